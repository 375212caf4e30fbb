"""The batch: prompts that are prefilled in groups, and rows that are decoded together.

`Batch` is what its two kinds share: `paged` is for the native kernels, `contiguous` for XLA. Knows nothing of queues or
of whose rows they are.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from llamajax.engine.pool import Tables
from llamajax.engine.programs import Program
from llamajax.engine.runner import CHUNKS, Runner, chunk_lens, last_of_chunk
from llamajax.engine.steps import Drawn, Requests, Rows, Slots
from llamajax.model.cache import Cache
from llamajax.types import Request

# A group has one prompt or so many: each size needs programs of its own.
GROUP_LEN = 4
# How many prompts are prefilled together, the positions that each takes, and the longest chunk.
Size = tuple[int, int, int]
NO_PROMPTS: Size = (0, 0, 0)
# On a CPU a product with one row takes as long as one with two, or adds up in another order.
MIN_ROWS = 2


class Needs(NamedTuple):
    """The memory that sequences need, in positions.

    Attributes:
      rows: of the sequences that run, by their rows.
      new: of those that have no memory yet. Pages that they share with running ones do not count.
      longest: the most positions of a sequence that runs or will run next.
      prompts: those that are prefilled meanwhile.
      num_wanted: sequences that there should be rows for.
      num_needed: those that there must be rows for.
      next_prompts: those that should find room, too, if none are prefilled.
    """

    rows: Mapping[int, int]
    new: Sequence[int] = ()
    longest: int = 0
    prompts: Size = NO_PROMPTS
    num_wanted: int = 1
    num_needed: int = 1
    next_prompts: Size = NO_PROMPTS


def row_counts(max_rows: int) -> list[int]:
    """How many rows a batch may have: powers of two, from 8 on also the middle of two, up to `max_rows` or the next."""
    sizes = [1] if max_rows == 1 else [MIN_ROWS]
    while sizes[-1] < max_rows:
        last = sizes[-1]
        sizes.append(last + (last if last < 8 else 1 << (last.bit_length() - 2)))
    return sizes


class Saved(NamedTuple):
    """A row on the host, and its pages if the cache is in pages."""

    rows: Rows
    pages: Sequence[Cache] = ()


class Chunk(NamedTuple):
    """The arguments of `steps.prefill` that come from prompts."""

    token_ids: Int32[np.ndarray, "P T"]
    start: Int32[np.ndarray, "P"]
    length: Int32[np.ndarray, "P"]
    new_tokens: Int32[np.ndarray, "P"]


class Prompts:
    """A group of prompts of one plan that is being prefilled.

    Attributes:
      different: their requests.
      requests: one for each place. A group that is neither one nor full repeats its first.
      asked: the same, on the device.
      limits: how many tokens each may draw.
      cache: their caches, if the cache is not in pages.
      tables: their pages, if it is. A repeated prompt has none.
      slots: their slots, once a chunk was prefilled.
      num_cached: how many tokens of each prompt are in the cache when it begins.
      chunks_left: how many chunks are still to be prefilled.
    """

    slots: Slots

    def __init__(
        self,
        runner: Runner,
        requests: Sequence[Request],
        limits: Sequence[int],
        chunks: Sequence[int],
        *,
        num_cached: int = 0,
    ) -> None:
        """The first `num_cached` tokens of each prompt are in the cache; these chunks have the others."""
        num_repeated = 0 if len(requests) == 1 else GROUP_LEN - len(requests)
        self.different = requests
        self.requests = [*requests, *[requests[0]] * num_repeated]
        self.asked: Requests = runner.device_requests(self.requests)
        self.cache: Cache = ()
        self.tables = Tables(0, 0)
        self.limits = [*limits, *[limits[0]] * num_repeated]
        self.num_cached = num_cached
        self._chunks = chunks
        self.chunks_left = len(self._chunks)

    def next_chunk(self) -> Chunk:
        start, size = self.num_prefilled, self._chunks[-self.chunks_left]
        starts = np.full(len(self.requests), start, np.int32)
        chunk = Chunk(np.zeros((len(starts), size), np.int32), starts, np.zeros_like(starts), np.zeros_like(starts))
        for row, (request, limit) in enumerate(zip(self.requests, self.limits, strict=True)):
            ids = request.token_ids[start : start + size]
            chunk.token_ids[row, : len(ids)] = ids
            chunk.length[row], chunk.new_tokens[row] = last_of_chunk(request, start + len(ids), len(ids), limit)
        self.chunks_left -= 1
        return chunk

    @property
    def num_prefilled(self) -> int:
        """Tokens of each prompt that are in the cache, for a prompt that has as many."""
        return self.num_cached + sum(self._chunks[: len(self._chunks) - self.chunks_left])

    @property
    def size(self) -> Size:
        return len(self.requests), self.num_cached + sum(self._chunks), max(self._chunks, default=0)

    @property
    def rows(self) -> Rows:
        return Rows(self.cache, self.slots, self.asked)


class Batch(ABC):
    """Rows on a device, decoded together; one that has nothing left to draw is idle.

    Attributes:
      shares: whether prompts that begin alike share their first pages.
    """

    shares = False

    def __init__(self, runner: Runner, max_rows: int) -> None:
        self._runner = runner
        self._sizes = row_counts(max_rows)
        self._is_one = max_rows == 1  # a prompt that was prefilled becomes the row as it is
        # The scheduler prefills a group only if more than half of it is there.
        self._groups = (1, GROUP_LEN) if 2 * max_rows > GROUP_LEN else (1,)
        self._rows: Rows | None = None
        self._scores: jax.Array

    @property
    def num_rows(self) -> int:
        """0 before the first."""
        return len(self._rows.slots.left) if self._rows else 0

    @property
    @abstractmethod
    def longest(self) -> int:
        """The most positions that a single request can have in the device's memory."""

    @abstractmethod
    def fits(self, needs: Needs) -> bool:
        """Whether the needs fit into memory once `fit` has made rows for them."""

    def can_admit(self, needs: Needs) -> bool:
        """Whether the needs fit into memory, before `fit` and after it."""
        return self.fits(needs)

    @abstractmethod
    def fit(self, needs: Needs) -> Iterator[Sequence[int]]:
        """Makes the rows that are needed. Yields, whenever rows move, where each one was before; -1 for a new one."""

    def expect_less_memory(self) -> bool:
        """Called when the device was out of memory. Returns whether `fits` will now refuse what it accepted."""
        return False

    @abstractmethod
    def expect_all_memory(self) -> None:
        """Forgets what `expect_less_memory` has found: something else may have taken the missing memory."""

    def find_cached(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """How many of a prompt's tokens are in the cache, in whole pages, and how many of them others that run have."""
        return 0, 0

    def prompts(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        *,
        num_cached: int = 0,
        num_positions: int = 0,
        longest_chunk: int = CHUNKS[-1],
    ) -> Prompts:
        """A group of at most GROUP_LEN prompts to prefill, with how many tokens each may draw.

        Their lengths must ask for the same chunks.

        Args:
          num_cached: what `find_cached` has found of each.
          num_positions: those that there is room for at least.
        """
        chunks = chunk_lens(len(requests[0].token_ids), num_cached, longest_chunk)
        prompts = Prompts(self._runner, requests, limits, chunks, num_cached=num_cached)
        self._make_room(prompts, max(num_positions, prompts.size[1]))
        return prompts

    @abstractmethod
    def _make_room(self, prompts: Prompts, num_positions: int) -> None:
        """Gives each prompt a cache of so many positions, or the pages for them."""

    @abstractmethod
    def prefill(self, prompts: Prompts) -> Drawn:
        """Prefills the next chunk of each prompt. The last chunk draws the first token of each answer."""

    @abstractmethod
    def insert(self, prompts: Prompts, which: Sequence[int], at: Sequence[int]) -> None:
        """Moves these of the prompts, whose prefill is complete, into the rows `at`."""

    @abstractmethod
    def drop(self, prompts: Prompts) -> None:
        """Forgets prompts, but for those that were inserted."""

    @abstractmethod
    def reserve(self, rows: Mapping[int, int]) -> None:
        """Makes room for so many positions of rows."""

    @abstractmethod
    def decode(self, rows: Sequence[int], num_steps: int, asked: Int32[np.ndarray, "1"] | None = None) -> Drawn:
        """Draws up to `num_steps` tokens for these rows: all that have more to draw. Returns at once: the device works
        on.

        With a number of `native.asked`, there is one row, and each step asks the host for its mask.
        """

    @abstractmethod
    def forward(self, rows: Sequence[int]) -> None:
        """Begins to compute these rows' scores, from which `draw` draws. Returns at once: the device works on."""

    @abstractmethod
    def draw(self, mask: Int32[np.ndarray, "B W"]) -> Drawn:
        """Draws one token, which the mask allows, for each row that has scores. Returns at once."""

    @abstractmethod
    def leave(self, row: int, *, draws: bool) -> None:
        """Stops a row, although it may have tokens left to draw."""

    @property
    def can_go_on(self) -> bool:
        """False after a change that broke off: some layers have the new size."""
        return True

    @property
    def is_lost(self) -> bool:
        """Whether there are no rows, or a call that failed has destroyed what it would have written in place."""
        return self._rows is None or any(x.is_deleted() for x in jax.tree.leaves(self._rows))

    @abstractmethod
    def save(self, rows: Mapping[int, int]) -> list[Saved]:
        """Copies rows (with so many positions each) to the host. Takes no memory of the device."""

    @abstractmethod
    def restore(self, saved: Saved, at: int) -> None:
        """Puts a row that was saved into the row `at`."""

    @abstractmethod
    def clear(self) -> None:
        """Forgets all rows."""

    @abstractmethod
    def programs(self, num_positions: int) -> list[Program]:
        """The programs for rows of up to this many positions, those of a first short request first."""

    @abstractmethod
    def programs_for(self, request: Request) -> list[Program]:
        """The programs that a request needs in a batch of one with the present cache; a longer answer needs more."""

    def _prefill_chunk(self, prompts: Prompts, chunk: Chunk, cache: Cache, length: int) -> tuple[Drawn, Cache]:
        """Prefills a chunk into a cache of this length."""
        program = self._runner.compile(Program("prefill", length, chunk.token_ids.shape[1], len(chunk.token_ids)))
        drawn, cache, prompts.slots = program(self._runner.model.arrays, cache, *chunk, prompts.asked)
        self._runner.copy_ahead(drawn)
        return drawn, cache

    def _inserted(self, rows: Rows | None, new: Rows, which: Sequence[int], at: Sequence[int]) -> Rows:
        """The rows, with these rows of a group in the places `at`."""
        if self._is_one:
            return new
        assert rows is not None
        old_len, new_len = self._row_len(rows), self._row_len(new)
        assert new_len <= old_len
        group, num_rows = len(new.slots.left), len(rows.slots.left)
        sources, places = (np.array([*x, *[x[0]] * (group - len(at))], np.int32) for x in (which, at))
        program = Program("insert", old_len, num_rows=num_rows, source=(group, new_len))
        return self._runner.compile(program)(rows, new, sources, places)

    @abstractmethod
    def _row_len(self, rows: Rows) -> int:
        """The length of rows, by which their programs are named."""
