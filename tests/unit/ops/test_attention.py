"""Attention over a cache, of each implementation, against sums written out in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamajax import ops
from llamajax.ops import native

from ... import tiny_model

strict_promotion = tiny_model.strict_promotion

LAYERS = 3


def reference(
    qkv: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    start: int,
    layer: int,
    stored: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One query of one head at a time, over the positions up to its own; `stored` is what a cache makes of a row."""
    (T, width), (_, K, _, H) = qkv.shape, keys.shape
    N = width // H - 2 * K
    query, new_key, new_value = np.split(qkv.astype(float).reshape(T, -1, H), [N, N + K], axis=1)

    def rotated(x: np.ndarray, t: int) -> np.ndarray:
        pairs = (x[: H // 2] + 1j * x[H // 2 :]) * (cos[t] + 1j * sin[t])
        return np.concatenate([pairs.real, pairs.imag])

    keys, values, mixed = keys.copy(), values.copy(), np.zeros((T, N, H))
    key, value = keys[layer], values[layer]
    for t in range(T):
        for k in range(K):
            key[k, start + t] = stored(rotated(new_key[t, k], t)).astype(key.dtype)
            value[k, start + t] = stored(new_value[t, k]).astype(value.dtype)
    for t, n in np.ndindex(T, N):
        k, visible = n // (N // K), start + t + 1
        scores = key[k, :visible].astype(float) @ rotated(query[t, n], t) / H**0.5
        weights = np.exp(scores - scores.max())
        mixed[t, n] = weights / weights.sum() @ value[k, :visible].astype(float)
    return mixed.reshape(T, -1), keys, values


def arguments(rng: np.random.Generator, *shape: int, dtype: type = np.float32) -> list[np.ndarray]:
    """Of T tokens, K heads of G queries, heads of H, LAYERS caches of S: all but the start and the layer."""
    T, K, G, H, S = shape
    angles = rng.uniform(0, 7, (T, H // 2))
    numbers = [rng.normal(size=(T, K * (G + 2) * H)), np.cos(angles), np.sin(angles)]
    caches = rng.normal(size=(2, LAYERS, K, S, H)).astype(np.float32)
    return [x.astype(np.float32) for x in numbers] + [x.astype(dtype) for x in caches]


# T, K, G, H, S. Each is a program: few. Heads that are no multiple of 8 are XLA's.
SHAPES = [
    (1, 1, 1, 2, 1),
    (1, 3, 2, 8, 33),
    (2, 2, 4, 8, 17),
    (5, 1, 3, 16, 5),
    (9, 2, 1, 6, 40),
    (1, 2, 5, 24, 200),
    (70, 1, 3, 40, 200),
    (150, 1, 4, 64, 420),
    (13, 3, 1, 64, 130),
    (1, 1, 8, 128, 70),
    (1, 1, 3, 64, 700),
]
layers = st.integers(0, LAYERS - 1)
_attention = jax.jit(ops.attention)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), st.integers(0, 700), st.sampled_from([0.1, 1, 30]), layers, st.integers(0, 2**32))
def test_attention(
    implementation: str, shape: tuple[int, ...], start: int, scale: float, layer: int, seed: int
) -> None:
    T, S = shape[0], shape[-1]
    start = min(start, S - T)
    qkv, cos, sin, key, value = arguments(np.random.default_rng(seed), *shape)
    qkv[:, : -2 * shape[1] * shape[3]] *= np.float32(scale)
    # What stands after the last query's position is not read.
    key[..., start + T :, :], value[..., start + T :, :] = 1e4, 1e6
    expected = reference(qkv, cos, sin, key, value, start, layer)
    found = _attention(qkv, cos, sin, key, value, jnp.int32(start), jnp.int32(layer))
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, wanted, rtol=2e-4, atol=2e-4)


def test_attention_by_hand(implementation: str) -> None:
    """Scores 0 and ln 3 at two positions weigh their values 1 to 3; the first position sees itself only."""
    H = 8
    qkv = np.zeros((2, 3, H), np.float32)
    qkv[0, :, 0] = [1, 0, 4]
    qkv[1, :, 0] = [np.sqrt(H), np.log(3), 0]
    one, zero = np.ones((2, H // 2), np.float32), np.zeros((2, H // 2), np.float32)
    cache = np.full((1, 1, 3, H), 100, np.float32)
    mixed, key, value = _attention(qkv.reshape(2, -1), one, zero, cache, cache, jnp.int32(0), jnp.int32(0))
    np.testing.assert_allclose(np.asarray(mixed)[:, :2], [[4, 0], [1, 0]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(key)[0, 0, :, 0], [0, np.log(3), 100], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(value)[0, 0, :, 0], [4, 0, 100])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@settings(deadline=None, max_examples=30)
@given(st.sampled_from(SHAPES), st.integers(0, 700), st.sampled_from([0.1, 1, 5]), layers, st.integers(0, 2**32))
def test_attention_of_a_cache_of_16_bits(
    implementation: str, dtype: type, shape: tuple[int, ...], start: int, scale: float, layer: int, seed: int
) -> None:
    T, S = shape[0], shape[-1]
    start = min(start, S - T)
    qkv, cos, sin, key, value = arguments(np.random.default_rng(seed), *shape, dtype=dtype)
    qkv[:, : -2 * shape[1] * shape[3]] *= np.float32(scale)
    key[..., start + T :, :], value[..., start + T :, :] = 1e4, 6e4
    mixed, new_key, new_value = _attention(qkv, cos, sin, key, value, jnp.int32(start), jnp.int32(layer))
    assert mixed.dtype == jnp.float32 and new_key.dtype == new_value.dtype == dtype
    expected = reference(qkv, cos, sin, key, value, start, layer)
    # A number nearly half way between two may go to either.
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(new_key, float), expected[1].astype(float), rtol=ulp, atol=1e-7)
    np.testing.assert_array_equal(new_value, expected[2])
    # An error of a score moves as large a part of the values: XLA rounds queries and weights to the cache's dtype, and
    # many queries at once are rounded to 12 bits. Five standard deviations.
    step = ulp if implementation == "xla" or shape[3] % 8 else 1 / 1024
    scores = np.square(qkv).mean() ** 0.5 * scale
    np.testing.assert_allclose(mixed, expected[0], atol=4 * step * (1 + 5 * scores))


def to_int8(x: np.ndarray) -> np.ndarray:
    """Rows of int8: their multiples of a step, which stands after them in f16."""
    step = (np.abs(x).max(-1, keepdims=True) / 127).astype(np.float16)
    multiples = np.divide(x, step, out=np.zeros(x.shape), where=step > 0)
    return np.concatenate([np.clip(np.rint(multiples), -127, 127).astype(np.int8), step.view(np.int8)], axis=-1)


def from_int8(rows: np.ndarray) -> np.ndarray:
    return rows[..., :-2] * np.ascontiguousarray(rows[..., -2:]).view(np.float16).astype(float)


def skip_xla(implementation: str) -> None:
    if implementation == "xla":
        pytest.skip("a cache of int8 is for the native kernels")


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([shape for shape in SHAPES if shape[3] % 8 == 0]),
    st.integers(0, 700),
    st.sampled_from([0.1, 1, 5]),
    layers,
    st.integers(0, 2**32),
)
def test_attention_of_a_cache_of_int8(
    implementation: str, shape: tuple[int, ...], start: int, scale: float, layer: int, seed: int
) -> None:
    skip_xla(implementation)
    T, S = shape[0], shape[-1]
    start = min(start, S - T)
    qkv, cos, sin, key, value = arguments(np.random.default_rng(seed), *shape)
    qkv[:, : -2 * shape[1] * shape[3]] *= np.float32(scale)
    key, value = to_int8(key), to_int8(value)
    key[..., start + T :, :], value[..., start + T :, :] = 123, 123
    mixed, new_key, new_value = _attention(qkv, cos, sin, key, value, jnp.int32(start), jnp.int32(layer))
    assert new_key.dtype == new_value.dtype == jnp.int8 and new_key.shape == key.shape
    rounded = lambda x: from_int8(to_int8(x))  # noqa: E731
    wide = from_int8(key), from_int8(value)
    expected = reference(qkv, cos, sin, *wide, start, layer, rounded)
    # A number nearly half way between two multiples may go to either.
    for actual, wanted in ((new_key, expected[1]), (new_value, expected[2])):
        rows = np.asarray(actual)
        near = np.abs(from_int8(rows) - wanted) <= from_int8(np.insert(rows[..., -2:], 0, 1, axis=-1)) * 1.01
        assert near[..., : start + T, :].all() and near.mean() > 0.999
        np.testing.assert_array_equal(rows[:, :, start + T :], 123)
    scores = np.square(qkv).mean() ** 0.5 * scale
    np.testing.assert_allclose(mixed, expected[0], atol=4 / 1024 * (1 + 5 * scores))


def test_what_a_cache_of_int8_holds(implementation: str) -> None:
    """Zeros, numbers whose step is subnormal or below all of f16, and what is not a number."""
    skip_xla(implementation)
    one, zero = np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)
    cache = np.zeros((1, 1, 2, 10), np.int8)
    for number in (0, 3, -1e-4, 1e-5, 1e-9):
        qkv = np.array([[0] * 16 + [number] * 7 + [number / 2]], np.float32)
        value = np.asarray(_attention(qkv, one, zero, cache, cache, jnp.int32(1), jnp.int32(0))[2])[0, 0, 1]
        np.testing.assert_allclose(from_int8(value), qkv[0, 16:], rtol=0.01, atol=2e-5 if abs(number) < 0.01 else 0)
    for T in (1, 9):
        qkv = arguments(np.random.default_rng(0), T, 1, 1, 64, 80)[0]
        qkv[0, 133] = np.nan
        caches = np.zeros((2, 1, 80, 66), np.int8)
        mixed = _attention(
            qkv, np.ones((T, 32), np.float32), np.zeros((T, 32), np.float32), *caches, jnp.int32(9), None
        )
        assert np.isnan(np.asarray(mixed[0])[:, 5]).all()


@pytest.mark.parametrize("T", [1, 9])
def test_a_row_of_int8_does_not_depend_on_its_batch_or_the_cache(implementation: str, T: int) -> None:
    skip_xla(implementation)
    rng = np.random.default_rng(0)
    rows = [arguments(rng, T, 2, 3, 16, 600) for _ in range(3)]
    rows = [[*row[:3], to_int8(row[3]), to_int8(row[4])] for row in rows]
    start = np.array([0, 590, 300], np.int32)
    batch = jax.jit(jax.vmap(ops.attention, in_axes=(*[0] * 6, None)))
    found = batch(*(np.stack(x) for x in zip(*rows, strict=True)), start, jnp.int32(1))
    for b, row in enumerate(rows):
        alone = _attention(*row, jnp.int32(start[b]), jnp.int32(1))
        for actual, wanted in zip(found, alone, strict=True):
            np.testing.assert_array_equal(actual[b], wanted)
        longer = [np.pad(x, ((0, 0), (0, 0), (0, 70), (0, 0))) for x in row[3:]]
        np.testing.assert_array_equal(_attention(*row[:3], *longer, jnp.int32(start[b]), jnp.int32(1))[0], alone[0])


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("T", [1, 9])
def test_what_is_not_a_number_stays_so(implementation: str, T: int, where: str) -> None:
    for dtype in (np.float32, np.float16):
        given = arguments(np.random.default_rng(0), T, 1, 1, 64, 80, dtype=dtype)
        given[0][0, {"query": 5, "key": 69, "value": 133}[where]] = np.nan
        mixed = np.asarray(_attention(*given, jnp.int32(70), jnp.int32(1))[0])
        seen = mixed[:1] if where == "query" else mixed
        assert np.isnan(seen[:, 5]).all()


def test_what_a_cache_of_16_bits_holds(implementation: str) -> None:
    """Subnormal numbers, ties, and what is too large."""
    numbers = [1e-6, -3e-8, 2**-14, 1 + 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -65519, 7e4]
    qkv = np.array([[0] * 16 + numbers], np.float32)
    one, zero = np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)
    for dtype in (jnp.float16, jnp.bfloat16):
        cache = np.zeros((1, 1, 2, 8), dtype)
        _, _, value = _attention(qkv, one, zero, cache, cache, jnp.int32(1), jnp.int32(0))
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(np.asarray(value)[0, 0, 1], np.array(numbers, np.float32).astype(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_of_one_layer(implementation: str, shape: tuple[int, ...]) -> None:
    *given, keys, values = arguments(np.random.default_rng(0), *shape)
    start = jnp.int32(shape[-1] - shape[0])
    found = _attention(*given, keys[1], values[1], start)
    mixed, keys, values = _attention(*given, keys, values, start, jnp.int32(1))
    for actual, wanted in zip(found, (mixed, keys[1], values[1]), strict=True):
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("shape", [(1, 2, 3, 8, 90), (5, 1, 2, 16, 12), (3, 2, 2, 6, 9)])
def test_vmap_is_a_batch(implementation: str, shape: tuple[int, ...]) -> None:
    T, S = shape[0], shape[-1]
    rng = np.random.default_rng(0)
    start = np.array([0, S - T, 3, 1], np.int32)
    rows = [arguments(rng, *shape) for _ in range(4)]
    batch = jax.jit(jax.vmap(ops.attention, in_axes=(*[0] * 6, None)))
    found = batch(*(np.stack(x) for x in zip(*rows, strict=True)), start, jnp.int32(1))
    for b, row in enumerate(rows):
        for actual, wanted in zip(found, reference(*row, start[b], 1), strict=True):
            np.testing.assert_allclose(actual[b], wanted, rtol=1e-4, atol=1e-4)
        if implementation != "xla" and shape[3] % 8 == 0:
            for actual, alone in zip(found, _attention(*row, start[b], jnp.int32(1)), strict=True):
                np.testing.assert_array_equal(actual[b], alone)


@pytest.mark.parametrize("shape", [(5, 2, 3, 64, 70), (90, 1, 4, 128, 500), (200, 1, 3, 40, 300)])
def test_tiles_of_bytes_give_the_sums_of_numbers_of_16_bits(implementation: str, shape: tuple[int, ...]) -> None:
    if implementation != "amx":
        pytest.skip("what AMX does otherwise")
    *given, keys, values = arguments(np.random.default_rng(0), *shape)
    start = jnp.int32(shape[-1] - shape[0])
    for caches in ((keys.astype(np.float16), values.astype(np.float16)), (to_int8(keys), to_int8(values))):
        found = []
        for instruction_set in ("avx512", implementation):
            native.limit(instruction_set)
            found.append(jax.block_until_ready(_attention(*given, *caches, start, jnp.int32(1))))
        for actual, wanted in zip(*found, strict=True):
            np.testing.assert_array_equal(actual, wanted)


def test_caches_are_written_in_place_where_they_are_donated(implementation: str) -> None:
    qkv, cos, sin, key, value = (jnp.asarray(x) for x in arguments(np.random.default_rng(0), 1, 2, 3, 8, 64))
    step = jax.jit(ops.attention, donate_argnums=(3, 4))
    before = key.unsafe_buffer_pointer(), value.unsafe_buffer_pointer()
    _, key, value = step(qkv, cos, sin, key, value, jnp.int32(5), jnp.int32(2))
    assert (key.unsafe_buffer_pointer(), value.unsafe_buffer_pointer()) == before


@pytest.mark.parametrize("start", [-1, 28, 2**31 - 2])
def test_positions_outside_the_cache_are_refused(implementation: str, start: int) -> None:
    if implementation == "xla":
        pytest.skip("XLA shifts the write")
    given = arguments(np.random.default_rng(0), 3, 2, 3, 8, 30)
    with pytest.raises(jax.errors.JaxRuntimeError, match="of a cache of 30"):
        jax.block_until_ready(_attention(*given, jnp.int32(start), jnp.int32(0)))


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_layers_outside_the_cache_are_refused(implementation: str, layer: int) -> None:
    if implementation == "xla":
        pytest.skip("XLA shifts the write")
    given = arguments(np.random.default_rng(0), 3, 2, 3, 8, 30)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"layer {layer} of {LAYERS}"):
        jax.block_until_ready(_attention(*given, jnp.int32(0), jnp.int32(layer)))
