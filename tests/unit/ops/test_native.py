"""The native products, for each format and instruction set, against numpy in float64."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from llamajax import kernels, ops
from llamajax.errors import CheckpointError
from llamajax.formats import FORMATS, MOVED_FORMATS, PACKED_FORMATS, PackedFormat
from llamajax.kernels import INSTRUCTION_SETS
from llamajax.ops import native
from llamajax.ops.packed import PackedWeight, pack, pack_dense, packed_layers
from llamajax.ops.quants import split
from llamajax.ops.stacked import alone

from ... import tiny_model
from .test_quants import random_blocks

strict_promotion = tiny_model.strict_promotion

pytestmark = pytest.mark.skipif(
    not native.available() or jax.default_backend() != "cpu", reason="no native kernels here"
)

DENSE = {name: jnp.dtype(format.numbers) for name, format in PACKED_FORMATS.items() if format.is_dense}
# What a format's K must be a multiple of; dense rows may have any length.
UNIT = {name: format.weights for name, format in FORMATS.items()} | dict.fromkeys(DENSE, 37)
# What keeping a weight costs, relatively to the row's largest: scales are rounded to f16, or to integers of 15 bits.
MOVED_BLOCKS = [name for name in MOVED_FORMATS if name in FORMATS]
ROUNDED = {
    name: 2.0**-12 if format.has_steps else 2.0**-11 if name.endswith("_k") else 0.0
    for name, format in PACKED_FORMATS.items()
}


@pytest.fixture(params=INSTRUCTION_SETS, scope="module")
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    native.limit(request.param)
    if request.param not in native.implementation():
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.limit(INSTRUCTION_SETS[0])


def random_weight(format: str, N: int, K: int, seed: int = 0) -> tuple[PackedWeight, np.ndarray]:
    """Packed, and as the gguf package dequantizes it; of scales that a model could have."""
    if format in DENSE:
        numbers = np.random.default_rng(seed).standard_normal((N, K)).astype(DENSE[format])
        return jax.jit(pack_dense)(numbers), numbers.astype(float)
    blocks = random_blocks(format, N, K // UNIT[format], seed=seed, small=True)
    weight = gguf.dequantize(blocks, GGMLQuantizationType[format.upper()])
    return _packed(blocks, format), weight.astype(float)


@partial(jax.jit, static_argnums=1)
def _packed(blocks: jax.Array, format: str) -> PackedWeight:
    return pack(split(blocks, format), format)


def rounded(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Each block of a row to multiples of its largest magnitude / 127, and these steps."""
    x = x.reshape(len(x), -1, block)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    inverse = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), 0).astype(x.dtype)
    step = np.repeat(largest.astype(float) / 127, block, axis=-1)
    return (np.rint(x * inverse) * step).reshape(len(x), -1), step.reshape(len(x), -1)


def taken(x: np.ndarray, format: PackedFormat, instruction_set: str) -> tuple[np.ndarray, np.ndarray]:
    """x as a product takes it, and the steps between such numbers."""
    if not format.is_dense:
        return rounded(x, format.block)
    if format.numbers == "bfloat16" and instruction_set in ("amx", "avx512bf16"):
        return x.astype(jnp.bfloat16).astype(float), np.abs(x) * 2.0**-8
    return x.astype(float), np.zeros(x.shape)


def slack(x: np.ndarray, weight: np.ndarray, format: str) -> np.ndarray:
    """How far a product may be from the exact one: sums are in f32, and K formats' scales are rounded."""
    precision = 2 * ROUNDED[format] + 1e-5
    return precision * np.abs(x).sum(axis=1, keepdims=True) * np.abs(weight).max(axis=1)


@pytest.mark.parametrize("format", PACKED_FORMATS)
def test_packed_weights_are_the_files(format: str) -> None:
    packed, weight = random_weight(format, 37, 2 * UNIT[format])
    assert packed.shape == weight.shape
    found = jax.jit(PackedWeight.rows)(packed, jnp.arange(37))
    # Scale and offset are rounded, and cancel where the weight is near zero.
    assert (
        np.abs(found - weight) <= ROUNDED[format] * np.abs(weight).max(axis=1, keepdims=True) + 1e-6 * abs(weight)
    ).all()


@pytest.mark.parametrize("format", MOVED_BLOCKS)
@given(st.permutations(range(35)), st.integers(1, 3))
def test_moved_rows_are_packed_ones(format: str, order: list[int], num_blocks: int) -> None:
    layers = [random_blocks(format, 35, num_blocks, seed=seed) for seed in range(3)]
    parts = ([rows[:20], rows[20:]] for rows in layers)
    data = kernels.pack(parts, ["a", "b", "c"], np.array(order[:33]), format)
    for found, rows in zip(packed_layers(data, (33, 32 * num_blocks), format), layers, strict=True):
        expected = _packed(rows[order[:33]], format)
        assert found.shape == expected.shape == (33, 32 * num_blocks)
        np.testing.assert_array_equal(alone(found.data)[:2], expected.data[:2])
        np.testing.assert_array_equal(found.rows(jnp.array([32])), expected.rows(jnp.array([32])))


