"""A batch whose rows have contiguous caches, for XLA. All have the same length, which doubles as the longest one grows.

There are few counts and lengths of rows, so that programs are few. Rows move when their count changes. A single row
grows in steps of its own: the next prompt is prefilled into its cache, which never gets shorter.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, permutations

import jax
import numpy as np
from jaxtyping import Int32

from llamajax.engine.batch import GROUP_LEN, NO_PROMPTS, Batch, Needs, Prompts, Saved, Size
from llamajax.engine.memory import Footprint
from llamajax.engine.programs import Program
from llamajax.engine.runner import CHUNKS, Runner, chunk_lens, power_of_two
from llamajax.engine.steps import Drawn, Rows, by_layer
from llamajax.model.cache import Cache
from llamajax.types import Request

# The length of an answer is unknown when it begins: a single row gets room for so many tokens at once.
RESERVED_LEN = 512


class ContiguousBatch(Batch):
    """A batch whose rows have contiguous caches."""

    def __init__(self, runner: Runner, max_rows: int) -> None:
        super().__init__(runner, max_rows)
        self._spare: dict[int, Cache] = {}  # of prompts that were prefilled, by the size of their group
        self._footprint = Footprint(runner.config, runner.placement)
        self._all_bytes = self._free_bytes = runner.free_bytes()
        self._tried: tuple[int, int, Size] | None = None  # what `_is_room` was last asked, if it found room

    @property
    def length(self) -> int:
        """Positions that each row has room for."""
        return _length(self._rows.cache) if self._rows else 0

    @property
    def longest(self) -> int:
        lengths = self._runner.lengths(self._runner.max_seq_len)
        num_rows = 1 if self._is_one else self._sizes[0] + 1  # the other one is being prefilled
        if self._all_bytes == math.inf:
            return lengths[-1]
        return max((n for n in lengths if self._footprint.rows(num_rows, n) <= self._all_bytes), default=0)

    def fits(self, needs: Needs) -> bool:
        return self._is_room(*self._size(needs), needs.prompts)

    def can_admit(self, needs: Needs) -> bool:
        size = self._size(needs)
        return self._is_room(self.num_rows, self.length, needs.prompts) and self._is_room(*size, needs.prompts)

    def fit(self, needs: Needs) -> Iterator[Sequence[int]]:
        num_rows, length = self._size(needs)
        self._is_room(num_rows, length, needs.prompts)  # noted as tried
        if self._is_one:
            if not needs.rows:
                yield [-1]
            return
        running = sorted(needs.rows)
        if not running and (num_rows, length) != (self.num_rows, self.length):
            self._rows = None  # frees its memory first
            self._rows = self._runner.empty_rows(num_rows, length)
            yield [-1] * num_rows
        while self.num_rows > num_rows:
            size = self._next_count(num_rows)
            kept = running + [-1] * (size - len(running))
            self._take(kept)
            running = list(range(len(running)))
            yield kept
        while self.length < length:
            self._resize(range(self.num_rows), self._runner.bucket(self.length + 1))
        while self.length > length:
            self._resize(range(self.num_rows), power_of_two(self.length) // 2)
        while self.num_rows != num_rows:
            old, size = self.num_rows, self._next_count(num_rows)
            kept = [*range(old), *[-1] * (size - old)]
            self._take(kept)
            yield kept

    def _size(self, needs: Needs) -> tuple[int, int]:
        """The best count of rows and length for these needs.

        They shrink only when a quarter is enough, so that short requests do not make caches be copied back and forth.
        Without memory for that, there are fewer rows, but never fewer than are needed.
        """
        if self._is_one:
            return 1, max(self.length, self._runner.bucket(needs.longest))
        prompts = needs.prompts if needs.prompts != NO_PROMPTS else needs.next_prompts
        wanted = next(size for size in self._sizes if size >= needs.num_wanted), self._runner.bucket(needs.longest)
        rows, length = (
            new if new > old or new <= old // 4 else old
            for new, old in zip(wanted, (self.num_rows, self.length), strict=True)
        )
        if self._is_room(rows, length, prompts):
            return rows, length
        sizes = [size for size in self._sizes if size >= needs.num_needed]
        for size in reversed(sizes):
            if size < rows and self._is_room(size, wanted[1], prompts):
                return size, wanted[1]
        # If nothing fits, stay as it is: another size would need memory beside the present one.
        is_enough = self.num_rows >= needs.num_needed and self.length >= wanted[1]
        return (self.num_rows, self.length) if is_enough else (sizes[0], wanted[1])

    def _is_room(self, num_rows: int, length: int, prompts: Size) -> bool:
        """Whether rows of this length fit into memory beside prompts."""
        count, prompt_len, chunk_len = prompts
        tried = num_rows, length, (count, self._runner.bucket(prompt_len), chunk_len)
        if self._free_bytes < math.inf:  # the first time takes 10 ms
            needed = self._needed(tried)
            spare = sum(self._footprint.rows(n, _length(cache)) for n, cache in self._spare.items())
            if needed + spare > self._free_bytes:
                self._spare.clear()
            if needed > self._free_bytes:
                self._tried = None
                return False
        self._tried = tried
        return True

    def _needed(self, tried: tuple[int, int, Size]) -> int:
        num_rows, length, prompts = tried
        if self._is_one and prompts[0]:
            num_rows, prompts = 0, (1, max(length, prompts[1]), prompts[2])
        return self._footprint.needed(num_rows, length, *prompts)

    def expect_less_memory(self) -> bool:
        self._spare.clear()
        if self._tried:
            self._free_bytes = min(self._free_bytes, self._needed(self._tried) - 1)
        return True

    def expect_all_memory(self) -> None:
        self._free_bytes = self._all_bytes

    def _make_room(self, prompts: Prompts, num_positions: int) -> None:
        num_prompts, length = len(prompts.requests), self._runner.bucket(num_positions)
        if self._is_one:
            length = max(self._length_for(prompts.requests[0], prompts.limits[0], num_positions), self._kept_len)
            if self._rows:
                self._spare[1], self._rows = self._rows.cache, None
        prompts.cache = self._spare.pop(num_prompts, ())
        if not prompts.cache or _length(prompts.cache) != length:
            prompts.cache = ()  # its memory comes first
            prompts.cache = self._runner.empty_rows(num_prompts, length).cache

    @property
    def _kept_len(self) -> int:
        """The length of the cache that the next prompt is prefilled into, if there is only one row."""
        return _length(self._spare[1]) if 1 in self._spare else self.length

    def _length_for(self, request: Request, limit: int, num_positions: int) -> int:
        """Positions to make room for at once, where there is only one row: at least so many.

        More are for the answer, if they fit into memory during prefill.
        """
        wanted = self._runner.bucket(max(num_positions, len(request.token_ids) + min(limit, RESERVED_LEN)))
        if self._free_bytes < self._footprint.needed(0, 0, 1, wanted, CHUNKS[-1]):
            return self._runner.bucket(num_positions)
        return wanted

    def prefill(self, prompts: Prompts) -> Drawn:
        drawn, prompts.cache = self._prefill_chunk(prompts, prompts.next_chunk(), prompts.cache, _length(prompts.cache))
        return drawn

    def insert(self, prompts: Prompts, which: Sequence[int], at: Sequence[int]) -> None:
        self._rows = self._inserted(self._rows, prompts.rows, which, at)
        if not self._is_one:
            self._spare[len(prompts.requests)] = prompts.cache

    def drop(self, prompts: Prompts) -> None:
        if self._is_one and not self._rows:
            self._spare[1] = prompts.cache

    def reserve(self, rows: Mapping[int, int]) -> None:
        """Of many rows, `fit` made room for all."""
        if self._is_one:
            while self.length < self._runner.bucket(rows[0]):
                self._resize([0], self._runner.bucket(self.length + 1))

    def decode(self, rows: Sequence[int], num_steps: int, asked: Int32[np.ndarray, "1"] | None = None) -> Drawn:
        assert self._rows is not None and asked is None
        cache, slots, requests = self._rows
        program = Program("decode", self.length, num_rows=self.num_rows)
        drawn, cache, slots = self._runner.compile(program)(
            self._runner.model.arrays, cache, slots, self._runner.step_counts[num_steps], requests
        )
        self._rows = Rows(cache, slots, requests)
        self._runner.copy_ahead(drawn)
        return drawn

    def forward(self, rows: Sequence[int]) -> None:
        assert self._rows is not None
        forward = self._runner.compile(Program("forward", self.length, num_rows=self.num_rows))
        self._scores, cache = forward(self._runner.model.arrays, self._rows.cache, self._rows.slots)
        self._rows = self._rows._replace(cache=cache)

    def draw(self, mask: Int32[np.ndarray, "B W"]) -> Drawn:
        assert self._rows is not None
        program = Program("draw", self._runner.bucket(1), num_rows=self.num_rows)
        drawn, slots = self._runner.compile(program)(self._scores, self._rows.slots, self._rows.requests, mask)
        self._rows = self._rows._replace(slots=slots)
        self._runner.copy_ahead(drawn)
        return drawn

    def leave(self, row: int, *, draws: bool) -> None:
        if draws and not self._is_one:
            assert self._rows is not None
            program = Program("stop", self._runner.bucket(1), num_rows=self.num_rows)
            left = self._runner.compile(program)(self._rows.slots.left, np.int32(row))
            self._rows = self._rows._replace(slots=replace(self._rows.slots, left=left))

    @property
    def can_go_on(self) -> bool:
        return self._rows is None or len({layer.key.shape for layer in self._rows.cache}) <= 1

    def save(self, rows: Mapping[int, int]) -> list[Saved]:
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
        return [Saved(jax.tree.unflatten(structure, parts)) for parts in saved]

    def restore(self, saved: Saved, at: int) -> None:
        self._rows = self._inserted(self._rows, jax.device_put(saved.rows, self._runner.device), [0], [at])

    def clear(self) -> None:
        self._rows = None
        self._spare.clear()

    def programs(self, num_positions: int) -> list[Program]:
        """The programs, the smallest first, and last those that only requests with a constraint need."""
        lengths = self._runner.lengths(num_positions)
        if self._is_one:
            return [program for length in lengths for program in self._of_one(length)]
        programs = [Program("stop", lengths[0], num_rows=num_rows) for num_rows in self._sizes]
        for length in lengths:
            for num_rows in sorted({*self._groups, *self._sizes}):
                programs.append(Program("empty_rows", length, num_rows=num_rows))
            for num_rows in self._groups:
                programs += self._runner.prefills(num_rows, length)
            for num_rows in self._sizes:
                programs += [
                    Program("insert", length, num_rows=num_rows, source=(group, shorter))
                    for group in self._groups
                    for shorter in lengths
                    if shorter <= length
                ]
                programs.append(Program("decode", length, num_rows=num_rows))
        programs += self._resizes(lengths)
        constrained = [Program("draw", lengths[0], num_rows=num_rows) for num_rows in self._sizes]
        constrained += [Program("forward", n, num_rows=num_rows) for num_rows in self._sizes for n in lengths]
        return [*sorted(programs, key=_size), *sorted(constrained, key=_size)]

    def programs_for(self, request: Request) -> list[Program]:
        chunks, num_tokens = chunk_lens(len(request.token_ids)), len(request.token_ids)
        limit = min(request.max_new_tokens, min(self._runner.max_seq_len, self.longest) - num_tokens)
        length = max(self._length_for(request, limit, sum(chunks)), self._kept_len)
        return [
            *([Program("empty_rows", length)] if length > self._kept_len else []),
            *(Program("prefill", length, n) for n in sorted(set(chunks))),
            *(_drawing(length, self._runner.bucket(1)) if request.constraint else [Program("decode", length)]),
        ]

    def _of_one(self, length: int) -> list[Program]:
        """The programs of a single row of this length."""
        shortest = self._runner.bucket(1)
        programs = [Program("empty_rows", length), *self._runner.prefills(1, length), Program("decode", length)]
        if length > shortest:
            grown = Program("resize", length, source=(1, power_of_two(length) // 2))
            programs += [grown, self._keep(1, 1)]
        return [*programs, *_drawing(length, shortest)]

    def _resizes(self, lengths: Sequence[int]) -> list[Program]:
        """The programs that give rows of these lengths the next size up or down."""
        along_rows = [((few, length), (more, length)) for few, more in pairwise(self._sizes) for length in lengths]
        along_length = [((n, short), (n, long)) for short, long in pairwise(lengths) for n in self._sizes]
        resizes = [
            Program("resize", length, num_rows=num_rows, source=source)
            for pair in (*along_rows, *along_length)
            for source, (num_rows, length) in permutations(pair)
            if not source[0] == GROUP_LEN < num_rows
        ]
        counts = [(n, n) for n in self._sizes] + [two for pair in pairwise(self._sizes) for two in permutations(pair)]
        return [*resizes, *(self._keep(*two) for two in counts)]

    def _next_count(self, num_rows: int) -> int:
        """The number of rows that comes after the present one on the way to this one."""
        if self.num_rows == GROUP_LEN < num_rows:  # a group can be inserted into a batch of any size
            return num_rows
        return self._sizes[self._sizes.index(self.num_rows) + (1 if num_rows > self.num_rows else -1)]

    def _take(self, keep: Sequence[int]) -> None:
        """Keeps these rows in this order (-1: an idle one, at the end): as many as `_next_count` says."""
        if not self.num_rows == GROUP_LEN < len(keep):
            self._resize(keep, self.length)
        elif self._rows:
            rows = self._runner.empty_rows(len(keep), self.length)
            self._rows = self._inserted(rows, self._rows, keep[:GROUP_LEN], range(GROUP_LEN))

    def _resize(self, keep: Sequence[int], length: int) -> None:
        assert self._rows is not None
        rows, kept = self._rows, np.array(keep, np.int32)
        source = self.num_rows, self.length
        slots, requests = self._runner.compile(self._keep(source[0], len(keep)))(rows.slots, rows.requests, kept)
        resize = self._runner.compile(Program("resize", length, num_rows=len(keep), source=source))
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

    def _row_len(self, rows: Rows) -> int:
        return _length(rows.cache)


def _drawing(length: int, shortest: int) -> list[Program]:
    """The programs of a single row of this length with a constraint."""
    return [Program("forward", length), Program("draw", shortest)]


def _size(program: Program) -> int:
    """Positions in all rows, of the most and the longest that the program has to do with."""
    num_rows, length = program.source
    return max(num_rows, program.num_rows) * max(length, program.cache_len)


def _length(cache: Cache) -> int:
    return cache[0].key.shape[-2]
