"""A device whose memory is small: those that run go on, those that come wait, and all get their tokens.

Each row has a cache of its own, as on an accelerator; `test_pool` does the same with pages.
"""

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from llamajax.engine.capacity import Capacity
from llamajax.engine.contiguous import ContiguousBatch
from llamajax.engine.engine import Engine
from llamajax.engine.memory import Footprint
from llamajax.engine.programs import Program
from llamajax.engine.runner import CHUNKS, Runner
from llamajax.engine.sequential import OneSlot, Sequential
from llamajax.errors import DeviceMemoryError, PromptTooLongError
from llamajax.families import CONFIGS
from llamajax.placement import Placement
from llamajax.types import Request, SamplingParams, Token

from ... import tiny_model
from ...tiny_model import CONFIG, answer_alone, placed, random_ids, tiny_runner
from .test_engine import KINDS, Collected

strict_promotion = tiny_model.strict_promotion

FOOTPRINT = Footprint(CONFIG, placed(has_pages=False))


@pytest.fixture(scope="module")
def runner() -> Runner:
    return tiny_runner(512, has_pages=False)


def exhausted() -> Exception:
    """As jax raises it. A new one each time: what refers to it refers to all that was being computed."""
    return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes.")


def requests() -> list[Request]:
    """Short and long ones, of which some grow; the longest come last, so that rows grow twice."""
    rng = np.random.default_rng(0)
    lengths, limits = rng.choice([3, 40, 130], 12).tolist(), rng.choice([5, 60, 200, 350], 12).tolist()
    lengths, limits = zip(*sorted(zip(lengths, limits, strict=True), key=sum), strict=True)
    return [
        Request(random_ids(length, i), limit, KINDS[i % len(KINDS)])
        for i, (length, limit) in enumerate(zip(lengths, limits, strict=True))
    ]


@pytest.fixture(scope="module")
def expected(runner: Runner) -> list[list[Token]]:
    return [answer_alone(runner, request) for request in requests()]


def live_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


@contextmanager
def small_device(runner: Runner, room: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Program]]:
    """Inside, the device has room for so many bytes more; gives the programs that it refused to run."""
    gc.collect()
    limit, compile, refused = live_bytes() + room, runner.compile, list[Program]()

    def new_bytes(program: Program) -> int:
        rows = FOOTPRINT.rows(program.num_rows, program.cache_len)
        if program.step == "resize":
            return rows // CONFIG.num_hidden_layers
        return rows if program.step == "empty_rows" else 4000 if program.step in ("prefill", "decode") else 0

    def compiled(program: Program) -> Callable[..., object]:
        run = compile(program)

        def call(*args: object) -> object:
            for collects in (lambda: None, gc.collect):  # garbage takes no memory of the device
                collects()
                if live_bytes() + new_bytes(program) <= limit:
                    return run(*args)
            refused.append(program)
            if program.step == "prefill":
                jax.tree.map(lambda x: x.delete(), args[1])  # it was to be written in place
            raise exhausted()

        return call

    with monkeypatch.context() as patch:
        patch.setattr(runner, "compile", compiled)
        yield refused


