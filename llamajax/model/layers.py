"""The parts a Llama is built of, but attention. Activations are f32; weights are what `ops` makes of them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int

from llamajax import ops
from llamajax.config import LlamaConfig


def parameter(*shape: int) -> nnx.Param:
    """A parameter that is a shape only, until weights are put in place."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32))


class Linear(nnx.Module):
    """y = x W^T + b; W is [out, in], and few layers have a bias b."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        self.weight = parameter(out_features, in_features)
        self.bias = parameter(out_features) if bias else None

    def __call__(
        self,
        x: Float32[Array, "T I"],
        norm: "RMSNorm | None" = None,
        residual: Float32[Array, "T O"] | None = None,
    ) -> Float32[Array, "T O"]:
        """norm(x) W^T + b + residual."""
        y = self.weight.get_value().linear(x, None if norm is None else norm.op, residual)
        return y if self.bias is None else y + ops.alone(self.bias.get_value())[None]


class Embedding(nnx.Module):
    """Rows of a table for token ids, and, for tied embeddings, logits from hidden states."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        self.weight = parameter(vocab_size, hidden_size)

    def __call__(self, token_ids: Int[Array, "T"]) -> Float32[Array, "T D"]:
        return self.weight.get_value().rows(token_ids)

    def attend(self, x: Float32[Array, "T D"]) -> Float32[Array, "T V"]:
        return self.weight.get_value().product(x)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        self.weight = parameter(hidden_size)
        self.eps = eps

    @property
    def op(self) -> ops.Norm:
        """This norm, for operations that fuse it with the product after it."""
        return ops.Norm(self.weight.get_value(), self.eps)

    def __call__(self, x: Float32[Array, "T D"]) -> Float32[Array, "T D"]:
        return self.op(x)


class MLP(nnx.Module):
    """x + down(silu(gate(norm(x))) * up(norm(x))) (SwiGLU, Shazeer 2020), gate and up in one product."""

    def __init__(self, config: LlamaConfig) -> None:
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float32[Array, "T D"], norm: RMSNorm) -> Float32[Array, "T D"]:
        gated = self.gate_up_proj.weight.get_value().gated_linear(x, norm.op)
        return self.down_proj(gated, residual=x)