@pytest.mark.parametrize("format", DENSE)
@given(st.permutations(range(35)), st.integers(1, 3))
def test_moved_numbers_are_packed_ones(format: str, order: list[int], num_blocks: int) -> None:
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal((35, 32 * num_blocks)).astype(DENSE[format]) for _ in range(3)]
    parts = ([rows[:20], rows[20:]] for rows in layers)
    data = kernels.pack(parts, ["a", "b", "c"], np.array(order[:33]), format)
    for found, rows in zip(packed_layers(data, (33, 32 * num_blocks), format), layers, strict=True):
        expected = jax.jit(pack_dense)(rows[order[:33]])
        assert (found.shape, found.name) == (expected.shape, expected.name) == ((33, 32 * num_blocks), format)
        np.testing.assert_array_equal(alone(found.data), expected.data)


@pytest.mark.parametrize("format", MOVED_BLOCKS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_moved_scales_and_offsets_must_be_finite(format: str, value: float) -> None:
    size = FORMATS[format].bytes
    for offset in (0, 2) if format == "q4_1" else (0,):
        blocks = random_blocks(format, 20, 3, seed=1)
        at = 2 * size + offset
        blocks[17, at : at + 2] = np.array([value], "<f2").view(np.uint8)
        layers = [[random_blocks(format, 20, 3, seed=0)], [blocks]]
        with pytest.raises(CheckpointError, match=r"^second has a scale that is not finite"):
            kernels.pack(layers, ["first", "second"], np.arange(20), format)


@pytest.mark.parametrize("format", PACKED_FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_a_row_with_a_number_that_is_not_finite_shows_it(instruction_set: str, format: str, value: float) -> None:
    packed, _ = random_weight(format, 37, 2 * UNIT[format])
    K = packed.shape[1]
    x = np.random.default_rng(0).standard_normal((7, K)).astype(np.float32)
    expected = np.asarray(packed.linear(x))
    for row, column in ((0, 0), (3, 13), (6, K - 1), (5, 16)):
        broken = x.copy()
        broken[row, column] = value
        found = np.asarray(packed.linear(broken))
        assert np.isnan(found[row]).all() or (format in DENSE and not np.isfinite(found[row]).any())
        np.testing.assert_array_equal(np.delete(found, row, 0), np.delete(expected, row, 0))


@pytest.mark.parametrize("format", PACKED_FORMATS)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_linear(instruction_set: str, format: str, data: st.DataObject) -> None:
    draw = data.draw
    M = draw(st.sampled_from([1, 2, 3, 5, 6, 7, 13, 17, 40, 70]))
    blocks, N = draw(st.sampled_from([(1, 1), (1, 16), (3, 37), (40, 70)]))
    packed, weight = random_weight(format, N, blocks * UNIT[format], seed=draw(st.integers(0, 2**32)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    x = (rng.standard_normal((M, packed.shape[1])) * 10.0 ** rng.uniform(-3, 3, (M, 1))).astype(np.float32)
    x[M // 2] *= M == 1
    residual = rng.standard_normal((M, N)).astype(np.float32) if draw(st.booleans()) else None
    quantized, _ = taken(x, packed.format, instruction_set)
    expected = quantized @ weight.T + (0 if residual is None else residual)
    found = jax.jit(PackedWeight.linear)(packed, x, residual=residual)
    assert (np.abs(found - expected) <= slack(quantized, weight, format) + 1e-6).all()


@pytest.mark.parametrize("format", ["q4_1", "q8_0", "q6_k", *DENSE])
@settings(deadline=None, max_examples=10)
@given(st.sampled_from([1, 3, 6, 20, 70]), st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.integers(0, 2**32))
def test_norm_and_gate(instruction_set: str, format: str, M: int, blocks: int, groups: int, seed: int) -> None:
    packed, weight = random_weight(format, 32 * groups, blocks * UNIT[format], seed)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((M, packed.shape[1])).astype(np.float32) * 7
    norm = ops.Norm(rng.uniform(0.5, 2, x.shape[1]).astype(np.float32), 1e-5)
    normed = x / np.sqrt(np.square(x.astype(float)).mean(axis=1, keepdims=True) + norm.eps) * norm.weight
    quantized, step = taken(normed, packed.format, instruction_set)
    y = quantized @ weight.T
    # A number that is nearly half way between two steps may be rounded to either.
    either = (step[:, None] * np.abs(weight)).max(axis=-1) + slack(quantized, weight, format)
    found = jax.jit(lambda x, w: w.linear(x, norm))(x, packed)
    assert (np.abs(found - y) <= either).all()
    gate, up = np.split(y, 2, axis=1)
    gate_slack, up_slack = np.split(either, 2, axis=1)
    silu = gate / (1 + np.exp(-np.clip(gate, -500, None)))
    found = jax.jit(lambda x, w: w.gated_linear(x, norm))(x, packed)
    # silu's slope is at most 1.1.
    assert (np.abs(found - silu * up) <= 1.1 * gate_slack * (np.abs(up) + up_slack) + np.abs(silu) * up_slack).all()


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q8_0", "q2_k", "q6_k", *DENSE])
def test_rows_do_not_depend_on_their_neighbours(instruction_set: str, format: str) -> None:
    """Nor on whether there are so many that 4-bit weights are unpacked first, a part after the other."""
    packed, _ = random_weight(format, 64, 2048)
    x = np.random.default_rng(0).standard_normal((150, 2048)).astype(np.float32)
    norm = ops.Norm(jnp.ones(2048), 1e-5)
    product = jax.jit(lambda x: (packed.linear(x, norm), packed.gated_linear(x, norm)))
    together = [np.asarray(y) for y in product(x)]
    for rows in (1, 2, 3, 5, 9, 17, 64, 75):
        for found, expected in zip(product(x[-rows:]), together, strict=True):
            np.testing.assert_array_equal(found, expected[-rows:])
    batched = jax.jit(jax.vmap(product))(x.reshape(30, 5, -1))
    for found, expected in zip(batched, together, strict=True):
        np.testing.assert_array_equal(np.asarray(found).reshape(150, -1), expected)


@pytest.mark.parametrize("format", ["q4_1", "q6_k", *DENSE])
def test_stacked_layers_are_read_in_place(instruction_set: str, format: str) -> None:
    weights = [random_weight(format, 32, 2 * UNIT[format], seed)[0] for seed in range(3)]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, weights[0].shape[1])).astype(np.float32)
    norms = rng.uniform(0.5, 2, (3, x.shape[1])).astype(np.float32)
    product = jax.jit(
        lambda weight, norm: (
            weight.linear(x, ops.Norm(norm, 1e-5)),
            weight.gated_linear(x, ops.Norm(norm, 1e-5)),
            weight.linear(x),
            weight.rows(jnp.array([0, 31])),
        )
    )
    expected = [product(weight, norm) for weight, norm in zip(weights, norms, strict=True)]
    stacked, norms = native.stack(iter(weights), 3), native.stack(iter(norms), 3)
    assert stacked[0].data.layers is stacked[2].data.layers
    for weight, norm, ys in zip(stacked, norms, expected, strict=True):
        assert weight.shape == weights[0].shape
        for found, y in zip(product(weight, norm), ys, strict=True):
            np.testing.assert_array_equal(found, y)
    assert product._cache_size() == 2  # one alone, one for all layers


def test_a_layer_that_is_not_there_is_an_error() -> None:
    weight, norm = (random_weight("q4_0", 32, 64)[0], np.ones(64, np.float32))
    (weight, _), (norm, _) = native.stack(iter([weight] * 2), 2), native.stack(iter([norm] * 2), 2)
    product = jax.jit(lambda weight, norm: weight.linear(jnp.ones((1, 64)), ops.Norm(norm, 1e-5)))
    for layer in (-1, 2, -(2**31), 2**31 - 1):
        elsewhere = replace(norm, layer=np.int32(layer))
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"llamajax_linear: layer {layer} of 2"):
            product(weight, elsewhere).block_until_ready()
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"llamajax_linear: layer {layer} of 2"):
            product(replace(weight, data=replace(weight.data, layer=np.int32(layer))), norm).block_until_ready()


def test_what_does_not_fit_is_an_error() -> None:
    packed, _ = random_weight("q4_0", 32, 64)
    for x in (jnp.zeros((1, 32)), jnp.zeros((1, 96))):
        with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
            jax.block_until_ready(packed.linear(x))
    wrong = PackedWeight(packed.data[..., 1:], (32, 64), "q4_0")
    with pytest.raises(jax.errors.JaxRuntimeError, match="do not fit"):
        jax.block_until_ready(wrong.linear(jnp.zeros((1, 64))))
    assert PACKED_FORMATS.keys() == FORMATS.keys() | DENSE.keys()


@pytest.mark.parametrize("wanted", ["", "portable"])
def test_portable_code_serves_only_those_who_ask(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("LLAMAJAX_CPU", wanted)
    monkeypatch.setattr(kernels, "instruction_set", lambda library: "portable")
    try:
        library = kernels.library.__wrapped__()
    finally:
        native.limit(INSTRUCTION_SETS[0])
    assert isinstance(library, str) == (wanted == "")
    if isinstance(library, str):
        assert library == "this processor has neither AVX2 nor NEON with dot products"
