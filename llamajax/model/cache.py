"""The KV cache: a plain value that goes into the model and comes out of it."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llamajax.config import LlamaConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer. [K, S, H]: a layout with S first is transposed at each step on a GPU."""

    key: Float[Array, "K S H"]
    value: Float[Array, "K S H"]


# One pair of arrays a layer: a cache stacked over layers is copied whole at each step.
Cache = tuple[LayerCache, ...]


def empty_cache(config: LlamaConfig, length: int, dtype: DTypeLike) -> Cache:
    """A cache of `length` positions. Zeros, since masked positions are multiplied, and 0 * NaN is NaN."""
    shape = (config.num_key_value_heads, length, config.head_dim)
    return tuple(LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_hidden_layers))
