"""Weights to GGUF's block formats: q8_0 and q4_0 as ggml's reference does, q4_k by the search that it makes.

ggml-quants.c: `quantize_row_q8_0_ref`, `quantize_row_q4_0_ref`, `quantize_row_q4_K_ref` with `make_qkx2_quants`.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from llamajax.formats import FORMATS
from llamajax.ops.quants import Parts

# Scales that are tried for a group of q4_k: (15 - 1 + i / 10) / (its range).
_Q4_K_TRIALS = 21


def quantize(weight: Float[Array, "N K"], format: str) -> Parts:
    """Rounds each block of a row; `format` is a key of QUANTIZABLE, K a multiple of its block."""
    blocks = weight.astype(jnp.float32).reshape(len(weight), -1, FORMATS[format].weights)
    quants, scale, offset = QUANTIZABLE[format](blocks)
    rows = len(weight)
    return Parts(
        quants.reshape(rows, -1), scale.reshape(rows, -1), None if offset is None else offset.reshape(rows, -1)
    )


def _f16(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    return x.astype(jnp.float16).astype(jnp.float32)


def _inverse(x: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """1 / x, or 0 for 0."""
    return jnp.where(x == 0, 0, 1 / jnp.where(x == 0, 1, x))


def _q8_0(blocks: Float32[Array, "N B 32"]) -> Parts:
    """The largest magnitude at 127."""
    scale = jnp.abs(blocks).max(axis=-1) / 127
    # Halves away from zero, as C's roundf.
    scaled = blocks * _inverse(scale)[..., None]
    quants = jnp.trunc(scaled + jnp.where(scaled < 0, -0.5, 0.5))
    return Parts(quants.astype(jnp.int8), _f16(scale))


def _q4_0(blocks: Float32[Array, "N B 32"]) -> Parts:
    """The number of the largest magnitude at -8."""
    largest = jnp.take_along_axis(blocks, jnp.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    scale = largest / -8
    quants = jnp.clip(jnp.trunc(blocks * _inverse(scale)[..., None] + 8.5), 0, 15) - 8
    return Parts(quants.astype(jnp.int8), _f16(scale))


def _q4_k(blocks: Float32[Array, "N B 256"]) -> Parts:
    """Groups of 32 with a scale and a minimum, both in 6 bits of the block's largest."""
    groups = blocks.reshape(*blocks.shape[:-1], 8, 32)
    scale, minimum = _scale_and_minimum(groups)
    of_scales, of_minimums = (_f16(x.max(axis=-1, keepdims=True) / 63) for x in (scale, minimum))
    scale = of_scales * jnp.clip(jnp.round(scale * _inverse(of_scales)), 0, 63)
    minimum = of_minimums * jnp.clip(jnp.round(minimum * _inverse(of_minimums)), 0, 63)
    quants = jnp.clip(jnp.round((groups + minimum[..., None]) * _inverse(scale)[..., None]), 0, 15)
    return Parts(quants.astype(jnp.uint8), scale, -minimum)


def _scale_and_minimum(x: Float32[Array, "... 32"]) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
    """Several scales are tried, each with the least squares fit of scale * quant - minimum; the best is taken."""
    importance = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True)) + jnp.abs(x)
    low = jnp.minimum(x.min(axis=-1), 0)
    span = x.max(axis=-1) - low

    def error(scale: Array, minimum: Array, quants: Array) -> Array:
        return (importance * jnp.square(scale[..., None] * quants + minimum[..., None] - x)).sum(axis=-1)

    def rounded(inverse: Array) -> Array:
        return jnp.clip(jnp.round(inverse[..., None] * (x - low[..., None])), 0, 15)

    best: tuple[Array, ...] = (span / 15, low, error(span / 15, low, rounded(15 * _inverse(span))))
    weight_sum, x_sum = importance.sum(axis=-1), (importance * x).sum(axis=-1)
    for trial in range(_Q4_K_TRIALS):
        quants = rounded((14 + trial / 10) * _inverse(span))
        q_sum, q2_sum, qx_sum = ((importance * y).sum(axis=-1) for y in (quants, quants * quants, quants * x))
        determinant = weight_sum * q2_sum - q_sum * q_sum
        scale = (weight_sum * qx_sum - x_sum * q_sum) * _inverse(determinant)
        minimum = (q2_sum * x_sum - q_sum * qx_sum) * _inverse(determinant)
        scale = jnp.where(minimum > 0, qx_sum * _inverse(q2_sum), scale)
        minimum = jnp.minimum(minimum, 0)
        found = error(scale, minimum, quants)
        better = (found < best[2]) & (determinant > 0)
        best = tuple(jnp.where(better, new, old) for new, old in zip((scale, minimum, found), best, strict=True))
    return best[0], -best[1]


QUANTIZABLE: dict[str, Callable[[Array], Parts]] = {"q8_0": _q8_0, "q4_0": _q4_0, "q4_k": _q4_k}
