"""Attention over a cache, of each implementation, against sums written out in float64."""

from collections.abc import Callable, Sequence
from functools import cache as once
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamajax import ops
from llamajax.ops import PAGE_LEN, native

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
    *,
    norm: ops.Norm | None = None,
    window: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One query of one head at a time, over the positions up to its own; `stored` is what a cache makes of a row."""
    (T, width), (_, K, _, H) = qkv.shape, keys.shape
    N = width // H - 2 * K
    query, new_key, new_value = np.split(qkv.astype(float).reshape(T, -1, H), [N, N + K], axis=1)
    if norm:
        of_query, of_key = np.split(np.asarray(norm.weight, float), 2)
        query, new_key = (
            x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * weight
            for x, weight in ((query, of_query), (new_key, of_key))
        )

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
        k, end = n // (N // K), start + t + 1
        visible = slice(max(0, end - window) if window else 0, end)
        scores = key[k, visible].astype(float) @ rotated(query[t, n], t) / H**0.5
        weights = np.exp(scores - scores.max())
        mixed[t, n] = weights / weights.sum() @ value[k, visible].astype(float)
    return mixed.reshape(T, -1), keys, values


def arguments(rng: np.random.Generator, *shape: int, dtype: type = np.float32) -> list[np.ndarray]:
    """Of T tokens, K heads of G queries, heads of H, LAYERS caches of S: all but the start and the layer."""
    T, K, G, H, S = shape
    angles = rng.uniform(0, 7, (T, H // 2))
    numbers = [rng.normal(size=(T, K * (G + 2) * H)), np.cos(angles), np.sin(angles)]
    caches = rng.normal(size=(2, LAYERS, K, S, H)).astype(np.float32)
    return [x.astype(np.float32) for x in numbers] + [
        to_int8(x) if dtype == np.int8 else x.astype(dtype) for x in caches
    ]


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
    (18, 2, 4, 8, 33),
    (1, 1, 8, 128, 70),
    (1, 1, 3, 64, 700),
]
DTYPES = [np.float32, jnp.bfloat16, np.float16, np.int8]
layers = st.integers(0, LAYERS - 1)


@once
def attention_of(norm: bool = False, window: int | None = None, batch: bool = False) -> Callable[..., Any]:
    """Of one sequence, or of a batch with pages in one pool. A norm's weights are the last argument."""

    def attend(*given: jax.Array) -> Any:
        qkv, cos, sin, key, value, start, *pages = given[: len(given) - norm]
        layer, table = pages or (None, None)
        kv, at = ops.KeysValues(key, value, table, layer), ops.Positions(start, cos, sin)
        mixed, kv = ops.attention(qkv, kv, at, norm=ops.Norm(given[-1], EPS) if norm else None, window=window)
        return mixed, kv.key, kv.value

    axes = (0, 0, 0, None, None, 0, None, 0, *[None] * norm)
    return jax.jit(jax.vmap(attend, in_axes=axes, out_axes=(0, None, None)) if batch else attend)


EPS = 1e-5
_attention, _batch = attention_of(), attention_of(batch=True)


def skip_xla(implementation: str) -> None:
    if implementation == "xla":
        pytest.skip("XLA has no pages, and shifts writes that pass the cache's end")


def to_int8(x: np.ndarray) -> np.ndarray:
    """Rows of int8: their multiples of a step, which follows them in f16."""
    step = (np.abs(x).max(-1, keepdims=True) / 127).astype(np.float16)
    multiples = np.divide(x, step, out=np.zeros(x.shape), where=step > 0)
    return np.concatenate([np.clip(np.rint(multiples), -127, 127).astype(np.int8), step.view(np.int8)], axis=-1)


def from_int8(rows: np.ndarray) -> np.ndarray:
    return rows[..., :-2] * np.ascontiguousarray(rows[..., -2:]).view(np.float16).astype(float)


