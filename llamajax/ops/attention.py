"""Causal attention of one sequence over its KV cache, and the cache's writing, through XLA.

Knows nothing of projections or RoPE.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int


def attention(
    query: Float32[Array, "T K G H"],
    key: Float[Array, "K S H"],
    value: Float[Array, "K S H"],
    start: Int[Array, ""],
) -> Float32[Array, "T K G H"]:
    """Query t stands at position start + t and attends to the cache's positions up to its own.

    Scores and softmax are in f32, whatever the cache's dtype.
    """
    T, K, G, H = query.shape
    # The operands of both products stand as they are stored: XLA would transpose the whole cache otherwise.
    queries = query.transpose(1, 2, 0, 3).reshape(K, G * T, H)
    scores = _batched_dot(queries, key, contract=2).reshape(K, G, T, -1) / math.sqrt(H)
    visible = jnp.arange(key.shape[1])[None] <= (start + jnp.arange(T))[:, None]
    weights = jax.nn.softmax(jnp.where(visible[None, None], scores, -jnp.inf), axis=-1)
    mixed = _batched_dot(weights.reshape(K, G * T, -1), value, contract=1)
    return mixed.reshape(K, G, T, H).transpose(2, 0, 1, 3)


def write(cache: Float[Array, "K S H"], new: Float[Array, "K T H"], start: Int[Array, ""]) -> Float[Array, "K S H"]:
    """Puts T positions at `start`. start + T must not pass S: XLA would shift the write, not refuse it."""
    return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, start, 0))


def _batched_dot(a: Float[Array, "K M C"], b: Float[Array, "K S H"], contract: int) -> Float32[Array, "K M X"]:
    return jax.lax.dot_general(
        a.astype(b.dtype),
        b,
        (((2,), (contract,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
