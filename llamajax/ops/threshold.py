"""The largest logits whose weights reach a sum, without sorting them: those above a threshold.

It is found in the order of the logits' bits: by halves, or on a GPU, where each kernel costs and the host must not wait
for a loop, four bits at a time.
"""

from collections.abc import Callable
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

_Need = Callable[[Float32[Array, "B"]], Float32[Array, "B"]]

_TINY = jnp.finfo(jnp.float32).tiny
# What comes before all numbers in order. There is room for 15 more before it.
_FIRST = np.int32(-(2**31) + 2**12)


def in_order(x: Float32[Array, "B V"]) -> Int32[Array, "B V"]:
    """Integers in the order of the numbers, NaN first. Subnormals count as 0, as on some processors."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    # The bits of negative numbers without their sign count downwards.
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return jnp.where(jnp.isnan(x), _FIRST, jnp.where(jnp.abs(x) < _TINY, 0, ordered))


def heaviest(order: Int32[Array, "B V"], weights: Float32[Array, "B V"], need: _Need) -> Float32[Array, "B V"]:
    """Weights of the smallest set of largest logits whose sum is what is needed; 0 for other tokens.

    Args:
      order: the logits, `in_order`. Of equal ones, the first are in the set.
      weights: not negative.
      need: makes the needed sum of the sum of all.
    """
    lowest = _threshold(order, weights, need)
    above, tied = order > lowest[:, None], order == lowest[:, None]

    def first_tied() -> Int32[Array, "B"]:
        rest = need(weights.sum(axis=-1)) - jnp.where(above, weights, 0).sum(axis=-1)
        return _threshold(jnp.where(tied, _down(order), _FIRST), weights, lambda _: rest)

    last = jax.lax.cond(_any_twice(tied), first_tied, lambda: jnp.full(lowest.shape, _FIRST))
    return jnp.where(above | tied & (_down(order) >= last[:, None]), weights, 0)


def _down(order: Int32[Array, "B V"]) -> Int32[Array, "1 V"]:
    """Ids, counted downwards: so "the first ids" are those after a threshold, too.

    Made anew where it is needed: with what is made outside of a conditional, XLA may compute both branches.
    """
    return -jnp.arange(order.shape[1], dtype=jnp.int32)[None]


def _any_twice(x: Bool[Array, "B V"]) -> Bool[Array, ""]:
    """Whether a row has more than one. Counted in 24 parts, so that a GPU needs two kernels, not three."""
    parts = jnp.pad(x, ((0, 0), (0, -x.shape[1] % 24))).reshape(x.shape[0], 24, -1).sum(axis=-1)
    count = reduce(jnp.add, [parts[:, part] for part in range(24)])
    return (count > 1).any()


def _threshold(order: Int32[Array, "B V"], weights: Float32[Array, "B V"], need: _Need) -> Int32[Array, "B"]:
    """Each row's largest t for which the weights at t and after it sum to what it needs; -2**31 if there is none.

    A need that is not above 0 is reached by the last place with any weight.
    """
    return jax.lax.platform_dependent(
        order, weights, cuda=partial(_in_rounds, need=need), default=partial(_by_halves, need=need)
    )


def _by_halves(order: Int32[Array, "B V"], weights: Float32[Array, "B V"], need: _Need) -> Int32[Array, "B"]:
    """As `_threshold`: each bit takes a sum over the row."""
    goal = need(weights.sum(axis=-1))

    def halve(turn: Int32[Array, ""], low: Array) -> Array:
        middle = low + (1 << (31 - turn))
        total = jnp.where(order >= middle[:, None], weights, 0).sum(axis=-1)
        return jnp.where((total >= goal) & (total > 0), middle, low)

    return jax.lax.fori_loop(0, 32, halve, jnp.full(goal.shape, jnp.int32(-(2**31))))


def _in_rounds(order: Int32[Array, "B V"], weights: Float32[Array, "B V"], need: _Need) -> Int32[Array, "B"]:
    """As `_threshold`, four bits a round: the sums for all 16 values at once, which a GPU computes in three kernels.

    Eight bits a round are half as many kernels, but were slower on an H200, for one row and for 32.
    """
    values = np.arange(16, dtype=np.int32)[None]
    low = jnp.full(order.shape[0], jnp.int32(-8))  # the bits so far, as a number
    for shift in range(28, -1, -4):
        # Subtracted from the places, not added to `low`, which would be a kernel of its own. All are counted for 0,
        # which is reached in any case.
        at_least = ((order >> shift)[:, :, None] - values[None] >= low[:, None, None]) | (values == 0)[None]
        totals = jnp.where(at_least, weights[:, :, None], 0).sum(axis=1)
        reached = (totals >= need(totals[:, 0])[:, None]) & (totals > 0)
        low = (jnp.where(reached, low[:, None] + values, low[:, None]) << min(shift, 4)).max(axis=-1)
    return low