def not_numbers(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """NaN in any dtype: int8's steps are f16."""
    return np.full((*shape[:-1], shape[-1] * dtype.itemsize), 0xFF, np.uint8).view(dtype)


def same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(*(np.ascontiguousarray(z).view(np.uint8) for z in (x, y)))


def paged(*caches: np.ndarray, order: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pools of keys and of values [2, P, L, K, 64, R] and tables [B, M] of sequences' caches [2, L, K, S, R].

    The pages are in a random order if none is given. All that is not of the caches is NaN, in other pages, too.
    """
    _, L, K, S, R = caches[0].shape
    M = -(-S // PAGE_LEN)
    if order is None:
        order = np.random.default_rng(S).permutation(len(caches) * M + 3)
    tables = np.reshape(order[: len(caches) * M], (-1, M)).astype(np.int32)
    pools = not_numbers((2, len(order), L, K, PAGE_LEN, R), caches[0].dtype)
    for cache, table in zip(caches, tables, strict=True):
        for page, begin in zip(table, range(0, S, PAGE_LEN), strict=True):
            part = cache[..., begin : begin + PAGE_LEN, :]
            pools[:, page, ..., : part.shape[-2], :] = part
    return pools, tables


def unpaged(pools: np.ndarray, table: np.ndarray, length: int) -> np.ndarray:
    """The first positions of a cache [2, L, K, S, R] that `paged` has put into pages."""
    return np.concatenate(list(pools[:, table].swapaxes(0, 1)), axis=-2)[..., :length, :]


def attend(
    implementation: str,
    given: Sequence[np.ndarray],
    start: int,
    layer: int,
    order: Sequence[int] | None = None,
    *,
    norm: ops.Norm | None = None,
    window: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention to a layer of caches [L, K, S, R]: XLA's to that layer alone, or the native one to pages of all.

    Returns the mixed values, and the caches up to the last token's position. Nothing behind it is read: it is NaN in
    pages. Nothing but the tokens' positions is written.
    """
    *tokens, key, value = given
    caches, end = np.stack([key, value]), start + len(tokens[0])
    attention, norms = attention_of(norm is not None, window), [norm.weight] if norm else []
    if implementation == "xla" or 2 * tokens[1].shape[1] % 8:  # the head's length
        caches[..., end:, :] = 1e4  # XLA multiplies it by zero
        mixed, *written = attention(*tokens, *caches[:, layer], jnp.int32(start), *norms)
        caches[:, layer] = np.stack(written)
        return np.asarray(mixed), *caches[..., :end, :]
    caches[..., end:, :] = not_numbers(caches[..., end:, :].shape, caches.dtype)
    pools, (table,) = paged(caches, order=order)
    mixed, *written = attention(*tokens, *pools, jnp.int32(start), jnp.int32(layer), table, *norms)
    found = np.stack(written)
    others = found.copy()
    for position in range(start, end):
        place = slice(None), table[position // PAGE_LEN], layer, slice(None), position % PAGE_LEN
        others[place] = pools[place]
    same_bits(others, pools)
    return np.asarray(mixed), *unpaged(found, table, end)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(SHAPES), st.integers(0, 700), st.sampled_from([0.1, 1, 30]), layers, st.integers(0, 2**32))
def test_attention(
    implementation: str, shape: tuple[int, ...], start: int, scale: float, layer: int, seed: int
) -> None:
    T, S = shape[0], shape[-1]
    start = min(start, S - T)
    qkv, cos, sin, key, value = arguments(np.random.default_rng(seed), *shape)
    qkv[:, : -2 * shape[1] * shape[3]] *= np.float32(scale)
    mixed, keys, values = reference(qkv, cos, sin, key, value, start, layer)
    expected = mixed, keys[..., : start + T, :], values[..., : start + T, :]
    found = attend(implementation, (qkv, cos, sin, key, value), start, layer)
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, wanted, rtol=2e-4, atol=2e-4)


# Shorter than a block, of its length, longer, and of several pieces.
WINDOWS = [1, 5, 64, 100, 300]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(SHAPES), st.integers(0, 700), st.sampled_from([0.1, 1, 30]), st.sampled_from(WINDOWS), st.booleans()
)
def test_attention_to_a_window(
    implementation: str, shape: tuple[int, ...], start: int, scale: float, window: int, has_norm: bool
) -> None:
    """And with a norm of each head, by which the scale does not matter."""
    T, H, S = shape[0], shape[3], shape[-1]
    start, rng = min(start, S - T), np.random.default_rng(start)
    qkv, *others = arguments(rng, *shape)
    qkv[:, : -2 * shape[1] * H] *= np.float32(scale)
    norm = ops.Norm(rng.normal(1, 0.3, 2 * H).astype(np.float32), EPS) if has_norm else None
    mixed, keys, values = reference(qkv, *others, start, 1, norm=norm, window=window)
    expected = mixed, keys[..., : start + T, :], values[..., : start + T, :]
    found = attend(implementation, (qkv, *others), start, 1, norm=norm, window=window)
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=2e-4, atol=2e-4)


