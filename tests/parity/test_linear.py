"""Products with dense and int8 weights against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from llamajax import ops
from llamajax.ops.linear import MANY_TOKENS

from .. import tiny_model

strict_promotion = tiny_model.strict_promotion

ROWS = (1, 2, 31, 32, 100)
ON_CPU = jax.default_backend() == "cpu"


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((48, 96)).astype(np.float32)


def product(x: jax.Array, weight: ops.Weight) -> jax.Array:
    return weight.product(x)


def inputs(rows: int) -> np.ndarray:
    """Rows of very different sizes, one of them zero."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 96)) * 10.0 ** rng.uniform(-4, 4, (rows, 1))
    x[rows // 2] *= rows == 1
    return x.astype(np.float32)


def magnitude(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Sums of the products' absolute values: what rounding is relative to."""
    return np.abs(x.astype(float)) @ np.abs(weight.astype(float)).T


def test_quantized_rows_are_within_half_a_step(weight: np.ndarray) -> None:
    weight = weight * np.float32(10.0) ** np.arange(-24, 24, dtype=np.float32)[:, None]
    weight[7] = 0
    quantized = ops.quantize_int8(jnp.asarray(weight))
    assert quantized.values.dtype == jnp.int8
    values, scale = np.asarray(quantized.values, float), np.asarray(quantized.scale, float)
    half = np.abs(weight).max(axis=1).astype(float) / 127 / 2
    assert (np.abs(values * scale[:, None] - weight) <= half[:, None] * (1 + 1e-4)).all()
    assert not (values[7] * scale[7]).any()


@pytest.mark.parametrize("rows", ROWS)
def test_int8(weight: np.ndarray, rows: int) -> None:
    x, quantized = inputs(rows), ops.quantize_int8(jnp.asarray(weight))
    kept = np.asarray(quantized.values, float) * np.asarray(quantized.scale, float)[:, None]
    error = np.abs(jax.jit(product)(x, quantized) - x.astype(float) @ kept.T)
    if rows < MANY_TOKENS and ON_CPU:
        # Activations in two bytes, precise to 1 / (127 * 254 * 2) of the row's largest.
        bound = np.abs(x).max(axis=1, keepdims=True) * np.abs(kept).sum(axis=1) / (127 * 254 * 2)
    else:
        bound = magnitude(x, kept) * 2.0**-8  # activations in bf16
    assert (error <= bound * 1.01 + magnitude(x, kept) * 1e-6).all()


@pytest.mark.skipif(not ON_CPU, reason="elsewhere activations are bf16 at any number of rows")
def test_int8_rows_do_not_depend_on_their_neighbours(weight: np.ndarray) -> None:
    x, quantized = inputs(MANY_TOKENS - 1), ops.quantize_int8(jnp.asarray(weight))
    linear = jax.jit(product)
    together = np.asarray(linear(x, quantized))
    batched = np.asarray(jax.jit(jax.vmap(product, in_axes=(0, None)))(x[:, None], quantized))
    pairs = np.asarray(jax.jit(jax.vmap(product, in_axes=(0, None)))(x[:-1].reshape(-1, 2, 96), quantized))
    np.testing.assert_array_equal(batched[:, 0], together)
    np.testing.assert_array_equal(pairs.reshape(-1, 48), together[:-1])
    for row in range(len(x)):
        np.testing.assert_array_equal(linear(x[row : row + 1], quantized)[0], together[row])


@pytest.mark.parametrize(
    ("dtype", "precision"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2.0**-8), (jnp.float16, 2.0**-11)]
)
@pytest.mark.parametrize("rows", ROWS)
def test_dense(weight: np.ndarray, rows: int, dtype: jnp.dtype, precision: float) -> None:
    """Only the activations are rounded, to the weight's dtype; sums are in f32."""
    x, kept = np.clip(inputs(rows), -6e4, 6e4), jnp.asarray(weight, dtype)
    x[np.abs(x) < 1e-3] = 0  # f16 has few digits there
    found = jax.jit(product)(x, ops.Dense(kept))
    assert found.dtype == jnp.float32
    exact = x.astype(float) @ np.asarray(kept, float).T
    assert (np.abs(found - exact) <= magnitude(x, np.asarray(kept, float)) * (precision * 1.01 + 1e-6)).all()


def test_embed(weight: np.ndarray) -> None:
    ids = jnp.array([3, 0, 47, 3])
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        table = jnp.asarray(weight, dtype)
        np.testing.assert_array_equal(ops.Dense(table).rows(ids), np.asarray(table)[np.asarray(ids)].astype(np.float32))
    quantized = ops.quantize_int8(jnp.asarray(weight))
    rows = np.asarray(quantized.values)[ids] * np.asarray(quantized.scale)[ids, None]
    np.testing.assert_array_equal(quantized.rows(ids), rows)


def test_dense_products_have_derivatives(weight: np.ndarray) -> None:
    x, kept, norm = jnp.asarray(inputs(3) / 1e4), jnp.asarray(weight), ops.Norm(jnp.linspace(1, 2, 96), 1e-5)
    products = (
        product,
        lambda x, w: w.linear(x, norm, residual=x[:, :48]),
        lambda x, w: w.gated_linear(x, norm),
        jax.vmap(lambda x, w: w.product(x[None]), in_axes=(0, None)),
    )
    for way in products:
        check_grads(way, (x, ops.Dense(kept)), order=1, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_embedding_has_a_derivative(weight: np.ndarray, dtype: jnp.dtype) -> None:
    ids, gains = jnp.array([3, 0, 3]), jnp.arange(1.0, 4.0)[:, None]
    found = jax.grad(lambda table: (gains * ops.Dense(table).rows(ids)).sum())(jnp.asarray(weight, dtype))
    expected = np.zeros(48)
    expected[[0, 3]] = 2, 1 + 3
    np.testing.assert_array_equal(np.asarray(found, float), np.broadcast_to(expected[:, None], found.shape))
