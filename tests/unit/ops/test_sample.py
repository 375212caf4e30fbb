"""The native sampler, of each instruction set, against probabilities in float64, XLA's draws, and by hand."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamajax import sampling
from llamajax.ops import native
from llamajax.sampling import Sampling
from llamajax.types import SamplingParams

from ... import tiny_model
from ...reference_sampling import reference_probs
from .test_native import instruction_set

__all__ = ["instruction_set"]

strict_promotion = tiny_model.strict_promotion

pytestmark = pytest.mark.skipif(
    not native.available() or jax.default_backend() != "cpu", reason="no native kernels here"
)

OFF = SamplingParams(temperature=1, top_p=1)
NUM_DRAWS = 512
_native = jax.jit(native.sample)


def options(rows: Sequence[SamplingParams], uniform: np.ndarray) -> np.ndarray:
    columns = [
        (p.temperature, p.min_p, p.top_k, p.top_p, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        for p in rows
    ]
    return np.concatenate([np.array(columns), uniform[:, None]], axis=1).astype(np.float32)


def drawn_shares(
    logits: np.ndarray, params: SamplingParams, mask: np.ndarray | None = None, counts: np.ndarray | None = None
) -> np.ndarray:
    """How often each token is drawn, by numbers that lie in [0, 1) at equal distances."""
    shape = NUM_DRAWS, len(logits)
    uniform = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    bias = params.logit_bias or {}
    tokens = _native(
        np.broadcast_to(logits, shape).astype(np.float32),
        np.broadcast_to(False if mask is None else mask, shape),
        np.broadcast_to(np.int32(0) if counts is None else counts, shape).astype(np.int32),
        np.broadcast_to(np.array([*bias, -1], np.int32), (NUM_DRAWS, len(bias) + 1)),
        np.broadcast_to(np.array([*bias.values(), 0], np.float32), (NUM_DRAWS, len(bias) + 1)),
        options([params] * NUM_DRAWS, uniform),
    )
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / NUM_DRAWS


def assert_shares(found: np.ndarray, expected: np.ndarray) -> None:
    """Each token has an interval of [0, 1): of the numbers in it, one may be missing or one too many, or rounded."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.1 / NUM_DRAWS)


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_p=st.just(1.0) | st.sampled_from([0.25, 0.5, 0.9]) | st.floats(1e-6, 1),
    top_k=st.just(0) | st.integers(1, 8) | st.integers(1, 2000),
    min_p=st.just(0.0) | st.floats(0, 1),
    repetition_penalty=st.sampled_from([1.0, 0.5, 2.0]),
    presence_penalty=st.sampled_from([0.0, -2.0, 0.25]),
    frequency_penalty=st.sampled_from([0.0, -0.25, 1.0]),
    logit_bias=st.sampled_from([None, {0: -2.0}]),
)


