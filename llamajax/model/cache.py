"""The KV cache: a plain value that goes into the model and comes out of it."""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int32

from llamajax.config import LlamaConfig
from llamajax.ops import PAGE_LEN, KeysValues, native
from llamajax.placement import row_len

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
