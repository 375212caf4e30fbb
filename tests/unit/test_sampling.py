"""Sampling against distributions computed by hand, and the frequencies of what is drawn."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamajax import sampling
from llamajax.sampling import Sampling
from llamajax.types import SamplingParams

from .. import tiny_model
from ..reference_sampling import reference_probs

strict_promotion = tiny_model.strict_promotion

OFF = SamplingParams(temperature=1, top_p=1)
_sample = jax.jit(sampling.sample)


@jax.jit
def _filtered_probs(logits: jax.Array, params: Sampling) -> jax.Array:
    filters = sampling._Filters.of(params)
    return jax.lax.switch(filters.kind, sampling._PROBS, logits, logits.max(axis=-1), filters)


def draw(
    logits: np.ndarray,
    rows: Sequence[SamplingParams],
    position: Sequence[int] | np.ndarray | int = 0,
    prompt_mask: np.ndarray | None = None,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """One token for each row; logits, prompt_mask and counts are of one row or of all."""
    shape = len(rows), logits.shape[-1]
    return np.asarray(
        _sample(
            np.broadcast_to(logits, shape).astype(np.float32),
            Sampling.of(rows),
            np.broadcast_to(np.asarray(position, np.int32), len(rows)),
            np.broadcast_to(False if prompt_mask is None else prompt_mask, shape),
            np.broadcast_to(np.int32(0) if counts is None else counts, shape).astype(np.int32),
        )
    )


def filtered(logits: Sequence[float] | np.ndarray, params: SamplingParams) -> np.ndarray:
    """The probabilities of one row after min-p, top-k and top-p."""
    probs = np.asarray(_filtered_probs(np.array([logits], np.float32), Sampling.of([params])))[0]
    return probs / probs.sum()


def penalized(logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]) -> list:
    mask = np.isin(np.arange(len(logits)), prompt)[None]
    counts = np.bincount(np.array(answer, int), minlength=len(logits)).astype(np.int32)[None]
    return sampling._penalize(np.array([logits], np.float32), Sampling.of([params]), mask, counts)[0].tolist()


# The hand-computed distributions hold for the reference, too: it judges the library elsewhere.
FIVE = (0.1, 0.4, 0.05, 0.3, 0.15)
BY_HAND: list[tuple[tuple, dict, tuple]] = [
    ((0.5, 0.3, 0.2), {"top_p": 1e-45}, (1, 0, 0)),
    ((0.5, 0.3, 0.2), {}, (0.5, 0.3, 0.2)),
    ((0.5, 0.3, 0.2), {"top_p": 0.79}, (0.625, 0.375, 0)),
    ((0.5, 0.3, 0.2), {"top_p": 0.8}, (0.625, 0.375, 0)),
    ((0.5, 0.3, 0.2), {"top_p": 0.81}, (0.5, 0.3, 0.2)),
    ((0.5, 0.3, 0.2), {"top_p": 0.5}, (1, 0, 0)),
    ((0.5, 0.3, 0.2), {"top_p": 0.51}, (0.625, 0.375, 0)),
    ((0.5, 0.3, 0.2), {"top_p": 1e-9}, (1, 0, 0)),
    (FIVE, {"top_p": 0.7}, (0, 4 / 7, 0, 3 / 7, 0)),
    (FIVE, {"top_p": 0.85}, (0, 8 / 17, 0, 6 / 17, 3 / 17)),
    (FIVE, {"top_k": 1}, (0, 1, 0, 0, 0)),
    (FIVE, {"top_k": 2}, (0, 4 / 7, 0, 3 / 7, 0)),
    (FIVE, {"top_k": 5}, FIVE),
    (FIVE, {"top_k": 2**31 - 1}, FIVE),
    # top_p takes its mass from what top_k left: of (4/7, 3/7), 0.57 needs one token, of all 0.57 needs two.
    (FIVE, {"top_k": 2, "top_p": 0.57}, (0, 1, 0, 0, 0)),
    (FIVE, {"top_p": 0.57}, (0, 4 / 7, 0, 3 / 7, 0)),
    # min_p is relative to the most probable token: 0.3 * 0.4 = 0.12.
    (FIVE, {"min_p": 0.3}, (0, 8 / 17, 0, 6 / 17, 3 / 17)),
    (FIVE, {"min_p": 1}, (0, 1, 0, 0, 0)),
    # ... and comes before top_k and top_p: of (8, 6, 3) / 17, 0.82 needs two tokens.
    (FIVE, {"min_p": 0.3, "top_p": 0.82}, (0, 4 / 7, 0, 3 / 7, 0)),
    # Of equal tokens the lowest ids stay.
    ((0.25,) * 4, {"top_k": 2}, (0.5, 0.5, 0, 0)),
    ((0.25,) * 4, {"top_p": 0.5}, (0.5, 0.5, 0, 0)),
    ((0.25,) * 4, {"top_p": 0.51}, (1 / 3, 1 / 3, 1 / 3, 0)),
    ((0.25,) * 4, {"min_p": 1}, (0.25,) * 4),
    ((0.2, 0.2, 0.4, 0.2), {"top_k": 2}, (1 / 3, 0, 2 / 3, 0)),
    ((0.2, 0.2, 0.4, 0.2), {"top_p": 0.7}, (0.25, 0.25, 0.5, 0)),
    ((1, 0, 0), {"top_p": 0.9}, (1, 0, 0)),
    ((1, 0, 0), {"top_k": 2}, (1, 0, 0)),
]


@pytest.mark.parametrize(("probs", "options", "expected"), BY_HAND)
def test_filters_by_hand(probs: tuple, options: dict, expected: tuple) -> None:
    params = replace(OFF, **options)
    rest = (0,) * (8 - len(probs))
    with np.errstate(divide="ignore"):
        logits = np.log(probs + rest)
    np.testing.assert_allclose(filtered(logits, params), expected + rest, rtol=1e-5)
    # A constant added to all scores changes nothing.
    np.testing.assert_allclose(filtered(logits + 17, params), expected + rest, rtol=1e-4)


@pytest.mark.parametrize(
    ("probs", "options", "expected"), [case for case in BY_HAND if case[1].get("top_p") not in (0.5, 0.8, 0.7, 0.85)]
)
def test_reference_by_hand(probs: tuple, options: dict, expected: tuple) -> None:
    """Masses that equal top_p but for rounding are left to the test above."""
    with np.errstate(divide="ignore"):
        logits = np.log(probs)
    np.testing.assert_allclose(reference_probs(logits, replace(OFF, **options)), expected, rtol=1e-9)


def test_a_negative_zero_is_a_zero() -> None:
    assert filtered([-1.0, -0.0, 0.0, -0.0, -1, -1, -1, -1], replace(OFF, top_k=1)).argmax() == 1


def test_penalties_by_hand() -> None:
    logits = [2.0, -2.0, 0.0, 3.0, -3.0, 1.0]
    # Repetition: tokens of the prompt and of the answer, once, towards improbable on either side of zero.
    params = replace(OFF, repetition_penalty=2.0)
    assert penalized(logits, params, [0, 1, 0], [3, 4, 3]) == [1.0, -4.0, 0.0, 1.5, -6.0, 1.0]
    params = replace(OFF, repetition_penalty=0.5)
    assert penalized(logits, params, [0, 1], []) == [4.0, -1.0, 0.0, 3.0, -3.0, 1.0]
    # Presence: tokens of the answer, once. Frequency: each time. Neither looks at the prompt.
    params = replace(OFF, presence_penalty=0.5)
    assert penalized(logits, params, [0, 1], [3, 4, 3]) == [2.0, -2.0, 0.0, 2.5, -3.5, 1.0]
    params = replace(OFF, frequency_penalty=0.5)
    assert penalized(logits, params, [0, 1], [3, 4, 3]) == [2.0, -2.0, 0.0, 2.0, -3.5, 1.0]
    params = replace(OFF, frequency_penalty=-1.0, presence_penalty=-0.25)
    assert penalized(logits, params, [5], [5, 5]) == [2.0, -2.0, 0.0, 3.0, -3.0, 3.25]
    # All at once: the repetition penalty acts on the model's score, the others on what it left.
    params = replace(OFF, repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.25)
    assert penalized(logits, params, [0], [3, 3]) == [1.0, -2.0, 0.0, 0.0, -3.0, 1.0]


def draw_four(
    logits: Sequence, rows: Sequence[SamplingParams], prompt_mask: Sequence = (), counts: Sequence = ()
) -> list[int]:
    """Tokens of four rows, whose first four of 97 scores are given. Of 40 rows: a program that serves elsewhere."""

    def padded(given: Sequence, fill: float, dtype: type) -> np.ndarray:
        result: np.ndarray = np.full((40, 97), fill, dtype)
        if len(given):
            result[:4, :4] = given
        return result

    scores = padded(np.broadcast_to(np.array(logits), (4, 4)), -np.inf, np.float32)
    scores[4:] = 0
    rows = [*rows, *[rows[-1]] * 36]
    return draw(scores, rows, 0, padded(prompt_mask, 0, bool), padded(counts, 0, np.int32))[:4].tolist()


def test_greedy_takes_the_lowest_of_equal_scores() -> None:
    greedy = replace(OFF, temperature=0)
    logits = [[1, 7, 7, 0], [3, 1, 3, 3], [-np.inf, -np.inf, -5, -5], [0, 0, 0, 0]]
    assert draw_four(logits, [greedy] * 4) == [1, 0, 2, 0]
    # Filters and the seed are without effect.
    assert draw_four(logits, [replace(greedy, top_p=0.1, top_k=3, min_p=0.5, seed=9)] * 4) == [1, 0, 2, 0]
    # Nor does a sampled row beside it matter, or a temperature that is 0 but for rounding.
    assert draw_four(logits, [greedy, replace(OFF, temperature=1e-30), greedy, OFF])[:3] == [1, 0, 2]


def test_greedy_is_of_the_penalized_scores() -> None:
    greedy = replace(OFF, temperature=0)
    repetition, frequency = replace(greedy, repetition_penalty=4.0), replace(greedy, frequency_penalty=2.0)
    mask = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    counts = [[0, 0, 0, 0], [0, 0, 1, 0], [1, 1, 0, 0], [2, 1, 0, 0]]
    rows = [repetition, repetition, frequency, frequency]
    assert draw_four([3.0, 2.0, 1.5, 0.7], rows, mask, counts) == [1, 0, 2, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_numbers_give_no_token(temperature: float) -> None:
    logits = [[0, 0, 90, 0], [np.nan, 0, 90, 0], [0, -np.inf, 90, 0], [np.inf, 0, 0, 0]]
    rows = [replace(OFF, temperature=t) for t in (0, 0, temperature, temperature)]
    assert draw_four(logits, rows) == [2, 97, 2, 97]
    assert draw_four(logits, rows[::-1]) == [2, 97, 2, 97]


# What every draw is made from: many (seed, position) pairs.
SEEDS, POSITIONS = (x.ravel() for x in np.meshgrid(np.arange(128), np.arange(64), indexing="ij"))


def draw_many(
    logits: np.ndarray, params: SamplingParams, prompt_mask: np.ndarray | None = None, counts: np.ndarray | None = None
) -> np.ndarray:
    """Tokens [128 seeds, 64 positions] of one distribution."""
    rows = [replace(params, seed=seed) for seed in SEEDS.tolist()]
    return draw(logits, rows, POSITIONS, prompt_mask, counts).reshape(128, 64)


def assert_frequencies(tokens: np.ndarray, probs: np.ndarray) -> None:
    """Pearson's chi-square test, which a right sampler fails once in ten thousand times."""
    found = np.bincount(tokens.ravel(), minlength=len(probs))
    assert len(found) == len(probs) and found[probs == 0].sum() == 0
    expected = probs[probs > 0] * tokens.size
    assert expected.min() >= 5, "too few draws for the test to hold"
    statistic = ((found[probs > 0] - expected) ** 2 / expected).sum()
    # The 1 - 1e-4 quantile of chi-square, after Wilson and Hilferty (1931); 3.719 is that of the normal.
    freedom = max(len(expected) - 1, 1)
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.719 * spread**0.5) ** 3


