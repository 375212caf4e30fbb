"""Thresholds against sums in float64 and by hand."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamajax.ops import threshold

from ... import tiny_model

strict_promotion = tiny_model.strict_promotion


def _threshold(form: Callable) -> Callable:
    """A form of `_threshold`, of numbers: it takes x, weights and needs."""

    @jax.jit
    def places(x: jax.Array, weights: jax.Array, need: jax.Array) -> jax.Array:
        return form(threshold.in_order(x), weights, lambda _: need)

    def numbers(x: np.ndarray, weights: np.ndarray, need: np.ndarray) -> np.ndarray:
        found = np.asarray(places(x, weights, need))
        bits = np.where(found < 0, found ^ 0x7FFFFFFF, found).astype(np.int32)
        return np.where(found <= threshold._FIRST, np.float32(-np.inf), bits.view(np.float32))

    return numbers


FORMS = {"halves": _threshold(threshold._by_halves), "rounds": _threshold(threshold._in_rounds)}
forms = pytest.mark.parametrize("threshold", FORMS.values(), ids=FORMS.keys())
COUNTS = [1, 3, 16, 37, 1000]
SPECIAL = np.array([0, -0.0, 1, -1, np.inf, -np.inf, 3e38, -3e38, 1e-30, -1e-30], np.float32)


@forms
@settings(deadline=None, max_examples=200)
@given(
    count=st.sampled_from(COUNTS),
    scale=st.sampled_from([1e-3, 1, 30]),
    special=st.floats(0, 1),
    share=st.floats(0.001, 1.2),
    ones=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_threshold(
    threshold: Callable, count: int, scale: float, special: float, share: float, ones: bool, seed: int
) -> None:
    """A number of the row: the weights above it do not reach the need, and with its own they do."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((3, count)) < special, rng.choice(SPECIAL, (3, count)), rng.normal(size=(3, count)) * scale)
    x = x.astype(np.float32)
    weights = np.ones_like(x) if ones else rng.random((3, count), np.float32) ** 9
    need = np.maximum(share * weights.sum(axis=1, dtype=float), 1e-30).astype(np.float32)
    found = threshold(x, weights, need)
    for row, w, n, t in zip(x, weights.astype(float), need.astype(float), found, strict=True):
        rounding = 1e-5 * w.sum()
        assert w[row > t].sum() < n + rounding
        if t > -np.inf:
            assert t in row  # the largest threshold is one of the numbers
            assert w[row >= t].sum() >= n - rounding
        else:
            assert w[row > -np.inf].sum() < n + rounding


@forms
def test_threshold_by_hand(threshold: Callable) -> None:
    x = np.array([[1, 3, 2, 3, -np.inf, 0, -0.0, -2]], np.float32)
    weights = np.array([[4, 1, 2, 1, 8, 16, 32, 64]], np.float32)
    for need, expected in [
        (0.5, 3),
        (2, 3),
        (2.1, 2),
        (8, 1),
        (8.1, 0),
        (56, 0),
        (57, -2),
        (121, -np.inf),
        (1e9, -np.inf),
        (0, 3),
        (-1, 3),
    ]:
        assert threshold(x, weights, np.array([need], np.float32)).tolist() == [expected]


@forms
def test_what_is_not_a_number_is_never_at_least_another(threshold: Callable) -> None:
    x = np.array([[1, np.nan, 2, -np.nan]], np.float32)
    assert threshold(x, np.ones_like(x), np.array([2], np.float32)).tolist() == [1]


@forms
def test_rows_are_the_same_alone(threshold: Callable) -> None:
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 5, 999)).astype(np.float32)
    need = np.abs(weights).sum(axis=1) * np.linspace(0.1, 0.9, 5, dtype=np.float32)
    together = threshold(x, np.abs(weights), need)
    alone = [threshold(x[b : b + 1], np.abs(weights[b : b + 1]), need[b : b + 1])[0] for b in range(5)]
    np.testing.assert_array_equal(together, alone)