def test_attention_by_hand(implementation: str) -> None:
    """Scores 0 and ln 3 at two positions weigh their values 1 to 3; the first position sees itself only."""
    H = 8
    qkv = np.zeros((2, 3, H), np.float32)
    qkv[0, :, 0] = [1, 0, 4]
    qkv[1, :, 0] = [np.sqrt(H), np.log(3), 0]
    one, zero = np.ones((2, H // 2), np.float32), np.zeros((2, H // 2), np.float32)
    cache = np.full((1, 1, 3, H), 100, np.float32)
    mixed, key, value = attend(implementation, (qkv.reshape(2, -1), one, zero, cache, cache), start=0, layer=0)
    np.testing.assert_allclose(mixed[:, :2], [[4, 0], [1, 0]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(key[0, 0, :, 0], [0, np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(value[0, 0, :, 0], [4, 0])


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
    mixed, new_key, new_value = attend(implementation, (qkv, cos, sin, key, value), start, layer)
    assert mixed.dtype == jnp.float32 and new_key.dtype == new_value.dtype == dtype
    expected = reference(qkv, cos, sin, key[..., : start + T, :], value[..., : start + T, :], start, layer)
    # A number nearly half way between two may go to either.
    ulp = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(new_key.astype(float), expected[1].astype(float), rtol=ulp, atol=1e-7)
    np.testing.assert_array_equal(new_value, expected[2])
    # An error of a score moves as large a part of the values: XLA rounds queries and weights to the cache's dtype, and
    # many queries at once are rounded to 12 bits. Five standard deviations.
    step = ulp if implementation == "xla" or shape[3] % 8 else 1 / 1024
    scores = np.square(qkv).mean() ** 0.5 * scale
    np.testing.assert_allclose(mixed, expected[0], atol=4 * step * (1 + 5 * scores))


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
    qkv, cos, sin, key, value = arguments(np.random.default_rng(seed), *shape, dtype=np.int8)
    qkv[:, : -2 * shape[1] * shape[3]] *= np.float32(scale)
    mixed, *written = attend(implementation, (qkv, cos, sin, key, value), start, layer)
    rounded = lambda x: from_int8(to_int8(x))  # noqa: E731
    wide = (from_int8(x[..., : start + T, :]) for x in (key, value))
    expected = reference(qkv, cos, sin, *wide, start, layer, rounded)
    # A number nearly half way between two multiples may go to either.
    for rows, wanted in zip(written, expected[1:], strict=True):
        assert rows.dtype == np.int8
        step = from_int8(np.insert(rows[..., -2:], 0, 1, axis=-1))
        assert (np.abs(from_int8(rows) - wanted) <= step * 1.01).all()
    scores = np.square(qkv).mean() ** 0.5 * scale
    np.testing.assert_allclose(mixed, expected[0], atol=4 / 1024 * (1 + 5 * scores))


def test_what_a_cache_of_int8_holds(implementation: str) -> None:
    """Zeros, numbers whose step is subnormal or below all of f16, and NaN."""
    skip_xla(implementation)
    one, zero = np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)
    cache = np.zeros((1, 1, 2, 10), np.int8)
    for number in (0, 3, -1e-4, 1e-5, 1e-9):
        qkv = np.array([[0] * 16 + [number] * 7 + [number / 2]], np.float32)
        value = attend(implementation, (qkv, one, zero, cache, cache), start=1, layer=0)[2][0, 0, 1]
        np.testing.assert_allclose(from_int8(value), qkv[0, 16:], rtol=0.01, atol=2e-5 if abs(number) < 0.01 else 0)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("T", [1, 9, 20])
def test_what_is_not_a_number_stays_so(implementation: str, T: int, where: str) -> None:
    for dtype in DTYPES[: 3 if implementation == "xla" else 4]:
        given = arguments(np.random.default_rng(0), T, 1, 1, 64, 90, dtype=dtype)
        given[0][0, {"query": 5, "key": 69, "value": 133}[where]] = np.nan
        mixed = attend(implementation, given, start=70, layer=1)[0]
        seen = mixed[:1] if where == "query" else mixed
        assert np.isnan(seen[:, 5]).all()


def test_what_a_cache_of_16_bits_holds(implementation: str) -> None:
    """Subnormal numbers, ties, and what is too large."""
    numbers = [1e-6, -3e-8, 2**-14, 1 + 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -65519, 7e4]
    qkv = np.array([[0] * 16 + numbers], np.float32)
    one, zero = np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)
    for dtype in (jnp.float16, jnp.bfloat16):
        cache = np.zeros((1, 1, 2, 8), dtype)
        value = attend(implementation, (qkv, one, zero, cache, cache), start=1, layer=0)[2]
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(value[0, 0, 1], np.array(numbers, np.float32).astype(dtype))


@pytest.mark.parametrize("shape", [(1, 2, 3, 8, 90), (5, 1, 2, 16, 12), (3, 2, 2, 6, 9)])
def test_vmap_is_a_batch(shape: tuple[int, ...]) -> None:
    """Of XLA."""
    rng, start = np.random.default_rng(0), np.array([0, shape[-1] - shape[0], 3, 1], np.int32)
    rows = [arguments(rng, *shape) for _ in start]
    *tokens, keys, values = (np.stack(x) for x in zip(*rows, strict=True))
    found = jax.jit(jax.vmap(attention_of()))(*tokens, keys[:, 1], values[:, 1], start)
    for b, row in enumerate(rows):
        mixed, *caches = reference(*row, start[b], layer=1)
        for actual, wanted in zip(found, (mixed, *(cache[1] for cache in caches)), strict=True):
            np.testing.assert_allclose(actual[b], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "window"), [(1, None), (9, None), (20, None), (1, 70), (9, 290), (20, 100)])
def test_a_row_depends_neither_on_its_batch_nor_on_its_pages(
    implementation: str, T: int, window: int | None, dtype: type
) -> None:
    """In a batch whose last two rows share pages; in a pool of its own; with pages in order and a longer table."""
    skip_xla(implementation)
    rng, start = np.random.default_rng(0), np.array([0, 580, 300], np.int32)
    rows = [arguments(rng, T, 2, 3, 16, 600, dtype=dtype) for _ in start]
    for cache, shared in zip(rows[2][3:], rows[1][3:], strict=True):
        cache[..., : 4 * PAGE_LEN, :] = shared[..., : 4 * PAGE_LEN, :]
    pools, tables = paged(*(np.stack(row[3:]) for row in rows))
    pools[:, tables[2, :4]] = not_numbers(pools[:, tables[2, :4]].shape, pools.dtype)
    tables[2, :4] = tables[1, :4]
    tokens = (np.stack(x) for x in zip(*(row[:3] for row in rows), strict=True))
    mixed, *written = attention_of(window=window, batch=True)(*tokens, *pools, start, jnp.int32(1), tables)
    for b, row in enumerate(rows):
        alone = attend(implementation, row, start[b], layer=1, window=window)
        same_bits(alone, (mixed[b], *unpaged(np.stack(written), tables[b], start[b] + T)))
        longer = [np.pad(x, ((0, 0), (0, 0), (0, 70), (0, 0))) for x in row[3:]]
        ordered = attend(implementation, [*row[:3], *longer], start[b], layer=1, order=range(11), window=window)
        same_bits(ordered, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=15)
@given(
    st.tuples(st.integers(2, 15), st.integers(1, 3), st.integers(1, 6), st.sampled_from([8, 24, 64, 136])),
    st.sampled_from([0, 60, 250, 255, 500]) | st.integers(0, 600),
    st.sampled_from([None, *WINDOWS]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_few_queries_are_as_if_each_were_alone(
    implementation: str,
    dtype: type,
    shape: tuple[int, ...],
    start: int,
    window: int | None,
    ends_with_nan: bool,
    seed: int,
) -> None:
    skip_xla(implementation)
    *tokens, keys, values = arguments(np.random.default_rng(seed), *shape, start + shape[0], dtype=dtype)
    if ends_with_nan:
        tokens[0][-1] = np.nan
    mixed, *together = attend(implementation, [*tokens, keys, values], start, layer=1, window=window)
    for t in range(shape[0]):
        one = [x[t : t + 1] for x in tokens]
        alone, *written = attend(implementation, [*one, keys, values], start + t, layer=1, window=window)
        keys[..., : start + t + 1, :], values[..., : start + t + 1, :] = written
        same_bits(alone[0], mixed[t])
    same_bits((keys, values), together)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 9, 20])
def test_an_idle_row_is_neither_read_nor_written(implementation: str, T: int, dtype: type) -> None:
    """Its tokens are NaN, and there are no such pages."""
    skip_xla(implementation)
    row = arguments(np.random.default_rng(0), T, 2, 3, 16, 70, dtype=dtype)
    pools, tables = paged(np.stack(row[3:]))
    idle = [np.full_like(x, np.nan) for x in row[:3]]
    tokens = [np.stack(x) for x in zip(idle, row[:3], idle, strict=True)]
    missing = np.full_like(tables[0], len(pools[0])), np.full_like(tables[0], -1)
    tables = np.stack([missing[0], tables[0], missing[1]])
    for start in (-1, 50, -1), (-(2**31), -700, -64):
        start = np.array(start, np.int32)
        mixed, *written = _batch(*tokens, *pools, start, jnp.int32(1), tables)
        np.testing.assert_array_equal(np.asarray(mixed)[start < 0], 0)
        if start[1] < 0:
            same_bits(np.stack(written), pools)
        else:
            alone = attend(implementation, row, 50, layer=1)
            same_bits(alone, (mixed[1], *unpaged(np.stack(written), tables[1], 50 + T)))


@pytest.mark.parametrize("shape", [(20, 2, 3, 64, 70), (90, 1, 4, 128, 500), (200, 1, 3, 40, 300)])
def test_tiles_of_bytes_give_the_sums_of_numbers_of_16_bits(implementation: str, shape: tuple[int, ...]) -> None:
    if implementation != "amx":
        pytest.skip("what AMX does otherwise")
    for dtype in (np.float16, np.int8):
        given, found = arguments(np.random.default_rng(0), *shape, dtype=dtype), []
        for instruction_set in ("avx512", implementation):
            native.limit(instruction_set)
            found.append(attend(implementation, given, start=shape[-1] - shape[0], layer=1))
        same_bits(*found)


def test_caches_are_written_in_place_where_they_are_donated(implementation: str) -> None:
    *tokens, key, value = arguments(np.random.default_rng(0), 1, 2, 3, 8, 64)
    if implementation == "xla":
        caches, rest = [jnp.asarray(key[2]), jnp.asarray(value[2])], []
    else:
        pools, (table,) = paged(np.stack([key, value]))
        caches, rest = [jnp.asarray(pool) for pool in pools], [jnp.int32(2), table]
    before = [cache.unsafe_buffer_pointer() for cache in caches]
    _, *written = jax.jit(attention_of(), donate_argnums=(3, 4))(*tokens, *caches, jnp.int32(5), *rest)
    assert [cache.unsafe_buffer_pointer() for cache in written] == before


def attend_to_two_pages(start: int = 0, layer: int = 0, table: Sequence[int] = (4, 0)) -> None:
    """Three tokens, with pages of 5."""
    *tokens, key, value = arguments(np.random.default_rng(0), 3, 2, 3, 8, 5 * PAGE_LEN)
    pools, _ = paged(np.stack([key, value]), order=range(5))
    table = np.array(table, np.int32)
    jax.block_until_ready(_attention(*tokens, *pools, jnp.int32(start), jnp.int32(layer), table))


@pytest.mark.parametrize("start", [126, 2**31 - 2])
def test_positions_outside_the_cache_are_refused(implementation: str, start: int) -> None:
    skip_xla(implementation)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"positions {start} to {start + 2} of a cache of 128"):
        attend_to_two_pages(start=start)
    attend_to_two_pages(start=125)
    with pytest.raises(jax.errors.JaxRuntimeError, match="of a cache of 0"):
        attend_to_two_pages(table=[])


@pytest.mark.parametrize("page", [-1, 5, 2**31 - 1])
def test_pages_outside_the_pool_are_refused(implementation: str, page: int) -> None:
    """Those behind the last position may have any number."""
    skip_xla(implementation)
    for table, start in [([page, 0], 64), ([0, page], 62)]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"page {page} of 5"):
            attend_to_two_pages(start, table=table)
    attend_to_two_pages(start=61, table=[0, page])


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_layers_outside_the_cache_are_refused(implementation: str, layer: int) -> None:
    skip_xla(implementation)
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"layer {layer} of {LAYERS}"):
        attend_to_two_pages(layer=layer)
