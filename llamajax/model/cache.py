"""The KV cache: a plain value that goes into the model and comes out of it."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Real

from llamajax.config import LlamaConfig
from llamajax.placement import row_len


class KeysValues(NamedTuple):
    """Of one layer, or of all L. [K, S, R]: a layout with S first is transposed at each step on a GPU."""

    key: Real[Array, "*L K S R"]
    value: Real[Array, "*L K S R"]


# One item for each layer, or one for all: `ops.layers_share_arrays` tells what is faster.
Cache = tuple[KeysValues, ...]


def empty_cache(config: LlamaConfig, length: int, dtype: DTypeLike, *, shared: bool = False) -> Cache:
    """A cache of `length` positions, whose layers may share their arrays.

    Zeros, since masked positions are multiplied, and 0 * NaN is NaN.
    """
    L, shape = config.num_hidden_layers, (config.num_key_value_heads, length, row_len(config.head_dim, dtype))
    shapes = [(L, *shape)] if shared else [shape] * L
    return tuple(KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for shape in shapes)
