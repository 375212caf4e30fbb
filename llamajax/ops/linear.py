"""Weights that XLA multiplies: dense ones, and integers with a scale for each output."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Float32, Int, Int8

from llamajax.ops.weight import Weight

# From this many tokens of a sequence on, XLA's CPU product of the weights cast to bf16 overtakes the int8 one
# (SmolLM2-135M, 2 cores of a Zen 4, tokens/s: 264 against 343 at 16 rows, 434 against 600 at 128).
MANY_TOKENS = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(Weight):
    """A weight in f32, bf16 or f16. Products and rows have derivatives."""

    values: Float[Array, "N K"]

    def product(self, x: Float32[Array, "T K"]) -> Float32[Array, "T N"]:
        return _dense_product(x, self.values)

    def rows(self, ids: Int[Array, "T"]) -> Float32[Array, "T K"]:
        if self.values.dtype.itemsize == 2:
            return jax.lax.platform_dependent(ids, self.values, cpu=_embed_cpu, default=_embed)
        return _embed(ids, self.values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight(Weight):
    """A weight in int8 with one scale for each output: weight = values * scale[:, None].

    It costs a small model more than its bits suggest: SmolLM2-135M's perplexity rises by 0.6 % (groups of 32 weights
    with a scale of their own: 0.35 %), while bf16 leaves it as it is.
    """

    values: Int8[Array, "N K"]
    scale: Float32[Array, "N"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def product(self, x: Float32[Array, "T K"]) -> Float32[Array, "T N"]:
        return _product(x, self)

    def rows(self, ids: Int[Array, "T"]) -> Float32[Array, "T K"]:
        return jax.lax.platform_dependent(ids, self, tpu=_embed_int8_tpu, default=_embed_int8)


def quantize_int8(weight: Float[Array, "N K"]) -> Int8Weight:
    """Rounds each row to multiples of its largest magnitude / 127."""
    scale = jnp.max(jnp.abs(weight), axis=-1).astype(jnp.float32) / 127
    values = jnp.round(weight / jnp.where(scale == 0, 1, scale)[:, None]).astype(jnp.int8)
    return Int8Weight(values, scale)


@custom_vmap
def _product(x: Float32[Array, "T K"], weight: jax.Array | Int8Weight) -> Float32[Array, "T N"]:
    return _rows(x, weight, x.shape[0])


@_product.def_vmap
def _(axis_size: int, in_batched: list, x: Array, weight: jax.Array | Int8Weight) -> tuple[Array, bool]:
    assert not any(jax.tree.leaves(in_batched[1])), "weights are never batched"
    rows = _rows(x.reshape(axis_size * x.shape[1], x.shape[2]), weight, x.shape[1])
    return rows.reshape(axis_size, x.shape[1], rows.shape[1]), True


@jax.custom_jvp
def _dense_product(x: Float32[Array, "T K"], weight: Float[Array, "N K"]) -> Float32[Array, "T N"]:
    return _product(x, weight)


@_dense_product.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # `custom_vmap` has no reverse mode.
    (x, weight), (dx, dweight) = primals, tangents
    return _dense_product(x, weight), _dense(dx, weight) + _dense(x, dweight)


def _rows(x: Float32[Array, "R K"], weight: jax.Array | Int8Weight, num_tokens: int) -> Float32[Array, "R N"]:
    """The way is chosen by a sequence's tokens, not by all rows: it must not depend on who shares the batch."""
    if not isinstance(weight, Int8Weight):
        return jax.lax.platform_dependent(x, weight, cpu=_dense_cpu, default=_dense)
    if num_tokens >= MANY_TOKENS:
        return _int8_as_bf16(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=_int8_rows, default=_int8_as_bf16)


def _embed(token_ids: Int[Array, "T"], weight: Float[Array, "V D"]) -> Float32[Array, "T D"]:
    return weight[token_ids].astype(jnp.float32)


@jax.custom_jvp
def _embed_cpu(token_ids: Int[Array, "T"], weight: Float[Array, "V D"]) -> Float32[Array, "T D"]:
    # Rows are looked up as integers: XLA's CPU compiler would convert a whole bf16 table to f32 in each call. Only on a
    # CPU, since a TPU would copy the table for this.
    rows = jax.lax.bitcast_convert_type(weight, jnp.uint16)[token_ids]
    return jax.lax.bitcast_convert_type(rows, weight.dtype).astype(jnp.float32)


@_embed_cpu.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Any, Array]) -> tuple[Array, Array]:
    # Integers have no derivative: without this it would be zero.
    return _embed_cpu(*primals), _embed(primals[0], tangents[1])


def _embed_int8(token_ids: Int[Array, "T"], weight: Int8Weight) -> Float32[Array, "T D"]:
    return weight.values[token_ids].astype(jnp.float32) * weight.scale[token_ids, None]


def _embed_int8_tpu(token_ids: Int[Array, "T"], weight: Int8Weight) -> Float32[Array, "T D"]:
    # For one row, XLA's TPU compiler would copy the whole table into a layout for slices. Two rows it gathers in place.
    if token_ids.shape[0] == 1:
        return _embed_int8(jnp.concatenate([token_ids, token_ids]), weight)[:1]
    return _embed_int8(token_ids, weight)


def _dense(x: Float[Array, "T K"], weight: Float[Array, "N K"]) -> Float32[Array, "T N"]:
    return jax.lax.dot_general(
        x.astype(weight.dtype),
        weight,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _dense_cpu(x: Float[Array, "T K"], weight: Float[Array, "N K"]) -> Float32[Array, "T N"]:
    # XLA's CPU product in bf16 takes ten times as long for one row as for two.
    if x.shape[0] == 1 and weight.dtype == jnp.bfloat16:
        return _dense(jnp.concatenate([x, x]), weight)[:1]
    return _dense(x, weight)


def _int8_as_bf16(x: Float32[Array, "T K"], weight: Int8Weight) -> Float32[Array, "T N"]:
    # Scaling after the product lets a GPU read int8; before it, the bf16 weights would be materialised.
    return _dense(x, weight.values.astype(jnp.bfloat16)) * weight.scale[None]


def _int8_rows(x: Float32[Array, "T K"], weight: Int8Weight) -> Float32[Array, "T N"]:
    """Each row as two int8 rows: the number rounded to 7 bits, and what that left, to 8 more.

    XLA's CPU product in int8 needs two rows to be fast anyway; the second makes the activations precise to
    2**-16 of the row's largest. Integer sums are exact, so a row's result does not depend on its neighbours.
    """
    step = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127
    step = jnp.where(step == 0, 1, step)
    high = jnp.round(x / step)
    low = jnp.round((x / step - high) * 254)
    y = jax.lax.dot_general(
        jnp.concatenate([high, low]).astype(jnp.int8),
        weight.values,
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32,
    ).astype(jnp.float32)
    rows = x.shape[0]
    return (y[:rows] + y[rows:] / 254) * step * weight.scale[None]
