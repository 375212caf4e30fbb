"""Many sequences on a device: prompts that are read in groups, and rows that are decoded together.

Their cache is in pages of one pool where the native kernels compute. For XLA each row has a cache of its own, and rows
grow together. Knows rows and cache lengths, both of few sizes, so that programs are few. Knows nothing of queues or of
whose rows they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, permutations
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from llamajax.engine.memory import Footprint, cache_bytes, prefix_cache_bytes
from llamajax.engine.pool import Pool, Tables, missing, pages
from llamajax.engine.programs import Program
from llamajax.engine.runner import Runner, before_answer, chunk_lens, power_of_two
from llamajax.engine.steps import Drawn, Rewind, Rows, by_layer
from llamajax.model.cache import Cache
from llamajax.ops import PAGE_LEN
from llamajax.placement import bytes_per_token
from llamajax.types import Request

# Prompts are read alone, or so many at once.
GROUP_LEN = 4
# How many prompts are read at once, the positions that each takes, and the longest chunk.
Size = tuple[int, int, int]
NO_PROMPTS: Size = (0, 0, 0)


class Needs(NamedTuple):
    """What there must be room for.

    Attributes:
      rows: positions of the sequences that run, by their rows.
      new: positions of those that have no room yet.
      longest: the most positions of a sequence that runs or will run next.
      prompts: those that are read meanwhile.
    """

    rows: Mapping[int, int]
    new: Sequence[int] = ()
    longest: int = 0
    prompts: Size = NO_PROMPTS


# On a CPU a product with one row takes as long as one with two, or adds up in another order.
MIN_ROWS = 2


def row_counts(max_rows: int) -> list[int]:
    """How many rows a batch may have: powers of two, and from 8 on what lies half way, up to `max_rows` or the next."""
    sizes = [1] if max_rows == 1 else [MIN_ROWS]
    while sizes[-1] < max_rows:
        last = sizes[-1]
        sizes.append(last + (last if last < 8 else 1 << (last.bit_length() - 2)))
    return sizes


class Saved(NamedTuple):
    """A row on the host, and its pages if the cache is in pages."""

    rows: Rows
    pages: list[Cache]


class Prompts:
    """A group of prompts of one plan that is being read.

    Attributes:
      rows: what was read of them, on the device.
      tables: their pages, if the cache is in pages.
      left: how many chunks are still to be read.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        rows: Rows,
        tables: Tables | None,
        chunks: Sequence[int],
        *,
        start: int = 0,
    ) -> None:
        """Of each prompt the first `start` tokens are in the cache; the others are read in these chunks."""
        self.rows = rows
        self.tables = tables
        self._requests = requests
        self._limits = np.array(limits, np.int32)
        self._start = start
        self._chunks = chunks
        self.left = len(self._chunks)

    def next_chunk(
        self,
    ) -> tuple[Int32[np.ndarray, "P T"], Int32[np.ndarray, "P"], Int32[np.ndarray, "P"], Int32[np.ndarray, "P"]]:
        """Token ids, where they begin, how many they are, and how many tokens to draw after them."""
        number = len(self._chunks) - self.left
        start, size = self._start + sum(self._chunks[:number]), self._chunks[number]
        token_ids = np.zeros((len(self._requests), size), np.int32)
        length = np.zeros(len(self._requests), np.int32)
        for row, request in enumerate(self._requests):
            chunk = request.token_ids[start : start + size]
            token_ids[row, : len(chunk)], length[row] = chunk, len(chunk)
        self.left -= 1
        draws = np.array([self.left == 0 and request.constraint is None for request in self._requests])
        # One that repeats another has no pages.
        starts = [-1 if self.tables and not self.tables.counts[row] else start for row in range(len(length))]
        return token_ids, np.array(starts, np.int32), length, np.where(draws, self._limits, 0)

    @property
    def read(self) -> list[tuple[int, Sequence[int]]]:
        """The prompts by their rows, but for those that repeat another."""
        counts = self.tables.counts if self.tables else []
        return [(row, self._requests[row].token_ids) for row, count in enumerate(counts) if count]

    @property
    def size(self) -> Size:
        return len(self._requests), self._start + sum(self._chunks), self._chunks[0]

    @property
    def rewind(self) -> Rewind | None:
        """Where to go back to when all chunks are read; None if no prompt has a constraint."""
        constrained = any(request.constraint for request in self._requests)
        return before_answer(self._requests, self._limits.tolist()) if constrained else None


