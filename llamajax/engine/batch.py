"""Many sequences on a device: prompts that are read in groups, and rows that are decoded together.

Knows rows and cache lengths, both of few sizes, so that programs are few. Knows nothing of queues or of whose rows
they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, permutations

import jax
import numpy as np
from jaxtyping import Int32

from llamajax.engine.memory import Footprint
from llamajax.engine.programs import Program
from llamajax.engine.runner import Runner, before_answer, chunk_lens, power_of_two
from llamajax.engine.steps import Drawn, Rewind, Rows, by_layer
from llamajax.ops import native
from llamajax.types import Request

# Prompts are read alone, or so many at once.
GROUP_LEN = 4
# How many prompts are read at once, the room that each has, and the longest chunk.
Size = tuple[int, int, int]
NO_PROMPTS: Size = (0, 0, 0)
# On a CPU a product with one row takes as long as one with two, or adds up in another order.
MIN_ROWS = 2


def row_counts(max_rows: int) -> list[int]:
    """How many rows a batch may have: powers of two, and from 8 on what lies half way, up to `max_rows` or the next."""
    sizes = [1] if max_rows == 1 else [MIN_ROWS]
    while sizes[-1] < max_rows:
        last = sizes[-1]
        sizes.append(last + (last if last < 8 else 1 << (last.bit_length() - 2)))
    return sizes


class Prompts:
    """A group of prompts of one plan that is being read.

    Attributes:
      rows: what was read of them, on the device.
      left: how many chunks are still to be read.
    """

    def __init__(self, requests: Sequence[Request], limits: Sequence[int], rows: Rows, *, start: int = 0) -> None:
        """Of each prompt the rows hold the first `start` tokens."""
        self.rows = rows
        self._requests = requests
        self._limits = np.array(limits, np.int32)
        self._start = start
        self._chunks = chunk_lens(len(requests[0].token_ids) - start)
        self.left = len(self._chunks)

    def next_chunk(self) -> tuple[Int32[np.ndarray, "P T"], int, Int32[np.ndarray, "P"], Int32[np.ndarray, "P"]]:
        """Token ids, their positions, how many they are, and how many tokens to draw after them."""
        number = len(self._chunks) - self.left
        start, size = self._start + sum(self._chunks[:number]), self._chunks[number]
        token_ids = np.zeros((len(self._requests), size), np.int32)
        length = np.zeros(len(self._requests), np.int32)
        for row, request in enumerate(self._requests):
            chunk = request.token_ids[start : start + size]
            token_ids[row, : len(chunk)], length[row] = chunk, len(chunk)
        self.left -= 1
        draws = np.array([self.left == 0 and request.constraint is None for request in self._requests])
        return token_ids, start, length, np.where(draws, self._limits, 0)

    @property
    def size(self) -> Size:
        return len(self._requests), _length(self.rows), self._chunks[0]

    @property
    def rewind(self) -> Rewind | None:
        """Where to go back to when all chunks are read; None if no prompt has a constraint."""
        constrained = any(request.constraint for request in self._requests)
        return before_answer(self._requests, self._limits.tolist()) if constrained else None


class Batch:
    """Rows on a device, decoded together; one that has nothing left to draw is idle."""

    def __init__(self, runner: Runner, max_rows: int) -> None:
        self._runner = runner
        self._max_rows = max_rows
        self._sizes = row_counts(max_rows)
        self._rows: Rows | None = None
        self._scores: jax.Array
        self._spare: dict[int, Rows] = {}  # of prompts that were read, by how many they are
        self._footprint = Footprint(runner.config, runner.cache_dtype, runner.device.platform, native.available())
        self._all_bytes = self._free_bytes = runner.free_bytes()
        self._tried: tuple[int, int, Size] | None = None  # what `fits` found room for, if it did the last time

    @property
    def num_rows(self) -> int:
        """One of `row_counts`; 0 before the first."""
        return len(self._rows.slots.left) if self._rows else 0

    @property
    def length(self) -> int:
        """Positions that each row has room for."""
        return _length(self._rows) if self._rows else 0

    def prompts(self, requests: Sequence[Request], limits: Sequence[int]) -> Prompts:
        """A group of at most GROUP_LEN prompts to read, with how many tokens each may draw.

        Their lengths must ask for the same chunks. A group that is neither one nor full repeats its first prompt.
        """
        missing = 0 if len(requests) == 1 else GROUP_LEN - len(requests)
        requests, limits = [*requests, *[requests[0]] * missing], [*limits, *[limits[0]] * missing]
        length = self._runner.bucket(sum(chunk_lens(len(requests[0].token_ids))))
        rows = self._spare.pop(len(requests), None)
        if rows is None or _length(rows) != length:
            rows = self._runner.empty_rows(len(requests), length)
        return Prompts(requests, limits, rows._replace(requests=self._runner.device_requests(requests)))

    def read(self, prompts: Prompts) -> Drawn:
        """Reads the next chunk of each prompt; what it draws after the last one are the first tokens."""
        token_ids, start, length, limits = prompts.next_chunk()
        num_rows, chunk_len = token_ids.shape
        program = Program("prefill", _length(prompts.rows), chunk_len, num_rows)
        drawn, cache, slots = self._runner.compile(program)(
            self._runner.model.arrays,
            prompts.rows.cache,
            token_ids,
            np.full_like(length, start),
            length,
            limits,
            prompts.rows.requests,
        )
        if not prompts.left and (to := prompts.rewind):
            rewind = Program("rewind", self._runner.bucket(1), num_rows=num_rows)
            slots = self._runner.compile(rewind)(slots, to)
        prompts.rows = Rows(cache, slots, prompts.rows.requests)
        self._runner.copy_ahead(drawn)
        return drawn

    def insert(self, prompts: Prompts, which: Sequence[int], at: Sequence[int]) -> None:
        """Puts these of the prompts, which were read, into the rows `at`."""
        assert self._rows is not None
        self._rows = self._inserted(self._rows, prompts.rows, which, at)
        self._spare[len(prompts.rows.slots.left)] = prompts.rows

    def decode(self, num_steps: int) -> Drawn:
        """Draws up to `num_steps` tokens for each row that has any left. Returns at once: the device works on."""
        assert self._rows is not None
        program = Program("decode", self.length, num_rows=self.num_rows)
        drawn, cache, slots = self._runner.compile(program)(
            self._runner.model.arrays,
            self._rows.cache,
            self._rows.slots,
            self._runner.step_counts[num_steps],
            self._rows.requests,
        )
        self._rows = Rows(cache, slots, self._rows.requests)
        self._runner.copy_ahead(drawn)
        return drawn

    def forward(self) -> None:
        """Begins to compute the scores that `draw` draws from. Returns at once: the device works on."""
        assert self._rows is not None
        program = Program("forward", self.length, num_rows=self.num_rows)
        forward = self._runner.compile(program)
        self._scores, cache = forward(self._runner.model.arrays, self._rows.cache, self._rows.slots)
        self._rows = self._rows._replace(cache=cache)

    def draw(self, mask: Int32[np.ndarray, "B W"]) -> Drawn:
        """Draws one token of the mask for each row that has any left. Returns at once."""
        assert self._rows is not None
        program = Program("draw", self._runner.bucket(1), num_rows=self.num_rows)
        drawn, slots = self._runner.compile(program)(self._scores, self._rows.slots, self._rows.requests, mask)
        self._rows = self._rows._replace(slots=slots)
        self._runner.copy_ahead(drawn)
        return drawn

    def stop(self, row: int) -> None:
        """Lets a row draw no more."""
        assert self._rows is not None
        program = Program("stop", self._runner.bucket(1), num_rows=self.num_rows)
        left = self._runner.compile(program)(self._rows.slots.left, np.int32(row))
        self._rows = self._rows._replace(slots=replace(self._rows.slots, left=left))

    @property
    def longest(self) -> int:
        """Positions that the device's memory has room for at most, if only one request is answered."""
        lengths, num_rows = self._runner.lengths(self._runner.max_seq_len), self._sizes[0] + 1  # one that is read
        if self._all_bytes == math.inf:
            return lengths[-1]
        return max((n for n in lengths if self._footprint.rows(num_rows, n) <= self._all_bytes), default=0)

    def fits(self, num_rows: int, length: int, prompts: Size = NO_PROMPTS) -> bool:
        """Whether the device's memory has room for such rows while prompts of this size are read."""
        if self._free_bytes < math.inf:  # the first time takes 10 ms
            needed = self._footprint.needed(num_rows, length, *prompts)
            spare = sum(self._footprint.rows(n, _length(rows)) for n, rows in self._spare.items())
            if needed + spare > self._free_bytes:
                self._spare.clear()
            if needed > self._free_bytes:
                self._tried = None
                return False
        self._tried = num_rows, length, prompts
        return True

    def expect_less_memory(self) -> None:
        """After the device had no room: `fits` will not find room again for what it just did."""
        self._spare.clear()
        if self._tried:
            num_rows, length, prompts = self._tried
            self._free_bytes = min(self._free_bytes, self._footprint.needed(num_rows, length, *prompts) - 1)

    def expect_all_memory(self) -> None:
        """As at the beginning: something else may have taken what was missing."""
        self._free_bytes = self._all_bytes

    def fitting(
        self, num_rows: int, num_positions: int, *, at_least: int = 1, prompts: Size = NO_PROMPTS
    ) -> tuple[int, int]:
        """The rows and the length that the batch should have for so many sequences of so many positions.

        It shrinks when a quarter would do: what comes and goes at once must not copy caches back and forth. If there
        is no memory for that while prompts of this size are read, it has fewer rows, but for `at_least` sequences.
        """
        wanted = next(size for size in self._sizes if size >= num_rows), self._runner.bucket(num_positions)
        rows, length = (
            new if new > old or new <= old // 4 else old
            for new, old in zip(wanted, (self.num_rows, self.length), strict=True)
        )
        if self.fits(rows, length, prompts):
            return rows, length
        sizes = [size for size in self._sizes if size >= at_least]
        for size in reversed(sizes):
            if size < rows and self.fits(size, wanted[1], prompts):
                return size, wanted[1]
        # If nothing fits, what is there is better than another size, which would need memory beside it.
        is_enough = self.num_rows >= at_least and self.length >= wanted[1]
        return (self.num_rows, self.length) if is_enough else (sizes[0], wanted[1])

    def start(self, num_rows: int, length: int) -> None:
        """Idle rows in place of those there are."""
        self._rows = None  # their memory comes first
        self._rows = self._runner.empty_rows(num_rows, length)

    def next_size(self, num_rows: int) -> int:
        """The number of rows that comes after the present one on the way to this one."""
        if self.num_rows == GROUP_LEN < num_rows:  # a group goes into any batch
            return num_rows
        return self._sizes[self._sizes.index(self.num_rows) + (1 if num_rows > self.num_rows else -1)]

    def take(self, keep: Sequence[int]) -> None:
        """Keeps these rows in this order (-1: an idle one, at the end): as many as `next_size` says."""
        if self._rows and self.num_rows == GROUP_LEN < len(keep):
            rows = self._runner.empty_rows(len(keep), self.length)
            self._rows = self._inserted(rows, self._rows, keep[:GROUP_LEN], range(GROUP_LEN))
        else:
            self._resize(keep, self.length)

    def approach(self, length: int) -> None:
        """Gives the rows the next longer or shorter length on the way to this one."""
        longer = length > self.length
        nearest = self._runner.bucket(self.length + 1) if longer else power_of_two(self.length) // 2
        self._resize(range(self.num_rows), nearest)

    @property
    def can_go_on(self) -> bool:
        """False after a resize that broke off: some layers have the new size."""
        return self._rows is None or len({layer.key.shape for layer in self._rows.cache}) == 1

    @property
    def is_lost(self) -> bool:
        """Whether there are no rows, or a call that failed has destroyed what it would have written in place."""
        return self._rows is None or any(x.is_deleted() for x in jax.tree.leaves(self._rows))

    def save(self, rows: Mapping[int, int]) -> list[Rows]:
        """Copies rows (with so many positions each) to the host. Takes no memory of the device."""
        assert self._rows is not None
        saved: list[list[np.ndarray]] = [[] for _ in rows]
        arrays, structure = jax.tree.flatten(self._rows)
        num_cached = len(jax.tree.leaves(self._rows.cache))
        for number, array in enumerate(arrays):
            whole = np.asarray(array)
            for parts, (row, num_positions) in zip(saved, rows.items(), strict=True):
                part = whole[row : row + 1]
                if number < num_cached:
                    part = part[..., : self._runner.bucket(num_positions), :]
                parts.append(part.copy())
        return [jax.tree.unflatten(structure, parts) for parts in saved]

    def restore(self, saved: Rows, at: int) -> None:
        """Puts a row that was saved into the row `at`."""
        assert self._rows is not None
        self._rows = self._inserted(self._rows, jax.device_put(saved, self._runner.device), [0], [at])

    def clear(self) -> None:
        """Forgets all rows."""
        self._rows = None
        self._spare.clear()

    def programs(self, num_positions: int) -> list[Program]:
        """All that rows of up to this many positions need, the smallest first: a first short request's, then few rows'
        and short caches'.
        """
        lengths = self._runner.lengths(num_positions)
        # The scheduler reads a group only if more than half of it is there.
        groups = (1, GROUP_LEN) if 2 * self._max_rows > GROUP_LEN else (1,)
        programs = [Program("stop", lengths[0], num_rows=num_rows) for num_rows in self._sizes]
        for length in lengths:
            for num_rows in sorted({*groups, *self._sizes}):
                programs.append(Program("empty_rows", length, num_rows=num_rows))
            for num_rows in groups:
                programs += self._runner.prefills(num_rows, length)
            for num_rows in self._sizes:
                programs += [
                    Program("insert", length, num_rows=num_rows, source=(group, shorter))
                    for group in groups
                    for shorter in lengths
                    if shorter <= length
                ]
                programs.append(Program("decode", length, num_rows=num_rows))
        along_rows = [((few, length), (more, length)) for few, more in pairwise(self._sizes) for length in lengths]
        along_length = [((n, short), (n, long)) for short, long in pairwise(lengths) for n in self._sizes]
        for small, large in (*along_rows, *along_length):
            programs += [
                Program("resize", length, num_rows=num_rows, source=source)
                for source, (num_rows, length) in permutations((small, large))
                if not source[0] == GROUP_LEN < num_rows
            ]
        programs += [self._keep(n, n) for n in self._sizes]
        programs += [self._keep(*sizes) for pair in pairwise(self._sizes) for sizes in permutations(pair)]
        # Few requests have a constraint.
        constrained = [Program("rewind", lengths[0], num_rows=group) for group in groups]
        for num_rows in self._sizes:
            constrained.append(Program("draw", lengths[0], num_rows=num_rows))
            constrained += [Program("forward", length, num_rows=num_rows) for length in lengths]
        return [*sorted(programs, key=_size), *sorted(constrained, key=_size)]

    def _inserted(self, rows: Rows, new: Rows, which: Sequence[int], at: Sequence[int]) -> Rows:
        """Rows with these of a group's in the places `at`."""
        assert _length(new) <= _length(rows)
        group, num_rows = len(new.slots.left), len(rows.slots.left)
        sources, places = (np.array([*x, *[x[0]] * (group - len(at))], np.int32) for x in (which, at))
        program = Program("insert", _length(rows), num_rows=num_rows, source=(group, _length(new)))
        return self._runner.compile(program)(rows, new, sources, places)

    def _resize(self, keep: Sequence[int], length: int) -> None:
        assert self._rows is not None
        rows, kept = self._rows, np.array(keep, np.int32)
        source = self.num_rows, self.length
        resize = self._runner.compile(Program("resize", length, num_rows=len(keep), source=source))
        slots, requests = self._runner.compile(self._keep(source[0], len(keep)))(rows.slots, rows.requests, kept)
        layers = list(rows.cache)
        try:
            by_layer(lambda layer: resize(layer, kept), layers)
        except BaseException:
            if layers[0] is not rows.cache[0]:
                # Old and new layers are good together, unless rows have moved.
                stay = all(row in (at, -1) for at, row in enumerate(keep))
                self._rows = Rows(tuple(layers), slots, requests) if stay else None
            raise
        self._rows = Rows(tuple(layers), slots, requests)

    def _keep(self, old: int, new: int) -> Program:
        shortest = self._runner.bucket(1)
        return Program("keep", shortest, num_rows=new, source=(old, shortest))


def _size(program: Program) -> int:
    """Positions in all rows, of the most and the longest that the program has to do with."""
    num_rows, length = program.source
    return max(num_rows, program.num_rows) * max(length, program.cache_len)


def _length(rows: Rows) -> int:
    return rows.cache[0].key.shape[-2]
