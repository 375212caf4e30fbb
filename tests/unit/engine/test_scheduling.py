"""The engine with a device of plain numpy, whose pages hold token ids: a token depends on all that a row's pages hold.

So each answer is known beforehand, and a page that is lost, or written by another, shows in what is drawn.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from llamajax.engine import engine as engine_module
from llamajax.engine import paged
from llamajax.engine.engine import FULL_BLOCK_LEN, SHORT_BLOCK_LEN, Engine
from llamajax.engine.paged import PagedBatch
from llamajax.engine.programs import Program
from llamajax.engine.runner import Runner
from llamajax.engine.scheduler import Job
from llamajax.engine.sequential import OneSlot, Sequential
from llamajax.engine.steps import BLOCK_LEN, Drawn, Rows, Slots
from llamajax.errors import RequestError
from llamajax.ops import PAGE_LEN, KeysValues, native
from llamajax.types import Request, Token, mask_len

from ...tiny_model import CONFIG, placed
from .test_engine import Collected

TABLE_LEN, VOCAB_SIZE = 8, 1000
FOLDER = str(Path(paged.__file__).parent)


def next_token(ids: Sequence[int]) -> int:
    return hash(tuple(ids)) % VOCAB_SIZE


class EveryThird:
    """A constraint, and its matcher: of answers that end after so many tokens, which each third of all allows."""

    def __init__(self, length: int) -> None:
        self.length = self.left = length

    def matcher(self) -> "EveryThird":
        return EveryThird(self.length)

    @property
    def ended(self) -> bool:
        return self.left == 0

    def mask(self) -> bytes:
        allowed = np.arange(32 * mask_len(VOCAB_SIZE)) % 3 == self.left % 3
        return np.packbits(allowed, bitorder="little").tobytes()

    def advance(self, token_id: int) -> None:
        assert token_id % 3 == self.left % 3 and self.left
        self.left -= 1


def masked(token: int, mask: Any) -> int:
    """The first token from this one on that a mask allows."""
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
    return int(next((id for id in allowed if id >= token), allowed[0]))


def answer(request: Request) -> list[int]:
    ids, matcher = list(request.token_ids), request.constraint.matcher() if request.constraint else None
    for _ in range(request.max_new_tokens):
        token = next_token(ids)
        if matcher:
            if matcher.ended:
                break
            matcher.advance(token := masked(token, matcher.mask()))
        ids.append(token)
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

    paged, max_seq_len, max_memory, table_len = True, TABLE_LEN * PAGE_LEN, None, TABLE_LEN
    config, placement, device = CONFIG, placed(), jax.devices()[0]
    model, step_counts = SimpleNamespace(arrays=[]), range(BLOCK_LEN + 1)

    def __init__(self, can_ask: bool = False) -> None:
        self.can_ask = can_ask

    def check(self, request: Request) -> None: ...

    def copy_ahead(self, drawn: Drawn) -> None: ...

    def bucket(self, num_positions: int) -> int:
        return TABLE_LEN * PAGE_LEN

    def device_requests(self, requests: Sequence[Request]) -> Any:
        return np.array([request.token_ids[-1] for request in requests], np.int32)

    def free_mask(self, num_rows: int) -> Any:
        return np.full((num_rows, mask_len(VOCAB_SIZE)), -1, np.int32)

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
            if limits[row] > 0:
                drawn[row] = next_token(held)
            last, left = (drawn[row, 0], limits[row] - 1) if limits[row] > 0 else (asked[row], -limits[row])
            for array, value in zip((moved.token, moved.position, moved.left), (last, len(held), left), strict=True):
                cast(Any, array)[row] = value
        return Drawn(cast(Any, drawn), cast(Any, None)), cache, moved

    def _decode_rows(
        self, _: Any, cache: tuple[KeysValues], all_slots: Slots, steps: int, requests: Any, asked: Any, rows: Any
    ) -> tuple[Drawn, tuple[KeysValues], Slots]:
        token, position, left = (np.array(x) for x in (all_slots.token, all_slots.position, all_slots.left))
        drawn = np.full((len(token), BLOCK_LEN), -1, np.int32)
        for place, row in enumerate(rows.tolist()):
            for step in range(min(steps, left[row]) if row < len(token) else 0):
                mask = None if asked is None else native._asked[int(asked[0])](int(token[row]))
                if asked is not None and mask is None:
                    left[row] = 0
                    break
                held = written(cache[0], place, position[row], [token[row]])
                drawn[row, step] = token[row] = masked(next_token(held), mask) if mask else next_token(held)
                position[row], left[row] = position[row] + 1, left[row] - 1
        moved = Slots(*(cast(Any, x) for x in (token, position, left, all_slots.counts)))
        return Drawn(cast(Any, drawn), cast(Any, None)), cache, moved

    _decode_asking = _decode_rows

    def _forward_rows(self, _: Any, cache: tuple[KeysValues], all_slots: Slots, rows: Any) -> Any:
        scores = np.zeros(len(rows), np.int32)
        for place, row in enumerate(rows.tolist()):
            if row < len(all_slots.left) and all_slots.left[row] > 0:
                scores[place] = next_token(
                    written(cache[0], place, int(all_slots.position[row]), [all_slots.token[row]])
                )
        return scores, cache

    def _draw_rows(self, scores: Any, all_slots: Slots, requests: Any, mask: Any, rows: Any) -> tuple[Drawn, Slots]:
        token, position, left = (np.array(x) for x in (all_slots.token, all_slots.position, all_slots.left))
        drawn = np.full((len(token), 1), -1, np.int32)
        for place, row in enumerate(rows.tolist()):
            if row < len(token) and left[row] > 0:
                drawn[row] = token[row] = masked(scores[place], np.ascontiguousarray(mask[place]))
                position[row], left[row] = position[row] + 1, left[row] - 1
        moved = Slots(*(cast(Any, x) for x in (token, position, left, all_slots.counts)))
        return Drawn(cast(Any, drawn), cast(Any, None)), moved

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
    st.tuples(st.just("submit constrained"), st.integers(0, 40), st.integers(1, 100)),
    st.tuples(st.just("cancel"), st.integers(0, 40), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([8, 10, 13, 64]),
    st.integers(1, 6),
    st.integers(0, 12),
    st.booleans(),
    st.lists(actions, max_size=40),
)
def test_whatever_comes_all_get_their_tokens_and_nobody_starves(
    num_pages: int, num_slots: int, most_kept: int, can_ask: bool, script: list[tuple[str, int, int]]
) -> None:
    """Requests are admitted in their order, also where they have to wait again, and what waits comes to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "_num_pages", lambda *_: num_pages)
        page_bytes = paged.bytes_per_token(CONFIG, np.float32) * PAGE_LEN
        engine = Engine(cast(Runner, Device(can_ask)), num_slots=num_slots, prefix_bytes=most_kept * page_bytes)
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
            constraint = EveryThird(3 * value + 1) if action.endswith("constrained") else None
            job = engine.job(Request(prompt(value), limit, constraint=constraint), collected, deadline)
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
        whole = reason in ("length", "stop")
        assert drawn == (expected if whole else expected[: len(drawn)])
        assert whole or job.cancelled or job.deadline
        assert reason != "stop" or job.matcher
    step()  # those that had only a first token leave their pages now
    assert batch._pool.num_free == num_pages