EIGHT = np.array([1.0, -0.5, 0.25, 1.5, 0.25, -1.25, 0.75, 0.0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_p": 0.8},
        {"top_k": 3},
        {"min_p": 0.2},
        {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0, "frequency_penalty": -0.5},
        {"repetition_penalty": 0.7, "frequency_penalty": 0.5, "temperature": 0.8, "top_p": 0.95},
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities(options: dict) -> None:
    params = replace(OFF, **options)
    prompt_mask = np.arange(8) % 3 == 0
    counts = np.array([0, 0, 3, 1, 0, 0, 2, 0])
    tokens = draw_many(EIGHT, params, prompt_mask, counts)
    assert_frequencies(tokens, reference_probs(EIGHT, params, prompt_mask, counts))


def test_frequencies_of_a_vocabulary_of_some_blocks() -> None:
    logits = np.random.default_rng(0).normal(size=257) / 3
    logits[80:150] = -np.inf
    assert_frequencies(draw_many(logits, OFF), reference_probs(logits, OFF))


def test_positions_and_seeds_draw_independently() -> None:
    tokens = draw_many(np.array([0] * 4 + [-np.inf] * 4), OFF)
    pairs = np.full(16, 1 / 16)
    assert_frequencies(tokens[:, :-1] * 4 + tokens[:, 1:], pairs)
    assert_frequencies(tokens[:-1] * 4 + tokens[1:], pairs)
    # Neither is it their sum that decides.
    assert_frequencies(tokens[1:, :-1] * 4 + tokens[:-1, 1:], pairs)
    assert len(np.unique(tokens, axis=0)) == 128 and len(np.unique(tokens, axis=1).T) == 64


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**20))
def test_a_seed_of_32_bits_draws_from_jax_s_own_key(seed: int, position: int) -> None:
    [halves] = np.asarray(Sampling.of([replace(OFF, seed=seed)]).seed)
    expected = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), position))
    assert sampling._uniform(halves, np.int32(position)) == expected


