"""Quantization, against the gguf package's where it has one."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from llamajax.ops.packed import pack
from llamajax.ops.quantize import QUANTIZABLE, quantize
from llamajax.ops.quants import split

from ... import tiny_model

strict_promotion = tiny_model.strict_promotion


def weights() -> np.ndarray:
    """Rows of very different sizes, zeros, and numbers half way between two quants."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 512)) * 10.0 ** rng.uniform(-3, 1, (24, 1))
    weight[3] = 0
    weight[4, 100:] = 0
    weight[5] = np.arange(512) % 64 - 31.5
    return weight.astype(np.float32)


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
def test_as_the_gguf_package_does(format: str) -> None:
    stored = gguf.quantize(weights(), GGMLQuantizationType[format.upper()])
    expected = split(jnp.asarray(stored), format)
    for found, wanted in zip(jax.tree.leaves(quantize(weights(), format)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_q4_k_is_better_than_the_plain_rounding_of_each_group() -> None:
    weight = weights()
    groups = weight.reshape(24, -1, 32).astype(float)
    low = np.minimum(groups.min(axis=-1, keepdims=True), 0)
    step = np.maximum(groups.max(axis=-1, keepdims=True) - low, 1e-30) / 15
    plain = (np.rint((groups - low) / step) * step + low).reshape(weight.shape)
    found = np.asarray(jax.jit(quantize, static_argnums=1)(weight, "q4_k").dequantized())
    errors = [np.square(x - weight).sum(axis=1) ** 0.5 for x in (found, plain)]
    # Scales of 6 bits cost what the search wins, or less; normal numbers are the hardest.
    assert (errors[0] <= 1.1 * errors[1] + 1e-9).all()
    assert np.median(errors[0] / (errors[1] + 1e-30)) < 1
    assert not found[3].any()


def test_q4_k_keeps_its_own_weights() -> None:
    """What was quantized once, and has all sixteen quants, stays as it is."""
    rng = np.random.default_rng(1)
    quants = np.stack([rng.permutation(np.repeat(np.arange(16), 2)) for _ in range(16)]).reshape(2, 8, 32)
    scale, minimum = rng.integers(20, 64, (2, 8, 1)) * 2.0**-10, rng.integers(20, 64, (2, 8, 1)) * 2.0**-8
    scale[:, 0], minimum[:, 0] = 63 * 2.0**-10, 63 * 2.0**-8
    weight = (scale * quants - minimum).reshape(2, 256).astype(np.float32)
    np.testing.assert_allclose(quantize(weight, "q4_k").dequantized(), weight, atol=1e-6)


@pytest.mark.parametrize("format", QUANTIZABLE)
def test_it_can_be_packed(format: str) -> None:
    parts = quantize(weights(), format)
    rows = pack(parts, format).rows(jnp.arange(24))
    np.testing.assert_allclose(rows, parts.dequantized(), rtol=2.0**-10, atol=2.0**-10 * np.abs(weights()).max())
