"""Rows whose cache is in pages of one pool, where the native kernels compute.

There is a row for each sequence that may run, and rows never move: a step is given the numbers of the rows that draw.
Idle rows cost time, too, so that each step is compiled for a few counts of rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Int32

from llamajax.engine.batch import Batch, Needs, Prompts, Saved
from llamajax.engine.memory import cache_bytes, prefix_cache_bytes
from llamajax.engine.pool import Pool, Tables, missing, pages
from llamajax.engine.programs import Program
from llamajax.engine.runner import Runner, chunk_lens, power_of_two
from llamajax.engine.steps import Drawn, Rows
from llamajax.model.cache import Cache
from llamajax.ops import PAGE_LEN
from llamajax.placement import bytes_per_token
from llamajax.types import Request

_Step = Literal["decode_rows", "decode_asking", "forward_rows", "draw_rows"]


class PagedBatch(Batch):
    """A batch whose rows have pages."""

    def __init__(self, runner: Runner, max_rows: int, prefix_bytes: int | None = None) -> None:
        """Keeps so many bytes of ended prompts, beyond the memory that rows have taken; by default a share of the
        computer's. With 0, rows share nothing.
        """
        super().__init__(runner, max_rows)
        self._width = power_of_two(max_rows)  # a power of two: each count needs programs of its own
        page_bytes = bytes_per_token(runner.config, runner.placement.cache_dtype) * PAGE_LEN
        kept = prefix_cache_bytes() if prefix_bytes is None else prefix_bytes
        self.shares = kept > 0
        num_pages = _num_pages(runner, max_rows)
        self._length = num_pages * PAGE_LEN
        if runner.max_memory is not None:  # the arrays, and the programs for them, stay the same
            num_pages = min(num_pages, runner.max_memory // page_bytes)
        self._pool = Pool(num_pages, self._empty_pages, kept // page_bytes if self.shares else None)
        self._tables = Tables(self._width, runner.table_len)
        self._drawing = self._taken([], self._sizes)  # the rows whose scores `forward` computes

    def _empty_pages(self) -> Cache:
        return self._runner.empty_pages(self._length)

    @property
    def longest(self) -> int:
        return self._runner.bucket(1)

    def fits(self, needs: Needs) -> bool:
        # Leave a free page for each running row, which will soon need it: a new one must not push it out.
        spare = len(needs.rows) if needs.new else 0
        return missing(self._tables, needs.rows) + sum(map(pages, needs.new)) + spare <= self._pool.num_free

    def fit(self, needs: Needs) -> Iterator[Sequence[int]]:
        if self._rows is None:
            if not self._is_one:
                self._rows = self._runner.empty_rows(self._width, self._runner.bucket(1))
            yield [-1] * self._width

    def expect_all_memory(self) -> None:
        """`fits` counts pages, and has nothing to learn."""

    def find_cached(self, token_ids: Sequence[int]) -> tuple[int, int]:
        known = self._pool.known(token_ids)
        return PAGE_LEN * len(known), PAGE_LEN * self._pool.num_owned(known)

    def _make_room(self, prompts: Prompts, num_positions: int) -> None:
        prompts.tables = Tables(len(prompts.requests), self._runner.table_len)
        for row, request in enumerate(prompts.different):
            known = self._pool.known(request.token_ids)[: pages(prompts.num_cached)]
            assert len(known) == pages(prompts.num_cached)
            self._pool.share(prompts.tables, row, known)
        for row in range(len(prompts.different)):  # last, since the pool may then forget pages that no row shares
            self._pool.take(prompts.tables, row, num_positions)

    def prefill(self, prompts: Prompts) -> Drawn:
        counts, chunk = np.array(prompts.tables.counts), prompts.next_chunk()
        chunk = chunk._replace(start=np.where(counts > 0, chunk.start, np.int32(-1)))
        drawn, cache = self._prefill_chunk(prompts, chunk, self._pool.lend(prompts.tables.ids), self._length)
        self._pool.put(cache)
        for row in counts.nonzero()[0].tolist():  # after each chunk: the request may be cancelled before the next
            self._pool.keep(prompts.tables, row, prompts.requests[row].token_ids[: prompts.num_prefilled + 1])
        return drawn

    def insert(self, prompts: Prompts, which: Sequence[int], at: Sequence[int]) -> None:
        self._rows = self._inserted(self._rows, prompts.rows, which, at)
        for source, row in zip(which, at, strict=True):
            prompts.tables.move(source, self._tables, row)

    def drop(self, prompts: Prompts) -> None:
        for row in range(len(prompts.tables.counts)):
            self._pool.leave(prompts.tables, row)

    def reserve(self, rows: Mapping[int, int]) -> None:
        for row, num_positions in rows.items():
            self._pool.take(self._tables, row, num_positions)

    def decode(self, rows: Sequence[int], num_steps: int, asked: Int32[np.ndarray, "1"] | None = None) -> Drawn:
        assert self._rows is not None
        taken = self._taken(rows, self._sizes if asked is None else [1])
        program = self._of_rows("decode_rows" if asked is None else "decode_asking", len(taken))
        drawn, cache, slots = self._runner.compile(program)(
            self._runner.model.arrays,
            self._lend(taken),
            self._rows.slots,
            self._runner.step_counts[num_steps],
            self._rows.requests,
            asked,
            taken,
        )
        self._pool.put(cache)
        self._rows = self._rows._replace(slots=slots)
        self._runner.copy_ahead(drawn)
        return drawn

    def forward(self, rows: Sequence[int]) -> None:
        assert self._rows is not None
        self._drawing = self._taken(rows, self._drawn_sizes)
        program = self._of_rows("forward_rows", len(self._drawing))
        forward = self._runner.compile(program)
        self._scores, cache = forward(
            self._runner.model.arrays, self._lend(self._drawing), self._rows.slots, self._drawing
        )
        self._pool.put(cache)

    def draw(self, mask: Int32[np.ndarray, "B W"]) -> Drawn:
        assert self._rows is not None
        rows = self._drawing
        program = self._of_rows("draw_rows", len(rows))
        drawn, slots = self._runner.compile(program)(
            self._scores, self._rows.slots, self._rows.requests, mask.take(rows, axis=0, mode="clip"), rows
        )
        self._rows = self._rows._replace(slots=slots)
        self._runner.copy_ahead(drawn)
        return drawn

    def leave(self, row: int, *, draws: bool) -> None:
        self._pool.leave(self._tables, row)

    @property
    def is_lost(self) -> bool:
        return super().is_lost or self._pool.is_lost

    def save(self, rows: Mapping[int, int]) -> list[Saved]:
        whole = jax.tree.map(np.asarray, self._rows)
        return [
            Saved(
                jax.tree.map(lambda x, row=row: x[row : row + 1].copy(), whole), self._pool.save(self._tables, row, n)
            )
            for row, n in rows.items()
        ]

    def restore(self, saved: Saved, at: int) -> None:
        try:
            put_page = self._runner.compile(Program("put_page", self._length))
            self._pool.restore(saved.pages, self._tables, at, put_page)
            self._rows = self._inserted(self._rows, jax.device_put(saved.rows, self._runner.device), [0], [at])
        except BaseException:
            self._pool.leave(self._tables, at)
            raise

    def clear(self) -> None:
        self._rows, self._tables = None, Tables(self._width, self._runner.table_len)
        self._pool.clear()

    def programs(self, num_positions: int) -> list[Program]:
        length, row_len = self._length, self._runner.bucket(1)
        programs = [Program("empty_pages", length)]
        if not self._is_one:
            programs.append(Program("empty_rows", row_len, num_rows=self._width))
        for group in self._groups:
            programs += self._runner.prefills(group, length)
            if not self._is_one:
                programs.append(Program("insert", row_len, num_rows=self._width, source=(group, row_len)))
            if group == 1:
                programs += [self._of_rows("decode_rows", n) for n in self._sizes]
        programs.append(Program("put_page", length))
        if self._runner.can_ask:
            programs.append(self._of_rows("decode_asking", 1))
        if not (self._is_one and self._runner.can_ask):
            programs += [self._of_rows(step, n) for n in self._drawn_sizes for step in ("forward_rows", "draw_rows")]
        return programs

    def programs_for(self, request: Request) -> list[Program]:
        length, num_cached = self._length, self.find_cached(request.token_ids)[0]
        steps: list[_Step] = ["decode_rows"]
        if request.constraint:
            steps = ["decode_asking"] if self._runner.can_ask else ["forward_rows", "draw_rows"]
        return [
            Program("empty_pages", length),
            *(Program("prefill", length, n) for n in sorted(set(chunk_lens(len(request.token_ids), num_cached)))),
            *(self._of_rows(step, 1) for step in steps),
        ]

    def _of_rows(self, step: _Step, num_rows: int) -> Program:
        return Program(step, self._length, num_rows=num_rows, source=(self._width, 0))

    @property
    def _drawn_sizes(self) -> list[int]:
        """The counts of rows that `draw` is compiled for: fewer, since few requests have a constraint."""
        return [size for size in self._sizes if size == power_of_two(size) or size == self._sizes[-1]]

    def _taken(self, rows: Sequence[int], sizes: Sequence[int]) -> Int32[np.ndarray, "P"]:
        """These rows, filled up to the next count that programs are compiled for, with idle ones."""
        size = next(size for size in sizes if size >= len(rows))
        return np.array([*rows, *[self._width] * (size - len(rows))], np.int32)

    def _lend(self, rows: Int32[np.ndarray, "P"]) -> Cache:
        return self._pool.lend(self._tables.ids.take(rows, axis=0, mode="clip"))

    def _row_len(self, rows: Rows) -> int:
        return self._runner.bucket(1)


def _num_pages(runner: Runner, max_rows: int) -> int:
    """The pages of so many rows at their longest, but no more than memory has room for, and at least one row's.

    It is one of few numbers, since each needs programs of its own. A page takes no memory before it is written.
    """
    most = max(1, cache_bytes() // (bytes_per_token(runner.config, runner.placement.cache_dtype) * PAGE_LEN))
    wanted = power_of_two(max_rows) * runner.table_len
    return max(runner.table_len, min(wanted, power_of_two(most + 1) // 2))
