"""Whole answers of a tiny model, against reading the whole sequence anew for each token."""

import time
from collections.abc import Sequence
from itertools import islice

import jax
import numpy as np
import pytest

from llamajax.engine import runner as runner_module
from llamajax.engine.runner import MAX_STOP_IDS, Runner
from llamajax.engine.sequential import Sequential
from llamajax.errors import CheckpointError, PromptTooLongError, RequestError
from llamajax.sampling import Sampling, sample
from llamajax.types import Request, SamplingParams, Token

from ... import tiny_model
from ...tiny_model import CONFIG, random_ids, random_weights, reference_logits, tiny_runner

strict_promotion = tiny_model.strict_promotion

GREEDY = SamplingParams(temperature=0)
V = CONFIG.vocab_size
_sample = jax.jit(sample)


def answer(
    runner: Runner,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_ids: frozenset[int] = frozenset(),
) -> list[int]:
    return [token.id for token in Sequential(runner, Request(ids, max_new_tokens, sampling, stop_ids))]


def assert_greedy(prompt: Sequence[int], found: Sequence[int]) -> None:
    """Each token has the highest score after those before it, or one that rounding cannot tell from it."""
    scores = reference_logits([*prompt, *found])[len(prompt) - 1 : -1]
    assert (scores[np.arange(len(found)), found] >= scores.max(-1) - 1e-3).all()


