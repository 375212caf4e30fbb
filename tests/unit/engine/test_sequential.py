"""Whole answers of a tiny model, against reading the whole sequence anew for each token."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

import jax
import numpy as np
import pytest

from llamajax.engine import contiguous
from llamajax.engine.engine import BLOCK_SECONDS
from llamajax.engine.paged import PagedBatch
from llamajax.engine.sequential import OneSlot, Sequential
from llamajax.engine.steps import BLOCK_LEN, MAX_STOP_IDS
from llamajax.errors import CheckpointError, PromptTooLongError, RequestError
from llamajax.ops import PAGE_LEN, native
from llamajax.sampling import Sampling, sample
from llamajax.types import FinishReason, Request, SamplingParams, Token

from ... import tiny_model
from ...tiny_model import CONFIG, answer_alone, random_ids, random_weights, reference_logits, tiny_runner

strict_promotion = tiny_model.strict_promotion

GREEDY = SamplingParams(temperature=0)
V = CONFIG.vocab_size
needs_kernels = pytest.mark.skipif(not native.available(), reason="pages are for the native kernels")
_sample = jax.jit(sample)


def answer(
    engine: OneSlot,
    ids: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_ids: frozenset[int] = frozenset(),
) -> list[int]:
    return [token.id for token in Sequential(engine, Request(ids, max_new_tokens, sampling, stop_ids))]


class Heard:
    """A listener that counts."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def begin(self, num_cached: int) -> None:
        pass

    def token(self, token: Token) -> bool:
        self.num_tokens += 1
        return True

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        pass


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
    found = answer(OneSlot(tiny_runner(1024)), random_ids(length), 6)
    assert len(found) == 6
    assert_greedy(random_ids(length), found)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 16, 17, 18, 40])
def test_an_answer_has_as_many_tokens_as_asked_for(max_new_tokens: int) -> None:
    engine = OneSlot(tiny_runner(512))
    prompt = random_ids(5)
    found = answer(engine, prompt, max_new_tokens)
    assert len(found) == max_new_tokens
    assert_greedy(prompt, found)


@pytest.mark.parametrize(("length", "max_seq_len"), [(500, 512), (511, 512), (1, 2), (90, 100), (1000, 1024)])
def test_an_answer_ends_with_the_context(length: int, max_seq_len: int) -> None:
    engine = OneSlot(tiny_runner(max_seq_len))
    prompt = random_ids(length)
    tokens = Sequential(engine, Request(prompt, 10**12, GREEDY))
    found = [token.id for token in tokens]
    assert length + len(found) == max_seq_len and not tokens.stopped
    assert_greedy(prompt, found)


