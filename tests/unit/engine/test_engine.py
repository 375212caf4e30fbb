"""The slot engine with a tiny model: the same tokens as alone, and nobody disturbs anybody."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from llamajax.engine.contiguous import ContiguousBatch
from llamajax.engine.engine import SHORT_CHUNK_LEN, Engine, make_batch
from llamajax.engine.programs import Program
from llamajax.engine.runner import Runner
from llamajax.engine.scheduler import Job
from llamajax.errors import CheckpointError, PromptTooLongError, QueueFullError, RequestError
from llamajax.ops import native
from llamajax.types import FinishReason, Request, SamplingParams, Token

from ... import tiny_model
from ...tiny_model import CONFIG, answer_alone, count_compilations, random_ids, random_weights, tiny_runner

strict_promotion = tiny_model.strict_promotion

needs_kernels = pytest.mark.skipif(not native.available(), reason="pages are for the native kernels")


@dataclass
class Collected:
    """A listener that keeps each token; it may fail at one, or want no more."""

    fails_at: int | None = None
    wants: int | None = None
    num_cached: int = 0
    tokens: list[Token] = field(default_factory=list)
    ends: list[tuple[FinishReason, Exception | None]] = field(default_factory=list)

    def begin(self, num_cached: int) -> None:
        assert not self.tokens or not self.ends
        self.num_cached = num_cached

    def token(self, token: Token) -> bool:
        assert not self.ends
        self.tokens.append(token)
        if len(self.tokens) == self.fails_at:
            raise ArithmeticError("a listener's own fault")
        return len(self.tokens) != self.wants

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        self.ends.append((reason, error))


@pytest.fixture(scope="module")
def runner() -> Runner:
    return tiny_runner(1024)


@pytest.fixture(scope="module")
def engine(runner: Runner) -> Engine:
    engine = Engine(runner, num_slots=8, max_waiting=50)
    engine.compile(256)
    return engine


KINDS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=1, top_p=0.95, seed=3),
    SamplingParams(temperature=0.7, top_k=9, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.4, seed=4),
    SamplingParams(temperature=1, top_p=1, seed=-(2**40), logit_bias={11: 6.5, 12: -100, 13: 5}),
]


def request(number: int, *, logprobs: int | None = None) -> Request:
    """One of many different ones."""
    rng = np.random.default_rng(number)
    sampling = KINDS[number % len(KINDS)]
    if logprobs is not None:
        sampling = SamplingParams(temperature=0, logprobs=logprobs)
    length = int(rng.choice([1, 5, 31, 33, 97, 150, 190]))
    limit = int(rng.integers(1, 60))
    return Request(random_ids(length, number), limit, sampling, frozenset([11]), min_tokens=limit * (number % 5) // 6)


_alone: dict[int, list[Token]] = {}


def alone(runner: Runner, number: int) -> list[Token]:
    if number not in _alone:
        _alone[number] = answer_alone(runner, request(number))
    return _alone[number]


def run(engine: Engine) -> Iterator[None]:
    """Steps until nothing is left to do."""
    while engine.step():
        engine.scheduler.check()
        yield
    assert engine.scheduler.num_jobs == 0


def submit(engine: Engine, request: Request, listener: Collected | None = None) -> tuple[Job, Collected]:
    listener = listener or Collected()
    job = engine.job(request, listener)
    engine.scheduler.submit(job)
    return job, listener


def test_the_same_tokens_as_alone_and_nothing_compiles(engine: Engine, runner: Runner) -> None:
    expected = [alone(runner, number) for number in range(40)]
    arrivals = iter(range(40))
    collected = []
    with count_compilations() as compiled:
        for number in itertools.islice(arrivals, 3):
            collected.append(submit(engine, request(number))[1])
        for _ in run(engine):
            for number in itertools.islice(arrivals, 2):
                collected.append(submit(engine, request(number))[1])
    assert compiled == []
    assert [c.tokens for c in collected] == expected
    assert {c.ends[0] for c in collected} == {("length", None), ("stop", None)}


def test_once_all_is_compiled_nothing_compiles_whatever_is_asked() -> None:
    config = replace(CONFIG, vocab_size=CONFIG.vocab_size + 1)  # no other test's programs
    engine = Engine(tiny_runner(512, config=config), num_slots=4, max_waiting=50)
    shown: list[tuple[int, int]] = []
    engine.compile(512, lambda done, total: shown.append((done, total)))
    total = len(shown) - 1
    assert shown == [(done, total) for done in range(total + 1)]
    rng = np.random.default_rng(0)

    def serve(lengths: Sequence[int], limit: int, cancelled: int = 0) -> None:
        """Prompts of these lengths at once; some are given up as they are read, or as they run."""
        kinds = [*KINDS, SamplingParams(temperature=0, logprobs=3)]
        jobs = [
            submit(engine, Request(random_ids(length, number), limit, kinds[number % len(kinds)]))[0]
            for number, length in enumerate(lengths)
        ]
        for number, _ in enumerate(run(engine)):
            if number % 2 and cancelled:
                jobs[cancelled - 1].cancel()
                cancelled -= 1

    with count_compilations() as compiled:
        for length in (1, 17, 120, 250, 500):  # alone, and in groups
            serve([length], 24)
            serve([length] * 4, 9, cancelled=2)
            serve([length] * 8, 3)
        serve([5, 400, 5, 5, 5, 300], 100)  # rows come and go while one is long
        serve([3] * 4, 509, cancelled=3)  # all grow to the end, fewer and fewer
        for _ in range(10):
            lengths = rng.choice([1, 20, 130, 260, 400, 500], 12).tolist()
            serve(lengths, int(rng.integers(1, 200)), cancelled=4)
        for length in (1, 65, 512):
            engine._runner.prompt_logprobs(random_ids(length), 5)
    assert compiled == []


@pytest.fixture(scope="module")
def contiguous() -> Runner:
    return tiny_runner(1024, has_pages=False)


@pytest.fixture
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ContiguousBatch, keep: Sequence[int]) -> None:
        raise AssertionError("rows were copied")

    monkeypatch.setattr(ContiguousBatch, "_take", refuse)


@pytest.mark.usefixtures("no_copies")
def test_idle_rows_are_not_copied_to_have_fewer_or_more(contiguous: Runner) -> None:
    engine = Engine(contiguous, num_slots=8, max_waiting=50)
    sizes = []
    for num_jobs in (8, 1, 6):
        requests = [Request(random_ids(5, number), 20, KINDS[1]) for number in range(num_jobs)]
        collected = [submit(engine, it)[1] for it in requests]
        for _ in run(engine):
            pass
        assert [c.tokens for c in collected] == [answer_alone(contiguous, it) for it in requests]
        sizes.append(engine._batch.num_rows)
    assert sizes == [8, 2, 8]


@pytest.mark.usefixtures("no_copies")
def test_those_who_come_while_the_first_prompt_is_read_find_rows(contiguous: Runner) -> None:
    engine = Engine(contiguous, num_slots=8, max_waiting=50)
    requests = [Request(random_ids(5, number), 20, KINDS[1]) for number in range(6)]
    collected = [submit(engine, requests[0])[1]]
    engine.step()
    assert len(collected[0].tokens) == 1  # it does not wait for them
    collected += [submit(engine, it)[1] for it in requests[1:]]
    for _ in run(engine):
        assert engine._batch.num_rows == 8
    assert [c.tokens for c in collected] == [answer_alone(contiguous, it) for it in requests]


@pytest.mark.parametrize("limit", [56, 57, 58])
@pytest.mark.parametrize("has_pages", [False, pytest.param(True, marks=needs_kernels)])
def test_one_that_ends_where_its_cache_does_disturbs_nobody(has_pages: bool, limit: int) -> None:
    """With a prompt of 200 and 57 tokens the last one would be at position 256, which a cache of 256 lacks."""
    requests = [Request(random_ids(length), limit, KINDS[0]) for length, limit in ((200, limit), (5, 150))]
    runner = tiny_runner(1024, has_pages=has_pages)
    engine = Engine(runner, num_slots=4)
    collected = [submit(engine, it)[1] for it in requests]
    list(run(engine))
    assert [c.tokens for c in collected] == [answer_alone(runner, it) for it in requests]


def test_a_few_slots_need_few_programs() -> None:
    runner = tiny_runner(1024, has_pages=False)

    def programs(slots: int) -> set[Program]:
        return set(make_batch(runner, slots).programs(1024))

    assert {p.num_rows for p in programs(1)} == {1}
    assert {p.num_rows for p in programs(2)} == {1, 2}  # never enough to be read as a group
    assert programs(2) < programs(3) < programs(8)
    first = make_batch(runner, 8).programs(1024)[:9]
    assert {p.cache_len for p in first} == {128}
    assert {p.step for p in first} == {"empty_rows", "prefill", "insert", "decode", "stop"}


def test_log_probabilities_are_those_of_a_request_alone(engine: Engine, runner: Runner) -> None:
    plain = submit(engine, request(1))[1]
    with count_compilations() as compiled:
        collected = [submit(engine, request(number, logprobs=number))[1] for number in range(3)]
        list(run(engine))
    assert compiled == []
    assert plain.tokens == alone(runner, 1)
    for number, c in enumerate(collected):
        expected = answer_alone(runner, request(number, logprobs=number))
        assert [token.id for token in c.tokens] == [token.id for token in expected]
        for token, alone_token in zip(c.tokens, expected, strict=True):
            # In float32 a product with one row adds up in another order than one with more.
            assert token.logprobs and alone_token.logprobs
            assert token.logprobs.logprob == pytest.approx(alone_token.logprobs.logprob, abs=1e-4)
        assert all(token.logprobs is not None and len(token.logprobs.top) == number for token in c.tokens)


def test_those_that_run_go_on_while_a_long_prompt_is_read(engine: Engine) -> None:
    first = submit(engine, Request([1, 2], 500, SamplingParams(temperature=0)))[1]
    while len(first.tokens) < 2:
        engine.step()
    long, second = submit(engine, Request(random_ids(900), 2, SamplingParams(temperature=0)))
    rounds = 0
    while not second.tokens:
        before = len(first.tokens)
        engine.step()
        rounds += 1
        assert len(first.tokens) > before
    assert rounds >= len(long.plan) > 1
    assert not engine._runner.paged or max(long.plan) == SHORT_CHUNK_LEN
    list(run(engine))
    assert len(first.tokens) == 500 and len(second.tokens) == 2


def test_rows_and_length_follow_what_runs() -> None:
    engine = Engine(tiny_runner(1024, has_pages=False), num_slots=8)
    batch = engine._batch
    assert isinstance(batch, ContiguousBatch)
    jobs = [submit(engine, Request([1 + i], 60 if i else 300, SamplingParams(temperature=0)))[0] for i in range(8)]
    sizes = set()
    for _ in run(engine):
        if engine.scheduler.running:
            sizes.add((batch.num_rows, batch.length))
    assert all(job.state == "ended" for job in jobs)
    assert max(sizes) == (8, 128) and (2, 512) in sizes  # seven short ones, then a long one alone
    submit(engine, Request([1], 3))
    list(run(engine))
    assert (batch.num_rows, batch.length) == (2, 128)


def test_a_cancelled_request_stops_within_a_block(
    engine: Engine, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, collected = submit(engine, Request([1], 400, SamplingParams(temperature=0)))
    long = Request([2], 200, SamplingParams(temperature=0))
    _, other = submit(engine, long)
    while len(collected.tokens) < 5:
        engine.step()
    job.cancel()
    tokens = len(collected.tokens)
    engine.step()
    assert collected.ends == [("cancelled", None)] and len(collected.tokens) == tokens
    assert job not in engine.scheduler.running
    decoded: list[Sequence[int]] = []
    decode = engine._batch.decode
    monkeypatch.setattr(engine._batch, "decode", lambda rows, *args: decoded.append(rows) or decode(rows, *args))
    list(run(engine))
    assert other.tokens == answer_alone(runner, long)
    assert {len(rows) for rows in decoded} == {1}


def test_a_deadline_ends_an_answer_wherever_it_is(engine: Engine) -> None:
    collected = []
    for _ in range(10):  # more than there are slots
        collected.append(Collected())
        engine.scheduler.submit(engine.job(Request([1], 1000), collected[-1], time.monotonic() + 0.05))
    began = time.monotonic()
    list(run(engine))
    assert [c.ends for c in collected] == [[("timeout", None)]] * 10
    assert time.monotonic() - began < 5
    assert any(c.tokens for c in collected) and not all(c.tokens for c in collected)


def test_a_listener_that_fails_ends_its_request_only(engine: Engine, runner: Runner) -> None:
    bad = submit(engine, Request([1], 50, SamplingParams(temperature=0)), Collected(fails_at=3))[1]
    enough = submit(engine, Request([1], 50, SamplingParams(temperature=0)), Collected(wants=4))[1]
    good = submit(engine, request(5))[1]
    list(run(engine))
    assert len(bad.tokens) == 3 and isinstance(bad.ends[0][1], ArithmeticError)
    assert len(enough.tokens) == 4 and enough.ends == [("stop", None)]
    assert good.tokens == alone(runner, 5)


@pytest.mark.parametrize("fails_at", [None, 1, 3])
def test_a_listener_that_fails_at_the_end_disturbs_nobody_and_is_heard(
    engine: Engine, runner: Runner, caplog: pytest.LogCaptureFixture, fails_at: int | None
) -> None:
    class FailsAtTheEnd(Collected):
        def end(self, reason: FinishReason, error: Exception | None) -> None:
            super().end(reason, error)
            raise ZeroDivisionError("at the end")

    bad = [submit(engine, Request([1], 5), FailsAtTheEnd(fails_at=fails_at))[1] for _ in range(3)]
    good = submit(engine, request(5))[1]
    cancelled_job, cancelled = submit(engine, request(6), FailsAtTheEnd())
    cancelled_job.cancel()
    list(run(engine))
    assert [len(listener.ends) for listener in (*bad, good, cancelled)] == [1] * 5
    assert good.tokens == alone(runner, 5) and good.ends[0][1] is None
    assert caplog.text.count("ZeroDivisionError: at the end") == 4


def test_whatever_listeners_do_an_aborted_engine_tells_all(engine: Engine) -> None:
    class Fails(Collected):
        def end(self, reason: FinishReason, error: Exception | None) -> None:
            super().end(reason, error)
            raise ZeroDivisionError

    collected = [submit(engine, request(number), Fails())[1] for number in range(12)]
    engine.step()
    engine.abort()
    assert [c.ends for c in collected] == [[("cancelled", None)]] * 12
    assert engine.scheduler.num_jobs == 0 and not engine.step()


def test_invalid_requests_are_refused(engine: Engine) -> None:
    for bad, error in ((Request([], 1), RequestError), (Request([1] * 1024, 1), PromptTooLongError)):
        with pytest.raises(error):
            engine.job(bad, Collected())
    for _ in range(8 + 50):  # its slots are free
        submit(engine, Request([1], 1))
    with pytest.raises(QueueFullError, match="50 requests wait"):
        submit(engine, Request([1], 1))
    list(run(engine))
    for slots, max_waiting in ((0, 5), (2.5, 5), ("2", 5), (True, 5), (2, 0), (2, None)):
        with pytest.raises(RequestError, match=r"(slots|max_waiting) must be an integer of at least 1, not"):
            Engine(engine._runner, num_slots=slots, max_waiting=max_waiting)


def test_broken_weights_end_every_request_with_the_reason() -> None:
    weights = random_weights()
    weights["norm.weight"][3] = np.nan
    engine = Engine(tiny_runner(512, weights=weights), num_slots=4)
    collected = [submit(engine, request(number))[1] for number in range(6)]
    list(run(engine))
    for c in collected:
        [(_, error)] = c.ends
        assert isinstance(error, CheckpointError)


def test_what_fails_on_the_device_ends_all_and_the_engine_goes_on(
    engine: Engine, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected = [submit(engine, request(number))[1] for number in range(12)]
    while not engine.scheduler.running:
        engine.step()
    assert len(left := [c for c in collected if not c.ends]) > 1
    with monkeypatch.context() as patch:
        patch.setattr(
            engine._batch, "decode", lambda *_: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("no memory"))
        )
        engine.step()
    assert all(isinstance(c.ends[0][1], jax.errors.JaxRuntimeError) for c in left)
    again = submit(engine, request(3))[1]
    list(run(engine))
    assert again.tokens == alone(runner, 3)


actions = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 30)),
    st.tuples(st.just("submit that fails"), st.integers(0, 30)),
    st.tuples(st.just("submit that is late"), st.integers(0, 30)),
    st.tuples(st.just("cancel"), st.integers(0, 60)),
    st.tuples(st.just("step"), st.integers(1, 4)),
)


@settings(max_examples=40)
@given(st.lists(actions, max_size=60))
def test_whatever_comes_and_goes(engine: Engine, runner: Runner, script: list[tuple[str, int]]) -> None:
    jobs: list[tuple[int, Job, Collected]] = []
    begun: list[Job] = []

    def step() -> None:
        engine.step()
        engine.scheduler.check()
        begun.extend(job for _, job, _ in jobs if job.state in ("prefilling", "running") and job not in begun)

    for action, value in script:
        if action == "step":
            for _ in range(value):
                step()
        elif action == "cancel" and value < len(jobs):
            jobs[value][1].cancel()
        elif action.startswith("submit") and engine.scheduler.num_waiting < 50:
            collected = Collected(fails_at=2 if action.endswith("fails") else None)
            deadline = time.monotonic() if action.endswith("late") else None
            job = engine.job(request(value), collected, deadline)
            engine.scheduler.submit(job)
            jobs.append((value, job, collected))
    while engine.scheduler.num_jobs:
        step()
    assert begun == sorted(begun, key=[job for _, job, _ in jobs].index)
    for value, job, collected in jobs:
        assert len(collected.ends) == 1
        reason, error = collected.ends[0]
        expected = alone(runner, value)
        assert collected.tokens == expected[: len(collected.tokens)]
        if reason in ("stop", "length"):
            assert error is None and collected.tokens == expected
        else:
            assert reason == "timeout" or job.cancelled or isinstance(error, ArithmeticError)
