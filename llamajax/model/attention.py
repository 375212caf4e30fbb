"""Grouped-query self-attention (Ainslie et al. 2023) with RoPE and a KV cache."""

import jax
from flax import nnx
from jaxtyping import Array, Float32, Int

from llamajax import ops
from llamajax.config import LlamaConfig
from llamajax.model.layers import Linear, RMSNorm


class Attention(nnx.Module):
    """x + attention(norm(x)): queries, keys and values in one product, keys and values stored, values mixed."""

    def __init__(self, config: LlamaConfig) -> None:
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.qkv_proj = Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        self.qk_norm = RMSNorm(2 * config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.window = config.sliding_window
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def __call__(
        self,
        x: Float32[Array, "T D"],
        norm: RMSNorm,
        cache: ops.KeysValues,
        at: ops.Positions,
        only: Int[Array, ""] | None = None,
    ) -> tuple[Float32[Array, "T D"], ops.KeysValues]:
        """All tokens are stored; what comes out is of the token `only` if there is one."""
        qkv, qk_norm = self.qkv_proj(x, norm), None if self.qk_norm is None else self.qk_norm.op
        mixed, cache = ops.attention(qkv, cache, at, norm=qk_norm, window=self.window)
        if only is not None:
            mixed, x = (jax.lax.dynamic_slice_in_dim(rows, only, 1) for rows in (mixed, x))
        return self.o_proj(mixed, residual=x), cache
