"""What sampling keeps of any scores, against sorting and running sums in float64."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llamajax import sampling
from llamajax.sampling import Sampling
from llamajax.types import SamplingParams

from .. import tiny_model
from ..reference_sampling import reference_probs

strict_promotion = tiny_model.strict_promotion

# Rows and vocabulary sizes, around the width of a vector and of a block. Each pair is a program: few.
SHAPES = [(1, 1), (5, 2), (2, 127), (3, 128), (4, 129), (5, 1000)]
# Arithmetic may take subnormal numbers for zeros.
_floats = partial(st.floats, allow_nan=False, allow_infinity=False, allow_subnormal=False, width=32)

filters = st.builds(
    SamplingParams,
    temperature=st.just(1.0),
    top_p=st.just(1.0) | st.sampled_from([0.25, 0.5, 0.9]) | st.floats(1e-6, 1),
    top_k=st.just(0) | st.integers(1, 8) | st.integers(1, 2000),
    min_p=st.just(0.0) | st.floats(0, 1),
)
# Numbers that penalties and temperature leave exact in f32.
exact_params = st.builds(
    replace,
    filters,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    presence_penalty=st.sampled_from([-2.0, 0.0, 0.25]),
    frequency_penalty=st.sampled_from([-0.25, 0.0, 1.0]),
    logit_bias=st.sampled_from([None, {0: -2.0}, {0: 100.0}]),
)
scores = st.one_of(
    _floats(-12, 12),
    _floats(-(2.0**100), 2.0**100),
    st.sampled_from([-0.0, 0.0, 1.0, 1.0 + 2**-20, -50.0, -np.inf]),
)


@st.composite
def rows(
    draw: st.DrawFn,
    elements: st.SearchStrategy[float],
    params: st.SearchStrategy[SamplingParams],
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> tuple:
    B, V = draw(st.sampled_from(shapes))
    # Hypothesis fills an array from few of its own numbers; the rest of a row is like what a model gives.
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        logits = draw(hnp.arrays(np.float32, (B, V), elements=elements))
    else:
        logits = (rng.normal(size=(B, V)) * draw(st.sampled_from([0.1, 1, 4, 100]))).astype(np.float32)
        step = draw(st.sampled_from([0.125, 0.5, 4]))
        logits = np.round(logits / step) * np.float32(step)
    # A model's scores are never all -inf.
    logits[:, draw(st.integers(0, V - 1))] = draw(st.sampled_from([0.0, 3.0]))
    mask, counts = rng.random((B, V)) < 0.3, rng.poisson(0.3, (B, V)).astype(np.int32)
    return logits, [draw(params) for _ in range(B)], mask, counts


def assert_as_reference(found: np.ndarray, logits: np.ndarray, params: SamplingParams, *seen: np.ndarray) -> None:
    """The kept set must be right for top_p and min_p as they are, or moved by no more than f32's rounding."""
    scale = np.abs(logits[np.isfinite(logits)]).max()
    rounding = np.exp(min(4 * np.finfo(np.float32).eps * max(scale / params.temperature, 1), 100))
    fewest = replace(params, top_p=params.top_p * (1 - 3e-6), min_p=min(1, params.min_p * rounding))
    most = replace(params, top_p=min(1, params.top_p * (1 + 1e-7)), min_p=params.min_p / rounding)
    if params.top_p == 1:
        fewest = replace(fewest, top_p=1)
    fewest_probs, most_probs = reference_probs(logits, fewest, *seen), reference_probs(logits, most, *seen)
    probs = found.astype(np.float64) / found.sum(dtype=np.float64)
    assert (probs[fewest_probs > 1e-30] > 0).all(), "a token is missing"
    assert (probs[most_probs == 0] == 0).all(), "a token is kept"
    if ((fewest_probs > 0) == (most_probs > 0)).all():
        np.testing.assert_allclose(probs, most_probs, rtol=1e-4, atol=1e-9)


@jax.jit
def penalized_and_filtered(
    logits: np.ndarray, sampling_params: Sampling, mask: np.ndarray, counts: np.ndarray
) -> jax.Array:
    penalized = sampling._adjusted(logits, sampling_params, mask, counts)
    scaled = penalized / sampling_params.temperature[:, None]
    filters = sampling._Filters.of(sampling_params)
    return jax.lax.switch(filters.kind, sampling._PROBS, scaled, scaled.max(axis=-1), filters)


_sample = jax.jit(sampling.sample)
_exact_scores = st.integers(-128, 128).map(lambda n: n / 8) | st.sampled_from([0.0, 1.0, -np.inf])


@settings(deadline=None, max_examples=150)
@given(rows(_exact_scores, exact_params))
def test_penalties_and_filters(case: tuple) -> None:
    logits, params, mask, counts = case
    found = penalized_and_filtered(logits, Sampling.of(params), mask, counts)
    for row in zip(np.asarray(found), logits, params, mask, counts, strict=True):
        assert_as_reference(*row)


@settings(deadline=None, max_examples=150)
@given(rows(scores, filters))
def test_filters_of_any_scores(case: tuple) -> None:
    logits, params, mask, counts = case
    found = penalized_and_filtered(logits, Sampling.of(params), mask & False, counts * 0)
    for row in zip(np.asarray(found), logits, params, strict=True):
        assert_as_reference(*row)


@settings(deadline=None, max_examples=60)
@given(rows(_exact_scores, exact_params, [(1, 97)]))
def test_greedy_and_drawn_tokens_are_kept_ones(case: tuple) -> None:
    logits, params, mask, counts = case
    for rows_params in (params, [replace(row, temperature=0.0) for row in params]):
        position = np.arange(len(params), dtype=np.int32)
        tokens = np.asarray(_sample(logits, Sampling.of(rows_params), position, mask, counts))
        for token, row in zip(tokens, zip(logits, rows_params, mask, counts, strict=True), strict=True):
            kept = reference_probs(row[0], replace(row[1], top_p=min(1, row[1].top_p + 1e-6)), *row[2:])
            assert kept[token] > 0
