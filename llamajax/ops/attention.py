"""Causal attention of one sequence over its KV cache, through XLA. Knows nothing of projections or RoPE."""

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
    precision = jax.lax.Precision.HIGHEST if key.dtype == jnp.float32 else None
    scores = jnp.einsum(
        "TKGH,KSH->KGTS",
        query.astype(key.dtype),
        key,
        precision=precision,
        preferred_element_type=jnp.float32,
    ) / math.sqrt(query.shape[-1])
    positions = start + jnp.arange(query.shape[0])
    visible = jnp.arange(key.shape[1]) <= positions[:, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum(
        "KGTS,KSH->TKGH",
        weights.astype(value.dtype),
        value,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
