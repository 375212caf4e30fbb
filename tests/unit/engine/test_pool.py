"""Pages of a KV cache: each is free or one sequence's, and where they are few, those that come wait."""

import itertools
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from llamajax.engine import paged as paged_module
from llamajax.engine.engine import Engine
from llamajax.engine.paged import PagedBatch
from llamajax.engine.pool import Pool, Tables, missing, pages
from llamajax.engine.prefixes import Prefixes
from llamajax.engine.programs import Program
from llamajax.engine.runner import Runner
from llamajax.errors import DeviceMemoryError
from llamajax.ops import PAGE_LEN, native
from llamajax.placement import bytes_per_token
from llamajax.types import Request, SamplingParams, Token

from ... import tiny_model
from ...tiny_model import CONFIG, answer_alone, random_ids, tiny_runner
from .test_engine import KINDS, Collected
from .test_memory import answers, exhausted, requests

strict_promotion = tiny_model.strict_promotion


@settings(deadline=None, max_examples=300)
@given(
    st.integers(3, 20),
    st.integers(0, 12),
    st.lists(st.tuples(st.sampled_from(["read", "grow", "leave", "move"]), st.integers(0, 3), st.integers(0, 2**32))),
)
def test_each_page_is_free_or_kept_or_a_sequence_s(
    num_pages: int, most_kept: int, changes: list[tuple[str, int, int]]
) -> None:
    """Prompts of few different pages are read, answered and forgotten; what is shared is what was read for it."""
    pool, tables = Pool(num_pages, lambda: (), most_kept), [Tables(4, 20), Tables(4, 20)]
    written: dict[int, tuple[int, ...]] = {}  # by page, all tokens up to its end
    most_owned = 0

    def take(table: Tables, row: int, num_positions: int) -> bool:
        needed, free = missing(table, {row: num_positions}), pool.num_free
        if needed > free:
            with pytest.raises(MemoryError):
                pool.take(table, row, num_positions)
            return False
        pool.take(table, row, num_positions)
        assert pool.num_free == free - needed
        return True

    for change, row, seed in changes:
        rng = np.random.default_rng(seed)
        mine, other = tables if rng.random() < 0.5 else tables[::-1]
        if change == "read" and mine.counts[row] == 0:
            ids = [id for kind in rng.integers(0, 2, rng.integers(0, 4)) for id in [int(kind)] * PAGE_LEN]
            ids += [7] * int(rng.integers(1, PAGE_LEN + 1))
            known = pool.known(ids)
            assert [written[page] for page in known] == [tuple(ids[: i * PAGE_LEN]) for i in range(1, len(known) + 1)]
            assert len(known) * PAGE_LEN < len(ids)
            pool.share(mine, row, known)
            if take(mine, row, len(ids)):
                for i, page in enumerate(mine.ids[row, : mine.counts[row]].tolist()):
                    assert i < len(known) or page not in known
                    written[page] = tuple(ids[: (i + 1) * PAGE_LEN])
                pool.keep(mine, row, ids)
                kept = mine.ids[row, : (len(ids) - 1) // PAGE_LEN].tolist()
                assert [written[page] for page in kept] == [tuple(ids[: i * PAGE_LEN]) for i in range(1, len(kept) + 1)]
            else:
                pool.leave(mine, row)
        elif change == "grow" and mine.counts[row]:
            before = mine.counts[row]
            take(mine, row, int(rng.integers(1, 700)))
            for page in mine.ids[row, before : mine.counts[row]].tolist():
                written[page] = ()
        elif change == "leave":
            pool.leave(mine, row)
        elif change == "move" and other.counts[row] == 0:
            ids = mine.ids[row, : mine.counts[row]].tolist()
            mine.move(row, other, row)
            assert other.ids[row, : other.counts[row]].tolist() == ids and mine.counts[row] == 0
        pool.check(tables)
        most_owned = max(most_owned, num_pages - pool.num_free)
        assert pool._num_written <= most_owned + most_kept


def test_the_page_that_was_asked_for_last_is_forgotten_last() -> None:
    pool, tables = Pool(3, lambda: (), 3), Tables(1, 3)
    first, second = ([id] * PAGE_LEN + [0] for id in (1, 2))
    for ids in (first, second):
        pool.take(tables, 0, len(ids))
        pool.keep(tables, 0, ids)
        pool.leave(tables, 0)
    assert pool.known(first)
    pool.take(tables, 0, 2 * PAGE_LEN)  # one is free
    assert pool.known(first) and not pool.known(second)


def paged(engine: Engine) -> PagedBatch:
    assert isinstance(engine._batch, PagedBatch)
    return engine._batch


needs_kernels = pytest.mark.skipif(not native.available(), reason="pages are for the native kernels")


@pytest.fixture(scope="module")
def runner() -> Runner:
    return tiny_runner(512, has_pages=True)


@pytest.fixture(scope="module")
def expected(runner: Runner) -> list[list[Token]]:
    return [answer_alone(runner, request) for request in requests()]


@needs_kernels
@pytest.mark.parametrize("num_pages", [8, 11, 16, 32])
def test_where_pages_are_few_those_that_come_wait_and_all_get_their_tokens(
    runner: Runner, expected: list[list[Token]], monkeypatch: pytest.MonkeyPatch, num_pages: int
) -> None:
    limited = copy(runner)
    limited.max_memory = (num_pages + 1) * PAGE_LEN * bytes_per_token(runner.config, runner.placement.cache_dtype) - 1
    saved, save, restored, restore = [], PagedBatch.save, [], PagedBatch.restore
    monkeypatch.setattr(PagedBatch, "save", lambda batch, rows: saved.extend(rows) or save(batch, rows))
    monkeypatch.setattr(PagedBatch, "restore", lambda batch, *args: restored.append(args) or restore(batch, *args))
    engine = Engine(limited, num_slots=4, max_waiting=50)
    step, pool = engine.step, paged(engine)._pool

    def checked_step() -> bool:
        busy, prompts = step(), engine._prompts
        pool.check([paged(engine)._tables, *([prompts.tables] if prompts else [])])
        return busy

    monkeypatch.setattr(engine, "step", checked_step)
    collected = answers(engine, requests())
    assert [c.tokens for c in collected] == expected
    assert {tuple(c.ends) for c in collected} == {(("length", None),)}
    assert len(saved) == len(restored) and bool(saved) == (num_pages < 20)
    assert pool.num_free == num_pages


@needs_kernels
def test_one_long_request_does_not_make_the_others_long(runner: Runner) -> None:
    engine = Engine(runner, num_slots=4)
    pool = paged(engine)._pool
    for number, limit in enumerate((400, 5, 5, 5)):
        engine.scheduler.submit(engine.job(Request(random_ids(5, number), limit), Collected()))
    most = 0
    while engine.step():
        most = max(most, pool.num_pages - pool.num_free)
    assert pages(405) <= most <= pages(405) + 3


@needs_kernels
@pytest.mark.parametrize(
    ("step", "at"),
    [
        ("empty_pages", 1),
        ("empty_rows", 1),
        *itertools.product(["prefill", "insert", "decode_rows", "put_page"], [1, 2, 5]),
    ],
)
def test_one_call_that_fails_for_want_of_memory_ends_nobody(
    runner: Runner, expected: list[list[Token]], monkeypatch: pytest.MonkeyPatch, step: str, at: int
) -> None:
    monkeypatch.setattr(paged_module, "_num_pages", lambda *_: 11)
    compile, calls = runner.compile, itertools.count(1)

    def compiled(program: Program) -> Callable[..., object]:
        if program.step == step and next(calls) == at:
            raise exhausted()
        return compile(program)

    engine = Engine(runner, num_slots=4, max_waiting=50)
    monkeypatch.setattr(runner, "compile", compiled)
    collected = answers(engine, requests())
    assert next(calls) > at
    assert [c.tokens for c in collected] == expected
    pool = paged(engine)._pool
    pool.check([paged(engine)._tables])
    assert pool.num_free == pool.num_pages


@needs_kernels
def test_those_that_run_go_on_while_there_is_no_memory_to_read_prompts(
    runner: Runner, expected: list[list[Token]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile, engine = runner.compile, Engine(runner, num_slots=4, max_waiting=50)

    def compiled(program: Program) -> Callable[..., object]:
        if program.step == "prefill" and engine.scheduler.running:
            raise exhausted()
        return compile(program)

    monkeypatch.setattr(runner, "compile", compiled)
    assert [c.tokens for c in answers(engine, requests())] == expected


@needs_kernels
def test_where_there_is_no_memory_for_pages_at_all_requests_end_with_an_error(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile = runner.compile

    def compiled(program: Program) -> Callable[..., object]:
        if program.step == "empty_pages":
            raise exhausted()
        return compile(program)

    engine = Engine(runner, num_slots=4)
    monkeypatch.setattr(runner, "compile", compiled)
    collected = answers(engine, requests()[:3])
    assert all(isinstance(c.ends[0][1], DeviceMemoryError) for c in collected)


@needs_kernels
def test_pages_that_a_failed_call_has_destroyed_end_those_that_run_with_its_error(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(runner, num_slots=4, max_waiting=50)
    collected = [Collected() for _ in range(3)]
    for listener in collected:
        engine.scheduler.submit(engine.job(Request([1, 2], 50), listener))
    while not engine.scheduler.running:
        engine.step()
    batch = paged(engine)

    def fail(*_: object) -> None:
        jax.tree.map(lambda x: x.delete(), batch._pool._cache)
        raise exhausted()

    with monkeypatch.context() as patch:
        patch.setattr(batch, "decode", fail)
        while engine.step():
            pass
    assert all(str(c.ends[0][1]).startswith("RESOURCE_EXHAUSTED") for c in collected)
    again = Collected()
    request = Request([1, 2], 5, SamplingParams(temperature=0))
    engine.scheduler.submit(engine.job(request, again))
    while engine.step():
        pass
    assert again.tokens == answer_alone(runner, request)


def shared_requests() -> list[Request]:
    """Prompts that share up to five pages with others, of all lengths after them."""
    rng = np.random.default_rng(1)
    begins = [random_ids(5 * PAGE_LEN, seed) for seed in (0, 1)]
    begins.append([*begins[0][: 2 * PAGE_LEN], *random_ids(3 * PAGE_LEN, 2)])
    found = []
    for number in range(40):
        shared = begins[rng.integers(3)][: int(rng.choice([30, 64, 128, 200, 320]))]
        ids = [*shared, *random_ids(int(rng.integers(1, 140)), number)] if number % 9 else shared
        if number % 13 == 12:
            ids = [*begins[number % 3], *random_ids(180, number)]
        sampling = replace(KINDS[number % len(KINDS)], logprobs=2 if number % 5 == 0 else None)
        found.append(Request(ids, int(rng.integers(1, min(40, 512 - len(ids)))), sampling))
    return found


@needs_kernels
@pytest.mark.parametrize(
    ("num_pages", "cache_dtype", "differs"),
    [
        *((num_pages, dtype, {}) for num_pages in (12, 64) for dtype in (np.float32, np.float16, np.int8)),
        (12, np.float16, {"sliding_window": 70, "qk_norm": True}),
    ],
)
def test_shared_prefixes_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, num_pages: int, cache_dtype: type, differs: dict[str, Any]
) -> None:
    """Tokens and log-probabilities, with and without, alone and together, while pages are forgotten."""
    config = replace(CONFIG, max_position_embeddings=512, **differs)
    runner = tiny_runner(512, config=config, cache_dtype=np.dtype(cache_dtype))
    monkeypatch.setattr(paged_module, "_num_pages", lambda *_: num_pages)
    asked, found = shared_requests(), {}
    forgotten, forget = list[int](), Prefixes.remove
    monkeypatch.setattr(Prefixes, "remove", lambda tree, page: forgotten.append(page) or forget(tree, page))
    for slots, prefix_bytes in ((4, 0), (4, 1 << 30), (1, 1 << 30)):
        engine = Engine(runner, num_slots=slots, max_waiting=50, prefix_bytes=prefix_bytes)
        pool = paged(engine)._pool
        forgotten.clear()
        collected = [Collected() for _ in asked]
        for request, listener in zip(asked, collected, strict=True):
            engine.scheduler.submit(engine.job(request, listener))
            engine.step()
        while engine.step():
            prompts = engine._prompts
            pool.check([paged(engine)._tables, *([prompts.tables] if prompts else [])])
        found[slots, prefix_bytes] = [[(t.id, t.logprobs) for t in c.tokens] for c in collected]
        assert {tuple(c.ends) for c in collected} == {(("length", None),)}
        assert any(c.num_cached for c in collected) == bool(prefix_bytes)
        assert bool(forgotten) == (prefix_bytes > 0 and num_pages < 20)
    assert found[4, 1 << 30] == found[4, 0]
    ids = [[[id for id, _ in tokens] for tokens in answers] for answers in found.values()]
    assert ids[0] == ids[2]


@needs_kernels
def test_those_that_begin_alike_wait_for_the_first_and_share_its_pages(runner: Runner) -> None:
    begin, prefills = random_ids(3 * PAGE_LEN), []
    engine = Engine(runner, num_slots=8, prefix_bytes=1 << 30)
    prefill = engine._batch.prefill
    engine._batch.prefill = lambda it: prefills.append(it.size) or prefill(it)  # type: ignore[method-assign]
    collected = [Collected() for _ in range(5)]
    for number, listener in enumerate(collected):
        engine.scheduler.submit(engine.job(Request([*begin, number, 1], 5), listener))
    while engine.step():
        pass
    assert [c.num_cached for c in collected] == [0, *[3 * PAGE_LEN] * 4]
    assert [number for number, _, _ in prefills] == [1, 1, 1, 4]  # the first one in three chunks, the others at once
    pool = paged(engine)._pool
    assert len(pool._prefixes) == 3 and pool.num_free == pool.num_pages
