"""What a weight can do, however it is kept: products with activations, and rows of embeddings."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from llamajax.ops.stacked import Stacked, alone


class Norm(NamedTuple):
    """RMSNorm (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight."""

    weight: Float32[Array, "K"] | Stacked
    eps: float

    def __call__(self, x: Float32[Array, "T K"]) -> Float32[Array, "T K"]:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + self.eps) * alone(self.weight)[None]


class Weight(ABC):
    """A matrix [N, K] (out, in). As [K, N], a GPU would transpose it to multiply one row: three times the traffic.

    The kinds that embeddings may have, all but `Fused`, also give rows [T, K]: `rows(ids)`.

    Under `vmap` the batch folds into the rows of a product, so that weights are read once for all sequences.
    """

    @abstractmethod
    def product(self, x: Float32[Array, "T K"]) -> Float32[Array, "T N"]:
        """x @ weight.T, accumulated in f32 (int8 products: exactly, in int32)."""

    def linear(
        self, x: Float32[Array, "T K"], norm: Norm | None = None, residual: Float32[Array, "T N"] | None = None
    ) -> Float32[Array, "T N"]:
        """The product, of norm(x) if there is a norm, plus the residual if there is one."""
        y = self.product(x if norm is None else norm(x))
        return y if residual is None else residual + y

    def gated_linear(self, x: Float32[Array, "T K"], norm: Norm) -> Float32[Array, "T N/2"]:
        """silu(gate) * up, the two halves of the product of norm(x) (SwiGLU, Shazeer 2020)."""
        gate, up = jnp.split(self.linear(x, norm), 2, axis=-1)
        return jax.nn.silu(gate) * up


# A bare matrix is a dense weight; vectors are norms and biases.
Parameter = Weight | jax.Array