class Batch:
    """Rows on a device, decoded together; one that has nothing left to draw is idle."""

    def __init__(self, runner: Runner, max_rows: int, prefix_bytes: int | None = None) -> None:
        """Keeps so many bytes of prompts that have ended; by default a share of the computer's memory."""
        self._runner = runner
        self._max_rows = max_rows
        self._sizes = row_counts(max_rows)
        self._rows: Rows | None = None
        self._scores: jax.Array
        self._spare: dict[int, Rows] = {}  # of prompts that were read, by how many they are
        page_bytes = bytes_per_token(runner.config, runner.cache_dtype) * PAGE_LEN
        most_kept = (prefix_cache_bytes() if prefix_bytes is None else prefix_bytes) // page_bytes
        self._pool = Pool(_num_pages(runner, max_rows), self._empty_pages, most_kept) if runner.paged else None
        self._tables = Tables(0, 0)
        self._footprint = Footprint(runner.config, runner.cache_dtype, runner.device.platform, runner.paged)
        self._all_bytes = self._free_bytes = runner.free_bytes()
        self._tried: tuple[int, int, Size] | None = None  # what `fits` found room for, if it did the last time

    def _empty_pages(self) -> Cache:
        return self._runner.empty_pages(self.length)

    @property
    def num_rows(self) -> int:
        """One of `row_counts`; 0 before the first."""
        return len(self._rows.slots.left) if self._rows else 0

    @property
    def length(self) -> int:
        """Positions that each row has room for, or all pages have."""
        if self._pool:
            return self._pool.length
        return _length(self._rows) if self._rows else 0

    def prompts(
        self, requests: Sequence[Request], limits: Sequence[int], num_cached: int = 0, num_positions: int = 0
    ) -> Prompts:
        """A group of at most GROUP_LEN prompts to read, with how many tokens each may draw.

        Their lengths must ask for the same chunks. A group that is neither one nor full repeats its first prompt.

        Args:
          num_cached: what `num_cached` has found of each.
          num_positions: those that there is room for at least.
        """
        num_repeated = 0 if len(requests) == 1 else GROUP_LEN - len(requests)
        requests, limits = [*requests, *[requests[0]] * num_repeated], [*limits, *[limits[0]] * num_repeated]
        chunks = chunk_lens(len(requests[0].token_ids), num_cached)
        num_positions = max(num_positions, num_cached + sum(chunks))
        length = self._runner.bucket(num_positions)
        rows = self._spare.pop(len(requests), None)
        if rows is None or (not self._pool and _length(rows) != length):
            rows = self._runner.empty_rows(len(requests), length)
        rows = rows._replace(requests=self._runner.device_requests(requests))
        tables = None
        if self._pool:
            tables = Tables(len(requests), self._runner.table_len)
            for row, request in enumerate(requests[: len(requests) - num_repeated]):
                known = self._pool.known(request.token_ids)[: pages(num_cached)]
                assert len(known) == pages(num_cached)
                self._pool.share(tables, row, known)
            for row in range(len(requests) - num_repeated):  # which may make the pool forget what nobody shares
                self._pool.take(tables, row, num_positions)
        return Prompts(requests, limits, rows, tables, chunks, start=num_cached)

    @property
    def is_paged(self) -> bool:
        """Whether the cache is in pages."""
        return self._pool is not None

    @property
    def shares(self) -> bool:
        """Whether prompts that begin alike share what was read of them."""
        return self._pool is not None and self._pool.most_kept > 0

    def num_cached(self, token_ids: Sequence[int]) -> int:
        """How many of a prompt's tokens are in the cache, in whole pages."""
        return PAGE_LEN * len(self._pool.known(token_ids)) if self._pool else 0

    def read(self, prompts: Prompts) -> Drawn:
        """Reads the next chunk of each prompt; what it draws after the last one are the first tokens."""
        token_ids, start, length, limits = prompts.next_chunk()
        num_rows, chunk_len = token_ids.shape
        cache = self._lend(prompts.tables, prompts.rows)
        program = Program("prefill", self._cache_len(prompts.rows), chunk_len, num_rows)
        drawn, cache, slots = self._runner.compile(program)(
            self._runner.model.arrays,
            cache,
            token_ids,
            start,
            length,
            limits,
            prompts.rows.requests,
        )
        cache = self._taken_back(cache)
        if not prompts.left and (to := prompts.rewind):
            rewind = Program("rewind", self._runner.bucket(1), num_rows=num_rows)
            slots = self._runner.compile(rewind)(slots, to)
        prompts.rows = Rows(cache, slots, prompts.rows.requests)
        if self._pool and prompts.tables and not prompts.left:
            for row, prompt in prompts.read:
                self._pool.keep(prompts.tables, row, prompt)
        self._runner.copy_ahead(drawn)
        return drawn

    def insert(self, prompts: Prompts, which: Sequence[int], at: Sequence[int]) -> None:
        """Puts these of the prompts, which were read, into the rows `at`."""
        assert self._rows is not None
        self._rows = self._inserted(self._rows, prompts.rows, which, at)
        self._spare[len(prompts.rows.slots.left)] = prompts.rows
        if prompts.tables:
            for source, row in zip(which, at, strict=True):
                prompts.tables.move(source, self._tables, row)

    def drop(self, prompts: Prompts) -> None:
        """Forgets prompts, but for those that were inserted."""
        if self._pool and prompts.tables:
            for row in range(len(prompts.tables.counts)):
                self._pool.leave(prompts.tables, row)

    def decode(self, num_steps: int) -> Drawn:
        """Draws up to `num_steps` tokens for each row that has any left. Returns at once: the device works on."""
        assert self._rows is not None
        program = Program("decode", self.length, num_rows=self.num_rows)
        drawn, cache, slots = self._runner.compile(program)(
            self._runner.model.arrays,
            self._lend(self._tables, self._rows),
            self._rows.slots,
            self._runner.step_counts[num_steps],
            self._rows.requests,
        )
        self._rows = Rows(self._taken_back(cache), slots, self._rows.requests)
        self._runner.copy_ahead(drawn)
        return drawn

    def forward(self) -> None:
        """Begins to compute the scores that `draw` draws from. Returns at once: the device works on."""
        assert self._rows is not None
        program = Program("forward", self.length, num_rows=self.num_rows)
        forward = self._runner.compile(program)
        cache = self._lend(self._tables, self._rows)
        self._scores, cache = forward(self._runner.model.arrays, cache, self._rows.slots)
        self._rows = self._rows._replace(cache=self._taken_back(cache))

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

    def reserve(self, rows: Mapping[int, int]) -> None:
        """Gives rows the pages that they need for so many positions."""
        if self._pool:
            for row, num_positions in rows.items():
                self._pool.take(self._tables, row, num_positions)

    def leave(self, row: int) -> None:
        """Takes the pages of a row that draws no more."""
        if self._pool:
            self._pool.leave(self._tables, row)

    def _lend(self, tables: Tables | None, rows: Rows) -> Cache:
        """The cache of rows, for a step."""
        return self._pool.lend(tables) if self._pool and tables else rows.cache

    def _taken_back(self, cache: Cache) -> Cache:
        """What rows keep of a cache that a step returned."""
        if not self._pool:
            return cache
        self._pool.put(cache)
        return ()

    def _cache_len(self, rows: Rows) -> int:
        return self._pool.length if self._pool else _length(rows)

    @property
    def longest(self) -> int:
        """Positions that the device's memory has room for at most, if only one request is answered."""
        if self._pool:
            return self._runner.bucket(1)
        lengths, num_rows = self._runner.lengths(self._runner.max_seq_len), self._sizes[0] + 1  # one that is read
        if self._all_bytes == math.inf:
            return lengths[-1]
        return max((n for n in lengths if self._footprint.rows(num_rows, n) <= self._all_bytes), default=0)

    def fits(self, num_rows: int, length: int, needs: Needs) -> bool:
        """Whether there is room for what is needed in so many rows, of this length if they have caches."""
        if self._pool:
            # Those that run will soon want a page more: none shall be put back for one that is new.
            spare = len(needs.rows) if needs.new else 0
            return missing(self._tables, needs.rows) + sum(map(pages, needs.new)) + spare <= self._pool.num_free
        count, prompt_len, chunk_len = needs.prompts
        prompts = count, self._runner.bucket(prompt_len), chunk_len
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

    def fitting(self, num_rows: int, needs: Needs, *, at_least: int = 1) -> tuple[int, int]:
        """The rows and the length that the batch should have for so many sequences.

        It shrinks when a quarter would do: what comes and goes at once must not copy caches back and forth. If there
        is no memory for that, it has fewer rows, but for `at_least` sequences.
        """
        length = self._pool.length if self._pool else self._runner.bucket(needs.longest)
        wanted = next(size for size in self._sizes if size >= num_rows), length
        rows, length = (
            new if new > old or new <= old // 4 else old
            for new, old in zip(wanted, (self.num_rows, self.length), strict=True)
        )
        if self._pool or self.fits(rows, length, needs):
            return rows, length
        sizes = [size for size in self._sizes if size >= at_least]
        for size in reversed(sizes):
            if size < rows and self.fits(size, wanted[1], needs):
                return size, wanted[1]
        # If nothing fits, what is there is better than another size, which would need memory beside it.
        is_enough = self.num_rows >= at_least and self.length >= wanted[1]
        return (self.num_rows, self.length) if is_enough else (sizes[0], wanted[1])

    def start(self, num_rows: int, length: int) -> None:
        """Idle rows in place of those there are."""
        self._rows = None  # their memory comes first
        self._rows = self._runner.empty_rows(num_rows, self._row_len(length))
        self._tables = Tables(num_rows, self._runner.table_len if self._pool else 0)

    def _row_len(self, length: int) -> int:
        """What programs of rows without a cache have as their length."""
        return self._runner.bucket(1) if self._pool else length

    def next_size(self, num_rows: int) -> int:
        """The number of rows that comes after the present one on the way to this one."""
        if not self._pool and self.num_rows == GROUP_LEN < num_rows:  # a group goes into any batch
            return num_rows
        return self._sizes[self._sizes.index(self.num_rows) + (1 if num_rows > self.num_rows else -1)]

    def take(self, keep: Sequence[int]) -> None:
        """Keeps these rows in this order (-1: an idle one, at the end): as many as `next_size` says."""
        if self._pool or not self.num_rows == GROUP_LEN < len(keep):
            self._resize(keep, self.length)
        elif self._rows:
            rows = self._runner.empty_rows(len(keep), self.length)
            self._rows = self._inserted(rows, self._rows, keep[:GROUP_LEN], range(GROUP_LEN))
        self._tables = self._tables.kept(keep)

    def approach(self, length: int) -> None:
        """Gives the rows the next longer or shorter length on the way to this one."""
        longer = length > self.length
        nearest = self._runner.bucket(self.length + 1) if longer else power_of_two(self.length) // 2
        self._resize(range(self.num_rows), nearest)

    @property
    def can_go_on(self) -> bool:
        """False after a resize that broke off: some layers have the new size."""
        return self._rows is None or len({layer.key.shape for layer in self._rows.cache}) <= 1

    @property
    def is_lost(self) -> bool:
        """Whether there are no rows, or a call that failed has destroyed what it would have written in place."""
        is_lost = self._rows is None or any(x.is_deleted() for x in jax.tree.leaves(self._rows))
        return is_lost or (self._pool is not None and self._pool.is_lost)

    def save(self, rows: Mapping[int, int]) -> list[Saved]:
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
        pool = self._pool
        kept = [pool.save(self._tables, row, n) if pool else [] for row, n in rows.items()]
        return [Saved(jax.tree.unflatten(structure, parts), pages) for parts, pages in zip(saved, kept, strict=True)]

    def restore(self, saved: Saved, at: int) -> None:
        """Puts a row that was saved into the row `at`."""
        assert self._rows is not None
        try:
            if self._pool:
                put_page = self._runner.compile(Program("put_page", self._pool.length))
                self._pool.restore(saved.pages, self._tables, at, put_page)
            self._rows = self._inserted(self._rows, jax.device_put(saved.rows, self._runner.device), [0], [at])
        except BaseException:
            self.leave(at)
            raise

    def clear(self) -> None:
        """Forgets all rows."""
        self._rows, self._tables = None, Tables(0, 0)
        self._spare.clear()
        if self._pool:
            self._pool.clear()

    def programs(self, num_positions: int) -> list[Program]:
        """All that rows of up to this many positions need, the smallest first: a first short request's, then few rows'
        and short caches'.
        """
        lengths = self._runner.lengths(num_positions)
        # The scheduler reads a group only if more than half of it is there.
        groups = (1, GROUP_LEN) if 2 * self._max_rows > GROUP_LEN else (1,)
        programs = [Program("stop", lengths[0], num_rows=num_rows) for num_rows in self._sizes]
        if self._pool:
            programs += [Program(step, self._pool.length) for step in ("empty_pages", "put_page")]
        for length in lengths:
            cache_len = self._pool.length if self._pool else length
            for num_rows in sorted({*groups, *self._sizes}):
                programs.append(Program("empty_rows", length, num_rows=num_rows))
            for num_rows in groups:
                programs += self._runner.prefills(num_rows, cache_len)
            for num_rows in self._sizes:
                programs += [
                    Program("insert", length, num_rows=num_rows, source=(group, shorter))
                    for group in groups
                    for shorter in lengths
                    if shorter <= length
                ]
                programs.append(Program("decode", cache_len, num_rows=num_rows))
        if not self._pool:
            programs += self._resizes(lengths)
        programs += [self._keep(n, n) for n in self._sizes]
        programs += [self._keep(*sizes) for pair in pairwise(self._sizes) for sizes in permutations(pair)]
        # Few requests have a constraint.
        constrained = [Program("rewind", lengths[0], num_rows=group) for group in groups]
        for num_rows in self._sizes:
            constrained.append(Program("draw", lengths[0], num_rows=num_rows))
            cache_lens = [self._pool.length] if self._pool else lengths
            constrained += [Program("forward", length, num_rows=num_rows) for length in cache_lens]
        return [*sorted(programs, key=_size), *sorted(constrained, key=_size)]

    def _resizes(self, lengths: Sequence[int]) -> list[Program]:
        """All that give rows of these lengths the next size up or down."""
        along_rows = [((few, length), (more, length)) for few, more in pairwise(self._sizes) for length in lengths]
        along_length = [((n, short), (n, long)) for short, long in pairwise(lengths) for n in self._sizes]
        return [
            Program("resize", length, num_rows=num_rows, source=source)
            for pair in (*along_rows, *along_length)
            for source, (num_rows, length) in permutations(pair)
            if not source[0] == GROUP_LEN < num_rows
        ]

    def _inserted(self, rows: Rows, new: Rows, which: Sequence[int], at: Sequence[int]) -> Rows:
        """Rows with these of a group's in the places `at`."""
        old_len, new_len = (self._row_len(0) if self._pool else _length(x) for x in (rows, new))
        assert new_len <= old_len
        group, num_rows = len(new.slots.left), len(rows.slots.left)
        sources, places = (np.array([*x, *[x[0]] * (group - len(at))], np.int32) for x in (which, at))
        program = Program("insert", old_len, num_rows=num_rows, source=(group, new_len))
        return self._runner.compile(program)(rows, new, sources, places)

    def _resize(self, keep: Sequence[int], length: int) -> None:
        assert self._rows is not None
        rows, kept = self._rows, np.array(keep, np.int32)
        source = self.num_rows, self.length
        slots, requests = self._runner.compile(self._keep(source[0], len(keep)))(rows.slots, rows.requests, kept)
        if self._pool:
            self._rows = Rows((), slots, requests)
            return
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


def _size(program: Program) -> int:
    """Positions in all rows, of the most and the longest that the program has to do with."""
    num_rows, length = program.source
    return max(num_rows, program.num_rows) * max(length, program.cache_len)


def _num_pages(runner: Runner, max_rows: int) -> int:
    """What so many rows may need, as far as the computer has memory for it, and at least what one needs.

    Few numbers, since programs are made for each: without memory that is written, a page costs nothing.
    """
    most = max(1, cache_bytes() // (bytes_per_token(runner.config, runner.cache_dtype) * PAGE_LEN))
    wanted = power_of_two(max_rows) * runner.table_len
    return max(runner.table_len, min(wanted, power_of_two(most + 1) // 2))


def _length(rows: Rows) -> int:
    return rows.cache[0].key.shape[-2]
