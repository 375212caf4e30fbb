"""The runner's scores, its errors, and what is compiled."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from llamajax.engine import steps
from llamajax.engine.programs import Program
from llamajax.engine.runner import CHUNKS, Runner, chunk_lens
from llamajax.engine.sequential import OneSlot, Sequential
from llamajax.errors import CheckpointError, PromptTooLongError, RequestError
from llamajax.ops import PAGE_LEN, native
from llamajax.placement import bytes_per_token
from llamajax.types import Request, SamplingParams

from ... import tiny_model
from ...tiny_model import (
    CONFIG,
    count_compilations,
    no_programs,
    placed,
    random_ids,
    random_weights,
    reference_logits,
    tiny_runner,
)

strict_promotion = tiny_model.strict_promotion

GREEDY = SamplingParams(temperature=0)


# The first of all, since what it compiles serves the other tests.
def test_nothing_compiles_in_the_steady_state() -> None:
    with no_programs(), count_compilations() as compiled:
        engine = OneSlot(tiny_runner(1024))
        engine.warm_up(512)
    asking = engine.runner.can_ask
    assert (compiled.count("jit(prefill)"), compiled.count("jit(decode)")) == (len(CHUNKS), 1 + asking)
    list(Sequential(engine, Request([1, 2, 3], 5)))
    with count_compilations() as compiled:
        _run_requests(engine, 512)
    assert compiled == []


def _run_requests(engine: OneSlot, room: int) -> None:
    """Requests of every kind but log-probabilities, finished and broken off, within a cache of this length."""
    for length, max_new_tokens in ((1, 1), (1, 40), (33, 2), (128, 17), (129, 50), (room - 56, 56)):
        for seed, sampling in (
            (0, GREEDY),
            (1, SamplingParams(temperature=1, top_k=5, min_p=0.1, seed=3)),
            (1, SamplingParams(repetition_penalty=1.1, presence_penalty=1, frequency_penalty=1, top_p=1)),
        ):
            request = Request(random_ids(length, seed), max_new_tokens, sampling, frozenset([5, 6]))
            list(Sequential(engine, request))
            next(iter(Sequential(engine, request)), None)


@pytest.mark.skipif(not native.available(), reason="XLA's attention takes memory for each position")
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_no_step_copies_the_cache(step: str, num_rows: int) -> None:
    runner = tiny_runner()
    rows = runner.empty_rows(num_rows, 1)
    [pages] = runner.empty_pages(1 << 16)
    cache = (pages._replace(table=np.zeros((num_rows, 4), np.int32)),)
    zeros = np.zeros(num_rows, np.int32)
    given = {
        "prefill": (np.zeros((num_rows, 16), np.int32), zeros, zeros, zeros),
        "decode": (rows.slots, np.int32(1)),
    }
    arrays, structure = runner.model
    jitted = jax.jit(getattr(steps, step).__wrapped__, static_argnames="structure", donate_argnames="cache")
    lowered = jitted.lower(arrays, cache, *given[step], rows.requests, structure=structure)
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < sum(x.nbytes for x in jax.tree.leaves(cache)) / 10


@pytest.mark.parametrize("length", [1, 31, 32, 33, 300, 512])
def test_logits_are_the_models(length: int) -> None:
    ids = random_ids(length)
    scores = tiny_runner(512).logits(ids)
    assert scores.shape == (length, CONFIG.vocab_size) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, reference_logits(ids), atol=1e-3)


@pytest.mark.parametrize(
    ("ids", "error"), [([], RequestError), ([-1], RequestError), ([97], RequestError), ([0] * 65, PromptTooLongError)]
)
def test_bad_ids_have_no_logits(ids: Sequence[int], error: type[Exception]) -> None:
    with pytest.raises(error):
        tiny_runner(64).logits(ids)


@pytest.fixture(scope="module")
def scorer() -> Runner:
    return tiny_runner(2048)


lengths_around_borders = st.builds(
    lambda border, off: max(1, min(border + off, 2048)),
    st.sampled_from([1, 64, 512, 1024, 1536, 2048]),
    st.integers(-2, 2),
)


@settings(max_examples=25)
@given(length=lengths_around_borders | st.integers(1, 2048), num_top=st.integers(0, 20))
def test_prompt_logprobs_are_those_of_the_logits(scorer: Runner, length: int, num_top: int) -> None:
    ids = random_ids(length)
    scores = scorer.logits(ids).astype(np.float64)
    logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    expected = logprobs[np.arange(length - 1), ids[1:]]
    found = scorer.prompt_logprobs(ids, num_top)
    assert len(found) == length - 1
    assert sum(token.logprob for token in found) == pytest.approx(expected.sum(), abs=1e-4, rel=1e-6)
    np.testing.assert_allclose([token.logprob for token in found], expected, atol=1e-4)
    for token, row in zip(found[:: max(1, length // 10)], logprobs[:: max(1, length // 10)], strict=False):
        assert [value for _, value in token.top] == pytest.approx(np.sort(row)[::-1][:num_top], abs=1e-4)
        assert [row[id] for id, _ in token.top] == pytest.approx([value for _, value in token.top], abs=1e-4)


def test_prompt_logprobs_need_little_memory_and_few_programs(scorer: Runner) -> None:
    with count_compilations() as compiled:
        for program in scorer.scorings():
            scorer.compile(program)
    with count_compilations() as compiled:
        for length in (1, 2, 63, 65, 300, 1025):
            scorer.prompt_logprobs(random_ids(length), 3)
    assert compiled == []
    config = replace(CONFIG, vocab_size=128_256, max_position_embeddings=1 << 16)
    runner = tiny_runner(config=config)
    length = 1 << 16
    memory = runner.compile(Program("prompt_logprobs", length)).memory_analysis()
    assert memory is not None
    all_scores = 4 * config.vocab_size * length
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < all_scores / 10


@pytest.mark.parametrize("max_seq_len", [0, -1, CONFIG.max_position_embeddings + 1])
def test_a_context_that_the_model_does_not_have(max_seq_len: int) -> None:
    with pytest.raises(RequestError, match=f"{CONFIG.max_position_embeddings}, not {max_seq_len}"):
        tiny_runner(max_seq_len)


def test_max_memory_bounds_the_context() -> None:
    placement, weights = placed(CONFIG), random_weights(CONFIG)
    page = PAGE_LEN * bytes_per_token(CONFIG, placement.cache_dtype)
    for max_memory, longest in ((page, 64), (3 * page - 1, 128), (1 << 40, CONFIG.max_position_embeddings)):
        assert Runner(CONFIG, weights, placement, max_memory=max_memory).max_seq_len == longest
    for bounds, expected in (
        ({"max_memory": page - 1}, f"at least {page} bytes, for 64 tokens, not {page - 1}"),
        ({"max_memory": page + 0.5}, f"an integer of at least {page} bytes, for 64 tokens, not {page + 0.5}"),
        ({"max_memory": 2 * page, "max_seq_len": 129}, f"128, for which there is room in {2 * page} bytes, not 129"),
    ):
        with pytest.raises(RequestError, match=expected):
            Runner(CONFIG, weights, placement, **bounds)


@pytest.mark.skipif(not native.available(), reason="pages are for the native kernels")
def test_there_is_room_for_all_chunks_of_each_prompt() -> None:
    """A last chunk may have a page more than its tokens."""
    placement, weights = placed(CONFIG), random_weights(CONFIG)
    page = PAGE_LEN * bytes_per_token(CONFIG, placement.cache_dtype)
    contexts = []
    for num_pages in range(1, 17):
        context = Runner(CONFIG, weights, placement, max_memory=num_pages * page).max_seq_len
        assert all(sum(chunk_lens(length)) <= num_pages * PAGE_LEN for length in range(1, context))
        contexts.append(context // PAGE_LEN)
    assert contexts == [1, 2, 3, 4, 5, 6, 6, 8, 9, 10, 11, 12, 13, 14, 14, 16]


def test_the_context_is_the_models_if_none_is_given() -> None:
    runner = tiny_runner()
    assert runner.max_seq_len == CONFIG.max_position_embeddings == 2048
    runner.check(Request([0] * 2047, 1))
    with pytest.raises(PromptTooLongError):
        runner.check(Request([0] * 2048, 1))


@pytest.mark.parametrize(
    ("max_seq_len", "num_positions", "cache_len"),
    [
        (2048, 1, 128),
        (2048, 128, 128),
        (2048, 129, 256),
        (2048, 512, 512),
        (2048, 513, 1024),
        (2048, 1025, 2048),
        (2048, 9999, 2048),
        (1300, 1200, 2048),
        (20, 20, 128),
    ],
)
def test_the_cache_has_few_lengths(max_seq_len: int, num_positions: int, cache_len: int) -> None:
    assert tiny_runner(max_seq_len, has_pages=False).bucket(num_positions) == cache_len


@pytest.mark.parametrize("max_seq_len", [2, 20, 512])
def test_warm_up_of_a_short_context(max_seq_len: int) -> None:
    engine = OneSlot(tiny_runner(max_seq_len))
    engine.warm_up(1024)
    with count_compilations() as compiled:
        assert len(list(Sequential(engine, Request([1], 1000, GREEDY)))) == max_seq_len - 1
    assert compiled == []


def test_warm_up_reports_broken_weights() -> None:
    weights = random_weights()
    weights["norm.weight"][3] = np.nan
    with pytest.raises(CheckpointError, match="not finite numbers"):
        OneSlot(tiny_runner(512, weights=weights)).warm_up(1)


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_a_step_that_ctrl_c_ends_takes_the_cache_with_it(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, request = tiny_runner(256), Request([1, 2, 3], 5, GREEDY)
    engine, compile = OneSlot(runner), runner.compile
    expected = list(Sequential(engine, request))

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    def interrupted(program: Program) -> Callable:
        return interrupt if program.step.startswith(step) else compile(program)

    monkeypatch.setattr(runner, "compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(Sequential(engine, replace(request, token_ids=[1, 2, 4])))
    monkeypatch.undo()
    assert list(Sequential(engine, request)) == expected


@pytest.mark.parametrize("num_tokens", [*range(1, 700), 1000, 2047])
def test_how_a_prompt_ends_depends_on_its_length_alone(num_tokens: int) -> None:
    plan = chunk_lens(num_tokens)
    last = (num_tokens - 1) // PAGE_LEN * PAGE_LEN
    filled = min(sum(plan) - last, PAGE_LEN)
    for num_cached, longest in itertools.product(range(0, num_tokens, PAGE_LEN), (128, CHUNKS[-1])):
        chunks = chunk_lens(num_tokens, num_cached, longest)
        assert max(chunks) <= longest
        end = num_cached + sum(chunks)
        assert set(chunks) <= set(CHUNKS) and num_tokens <= end <= sum(plan) < num_tokens + CHUNKS[-1]
        assert all(chunk % PAGE_LEN == 0 for chunk in chunks[:-1])
        assert min(end - last, PAGE_LEN) == filled
        assert sum(chunks[:-1]) + num_cached < num_tokens
