"""The KV cache: a plain value that goes into the model and comes out of it."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from llamajax.config import LlamaConfig


class KeysValues(NamedTuple):
    """Of one layer, or of all L. [K, S, H]: a layout with S first is transposed at each step on a GPU."""

    key: Float[Array, "*L K S H"]
    value: Float[Array, "*L K S H"]


# One item for each layer, or one for all: `ops.layers_share_arrays` tells what is faster.
Cache = tuple[KeysValues, ...]


def empty_cache(config: LlamaConfig, length: int, dtype: DTypeLike, *, shared: bool = False) -> Cache:
    """A cache of `length` positions, whose layers may share their arrays.

    Zeros, since masked positions are multiplied, and 0 * NaN is NaN.
    """
    L, shape = config.num_hidden_layers, (config.num_key_value_heads, length, config.head_dim)
    shapes = [(L, *shape)] if shared else [shape] * L
    return tuple(KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes)
