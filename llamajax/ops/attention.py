"""Causal attention of one sequence over its KV cache: RoPE, the cache's writing, and the mixing of values."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Float32, Int, Real

from llamajax.ops import native

Mixed = tuple[Float32[Array, "T N*H"], Real[Array, "*L K S R"], Real[Array, "*L K S R"]]


@custom_vmap
def attention(
    qkv: Float32[Array, "T (N+2K)*H"],
    cos: Float32[Array, "T H/2"],
    sin: Float32[Array, "T H/2"],
    key: Real[Array, "*L K S R"],
    value: Real[Array, "*L K S R"],
    start: Int[Array, ""],
    layer: Int[Array, ""] | None = None,
) -> Mixed:
    """Token t is at position start + t and attends to the cache's positions up to its own.

    qkv is each token's N queries, K keys and K values; cos and sin are of its RoPE angles. Caches of L layers are read
    and written at `layer`. start + T must not pass S, nor `layer` L - 1: natively it is an error, and XLA would shift
    the write. Sums and softmax are in f32. Of a cache of 16 bits, XLA rounds queries and weights to its dtype; natively
    many queries are multiplied in numbers of 12 bits, one in f32. A cache of int8 has rows of `placement.row_len`
    numbers, and is for the native kernels only.

    Returns the mixed values, and the caches with the T positions written.
    """
    return _either(_attention, qkv, cos, sin, key, value, start, layer)


def layers_share_arrays(device: jax.Device, head_dim: int) -> bool:
    """Whether the caches of all layers had better be one array, L of them, rather than one each.

    Each array costs a call about 5 us on a CPU, and 30 layers have 60. XLA would copy an array of all at each step.
    """
    return device.platform == "cpu" and _is_native(head_dim)


@attention.def_vmap
def _(axis_size: int, in_batched: list[bool], *arguments: Array) -> tuple[Mixed, tuple[bool, bool, bool]]:
    *rows, layer = arguments  # which is the same for all rows
    rows = [
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip(rows, in_batched[:-1], strict=True)
    ]
    return _either(jax.vmap(_attention, in_axes=(*[0] * len(rows), None)), *rows, layer), (True, True, True)


def _either(xla_attention: Callable[..., Mixed], *arguments: Any) -> Mixed:
    _, cos, _, key, *_ = arguments
    if key.dtype == jnp.int8:
        return native.attention(*arguments)
    if not _is_native(head_dim=2 * cos.shape[-1]):
        return xla_attention(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=native.attention, default=xla_attention)


def _is_native(head_dim: int) -> bool:
    return head_dim % 8 == 0 and native.available()


def _attention(
    qkv: Array, cos: Array, sin: Array, key: Array, value: Array, start: Array, layer: Array | None
) -> Mixed:
    if layer is None:
        return _of_one_layer(qkv, cos, sin, key, value, start)
    take = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    mixed, new_key, new_value = _of_one_layer(qkv, cos, sin, take(key), take(value), start)
    return mixed, put(key, new_key), put(value, new_value)


def _of_one_layer(qkv: Array, cos: Array, sin: Array, key: Array, value: Array, start: Array) -> Mixed:
    T, (K, S, H) = qkv.shape[0], key.shape
    heads = qkv.reshape(T, -1, H)
    query, new_key, new_value = jnp.split(heads, [heads.shape[1] - 2 * K, heads.shape[1] - K], axis=1)
    key = _write(key, rotate(new_key, cos, sin), start)
    value = _write(value, new_value, start)
    # The operands of both products stand as they are stored: XLA would transpose the whole cache otherwise.
    queries = rotate(query, cos, sin).reshape(T, K, -1, H).transpose(1, 2, 0, 3).reshape(K, -1, H)
    scores = _batched_dot(queries, key, contract=2).reshape(K, -1, T, S) / math.sqrt(H)
    visible = jnp.arange(S)[None] <= (start + jnp.arange(T))[:, None]
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
