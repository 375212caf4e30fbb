"""Grouped-query self-attention (Ainslie et al. 2023) with RoPE and a KV cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int

from llamajax import ops
from llamajax.config import LlamaConfig
from llamajax.model.cache import KeysValues
from llamajax.model.layers import Linear, RMSNorm


class Attention(nnx.Module):
    """x + attention(norm(x)): queries, keys and values in one product, keys and values stored, values mixed."""

    def __init__(self, config: LlamaConfig) -> None:
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.qkv_proj = Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None for _ in range(2)
        )
        num_queries_and_keys = config.num_attention_heads + config.num_key_value_heads
        self._ends = config.num_attention_heads * config.head_dim, num_queries_and_keys * config.head_dim
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def __call__(
        self,
        x: Float32[Array, "T D"],
        norm: RMSNorm,
        rope: tuple[Float32[Array, "T H/2"], Float32[Array, "T H/2"]],
        cache: KeysValues,
        layer: Int[Array, ""] | None,
        start: Int[Array, ""],
        only: Int[Array, ""] | None = None,
    ) -> tuple[Float32[Array, "T D"], KeysValues]:
        """All tokens are stored; what comes out is of the token `only` if there is one."""
        qkv = self.qkv_proj(x, norm)
        if self.q_norm and self.k_norm:
            query, key, value = jnp.split(qkv, self._ends, axis=1)
            qkv = jnp.concatenate([self.q_norm.of_heads(query), self.k_norm.of_heads(key), value], axis=1)
        mixed, key, value = ops.attention(qkv, *rope, cache.key, cache.value, start, layer, cache.table)
        if only is not None:
            mixed, x = (jax.lax.dynamic_slice_in_dim(rows, only, 1) for rows in (mixed, x))
        return self.o_proj(mixed, residual=x), KeysValues(key, value, cache.table)
