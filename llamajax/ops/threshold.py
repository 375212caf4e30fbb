"""Where the weights of the largest numbers reach a sum: the cut that top-k and top-p make, without sorting."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from llamajax.ops import native


def threshold(
    x: Float32[Array, "B V"], weights: Float32[Array, "B V"], need: Float32[Array, "B"]
) -> Float32[Array, "B"]:
    """Each row's largest t for which the weights of the numbers x >= t sum to `need`; -inf if there is none.

    Weights must not be negative; a need that is not above 0 is met by the first that has any. Found by bisection: each
    bit of t takes a sum over the row, or two bits where the kernels serve.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    need = jnp.maximum(need, tiny)
    if native.available():
        t = jax.lax.platform_dependent(x, weights, need, cpu=native.threshold, default=_threshold)
    else:
        t = _threshold(x, weights, need)
    # Some processors take subnormal numbers for zeros.
    return jnp.where(jnp.abs(t) < tiny, 0, t)


def _threshold(x: Array, weights: Array, need: Array) -> Array:
    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        reached = jnp.where(x >= _in_order(middle)[:, None], weights, 0).sum(axis=-1) >= need
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle - 1)

    low, high = (jnp.full(need.shape, place, jnp.int32) for place in (-(2**31), 2**31 - 1))
    return jnp.fmax(_in_order(jax.lax.fori_loop(0, 32, halve, (low, high))[0]), -jnp.inf)


def _in_order(place: Int32[Array, "B"]) -> Float32[Array, "B"]:
    """The number at a place in the order of all numbers of f32, 0 at 0; NaN before and after the infinities."""
    # The bits of negative numbers without their sign count downwards.
    return jax.lax.bitcast_convert_type(jnp.where(place < 0, place ^ 0x7FFFFFFF, place), jnp.float32)
