"""The engine with a device of plain numpy, whose pages hold token ids: a token depends on all that a row's pages hold.

So each answer can be told beforehand, and a page that is lost, or written by another, shows in what is drawn.
"""

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from llamajax.engine import paged
from llamajax.engine.engine import Engine
from llamajax.engine.paged import PagedBatch
from llamajax.engine.programs import Program
from llamajax.engine.runner import Runner
from llamajax.engine.scheduler import Job
from llamajax.engine.steps import BLOCK_LEN, Drawn, Rows, Slots
from llamajax.model.cache import KeysValues
from llamajax.ops import PAGE_LEN
from llamajax.types import Request, Token

from ...tiny_model import CONFIG
from .test_engine import Collected

TABLE_LEN, VOCAB_SIZE = 8, 1000


def next_token(ids: Sequence[int]) -> int:
    return hash(tuple(ids)) % VOCAB_SIZE


def answer(request: Request) -> list[int]:
    ids = list(request.token_ids)
    for _ in range(request.max_new_tokens):
        ids.append(next_token(ids))
    return ids[len(request.token_ids) :]


def slots(num_rows: int) -> Slots:
    return Slots(*(cast(Any, np.zeros(num_rows, np.int32)) for _ in range(4)))


def written(cache: KeysValues, row: int, start: int, ids: Sequence[int]) -> list[int]:
    """Writes these into a row's pages, and returns all that they hold up to there."""
    table, key = np.asarray(cache.table)[row], cast(Any, cache.key)
    for position, id in enumerate(ids, start):
        assert table[position // PAGE_LEN] >= 0
        key[table[position // PAGE_LEN], position % PAGE_LEN] = id
    end = start + len(ids)
    return key[table[: -(-end // PAGE_LEN)]].reshape(-1)[:end].tolist()


class Device:
    """What programs do, in numpy. Has what the engine asks a runner for."""

    paged, max_seq_len, table_len = True, TABLE_LEN * PAGE_LEN, TABLE_LEN
    config, cache_dtype, device = CONFIG, np.float32, jax.devices()[0]
    model, step_counts = SimpleNamespace(arrays=[]), range(BLOCK_LEN + 1)

    def check(self, request: Request) -> None: ...

    def copy_ahead(self, drawn: Drawn) -> None: ...

    def bucket(self, num_positions: int) -> int:
        return TABLE_LEN * PAGE_LEN

    def device_requests(self, requests: Sequence[Request]) -> Any:
        return np.zeros(len(requests), np.int32)

    def empty_rows(self, num_rows: int, length: int) -> Rows:
        return Rows((), slots(num_rows), cast(Any, np.zeros(num_rows, np.int32)))

    def empty_pages(self, length: int) -> tuple[KeysValues]:
        pages: Any = np.full((length // PAGE_LEN, PAGE_LEN), -1, np.int32)
        return (KeysValues(pages, np.zeros(len(pages), np.int32)),)

    def to_host(self, drawn: Drawn, with_logprobs: bool) -> Drawn:
        return drawn

    def tokens(self, drawn: Drawn, row: int, num_logprobs: int | None) -> list[Token]:
        return [Token(id, None, 0.0) for id in drawn.tokens[row].tolist() if id >= 0]

    def compile(self, program: Program) -> Callable[..., Any]:
        return getattr(self, f"_{program.step}")

    def _prefill(
        self, _: Any, cache: tuple[KeysValues], ids: Any, start: Any, length: Any, limits: Any, asked: Any
    ) -> tuple[Drawn, tuple[KeysValues], Slots]:
        moved, drawn = slots(len(ids)), np.full((len(ids), 1), -1, np.int32)
        for row in np.flatnonzero(start >= 0):
            held = written(cache[0], row, start[row], ids[row, : length[row]])
            if limits[row]:
                drawn[row] = next_token(held)
                for array, value in zip(
                    (moved.token, moved.position, moved.left), (drawn[row, 0], len(held), limits[row] - 1), strict=True
                ):
                    cast(Any, array)[row] = value
        return Drawn(cast(Any, drawn), cast(Any, None)), cache, moved

    def _decode_rows(
        self, _: Any, cache: tuple[KeysValues], all_slots: Slots, steps: int, requests: Any, asked: None, rows: Any
    ) -> tuple[Drawn, tuple[KeysValues], Slots]:
        token, position, left = (np.array(x) for x in (all_slots.token, all_slots.position, all_slots.left))
        drawn = np.full((len(token), BLOCK_LEN), -1, np.int32)
        for place, row in enumerate(rows.tolist()):
            for step in range(min(steps, left[row]) if row < len(token) else 0):
                held = written(cache[0], place, position[row], [token[row]])
                drawn[row, step] = token[row] = next_token(held)
                position[row], left[row] = position[row] + 1, left[row] - 1
        moved = Slots(*(cast(Any, x) for x in (token, position, left, all_slots.counts)))
        return Drawn(cast(Any, drawn), cast(Any, None)), cache, moved

    def _insert(self, rows: Rows, new: Rows, sources: Any, places: Any) -> Rows:
        def put(old: Any, new: Any) -> Any:
            both = np.array(old)
            both[places] = np.asarray(new)[sources]
            return both

        return jax.tree.map(put, rows, new)

    def _put_page(self, pages: tuple[KeysValues], page: tuple[KeysValues], number: int) -> tuple[KeysValues]:
        cast(Any, pages[0].key)[number] = page[0].key
        return pages


def prompt(kind: int) -> list[int]:
    """One of few, of which many begin alike: their pages are shared."""
    rng = np.random.default_rng(kind)
    begin = [kind % 3] * int(rng.choice([30, PAGE_LEN, 2 * PAGE_LEN, 4 * PAGE_LEN]))
    return [*begin, *rng.integers(10, VOCAB_SIZE, int(rng.integers(1, 150))).tolist()]


actions = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 40), st.integers(1, 100)),
    st.tuples(st.just("submit late"), st.integers(0, 40), st.integers(1, 100)),
    st.tuples(st.just("cancel"), st.integers(0, 40), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([8, 10, 13, 64]), st.integers(1, 6), st.integers(0, 12), st.lists(actions, max_size=40))
def test_whatever_comes_all_get_their_tokens_and_nobody_starves(
    num_pages: int, num_slots: int, most_kept: int, script: list[tuple[str, int, int]]
) -> None:
    """Requests are admitted in their order, also where they have to wait again, and what waits comes to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "_num_pages", lambda *_: num_pages)
        page_bytes = paged.bytes_per_token(CONFIG, np.float32) * PAGE_LEN
        engine = Engine(cast(Runner, Device()), num_slots=num_slots, prefix_bytes=most_kept * page_bytes)
    batch = engine._batch
    assert isinstance(batch, PagedBatch)
    asked: list[tuple[Job, Collected]] = []
    admitted: list[Job] = []

    def step() -> None:
        engine.step()
        engine.scheduler.check()
        batch._pool.check([batch._tables, *([engine._prompts.tables] if engine._prompts else [])])
        admitted.extend(job for job, _ in asked if job._admitted and job not in admitted)

    for action, value, limit in script:
        if action == "step":
            for _ in range(value):
                step()
        elif action == "cancel" and value < len(asked):
            asked[value][0].cancel()
        elif action.startswith("submit"):
            collected, deadline = Collected(), time.monotonic() if action.endswith("late") else None
            job = engine.job(Request(prompt(value), limit), collected, deadline)
            engine.scheduler.submit(job)
            asked.append((job, collected))
    # Each step gives a token or reads a chunk, unless a row waits for pages that another gives back.
    most = sum(len(job.request.token_ids) + 2 * job.limit + 20 for job, _ in asked)
    while engine.scheduler.num_jobs or engine._pending:
        most -= 1
        assert most > 0
        step()
    assert [asked_at for asked_at, _ in asked if asked_at in admitted] == admitted
    for job, collected in asked:
        [(reason, error)] = collected.ends
        expected = answer(job.request)
        drawn = [token.id for token in collected.tokens]
        assert error is None
        assert drawn == (expected if reason == "length" else expected[: len(drawn)])
        assert reason == "length" or job.cancelled or job.deadline
    step()  # those that had only a first token leave their pages now
    assert batch._pool.num_free == num_pages


def test_what_those_that_run_have_already_needs_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 11 pages, one has six and five of them are shared: another like it needs one, where it needed six."""
    monkeypatch.setattr(paged, "_num_pages", lambda *_: 11)
    engine = Engine(cast(Runner, Device()), num_slots=4, prefix_bytes=1 << 30)
    begin = [3] * (5 * PAGE_LEN)
    collected = [Collected() for _ in range(3)]
    for number, listener in enumerate(collected):
        engine.scheduler.submit(engine.job(Request([*begin, number], 20), listener))
    most = 0
    while engine.step():
        most = max(most, len(engine.scheduler.running))
    assert most == 3
    assert [[token.id for token in c.tokens] for c in collected] == [answer(Request([*begin, n], 20)) for n in range(3)]


def test_the_page_that_was_asked_for_last_is_forgotten_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "_num_pages", lambda *_: TABLE_LEN)
    engine = Engine(cast(Runner, Device()), num_slots=1, prefix_bytes=1 << 30)
    prompts = {name: [id] * (2 * PAGE_LEN + 1) for id, name in enumerate("abcd", 20)}
    cached = []
    for name in "abcabdabc":  # two of eight pages are free, and d needs three: the end of c is forgotten
        listener = Collected()
        engine.scheduler.submit(engine.job(Request(prompts[name], 1), listener))
        while engine.step():
            pass
        cached.append(listener.num_cached)
    assert cached == [0, 0, 0, 128, 128, 0, 128, 128, 64]