def test_all_64_bits_of_a_seed_count() -> None:
    seeds = [7, 7 + 2**32, 7 - 2**63, -7, -1, 2**32 - 1, 2**63 - 1, -(2**63), *(7 + 2**bit for bit in range(33, 63))]
    streams = draw(np.zeros(97), [replace(OFF, seed=seed) for seed in np.repeat(seeds, 12)], np.arange(38 * 12) % 12)
    assert len(np.unique(streams.reshape(38, 12), axis=0)) == 38


def test_a_bias_comes_before_penalties_and_other_rows_have_none() -> None:
    logits, counts = np.array([-3.0, 0, 2, 2.5]), np.array([1, 0, 0, 0])
    greedy = SamplingParams(temperature=0, repetition_penalty=2)
    rows = [
        replace(greedy, logit_bias={0: 7.9}),  # (-3 + 7.9) / 2 < 2.5; the other order gives -6 + 7.9, too
        replace(greedy, logit_bias={0: 8.2}),  # (-3 + 8.2) / 2 > 2.5; the other order gives 2.2
        greedy,
        replace(greedy, logit_bias={3: -100, 2: -100}),
    ]
    assert draw(logits, rows, counts=counts).tolist() == [3, 0, 3, 1]


@pytest.mark.parametrize("temperature", [0, 1])
def test_forbidden_tokens_are_never_drawn(temperature: float) -> None:
    """Whatever is added to their logits, and in their own row only."""
    rows = [replace(OFF, temperature=temperature, seed=seed, logit_bias={5: 100}) for seed in range(64)]
    forbidden = np.full((64, 3), -1, np.int32)
    forbidden[::2] = [5, 96, -1]
    params = Sampling.of(rows).forbidding(forbidden)
    logits = np.zeros((64, 97), np.float32)
    drawn = np.asarray(_sample(logits, params, np.zeros(64, np.int32), logits > 0, logits.astype(np.int32)))
    assert not np.isin(drawn[::2], [5, 96]).any() and (drawn[1::2] == 5).all()