@pytest.mark.parametrize("length", [20, 300])  # read in one chunk, and in several
@pytest.mark.parametrize("num_steps", range(4))
def test_one_of_a_group_that_is_cancelled_as_it_is_read_leaves_the_others_their_places(
    length: int, num_steps: int
) -> None:
    for leaver in range(4):
        engine = Engine(cast(Runner, Device()), num_slots=4)
        requests, collected = [Request([kind] * length, 20) for kind in range(4)], [Collected() for _ in range(4)]
        jobs = [engine.job(*pair) for pair in zip(requests, collected, strict=True)]
        for job in jobs:
            engine.scheduler.submit(job)
        for _ in range(num_steps):
            engine.step()
        jobs[leaver].cancel()
        while engine.step():
            pass
        del requests[leaver], collected[leaver]
        assert [[token.id for token in c.tokens] for c in collected] == [answer(request) for request in requests]


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


def test_blocks_are_short_while_others_are_read_or_wait_for_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "BLOCK_SECONDS", 1e9)  # a step never takes too long
    engine, lens = Engine(cast(Runner, Device()), num_slots=2), list[int]()
    decode = engine._batch.decode

    def noted(rows: Sequence[int], num_steps: int, asked: Any) -> Drawn:
        lens.append(num_steps)
        return decode(rows, num_steps, asked)

    monkeypatch.setattr(engine._batch, "decode", noted)

    def submit(length: int, limit: int) -> Job:
        engine.scheduler.submit(job := engine.job(Request([length] * length, limit), Collected()))
        return job

    def next_lens(number: int) -> list[int]:
        lens.clear()
        for _ in range(number):
            engine.step()
        return lens

    submit(20, 400)
    next_lens(3)  # one token alone, whose time is taken
    assert next_lens(2) == [BLOCK_LEN] * 2
    long = submit(300, 100)
    num_chunks = len(long.plan)
    assert num_chunks > 1
    assert next_lens(num_chunks - 1) == [SHORT_BLOCK_LEN] * (num_chunks - 1)
    next_lens(1)
    assert next_lens(1) == [BLOCK_LEN]
    submit(10, 20)
    assert next_lens(2) == [FULL_BLOCK_LEN] * 2
    while engine.step():
        pass


class Impatient(OneSlot):
    """Fails where a stream would wait forever."""

    num_steps = 0

    def step(self) -> bool:
        self.num_steps += 1
        assert self.num_steps < 200
        return super().step()


@contextmanager
def interrupted_at(number: int) -> Iterator[None]:
    """Inside, the engine is interrupted before it runs this line, counted from 0."""
    left = number

    def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
        nonlocal left
        if not frame.f_code.co_filename.startswith(FOLDER):
            return None
        left -= event == "line"
        if left < 0:
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(None)


@pytest.mark.parametrize("limit", [20, 60])  # the first one has ended when its last block is delivered, or runs
def test_an_interrupt_at_any_line_leaves_no_stream_waiting(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """The one that takes the slot is interrupted: the one that had it goes on or learns of it, and the next has all."""
    monkeypatch.setattr(paged, "_num_pages", lambda *_: TABLE_LEN)
    asked, learned = [Request([kind] * 20, limit) for kind in (1, 2, 3)], set[bool]()
    for line in itertools.count():
        engine = Impatient(cast(Runner, Device()))
        first, then, last = (iter(Sequential(engine, request)) for request in asked)
        found = list(itertools.islice(first, 5))
        try:
            with interrupted_at(line):
                next(then)
            break
        except KeyboardInterrupt:
            pass
        engine.scheduler.check()
        try:
            found += first
            assert [token.id for token in found] == answer(asked[0])
            learned.add(False)
        except RequestError as error:
            assert "an interrupt ended this request" in str(error)
            learned.add(True)
        assert [token.id for token in last] == answer(asked[2])
    assert line > 100 and learned == {False, True}