def naive_answer(prompt: Sequence[int], max_new_tokens: int, sampling: SamplingParams) -> list[int]:
    """One token at a time, from scores of the whole sequence."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        token = _sample(
            np.asarray(reference_logits(ids)[-1:], np.float32),
            Sampling.of([sampling]),
            np.array([len(ids)], np.int32),
            np.isin(np.arange(V), prompt)[None],
            np.bincount(np.array(ids[len(prompt) :], int), minlength=V).astype(np.int32)[None],
        )
        ids.append(int(token[0]))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 127, 128, 129, 159, 511, 512, 513, 700, 1018])
def test_prompts_of_any_length(length: int) -> None:
    found = answer(tiny_runner(1024), random_ids(length), 6)
    assert len(found) == 6
    assert_greedy(random_ids(length), found)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 16, 17, 18, 40])
def test_an_answer_has_as_many_tokens_as_asked_for(max_new_tokens: int) -> None:
    runner = tiny_runner(512)
    prompt = random_ids(5)
    found = answer(runner, prompt, max_new_tokens)
    assert len(found) == max_new_tokens
    assert_greedy(prompt, found)
    # The last token was not read yet.
    assert runner.cached_ids == prompt + found[:-1]


@pytest.mark.parametrize(("length", "max_seq_len"), [(500, 512), (511, 512), (1, 2), (90, 100), (1000, 1024)])
def test_an_answer_ends_with_the_context(length: int, max_seq_len: int) -> None:
    runner = tiny_runner(max_seq_len)
    prompt = random_ids(length)
    tokens = Sequential(runner, Request(prompt, 10**12, GREEDY))
    found = [token.id for token in tokens]
    assert length + len(found) == max_seq_len and not tokens.stopped
    assert_greedy(prompt, found)


def test_the_cache_grows_in_the_middle_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "RESERVED_LEN", 1)
    prompt, sampling = random_ids(40), SamplingParams(temperature=1, top_p=0.95)
    growing, roomy = tiny_runner(1024, paged=False), tiny_runner(1024, paged=False)
    roomy.reserve(1024)
    found, lengths = [], set()
    for token in Sequential(growing, Request(prompt, 984, sampling)):
        found.append(token.id)
        lengths.add(growing.cache_len)
    assert lengths == {128, 256, 512, 1024}
    assert found == answer(roomy, prompt, 984, sampling)
    # What the cache held when it grew is still right.
    request = Request(prompt + found[:500], 20, sampling, reuse_cache=True)
    tokens = Sequential(growing, request)
    assert [token.id for token in tokens] == found[500:520]
    assert tokens.cached_tokens == 539


def test_an_answer_that_fits_does_not_grow_the_cache() -> None:
    runner = tiny_runner(1024, paged=False)
    assert len(answer(runner, random_ids(456), 56)) == 56
    assert runner.cache_len == 512


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=1, top_p=1),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=7),
        SamplingParams(temperature=1.5, min_p=0.05, seed=2**32 - 1),
        SamplingParams(temperature=0, repetition_penalty=1.3),
        SamplingParams(temperature=1, presence_penalty=1.5, frequency_penalty=0.5),
        SamplingParams(temperature=0, frequency_penalty=2, presence_penalty=-2, repetition_penalty=0.8),
    ],
)
def test_sampling_in_the_loop(sampling: SamplingParams) -> None:
    """Positions, the prompt's tokens and the answer's counts reach the sampler."""
    prompt = random_ids(9)
    assert answer(tiny_runner(512), prompt, 24, sampling) == naive_answer(prompt, 24, sampling)


def test_a_new_request_forgets_the_counts_of_the_last_one() -> None:
    runner, prompt = tiny_runner(512), random_ids(9)
    penalized = SamplingParams(temperature=0, presence_penalty=2, frequency_penalty=2)
    first = answer(runner, prompt, 24, penalized)
    assert answer(runner, prompt, 24, penalized) == first
    assert answer(runner, prompt + first, 8, penalized) == naive_answer(prompt + first, 8, penalized)


def test_a_huge_repetition_penalty_repeats_nothing() -> None:
    prompt = random_ids(10)
    found = answer(tiny_runner(512), prompt, 40, SamplingParams(temperature=0, repetition_penalty=1e6))
    assert len({*prompt, *found}) == len(set(prompt)) + 40
    # Without it the same answer repeats itself.
    assert len(set(answer(tiny_runner(512), prompt, 40))) < 40


def test_seeds_and_positions_decide() -> None:
    runner, prompt = tiny_runner(512), random_ids(4)
    answers = [answer(runner, prompt, 12, SamplingParams(temperature=1, seed=seed)) for seed in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]
    # What was drawn of an answer may be given as a prompt: the rest is drawn the same.
    rest = answer(runner, prompt + answers[0][:5], 7, SamplingParams(temperature=1, seed=1))
    assert rest == answers[0][5:]


def test_stop_ids_end_an_answer_without_being_part_of_it() -> None:
    runner, prompt = tiny_runner(512), random_ids(6)
    full = answer(runner, prompt, 40)
    for end in (0, 1, 7, 39):
        expected = full[: full.index(full[end])]
        tokens = Sequential(runner, Request(prompt, 40, GREEDY, frozenset([full[end]])))
        assert [token.id for token in tokens] == expected and tokens.stopped
        assert runner.cached_ids == prompt + expected
    unused = sorted(set(range(2 * V)) - set(full))
    assert len(unused) > MAX_STOP_IDS
    tokens = Sequential(runner, Request(prompt, 40, GREEDY, frozenset(unused[:MAX_STOP_IDS])))
    assert [token.id for token in tokens] == full and not tokens.stopped
    many = frozenset([*unused[: MAX_STOP_IDS - 1], full[9]])
    assert answer(runner, prompt, 40, stop_ids=many) == full[: full.index(full[9])]
    # A stop token among the prompt's is no reason to stop.
    assert answer(runner, prompt, 10, stop_ids=frozenset(set(prompt) - set(full[:10]))) == full[:10]


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 17, 40])
def test_no_stop_token_is_drawn_before_there_are_so_many(min_tokens: int) -> None:
    runner, prompt = tiny_runner(512), random_ids(6)
    stops = frozenset(range(60))  # most tokens
    asked = Request(prompt, 40, SamplingParams(temperature=1, top_p=1, seed=5), stops, min_tokens=min_tokens)
    tokens = [token.id for token in Sequential(runner, asked)]
    assert min_tokens <= len(tokens) < min_tokens + 10 and stops.isdisjoint(tokens)


@pytest.mark.parametrize(
    ("first", "then", "cached"),
    [
        (random_ids(60), random_ids(60), 59),
        (random_ids(60), random_ids(60)[:30], 29),
        (random_ids(60), random_ids(60)[:50] + random_ids(20, seed=1), 50),
        (random_ids(60), [*random_ids(60)[:-1], (random_ids(60)[-1] + 1) % V], 59),
        (random_ids(60), [(random_ids(60)[0] + 1) % V, *random_ids(60)[1:]], 0),
        (random_ids(130), random_ids(100) + random_ids(140, seed=1), 100),
        ([3], [3], 0),
        ([3], [3, 4], 1),
    ],
)
def test_a_shared_prefix_is_not_read_again(first: list[int], then: list[int], cached: int) -> None:
    runner = tiny_runner(512)
    assert_greedy(first, answer(runner, first, 4))
    tokens = Sequential(runner, Request(then, 12, GREEDY, reuse_cache=True))
    found = [token.id for token in tokens]
    assert tokens.cached_tokens == cached
    assert found == answer(tiny_runner(512), then, 12)
    assert_greedy(then, found)


def test_a_shared_prefix_gives_the_same_scores() -> None:
    runner, sampling = tiny_runner(512), SamplingParams(temperature=0, logprobs=20)
    answer(runner, random_ids(30), 4)
    then = random_ids(20) + random_ids(10, seed=1)
    reused = list(Sequential(runner, Request(then, 8, sampling, reuse_cache=True)))
    anew = list(Sequential(tiny_runner(512), Request(then, 8, sampling)))
    for token, expected in zip(reused, anew, strict=True):
        assert token.id == expected.id and token.logprobs and expected.logprobs
        np.testing.assert_allclose(token.logprobs.top, expected.logprobs.top, atol=1e-4)


def test_what_was_asked_before_does_not_matter() -> None:
    """To the last bit of keys and values, however long the cache has grown, as long as it is not reused."""
    request = Request(random_ids(30), 40, SamplingParams(temperature=1, seed=5))

    def cached(runner: Runner) -> list[np.ndarray]:
        return [np.asarray(x)[0, ..., :69, :] for x in jax.tree.leaves(runner._cache)]

    runner, fresh = tiny_runner(1024, paged=False), tiny_runner(1024, paged=False)
    expected = list(Sequential(fresh, request))
    for before in (random_ids(30), random_ids(30) + random_ids(90, seed=1), random_ids(600, seed=2)):
        answer(runner, before, 5)
        tokens = Sequential(runner, request)
        assert list(tokens) == expected
        assert tokens.cached_tokens == 0
        for found, right in zip(cached(runner), cached(fresh), strict=True):
            np.testing.assert_array_equal(found, right)
    assert (runner.cache_len, fresh.cache_len) == (1024, 128)


def test_a_long_shared_prefix_near_the_end_of_the_cache() -> None:
    """The last chunk would pass the end of the cache, and begins among what is there."""
    runner = tiny_runner(1024)
    runner.reserve(1024)
    ids = random_ids(1010)
    answer(runner, ids[:100], 2)
    for length, cached in ((1010, 100), (1005, 1004)):
        tokens = Sequential(runner, Request(ids[:length], 10, GREEDY, reuse_cache=True))
        found = [token.id for token in tokens]
        # What the answer before shares with this prompt is known, too, but only by chance more.
        assert tokens.cached_tokens >= cached
        assert_greedy(ids[:length], found)


def test_a_conversation_reads_only_what_is_new() -> None:
    runner, ids = tiny_runner(512), random_ids(20)
    for turn in range(1, 4):
        known = len(runner.cached_ids)
        tokens = Sequential(runner, Request(ids, 15, GREEDY, reuse_cache=True))
        found = [token.id for token in tokens]
        assert tokens.cached_tokens == known
        assert_greedy(ids, found)
        assert runner.cached_ids == ids + found[:-1]
        ids = ids + found + random_ids(10, seed=turn)


@pytest.mark.parametrize("read", [0, 1, 2, 3, 20])
def test_an_answer_broken_off_leaves_the_cache_right(read: int) -> None:
    runner, prompt = tiny_runner(512), random_ids(50)
    found = [token.id for token in islice(Sequential(runner, Request(prompt, 100, GREEDY)), read)]
    # On with what was read, then with something else after the same prompt.
    for then in (prompt + found + random_ids(7, seed=1), prompt + random_ids(40, seed=2)):
        common = len(prompt) if read else 0
        tokens = Sequential(runner, Request(then, 12, GREEDY, reuse_cache=True))
        after = [token.id for token in tokens]
        assert tokens.cached_tokens >= common
        assert_greedy(then, after)


def test_logprobs_are_of_the_raw_scores() -> None:
    prompt = random_ids(12)
    sampling = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.5, presence_penalty=1, logprobs=5)
    tokens = list(Sequential(tiny_runner(512), Request(prompt, 20, sampling)))
    ids = [token.id for token in tokens]
    assert ids == answer(tiny_runner(512), prompt, 20, SamplingParams(**{**vars(sampling), "logprobs": None}))
    scores = reference_logits(prompt + ids)[len(prompt) - 1 : -1]
    logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    for token, expected in zip(tokens, logprobs, strict=True):
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(expected[token.id], abs=1e-3)
        assert [id for id, _ in token.logprobs.top] == np.argsort(-expected)[:5].tolist()
        np.testing.assert_allclose([lp for _, lp in token.logprobs.top], np.sort(expected)[::-1][:5], atol=1e-3)


def test_tokens_that_come_together_have_one_time() -> None:
    began = time.perf_counter()
    blocks = list(Sequential(tiny_runner(128), Request(random_ids(12), 60, GREEDY))._blocks())
    times = [{token.time for token in block} for block in blocks]
    assert max(map(len, blocks)) > 1 and [len(block) for block in times] == [1] * len(blocks)
    moments = [began, *(block.pop() for block in times), time.perf_counter()]
    assert moments == sorted(moments) and len(set(moments)) == len(moments)


def test_logprobs_are_given_when_asked_for() -> None:
    runner, prompt = tiny_runner(512), random_ids(12)
    for count in (0, 1, 20):
        tokens = list(Sequential(runner, Request(prompt, 3, SamplingParams(temperature=0, logprobs=count))))
        assert [len(token.logprobs.top) for token in tokens if token.logprobs] == [count] * 3
    assert list(Sequential(runner, Request(prompt, 1, GREEDY))) == [Token(tokens[0].id, None)]


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request([], 5), RequestError, "empty"),
        (Request([0, V], 5), RequestError, f"from 0 to {V - 1}, found 0 to {V}"),
        (Request([-1, 3], 5), RequestError, "found -1 to 3"),
        (Request([1], 0), RequestError, "at least 1, not 0"),
        (Request([1], -4), RequestError, "at least 1, not -4"),
        (Request([1], 5, stop_ids=frozenset(range(MAX_STOP_IDS + 1))), RequestError, "at most 128"),
        (Request([1], 5.0), RequestError, "max_new_tokens must be an integer"),
        (Request([1], 5, min_tokens=6), RequestError, "min_tokens must be at most max_new_tokens, 5, not 6"),
        (Request([1], 5, min_tokens=-1), RequestError, "min_tokens must be an integer of at least 0, not -1"),
        (Request([1], 5, SamplingParams(logit_bias={V: 1})), RequestError, f"logit_bias has {V} to {V}"),
        (Request([1] * 512, 5), PromptTooLongError, "is 512 tokens, and the prompt has 512"),
        (Request([1] * 1000, 5), PromptTooLongError, "is 512 tokens, and the prompt has 1000"),
    ],
)
def test_bad_requests(request_: Request, error: type[Exception], message: str) -> None:
    runner = tiny_runner(512)
    with pytest.raises(error, match=message):
        next(iter(Sequential(runner, request_)))
    with pytest.raises(error, match=message):
        runner.check(request_)
    assert_greedy([1, 2], answer(runner, [1, 2], 3))


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1), SamplingParams(temperature=0, logprobs=3)])
def test_broken_weights_are_reported(sampling: SamplingParams) -> None:
    weights = random_weights()
    weights["layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    runner = tiny_runner(512, weights=weights)
    with pytest.raises(CheckpointError, match="not finite numbers"):
        answer(runner, random_ids(3), 5, sampling)