def test_all_seeds_count() -> None:
    seeds = np.repeat([0, 1, 2**31 - 1, 2**31, 2**32 - 1], 8).tolist()
    tokens = draw(np.zeros(97), [replace(OFF, seed=seed) for seed in seeds], np.arange(40) % 8)
    assert len(np.unique(tokens.reshape(5, 8), axis=0)) == 5


def test_a_row_draws_the_same_in_any_company() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(40, 97)) * 3
    mask, counts = rng.random((40, 97)) < 0.1, rng.poisson(0.1, (40, 97))
    rows = [
        SamplingParams(
            temperature=float(rng.choice([0, 0.3, 1, 2])),
            top_p=float(rng.choice([0.3, 0.9, 1])),
            top_k=int(rng.choice([0, 1, 40])),
            min_p=float(rng.choice([0, 0.1])),
            repetition_penalty=float(rng.choice([1, 1.3])),
            presence_penalty=float(rng.choice([0, 0.5])),
            frequency_penalty=float(rng.choice([0, 0.5])),
            seed=int(rng.integers(2**32)),
        )
        for _ in range(40)
    ]
    position = rng.integers(0, 10_000, 40)
    together = draw(logits, rows, position, mask, counts)
    for order in (np.arange(40)[::-1], rng.permutation(40)):
        apart = draw(logits[order], [rows[i] for i in order], position[order], mask[order], counts[order])
        assert apart.tolist() == together[order].tolist()
    alone = [
        draw(logits[i : i + 1], rows[i : i + 1], position[i : i + 1], mask[i : i + 1], counts[i : i + 1])[0]
        for i in range(40)
    ]
    assert alone == together.tolist()
    # In a batch without any filter, rows draw as beside rows with filters.
    plain = [i for i, row in enumerate(rows) if row.top_p == 1 and not row.top_k and row.temperature]
    assert plain
    plain = np.resize(plain, 40).tolist()
    apart = draw(logits[plain], [rows[i] for i in plain], position[plain], mask[plain], counts[plain])
    assert apart.tolist() == together[plain].tolist()


