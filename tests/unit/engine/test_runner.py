"""The runner's cache, its errors, and what it compiles."""

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
from llamajax.engine.sequential import Sequential
from llamajax.errors import CheckpointError, PromptTooLongError, RequestError
from llamajax.ops import PAGE_LEN, native
from llamajax.types import Request, SamplingParams

from ... import tiny_model
from ...tiny_model import (
    CONFIG,
    count_compilations,
    no_programs,
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
        runner = tiny_runner(1024)
        runner.warm_up(512)
    length = runner.cache_len
    assert length == runner.bucket(512)
    assert (compiled.count("jit(prefill)"), compiled.count("jit(decode)")) == (len(CHUNKS), 1)
    list(Sequential(runner, Request([1, 2, 3], 5)))
    with count_compilations() as compiled:
        _run_requests(runner, 512)
    assert runner.cache_len == length
    assert compiled == []


def _run_requests(runner: Runner, room: int) -> None:
    """Requests of every kind but log-probabilities, finished and broken off, within a cache of this length."""
    for length, max_new_tokens in ((1, 1), (1, 40), (33, 2), (128, 17), (129, 50), (room - 56, 56)):
        for seed, sampling in (
            (0, GREEDY),
            (1, SamplingParams(temperature=1, top_k=5, min_p=0.1, seed=3)),
            (1, SamplingParams(repetition_penalty=1.1, presence_penalty=1, frequency_penalty=1, top_p=1)),
        ):
            request = Request(random_ids(length, seed), max_new_tokens, sampling, frozenset([5, 6]))
            for reuse_cache in (False, True):
                list(Sequential(runner, replace(request, reuse_cache=reuse_cache)))
            next(iter(Sequential(runner, request)), None)


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


def test_logits_leave_the_cache_as_it_is() -> None:
    runner, ids = tiny_runner(512), random_ids(40)
    tokens = iter(Sequential(runner, Request(ids, 30, GREEDY)))
    found = [next(tokens).id for _ in range(5)]
    cached = list(runner.cached_ids)
    runner.logits(random_ids(20, seed=1))
    assert runner.cached_ids == cached
    found += [token.id for token in tokens]
    assert found == reference_logits(ids + found).argmax(-1)[len(ids) - 1 : -1].tolist()


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


def test_the_context_is_the_models_if_none_is_given() -> None:
    runner = tiny_runner()
    assert runner.max_seq_len == CONFIG.max_position_embeddings == 2048
    runner.check(Request([0] * 2047, 1))
    with pytest.raises(PromptTooLongError):
        runner.check(Request([0] * 2048, 1))


def test_prefill_says_how_much_of_the_prompt_was_there() -> None:
    runner, ids = tiny_runner(512), random_ids(50)
    assert runner.cached_ids == []
    request = Request(ids, 5, GREEDY, reuse_cache=True)
    first, reused = runner.prefill(request)
    assert (reused, runner.cached_ids) == (0, ids)
    again, reused = runner.prefill(request)
    assert (reused, runner.cached_ids) == (49, ids)
    assert runner.read(first) == runner.read(again)
    other = [*ids[:20], ids[20] ^ 1]
    _, reused = runner.prefill(replace(request, token_ids=other))
    assert (reused, runner.cached_ids) == (20, other)
    _, reused = runner.prefill(replace(request, reuse_cache=False))
    assert (reused, runner.cached_ids) == (0, ids)


def test_decode_draws_no_more_than_was_asked_for() -> None:
    runner, ids = tiny_runner(512), random_ids(7)
    found = [token.id for token in runner.read(runner.prefill(Request(ids, 12, GREEDY))[0])]
    lengths = []
    for num_steps in (1, 3, 5, 4, 2):
        block = runner.read(runner.decode(num_steps))
        lengths.append(len(block))
        found += [token.id for token in block]
    assert lengths == [1, 3, 5, 2, 0]
    assert found == reference_logits(ids + found).argmax(-1)[len(ids) - 1 : -1].tolist()


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
    runner = tiny_runner(max_seq_len, paged=False)
    assert runner.cache_len == 0
    runner.reserve(num_positions)
    assert runner.cache_len == cache_len
    runner.reserve(1)
    assert runner.cache_len == cache_len


def test_reserve_keeps_what_the_cache_holds() -> None:
    runner, ids = tiny_runner(1024, paged=False), random_ids(60)
    runner.read(runner.prefill(Request(ids, 1, GREEDY))[0])
    runner.reserve(1000)
    assert runner.cached_ids == ids and runner.cache_len == 1024
    prompt = ids + random_ids(5, seed=1)
    tokens = Sequential(runner, Request(prompt, 9, GREEDY, reuse_cache=True))
    found = [token.id for token in tokens]
    assert tokens.cached_tokens == 60
    assert found == reference_logits(prompt + found).argmax(-1)[len(prompt) - 1 : -1].tolist()


@pytest.mark.parametrize("max_seq_len", [2, 20, 512])
def test_warm_up_of_a_short_context(max_seq_len: int) -> None:
    runner = tiny_runner(max_seq_len)
    runner.warm_up(1024)
    assert runner.cache_len == runner.bucket(max_seq_len)
    assert len(list(Sequential(runner, Request([1], 1000, GREEDY)))) == max_seq_len - 1


def test_warm_up_reports_broken_weights() -> None:
    weights = random_weights()
    weights["norm.weight"][3] = np.nan
    with pytest.raises(CheckpointError, match="not finite numbers"):
        tiny_runner(512, weights=weights).warm_up()


@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_a_step_that_ctrl_c_ends_takes_the_cache_with_it(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, request = tiny_runner(256), Request([1, 2, 3], 5, GREEDY, reuse_cache=True)
    expected = [token.id for token in Sequential(runner, request)]
    compile = runner.compile

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    def interrupted(program: Program) -> Callable:
        return interrupt if program.step == step else compile(program)

    monkeypatch.setattr(runner, "compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(Sequential(runner, replace(request, token_ids=[1, 2, 4])))
    monkeypatch.undo()
    assert [token.id for token in Sequential(runner, request)] == expected


@pytest.mark.parametrize("num_tokens", [*range(1, 700), 1000, 2047])
def test_how_a_prompt_ends_depends_on_its_length_alone(num_tokens: int) -> None:
    plan = chunk_lens(num_tokens)
    last = (num_tokens - 1) // PAGE_LEN * PAGE_LEN
    filled = min(sum(plan) - last, PAGE_LEN)
    for num_cached in range(0, num_tokens, PAGE_LEN):
        chunks = chunk_lens(num_tokens, num_cached)
        end = num_cached + sum(chunks)
        assert set(chunks) <= set(CHUNKS) and num_tokens <= end <= sum(plan) < num_tokens + CHUNKS[-1]
        assert all(chunk % PAGE_LEN == 0 for chunk in chunks[:-1])
        assert min(end - last, PAGE_LEN) == filled
        assert sum(chunks[:-1]) + num_cached < num_tokens
