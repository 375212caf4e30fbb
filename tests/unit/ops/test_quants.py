"""Dequantization, bit for bit against the gguf package's."""

from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from llamajax.formats import FORMATS
from llamajax.ops.quants import dequantize

# Where a block has its f16 fields (ggml-common.h); random bytes there could be infinite or NaN.
F16_FIELDS = {
    "q4_0": [0],
    "q4_1": [0, 2],
    "q5_0": [0],
    "q5_1": [0, 2],
    "q8_0": [0],
    "q2_k": [80, 82],
    "q3_k": [108],
    "q4_k": [0, 2],
    "q5_k": [0, 2],
    "q6_k": [208],
    "iq4_nl": [0],
}
# The gguf package quantizes to these only.
QUANTIZED = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]


def assert_same_bits(blocks: np.ndarray, format: str) -> None:
    expected = gguf.dequantize(blocks, GGMLQuantizationType[format.upper()])
    assert np.isfinite(expected).all()
    for run in (dequantize, jax.jit(dequantize, static_argnums=1)):
        actual = np.asarray(run(jnp.asarray(blocks), format))
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def random_blocks(format: str, *blocks: int, seed: int = 0, small: bool = False) -> np.ndarray:
    """Blocks of any bits, with finite numbers; `small`: with scales and offsets of about 0.01."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (*blocks, FORMATS[format].bytes), dtype=np.uint8)
    for field in F16_FIELDS[format]:
        # Every finite f16: both signs, zeros, subnormals. An exponent of all ones would be infinite or NaN.
        high = data[..., field + 1]
        high[(high & 0x7C) == 0x7C] ^= 0x40
        if small:
            numbers = rng.uniform(-0.01, 0.01, high.shape).astype(np.float16)
            data[..., field : field + 2] = numbers[..., None].view(np.uint8)
    return data.reshape(*blocks[:-1], -1)


def test_formats_are_ggmls() -> None:
    for name, (ggml_type, weights, size) in FORMATS.items():
        assert GGMLQuantizationType[name.upper()] == ggml_type
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)] == (weights, size)


@pytest.mark.parametrize("format", FORMATS)
def test_random_blocks(format: str) -> None:
    assert_same_bits(random_blocks(format, 64, 40), format)


@pytest.mark.parametrize("format", QUANTIZED)
def test_quantized_weights(format: str) -> None:
    weights = np.random.default_rng(1).standard_normal((48, 576), dtype=np.float32)
    blocks = gguf.quantize(weights, GGMLQuantizationType[format.upper()])
    assert_same_bits(blocks, format)
    # The quants are in the right places, whatever the gguf package says: near the weights they came from.
    error = np.abs(np.asarray(dequantize(jnp.asarray(blocks), format)) - weights).max()
    assert error < {"q4_0": 0.6, "q4_1": 0.3, "q5_0": 0.3, "q5_1": 0.15, "q8_0": 0.02}[format]


@pytest.mark.parametrize("format", FORMATS)
def test_leading_axes(format: str) -> None:
    blocks = jnp.asarray(random_blocks(format, 2, 3, 5))
    whole = np.asarray(dequantize(blocks, format))
    assert whole.shape == (2, 3, 5 * FORMATS[format].weights)
    one_row = jax.vmap(jax.vmap(partial(dequantize, format=format)))(blocks)
    np.testing.assert_array_equal(whole, np.asarray(one_row))


def test_iq4_nl_by_hand() -> None:
    # Scale 0.5 (f16 0x3800); byte i holds weight i in its low half and weight i + 16 in its high half.
    block = np.array([0x00, 0x38, *((15 - i) << 4 | i for i in range(16))], np.uint8)
    values = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    expected = 0.5 * np.array([*values, *reversed(values)])
    np.testing.assert_array_equal(np.asarray(dequantize(jnp.asarray(block), "iq4_nl")), expected.astype(np.float32))


def test_q4_0_by_hand() -> None:
    # Scale 0.5 (f16 0x3800); byte i holds weight i in its low half and weight i + 16 in its high half.
    block = np.array([0x00, 0x38, *((15 - i) << 4 | i for i in range(16))], np.uint8)
    expected = 0.5 * np.array([*range(-8, 8), *range(7, -9, -1)])
    np.testing.assert_array_equal(np.asarray(dequantize(jnp.asarray(block), "q4_0")), expected.astype(np.float32))
