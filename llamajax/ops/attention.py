"""Causal attention of one sequence over its KV cache: RoPE, the cache's writing, and the mixing of values."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Float32, Int, Real

from llamajax.ops import native
from llamajax.ops.kv import KeysValues, Positions
from llamajax.ops.stacked import alone
from llamajax.ops.weight import Norm

Mixed = tuple[Float32[Array, "T N*H"], Real[Array, "*PL K S R"], Real[Array, "*PL K S R"]]


def attention(
    qkv: Float32[Array, "T (N+2K)*H"],
    kv: KeysValues,
    at: Positions,
    *,
    norm: Norm | None = None,
    window: int | None = None,
) -> tuple[Float32[Array, "T N*H"], KeysValues]:
    """Each token attends to the cache's positions up to its own, or to the last `window` of them.

    qkv is each token's N queries, K keys and K values. Before RoPE comes the norm, if there is one. Its weights [2H]
    are for a query's head, then for a key's.

    The sequences of a batch have one pool of pages, and may share pages that the call does not write. The last position
    must be in the cache: XLA would shift the write, and natively it is an error. A sequence with pages and a negative
    start is idle: nothing of it is read or written, and it gets zeros.

    Sums and softmax are in f32. Of a cache of 16 bits, XLA rounds queries and weights to its dtype. Natively 16 queries
    or more are multiplied in numbers of 12 bits; fewer in f32, each to the same bits as if it were alone.

    Returns the mixed values, and the cache with the T positions written.
    """
    eps, weights = (0.0, None) if norm is None else (norm.eps, alone(norm.weight))
    operation = _kernels(eps, window) if kv.table is not None else partial(_attention, eps=eps, window=window)
    mixed, key, value = operation(qkv, kv, at, weights)
    return mixed, KeysValues(key, value, kv.table)


@cache
def _kernels(eps: float, window: int | None) -> Callable[..., Mixed]:
    native_attention = partial(native.attention, eps=eps, window=window)
    operation = custom_vmap(native_attention)

    @operation.def_vmap
    def _(
        axis_size: int, in_batched: list[Any], qkv: Array, kv: KeysValues, at: Positions, norms: Array | None
    ) -> tuple[Mixed, tuple[bool, bool, bool]]:
        def of_rows(x: Array, batched: bool) -> Array:
            return x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))

        qkv, at = jax.tree.map(of_rows, (qkv, at), (in_batched[0], in_batched[2]))
        assert kv.table is not None
        kv = kv._replace(table=of_rows(kv.table, in_batched[1].table))  # all rows have one pool
        return native_attention(qkv, kv, at, norms), (True, False, False)

    return operation


def _attention(
    qkv: Array, kv: KeysValues, at: Positions, norms: Array | None, *, eps: float, window: int | None
) -> Mixed:
    key, value, (start, cos, sin) = kv.key, kv.value, at
    T, (K, S, H) = qkv.shape[0], key.shape
    heads = qkv.reshape(T, -1, H)
    query, new_key, new_value = jnp.split(heads, [heads.shape[1] - 2 * K, heads.shape[1] - K], axis=1)
    if norms is not None:
        query, new_key = (
            Norm(weight, eps)(x.reshape(-1, H)).reshape(x.shape)
            for x, weight in zip((query, new_key), jnp.split(norms, 2), strict=True)
        )
    key = _write(key, rotate(new_key, cos, sin), start)
    value = _write(value, new_value, start)
    # Both products take the cache in its stored order of axes: otherwise XLA would transpose the whole cache.
    queries = rotate(query, cos, sin).reshape(T, K, -1, H).transpose(1, 2, 0, 3).reshape(K, -1, H)
    scores = _batched_dot(queries, key, contract=2).reshape(K, -1, T, S) / math.sqrt(H)
    position, own = jnp.arange(S)[None], (start + jnp.arange(T))[:, None]
    visible = position <= own if window is None else (position <= own) & (position > own - window)
    weights = jax.nn.softmax(jnp.where(visible[None, None], scores, -jnp.inf), axis=-1)
    mixed = _batched_dot(weights.reshape(K, -1, S), value, contract=1)
    return mixed.reshape(K, -1, T, H).transpose(2, 0, 1, 3).reshape(T, -1), key, value


def rotate(
    x: Float32[Array, "T N H"], cos: Float32[Array, "T H/2"], sin: Float32[Array, "T H/2"]
) -> Float32[Array, "T N H"]:
    """RoPE (Su et al. 2021): turns the pairs (x[i], x[i + H/2]) by the position's angles."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _write(cache: Float[Array, "K S H"], new: Float[Array, "T K H"], start: Int[Array, ""]) -> Float[Array, "K S H"]:
    return jax.lax.dynamic_update_slice(cache, new.swapaxes(0, 1).astype(cache.dtype), (0, start, 0))


def _batched_dot(a: Float[Array, "K M C"], b: Float[Array, "K S H"], contract: int) -> Float32[Array, "K M X"]:
    return jax.lax.dot_general(
        a.astype(b.dtype),
        b,
        (((2,), (contract,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