def answers(engine: Engine, requests: list[Request]) -> list[Collected]:
    """Half of them come at once, the others one at each step."""
    collected, later = [Collected() for _ in requests], list(range(len(requests)))
    while later or engine.scheduler.num_jobs:
        for index in later[: 1 if len(later) < len(requests) else -(-len(later) // 2)]:
            engine.scheduler.submit(engine.job(requests[index], collected[index]))
            later.remove(index)
        engine.step()
        engine.scheduler.check()
    return collected


@pytest.mark.parametrize(("num_rows", "length"), [(1, 128), (2, 256), (4, 512)])
def test_the_bytes_of_rows_are_those_of_their_arrays(runner: Runner, num_rows: int, length: int) -> None:
    rows = runner.empty_rows(num_rows, length)
    assert FOOTPRINT.rows(num_rows, length) == sum(x.nbytes for x in jax.tree.leaves(rows))


# MB of temporary memory as XLA's compiler says (`python -m scripts.program_report`).
@pytest.mark.parametrize(
    ("name", "platform", "rows", "length", "queries", "megabytes"),
    [
        ("llama3.2-1b", "gpu", 8, 2048, 1, 22.6),
        ("llama3.2-1b", "gpu", 32, 2048, 1, 90.4),
        ("llama3.1-8b", "gpu", 32, 2048, 1, 90.4),
        ("llama3.2-1b", "gpu", 1, 2048, 512, 220),
        ("llama3.1-8b", "gpu", 1, 2048, 512, 223),
        ("llama3.2-1b", "tpu", 32, 2048, 1, 4320),
        ("llama3.1-8b", "tpu", 32, 2048, 1, 120),
    ],
)
def test_the_temporary_bytes_are_about_the_compiler_s(
    name: str, platform: str, rows: int, length: int, queries: int, megabytes: float
) -> None:
    footprint = Footprint(CONFIGS[name], Placement.of(CONFIGS[name], platform, has_kernels=False))
    assert footprint.temporary(0, 0, rows, length, queries) / 1e6 == pytest.approx(megabytes, rel=0.25)


@pytest.mark.parametrize(("sequences", "length"), [(1, 100), (3, 200), (4, 300)])
def test_the_capacity_is_as_the_engine_makes_rows(runner: Runner, sequences: int, length: int) -> None:
    engine = Engine(runner, num_slots=sequences)
    for number in range(sequences):
        engine.scheduler.submit(engine.job(Request(random_ids(length - 20, number), 20, KINDS[0]), Collected()))
    while engine.scheduler.prefilling or not engine.scheduler.running:
        engine.step()
    config = replace(CONFIG, max_position_embeddings=512)
    footprint = replace(FOOTPRINT, config=config)
    needed = footprint.needed(4, 512, 1, 512, 512)
    told = Capacity.of(footprint, sequences, length, needed)
    batch = engine._batch
    assert isinstance(batch, ContiguousBatch)
    assert told.rows == sum(x.nbytes for x in jax.tree.leaves(batch._rows))
    assert (told.num_rows, told.length) == (batch.num_rows, batch.length)
    engine.abort()


def test_the_most_rows_are_those_that_fit_and_no_more() -> None:
    needed = FOOTPRINT.needed(8, 512, 1, 512, 512)
    assert [Capacity.of(FOOTPRINT, 1, 512, free).most_rows for free in (needed, needed - 1, 0, None)] == [8, 4, 0, None]


@pytest.mark.parametrize("num_rows", [3, 4, 5])
def test_what_a_device_refuses_ends_nobody(
    runner: Runner, expected: list[list[Token]], monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    engine = Engine(runner, num_slots=4, max_waiting=50)
    with small_device(runner, FOOTPRINT.rows(num_rows, 512), monkeypatch) as refused:
        collected = answers(engine, requests())
    assert {program.step for program in refused} & {"resize", "empty_rows"}
    assert [c.tokens for c in collected] == expected
    assert {tuple(c.ends) for c in collected} == {(("length", None),)}


@pytest.mark.parametrize("num_rows", [2, 4])
def test_where_the_device_tells_its_memory_no_more_is_asked_for(
    runner: Runner, expected: list[list[Token]], monkeypatch: pytest.MonkeyPatch, num_rows: int
) -> None:
    monkeypatch.setattr(Footprint, "_of_step", lambda *_: 4000)  # of a model so small, more than all rows
    room = FOOTPRINT.needed(num_rows, 512, 1, 512, 512)
    monkeypatch.setattr(runner, "free_bytes", lambda: room)
    engine = Engine(runner, num_slots=4, max_waiting=50)
    saved = []
    save = ContiguousBatch.save
    monkeypatch.setattr(ContiguousBatch, "save", lambda batch, rows: saved.extend(rows) or save(batch, rows))
    with small_device(runner, room + FOOTPRINT.rows(8, 256), monkeypatch) as refused:
        collected = answers(engine, requests())
    assert refused == []
    assert [c.tokens for c in collected] == expected
    assert bool(saved) == (num_rows < 4)


@pytest.mark.parametrize("steps", [("decode", "empty_rows"), ("resize", "empty_rows"), ("decode", "insert")])
def test_calls_that_fail_in_a_row_end_nobody(
    runner: Runner, expected: list[list[Token]], monkeypatch: pytest.MonkeyPatch, steps: tuple[str, str]
) -> None:
    """The second one while those that were saved come back, and their last block is still to be delivered."""
    compile, left, calls, at = runner.compile, list(steps), itertools.count(), 1 if "resize" in steps else 3

    def compiled(program: Program) -> Callable[..., object]:
        if left and program.step == left[0] and (len(left) == 1 or next(calls) == at):
            del left[0]
            raise exhausted()
        return compile(program)

    engine = Engine(runner, num_slots=4, max_waiting=50)
    monkeypatch.setattr(runner, "compile", compiled)
    collected = answers(engine, requests())
    assert not left
    assert [c.tokens for c in collected] == expected


@pytest.mark.parametrize(
    ("step", "at"),
    [
        *itertools.product(["empty_rows", "prefill", "insert", "decode"], [1, 2, 5]),
        *itertools.product(["resize", "keep"], [1, 2]),
    ],
)
def test_one_call_that_fails_for_want_of_memory_ends_nobody(
    runner: Runner, expected: list[list[Token]], monkeypatch: pytest.MonkeyPatch, step: str, at: int
) -> None:
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


def test_what_never_fits_is_refused_and_what_grows_ends_with_the_memory(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Footprint, "_of_step", lambda *_: 0)
    monkeypatch.setattr(runner, "free_bytes", lambda: FOOTPRINT.rows(3, 256))
    engine = Engine(runner, num_slots=4, max_waiting=50)
    for length in (256, 500):
        with pytest.raises(PromptTooLongError, match=f"prompt has {length} tokens, and the memory of .* room for 256,"):
            engine.job(Request(random_ids(length), 5), Collected())
    ids = random_ids(200)
    [collected] = answers(engine, [Request(ids, 300, KINDS[1])])
    assert collected.ends == [("length", None)]
    assert collected.tokens == answer_alone(runner, Request(ids, 56, KINDS[1]))


@pytest.mark.parametrize("is_known", [True, False])
def test_a_single_row_gets_room_for_its_answer_only_where_there_is_memory(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, is_known: bool
) -> None:
    request = Request(random_ids(100), 300, KINDS[1])
    expected = answer_alone(runner, request)
    compile, lengths = runner.compile, list[int]()

    def compiled(program: Program) -> Callable[..., object]:
        if program.step == "empty_rows":
            lengths.append(program.cache_len)
            if not is_known and program.cache_len > 128:
                raise exhausted()
        return compile(program)

    monkeypatch.setattr(runner, "compile", compiled)
    if is_known:
        monkeypatch.setattr(runner, "free_bytes", lambda: FOOTPRINT.needed(0, 0, 1, 256, CHUNKS[-1]))
    assert list(Sequential(OneSlot(runner), request)) == expected
    assert lengths == ([128] if is_known else [512, 128])


def test_one_that_does_not_fit_alone_ends_with_an_error_and_the_others_go_on(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(runner, num_slots=4, max_waiting=50)
    asked = [Request(random_ids(5, number), 60, KINDS[number % len(KINDS)]) for number in range(8)]
    asked.insert(4, Request(random_ids(400), 5, SamplingParams(temperature=0)))
    with small_device(runner, FOOTPRINT.rows(5, 256), monkeypatch):
        collected = answers(engine, asked)
    del asked[4]
    error = collected.pop(4).ends[0][1]
    assert isinstance(error, DeviceMemoryError) and "no room for this request" in str(error)
    assert [c.tokens for c in collected] == [answer_alone(runner, request) for request in asked]


def test_rows_that_a_failed_call_has_destroyed_end_with_its_error(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(runner, num_slots=4, max_waiting=50)
    collected = [Collected() for _ in range(3)]
    for listener in collected:
        engine.scheduler.submit(engine.job(Request([1, 2], 50), listener))
    while not engine.scheduler.running:
        engine.step()
    assert engine._batch._rows

    def fail(*_: object) -> None:
        jax.tree.map(lambda x: x.delete(), engine._batch._rows.cache)
        raise exhausted()

    monkeypatch.setattr(engine._batch, "decode", fail)
    while engine.step():
        pass
    assert all(str(c.ends[0][1]).startswith("RESOURCE_EXHAUSTED") for c in collected)
