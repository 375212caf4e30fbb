"""Grouped-query self-attention (Ainslie et al. 2023) with RoPE and a KV cache."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int

from llamajax import ops
from llamajax.config import LlamaConfig
from llamajax.model.cache import LayerCache
from llamajax.model.layers import Linear
from llamajax.model.rope import rotate


class Attention(nnx.Module):
    """Projects to queries, keys and values in one product, stores keys and values, attends."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.qkv_proj = Linear(config.hidden_size, heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def __call__(
        self,
        x: Float32[Array, "T D"],
        rope: tuple[Float32[Array, "T H/2"], Float32[Array, "T H/2"]],
        cache: LayerCache,
        start: Int[Array, ""],
    ) -> tuple[Float32[Array, "T D"], LayerCache]:
        c = self.config
        heads = self.qkv_proj(x).reshape(x.shape[0], -1, c.head_dim)
        query, key, value = jnp.split(heads, [c.num_attention_heads, heads.shape[1] - c.num_key_value_heads], axis=1)
        cache = LayerCache(
            ops.write(cache.key, rotate(key, *rope).swapaxes(0, 1), start),
            ops.write(cache.value, value.swapaxes(0, 1), start),
        )
        query = rotate(query, *rope).reshape(x.shape[0], c.num_key_value_heads, -1, c.head_dim)
        mixed = ops.attention(query, cache.key, cache.value, start)
        return self.o_proj(mixed.reshape(x.shape[0], -1)), cache
