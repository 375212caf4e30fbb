"""The KV cache: a plain value that goes into the model and comes out of it."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int32, Real

from llamajax.config import LlamaConfig
from llamajax.ops import PAGE_LEN, native
from llamajax.placement import row_len


class KeysValues(NamedTuple):
    """Of one layer: [K, S, R], since a layout with S first is transposed at each step on a GPU. Or of all, in P pages.

    Attributes:
      table: the numbers of this sequence's pages, in their order, if there are pages.
    """

    key: Real[Array, "*PL K S R"]
    value: Real[Array, "*PL K S R"]
    table: Int32[Array, "M"] | None = None


# One item for each layer, or one for all, with pages: `Placement.has_pages`.
Cache = tuple[KeysValues, ...]


def empty_cache(config: LlamaConfig, length: int, dtype: DTypeLike) -> Cache:
    """A cache of `length` positions, for XLA.

    Zeros, since masked positions are multiplied, and 0 * NaN is NaN.
    """
    shape = config.num_key_value_heads, length, row_len(config.head_dim, dtype)
    layers = range(config.num_hidden_layers)
    return tuple(KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in layers)


def paged_cache(
    config: LlamaConfig, num_pages: int, dtype: DTypeLike, table: Int32[Array, "*B M"] | None = None
) -> Cache:
    """A cache of pages, for the native kernels. A page takes memory when it is first written."""
    L, K = config.num_hidden_layers, config.num_key_value_heads
    shape = num_pages, L, K, PAGE_LEN, row_len(config.head_dim, dtype)
    return (KeysValues(*native.unwritten(shape, dtype), table),)