@pytest.mark.parametrize("vocab_size", [7, 20, 21, 500])
def test_top_logprobs(vocab_size: int) -> None:
    logits = np.random.default_rng(vocab_size).normal(size=(3, vocab_size)).astype(np.float32) * 5
    token = np.array([0, vocab_size - 1, 3], np.int32)
    found = sampling.wanted_logprobs(logits, token, wanted=np.array([True, False, False]))
    exact = logits.astype(np.float64)
    logprobs = exact - np.log(np.exp(exact).sum(-1, keepdims=True))
    best = np.argsort(-logprobs, axis=-1)[:, :20]
    assert np.asarray(found.top_ids).tolist() == best.tolist()
    np.testing.assert_allclose(found.top, np.take_along_axis(logprobs, best, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.chosen, logprobs[np.arange(3), token], rtol=1e-5, atol=1e-5)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms that a GPU takes, on this processor."""

    def chosen(*arguments: jax.Array, default: Callable, cuda: Callable | None = None, **_: Callable) -> Any:
        return (cuda or default)(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)


def test_a_gpu_draws_the_same(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """By other sums: tokens differ only where rounding decides, which it does in none of these."""
    rng = np.random.default_rng(4)
    logits = np.round(rng.normal(size=(32, 1000)) * 4, 1).astype(np.float32)  # many are equal
    logits[5, 9] = np.nan
    rows = [
        SamplingParams(
            temperature=float(rng.choice([0, 0.3, 0.6, 1, 2])),
            top_p=float(rng.choice([1e-9, 0.3, 0.9, 1])),
            top_k=int(rng.choice([0, 1, 40])),
            min_p=float(rng.choice([0, 0.1])),
            logit_bias={3: 5.0, 999: -1.0} if rng.random() < 0.3 else None,
            seed=int(rng.integers(2**63)),
        )
        for _ in range(32)
    ]
    kinds = [
        rows,
        [replace(row, top_k=0) for row in rows if row.temperature],
        [replace(row, temperature=0) for row in rows],
    ]

    def tokens() -> list[list[int]]:
        drawn = []
        for kind in kinds:
            seen = np.zeros((len(kind), 1000), np.int32)
            arguments = logits[: len(kind)], Sampling.of(kind), np.arange(len(kind)), seen > 0, seen
            drawn.append(jax.jit(lambda *arguments: sampling._sample(*arguments))(*arguments).tolist())
        return drawn

    expected = tokens()
    request.getfixturevalue("as_on_a_gpu")
    assert tokens() == expected
    assert expected[0][5] == 1000 and len({*expected[0]}) > 15


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("vocab_size", [7, 16, 17, 20, 500])
def test_top_logprobs_of_a_gpu(vocab_size: int) -> None:
    """Of equal tokens, the lowest ids come first."""
    logits = np.random.default_rng(vocab_size).integers(0, 9, (3, vocab_size)).astype(np.float32)
    found = sampling.wanted_logprobs(logits, np.zeros(3, np.int32), wanted=np.array([True, False, False]))
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :20]
    assert found.top_ids.tolist() == best.tolist()
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.top, np.take_along_axis(logprobs, best, 1), rtol=1e-5, atol=1e-5)


def test_filters_of_a_large_vocabulary() -> None:
    """Sums of 128,256 f32 numbers still find the right set, but for tokens that weigh less than rounding."""
    logits = np.random.default_rng(0).normal(size=128256).astype(np.float32)
    for top_p in (0.5, 0.9, 0.999):
        kept = np.count_nonzero(filtered(logits, replace(OFF, top_p=top_p)))
        low = np.count_nonzero(reference_probs(logits, replace(OFF, top_p=top_p - 5e-6)))
        high = np.count_nonzero(reference_probs(logits, replace(OFF, top_p=top_p + 5e-6)))
        assert low <= kept <= high
    for top_k in (1, 1000, 128255):
        kept = filtered(logits, replace(OFF, top_k=top_k))
        assert (kept > 0).tolist() == (reference_probs(logits, replace(OFF, top_k=top_k)) > 0).tolist()