@pytest.mark.parametrize("length", [40, 456])
def test_the_cache_grows_in_the_middle_of_an_answer(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    prompt, sampling = random_ids(length), SamplingParams(temperature=1, top_p=0.95)
    engine, roomy = (OneSlot(tiny_runner(1024, has_pages=False)) for _ in range(2))
    roomy.warm_up(1024)
    expected, lengths = answer(roomy, prompt, 984, sampling), set()
    monkeypatch.setattr(contiguous, "RESERVED_LEN", 1)
    for number, token in enumerate(Sequential(engine, Request(prompt, 984, sampling))):
        assert token.id == expected[number]
        lengths.add(engine._batch.length)
    assert lengths == {0, *(n for n in (128, 256, 512, 1024) if n > length)}
    assert roomy._batch.length == 1024


def test_an_answer_that_fits_does_not_grow_the_cache() -> None:
    engine = OneSlot(tiny_runner(1024, has_pages=False))
    for limit in (56, 20):  # the next one is read into the same memory
        assert len(answer(engine, random_ids(456), limit)) == limit
        assert engine._batch.length == 512


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
    assert answer(OneSlot(tiny_runner(512)), prompt, 24, sampling) == naive_answer(prompt, 24, sampling)


def test_a_new_request_forgets_the_counts_of_the_last_one() -> None:
    engine, prompt = OneSlot(tiny_runner(512)), random_ids(9)
    penalized = SamplingParams(temperature=0, presence_penalty=2, frequency_penalty=2)
    first = answer(engine, prompt, 24, penalized)
    assert answer(engine, prompt, 24, penalized) == first
    assert answer(engine, prompt + first, 8, penalized) == naive_answer(prompt + first, 8, penalized)


def test_a_huge_repetition_penalty_repeats_nothing() -> None:
    prompt = random_ids(10)
    found = answer(OneSlot(tiny_runner(512)), prompt, 40, SamplingParams(temperature=0, repetition_penalty=1e6))
    assert len({*prompt, *found}) == len(set(prompt)) + 40
    # Without it the same answer repeats itself.
    assert len(set(answer(OneSlot(tiny_runner(512)), prompt, 40))) < 40


def test_seeds_and_positions_decide() -> None:
    engine, prompt = OneSlot(tiny_runner(512)), random_ids(4)
    answers = [answer(engine, prompt, 12, SamplingParams(temperature=1, seed=seed)) for seed in (1, 2, 1)]
    assert answers[0] == answers[2] != answers[1]
    # What was drawn of an answer may be given as a prompt: the rest is drawn the same.
    rest = answer(engine, prompt + answers[0][:5], 7, SamplingParams(temperature=1, seed=1))
    assert rest == answers[0][5:]


def test_stop_ids_end_an_answer_without_being_part_of_it() -> None:
    engine, prompt = OneSlot(tiny_runner(512)), random_ids(6)
    full = answer(engine, prompt, 40)
    for end in (0, 1, 7, 39):
        expected = full[: full.index(full[end])]
        tokens = Sequential(engine, Request(prompt, 40, GREEDY, frozenset([full[end]])))
        assert [token.id for token in tokens] == expected and tokens.stopped
    unused = sorted(set(range(2 * V)) - set(full))
    assert len(unused) > MAX_STOP_IDS
    tokens = Sequential(engine, Request(prompt, 40, GREEDY, frozenset(unused[:MAX_STOP_IDS])))
    assert [token.id for token in tokens] == full and not tokens.stopped
    many = frozenset([*unused[: MAX_STOP_IDS - 1], full[9]])
    assert answer(engine, prompt, 40, stop_ids=many) == full[: full.index(full[9])]
    # A stop token among the prompt's is no reason to stop.
    assert answer(engine, prompt, 10, stop_ids=frozenset(set(prompt) - set(full[:10]))) == full[:10]


@pytest.mark.parametrize("min_tokens", [0, 1, 2, 17, 40])
def test_no_stop_token_is_drawn_before_there_are_so_many(min_tokens: int) -> None:
    engine, prompt = OneSlot(tiny_runner(512)), random_ids(6)
    stops = frozenset(range(60))  # most tokens
    asked = Request(prompt, 40, SamplingParams(temperature=1, top_p=1, seed=5), stops, min_tokens=min_tokens)
    tokens = [token.id for token in Sequential(engine, asked)]
    assert min_tokens <= len(tokens) < min_tokens + 10 and stops.isdisjoint(tokens)


def kept(tokens: Iterable[Token]) -> list[tuple[int, object]]:
    return [(token.id, token.logprobs) for token in tokens]


@pytest.mark.parametrize("paged", [False, pytest.param(True, marks=needs_kernels)])
def test_what_was_asked_before_does_not_matter(paged: bool) -> None:
    """To the last bit, however long the cache has grown, and whatever it has of the prompt."""
    engine, sampling = OneSlot(tiny_runner(1024, has_pages=paged)), SamplingParams(temperature=1, seed=5, logprobs=3)
    ids = random_ids(300)
    for length, cached in ((30, 0), (300, 0), (300, 256), (129, 128), (128, 64), (270, 256)):
        request = Request(ids[:length], 40, sampling)
        tokens = Sequential(engine, request)
        assert kept(tokens) == kept(answer_alone(tiny_runner(1024, has_pages=paged), request))
        assert tokens.cached_tokens == (cached if paged else 0)


@needs_kernels
def test_a_conversation_shares_the_pages_that_were_read() -> None:
    engine, ids, known = OneSlot(tiny_runner(1024)), random_ids(100), 0
    for turn in range(1, 5):
        tokens = Sequential(engine, Request(ids, 50, GREEDY))
        found = [token.id for token in tokens]
        assert tokens.cached_tokens == known
        assert found == answer(OneSlot(tiny_runner(1024)), ids, 50)
        known = (len(ids) - 1) // PAGE_LEN * PAGE_LEN
        ids = ids + found + random_ids(10, seed=turn)


@needs_kernels
def test_prompts_that_have_ended_take_no_memory_beside_the_longest_sequence() -> None:
    engine = OneSlot(tiny_runner(2048))
    assert isinstance(engine._batch, PagedBatch)
    for seed in range(20):
        answer(engine, random_ids(100 + 40 * (seed % 5), seed), 100)
    assert engine._batch._pool._num_written == -(-(100 + 160 + 100) // PAGE_LEN)


@pytest.mark.parametrize("paged", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("read", [0, 1, 2, 3, 20])
def test_an_answer_broken_off_leaves_the_engine_free(read: int, paged: bool) -> None:
    engine, prompt = OneSlot(tiny_runner(512, has_pages=paged)), random_ids(50)
    found = [token.id for token in islice(Sequential(engine, Request(prompt, 100, GREEDY)), read)]
    for then in (prompt + found + random_ids(7, seed=1), prompt + random_ids(40, seed=2)):
        assert_greedy(then, answer(engine, then, 12))
    assert engine.scheduler.num_jobs == 0


@pytest.mark.parametrize("paged", [False, pytest.param(True, marks=needs_kernels)])
def test_streams_that_take_turns_have_their_own_tokens(paged: bool) -> None:
    """One that begins while another runs, or is read, takes the slot; both go on."""
    engine = OneSlot(tiny_runner(1024, has_pages=paged))
    requests = [Request(random_ids(length, length), 60, GREEDY) for length in (20, 700, 130)]
    expected = [list(answer_alone(tiny_runner(1024, has_pages=paged), request)) for request in requests]
    streams = [iter(Sequential(engine, request)) for request in requests]
    found: list[list[Token]] = [[] for _ in streams]
    while streams_left := [i for i in range(3) if len(found[i]) < 60]:
        for i in streams_left:
            found[i] += islice(streams[i], 7)
    assert found == expected
    assert [next(stream, None) for stream in streams] == [None] * 3


def test_a_stream_that_ends_before_its_first_step_takes_nobody_s_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, request = OneSlot(tiny_runner(512)), Request(random_ids(20), 60, GREEDY)
    expected = answer(OneSlot(tiny_runner(512)), request.token_ids, 60)
    stream, other = iter(Sequential(engine, request)), Sequential(engine, Request(random_ids(30), 60, GREEDY))
    other.goes_on = lambda read: False
    found = list(islice(stream, 5))
    monkeypatch.setattr(engine._batch, "save", None)
    assert list(other) == []
    assert [token.id for token in [*found, *stream]] == expected


def test_logprobs_are_of_the_raw_scores() -> None:
    prompt = random_ids(12)
    sampling = SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.5, presence_penalty=1, logprobs=5)
    tokens = list(Sequential(OneSlot(tiny_runner(512)), Request(prompt, 20, sampling)))
    ids = [token.id for token in tokens]
    assert ids == answer(OneSlot(tiny_runner(512)), prompt, 20, SamplingParams(**{**vars(sampling), "logprobs": None}))
    scores = reference_logits(prompt + ids)[len(prompt) - 1 : -1]
    logprobs = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    for token, expected in zip(tokens, logprobs, strict=True):
        assert token.logprobs is not None
        assert token.logprobs.logprob == pytest.approx(expected[token.id], abs=1e-3)
        assert [id for id, _ in token.logprobs.top] == np.argsort(-expected)[:5].tolist()
        np.testing.assert_allclose([lp for _, lp in token.logprobs.top], np.sort(expected)[::-1][:5], atol=1e-3)


def test_tokens_that_come_together_have_one_time() -> None:
    began = time.perf_counter()
    times = [token.time for token in answer_alone(tiny_runner(128), Request(random_ids(12), 60, GREEDY))]
    assert times == sorted(times) and began < times[0] and times[-1] < time.perf_counter()
    blocks = Counter(times)
    assert blocks[times[0]] == 1 and 1 < max(blocks.values()) <= BLOCK_LEN


def test_logprobs_are_given_when_asked_for() -> None:
    engine, prompt = OneSlot(tiny_runner(512)), random_ids(12)
    for count in (0, 1, 20):
        tokens = list(Sequential(engine, Request(prompt, 3, SamplingParams(temperature=0, logprobs=count))))
        assert [len(token.logprobs.top) for token in tokens if token.logprobs] == [count] * 3
    assert list(Sequential(engine, Request(prompt, 1, GREEDY))) == [Token(tokens[0].id, None)]


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
    engine = OneSlot(tiny_runner(512))
    with pytest.raises(error, match=message):
        next(iter(Sequential(engine, request_)))
    with pytest.raises(error, match=message):
        engine.runner.check(request_)
    assert_greedy([1, 2], answer(engine, [1, 2], 3))


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1), SamplingParams(temperature=0, logprobs=3)])
def test_broken_weights_are_reported(sampling: SamplingParams) -> None:
    weights = random_weights()
    weights["layers.1.mlp.down_proj.weight"][0, 0] = np.nan
    engine = OneSlot(tiny_runner(512, weights=weights))
    with pytest.raises(CheckpointError, match="not finite numbers"):
        answer(engine, random_ids(3), 5, sampling)


@needs_kernels
def test_what_was_read_of_a_cancelled_prompt_is_shared() -> None:
    engine, prompt = OneSlot(tiny_runner(2048)), random_ids(1500)
    expected = answer(OneSlot(tiny_runner(2048)), prompt, 20)
    tokens = Sequential(engine, Request(prompt, 20, GREEDY))
    tokens.goes_on = lambda read: read < 1024
    assert list(tokens) == []
    again = Sequential(engine, Request(prompt, 20, GREEDY))
    assert [token.id for token in again] == expected
    assert again.cached_tokens == 1024


def test_blocks_are_short_where_the_device_may_have_been_slow() -> None:
    """A block that is there when its reader comes back may have taken all the time until then."""
    engine = OneSlot(tiny_runner(256))
    engine.scheduler.submit(engine.job(Request(random_ids(5), 100, GREEDY), (heard := Heard())))
    lens = []
    for _ in range(8):
        engine.step()
        lens.append(heard.num_tokens)
        time.sleep(1.1 * BLOCK_SECONDS)
    assert max(np.diff(lens)) == 1
