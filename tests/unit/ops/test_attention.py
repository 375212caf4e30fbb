"""Attention and the cache's writing, against sums written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamajax import ops

from ... import tiny_model

strict_promotion = tiny_model.strict_promotion


def reference_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, start: int) -> np.ndarray:
    """One query of one head at a time, over the positions up to its own."""
    T, K, G, H = query.shape
    mixed = np.zeros((T, K, G, H))
    for t, k, g in np.ndindex(T, K, G):
        visible = start + t + 1
        scores = key[k, :visible].astype(np.float64) @ query[t, k, g].astype(np.float64) / H**0.5
        weights = np.exp(scores - scores.max())
        mixed[t, k, g] = weights / weights.sum() @ value[k, :visible].astype(np.float64)
    return mixed


# T, K, G, H, S. Each is a program: few.
SHAPES = [(1, 1, 1, 2, 1), (1, 3, 2, 8, 33), (2, 2, 4, 4, 17), (5, 1, 3, 16, 5), (9, 2, 1, 6, 40), (7, 3, 3, 2, 11)]
_attention = jax.jit(ops.attention)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), st.integers(0, 40), st.sampled_from([0.1, 1, 30]), st.integers(0, 2**32))
def test_attention(shape: tuple[int, ...], start: int, scale: float, seed: int) -> None:
    T, K, G, H, S = shape
    start = min(start, S - T)
    rng = np.random.default_rng(seed)
    query = (rng.normal(size=(T, K, G, H)) * scale).astype(np.float32)
    key, value = rng.normal(size=(2, K, S, H)).astype(np.float32)
    # What stands after the last query's position is not read.
    key[:, start + T :], value[:, start + T :] = 1e4, 1e6
    found = _attention(query, key, value, start)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, reference_attention(query, key, value, start), rtol=1e-4, atol=1e-4)


def test_attention_by_hand() -> None:
    """Scores 0 and ln 3 at two positions weigh their values 1 to 3; the first position sees itself only."""
    query = np.array([[1.0, 0.0], [2**0.5, 0.0]], np.float32).reshape(2, 1, 1, 2)
    key = np.array([[[0.0, 0.0], [np.log(3), 5.0], [9.0, 9.0]]], np.float32)
    value = np.array([[[4.0, 8.0], [0.0, -8.0], [100.0, 100.0]]], np.float32)
    found = _attention(query, key, value, 0)
    np.testing.assert_allclose(np.asarray(found).reshape(2, 2), [[4, 8], [1, -4]], rtol=1e-5)


def test_heads_of_a_group_share_keys_and_values() -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 5, 4)).astype(np.float32)
    found = np.asarray(_attention(query, key, value, 3))
    for k in range(2):
        for g in range(3):
            alone = _attention(query[:, k : k + 1, g : g + 1], key[k : k + 1], value[k : k + 1], 3)
            np.testing.assert_allclose(found[:, k : k + 1, g : g + 1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("T", [1, 7])
def test_attention_of_a_bf16_cache(T: int) -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(T, 2, 3, 8)).astype(np.float32)
    key, value = jnp.asarray(rng.normal(size=(2, 2, 30, 8)), jnp.bfloat16)
    found = _attention(query, key, value, 20)
    assert found.dtype == jnp.float32
    expected = reference_attention(query, np.asarray(key, np.float32), np.asarray(value, np.float32), 20)
    np.testing.assert_allclose(found, expected, atol=0.03)


@pytest.mark.parametrize("shape", [(1, 2, 3, 4, 30), (5, 1, 2, 6, 12)])
def test_vmap_is_a_batch(shape: tuple[int, ...]) -> None:
    T, K, G, H, S = shape
    rng = np.random.default_rng(0)
    query = rng.normal(size=(4, T, K, G, H)).astype(np.float32)
    new = rng.normal(size=(4, K, T, H)).astype(np.float32)
    key, value = rng.normal(size=(2, 4, K, S, H)).astype(np.float32)
    start = np.array([0, S - T, 3, 1], np.int32)
    written = np.asarray(jax.vmap(ops.write)(key, new, start))
    found = jax.vmap(ops.attention)(query, written, value, start)
    for b in range(4):
        expected = key[b].copy()
        expected[:, start[b] : start[b] + T] = new[b]
        assert written[b].tolist() == expected.tolist()
        np.testing.assert_allclose(
            found[b], reference_attention(query[b], expected, value[b], start[b]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_write_puts_positions_into_the_cache(start: int, dtype: jnp.dtype) -> None:
    cache = jnp.arange(2 * 8 * 4).reshape(2, 8, 4).astype(dtype)
    # Thirds are exact in no dtype: what is written is rounded to the cache's.
    new = -np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4) / 3
    found = ops.write(cache, new, jnp.int32(start))
    assert found.dtype == dtype
    expected = np.array(cache)
    expected[:, start : start + 3] = new.astype(expected.dtype)
    assert found.tolist() == expected.tolist()