@settings(deadline=None, max_examples=150)
@given(
    count=st.sampled_from([1, 2, 63, 64, 129, 1000]),
    params=params,
    scale=st.sampled_from([0.05, 1, 4, 100]),
    step=st.sampled_from([2**-10, 0.125, 1]),
    seed=st.integers(0, 2**32),
)
def test_shares_of_any_scores(
    instruction_set: str, count: int, params: SamplingParams, scale: float, step: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = np.round(rng.normal(size=count) * scale / step) * step
    logits[rng.random(count) < 0.1] = -np.inf
    logits[rng.integers(count)] = 0
    mask, counts = rng.random(count) < 0.3, rng.poisson(0.3, count)
    found = drawn_shares(logits, params, mask, counts)
    # Sums of f32 may take a token more or less where its mass is top_p's, or its share of the first's min_p.
    near = [
        reference_probs(
            logits, replace(params, top_p=min(1, params.top_p * p), min_p=min(1, params.min_p * m)), mask, counts
        )
        for p in (1 - 3e-6, 1 + 1e-7)
        for m in (1 - 1e-5, 1 + 1e-5)
    ]
    errors = [np.abs(found - expected).max() for expected in near]
    assert_shares(found, near[int(np.argmin(errors))])


@pytest.mark.parametrize(
    ("probs", "changes", "expected"),
    [
        ((0.5, 0.3, 0.2), {"top_p": 1e-45}, (1, 0, 0)),
        ((0.5, 0.3, 0.2), {"top_p": 0.8}, (0.625, 0.375, 0)),
        ((0.5, 0.3, 0.2), {"top_p": 0.81}, (0.5, 0.3, 0.2)),
        ((0.1, 0.4, 0.05, 0.3, 0.15), {"min_p": 0.3, "top_p": 0.82}, (0, 4 / 7, 0, 3 / 7, 0)),
        ((0.1, 0.4, 0.05, 0.3, 0.15), {"top_k": 2, "top_p": 0.57}, (0, 1, 0, 0, 0)),
        ((0.25,) * 4, {"top_k": 2}, (0.5, 0.5, 0, 0)),
        ((0.25,) * 4, {"top_p": 0.51}, (1 / 3, 1 / 3, 1 / 3, 0)),
        ((0.2, 0.2, 0.4, 0.2), {"top_p": 0.7}, (0.25, 0.25, 0.5, 0)),
        ((0.2, 0.2, 0.4, 0.2), {"top_k": 2**31 - 1, "min_p": 1}, (0, 0, 1, 0)),
        ((1, 0, 0), {"top_k": 2}, (1, 0, 0)),
    ],
)
def test_filters_by_hand(instruction_set: str, probs: tuple, changes: dict, expected: tuple) -> None:
    for rest in (0, 1, 124):  # in the same part of the vocabulary, or in another one
        with np.errstate(divide="ignore"):
            logits = np.log((0,) * rest + probs)
        assert_shares(drawn_shares(logits, replace(OFF, **changes)), np.array((0,) * rest + expected))


def test_zeros_of_either_sign_are_equal(instruction_set: str) -> None:
    logits = np.array([-1, -0.0, 0.0, -0.0, 1e-40, -1])
    for changes in ({"top_k": 1}, {"temperature": 0}, {"top_p": 0.01}):
        assert drawn_shares(logits, replace(OFF, **changes)).argmax() == 1
    for zeros in (np.full(63, -0.0), np.where(np.arange(63) % 2, -0.0, 0.0)):
        for changes in ({"top_k": 15}, {"top_p": 15 / 63}):
            assert_shares(drawn_shares(zeros, replace(OFF, **changes)), np.where(np.arange(63) < 15, 1 / 15, 0))


def test_the_draws_are_xla_s(instruction_set: str) -> None:
    """From the same random numbers: tokens differ only where rounding decides, which it does in none of these."""
    rng = np.random.default_rng(3)
    logits = (rng.normal(size=(64, 1000)) * 4).astype(np.float32)
    rows = [
        SamplingParams(
            temperature=float(rng.choice([0, 0.3, 0.6, 1, 2])),
            top_p=float(rng.choice([0.3, 0.9, 1])),
            top_k=int(rng.choice([0, 1, 40])),
            min_p=float(rng.choice([0, 0.1])),
            repetition_penalty=float(rng.choice([1, 1.3])),
            presence_penalty=float(rng.choice([0, 0.5])),
            frequency_penalty=float(rng.choice([0, 0.5])),
            logit_bias={3: 5.0, 999: -1.0} if rng.random() < 0.3 else None,
            seed=int(rng.integers(2**63)),
        )
        for _ in range(64)
    ]
    forbidden = rng.integers(-1, 1000, (64, 20)).astype(np.int32)
    arguments = (
        logits,
        Sampling.of(rows).forbidding(forbidden),
        np.arange(64, dtype=np.int32),
        rng.random((64, 1000)) < 0.1,
        rng.poisson(0.1, (64, 1000)).astype(np.int32),
    )
    found = np.asarray(jax.jit(sampling.sample)(*arguments))
    assert found.tolist() == np.asarray(jax.jit(sampling._sample)(*arguments)).tolist()
    assert len(set(found.tolist())) > 30


def test_scores_that_are_not_numbers_give_no_token(instruction_set: str) -> None:
    logits = np.zeros((4, 97), np.float32)
    logits[1, 96], logits[2, 5], logits[3, 40] = np.nan, np.inf, -np.inf
    none, zero = np.zeros((4, 1), np.int32), np.zeros((4, 1), np.float32)
    for temperature in (0, 1):
        rows = options([replace(OFF, temperature=temperature)] * 4, np.zeros(4))
        tokens = np.asarray(_native(logits, np.zeros((4, 97), bool), np.zeros((4, 97), np.int32), none, zero, rows))
        assert tokens.tolist() == [0, 97, 97, 0]
