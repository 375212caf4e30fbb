"""Logits, a row's parameters and its randomness -> a token. Knows nothing of models, slots or text.

The order is vLLM's: logit bias, penalties, temperature, min-p, top-k, top-p. The vocabulary is never sorted: top-k and
top-p keep the tokens above a threshold, which is found by bisection on the logits' bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from llamajax.ops import native
from llamajax.types import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams

# Below this a temperature is 0: dividing by it would overflow.
_GREEDY_TEMPERATURE = 1e-5
# Sums of f32 probabilities carry rounding: a set whose mass is within this of top_p reaches it.
_MASS_ROUNDING = 1e-6
# The width of the blocks in which a draw walks through the vocabulary.
_BLOCK = 128
_LOW = 2**32 - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """`SamplingParams` of B rows, on the device."""

    temperature: Float32[Array, "B"]
    top_p: Float32[Array, "B"]
    top_k: Int32[Array, "B"]
    min_p: Float32[Array, "B"]
    repetition_penalty: Float32[Array, "B"]
    presence_penalty: Float32[Array, "B"]
    frequency_penalty: Float32[Array, "B"]
    seed: UInt32[Array, "B 2"]  # the upper and the lower half of 64 bits
    bias_ids: Int32[Array, "B N"]  # padded with 0
    bias: Float32[Array, "B N"]  # padded with 0

    @classmethod
    def of(cls, rows: Sequence[SamplingParams]) -> "Sampling":
        """One row for each request, in numpy: to make an array on a device of each would compile programs."""

        def column(name: str, dtype: type) -> Any:
            return np.array([getattr(row, name) for row in rows], dtype)

        seed: Any = np.array([[row.seed >> 32 & _LOW, row.seed & _LOW] for row in rows], np.uint32)
        bias_ids: Any = np.zeros((len(rows), MAX_LOGIT_BIAS), np.int32)
        bias: Any = np.zeros((len(rows), MAX_LOGIT_BIAS), np.float32)
        for at, row in enumerate(rows):
            added = row.logit_bias or {}
            bias_ids[at, : len(added)], bias[at, : len(added)] = list(added), list(added.values())
        return cls(
            temperature=column("temperature", np.float32),
            top_p=column("top_p", np.float32),
            top_k=column("top_k", np.int32),
            min_p=column("min_p", np.float32),
            repetition_penalty=column("repetition_penalty", np.float32),
            presence_penalty=column("presence_penalty", np.float32),
            frequency_penalty=column("frequency_penalty", np.float32),
            seed=seed,
            bias_ids=bias_ids,
            bias=bias,
        )

    def forbidding(self, ids: Int32[Array, "B E"]) -> "Sampling":
        """The same, but these tokens are never drawn; -1 is none."""
        bias = jnp.where(ids >= 0, -jnp.inf, jnp.float32(0))
        return replace(
            self,
            bias_ids=jnp.concatenate([self.bias_ids, ids], axis=1),
            bias=jnp.concatenate([self.bias, bias], axis=1),
        )


class TopLogprobs(NamedTuple):
    """Natural logarithms of raw probabilities, before penalties, temperature and filters."""

    chosen: Float32[Array, "B"]
    top: Float32[Array, "B 20"]
    top_ids: Int32[Array, "B 20"]

    @classmethod
    def zeros(cls, shape: tuple[int, ...], vocab_size: int) -> "TopLogprobs":
        """Of so many tokens, with nothing in them yet."""
        top = (*shape, min(MAX_TOP_LOGPROBS, vocab_size))
        return cls(jnp.zeros(shape, jnp.float32), jnp.zeros(top, jnp.float32), jnp.zeros(top, jnp.int32))


def sample(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    position: Int[Array, "B"],
    prompt_mask: Bool[Array, "B V"],
    counts: Int32[Array, "B V"],
) -> Int32[Array, "B"]:
    """Draws each row's next token.

    Args:
      logits: the model's scores.
      sampling: the rows' parameters.
      position: where the drawn token will stand. (seed, position) alone decide a row's randomness.
      prompt_mask: which tokens occur in the prompt.
      counts: how often each token occurs in the answer so far.

    Returns the tokens; V, which is none, where a score is NaN or infinite.
    """
    arguments = logits, sampling, position, prompt_mask, counts
    if native.available():
        return jax.lax.platform_dependent(*arguments, cpu=_native_sample, default=_sample)
    return _sample(*arguments)


def _native_sample(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    position: Int[Array, "B"],
    prompt_mask: Bool[Array, "B V"],
    counts: Int32[Array, "B V"],
) -> Int32[Array, "B"]:
    options = (
        jnp.where(sampling.temperature < _GREEDY_TEMPERATURE, 0, sampling.temperature),
        sampling.min_p,
        sampling.top_k.astype(jnp.float32),
        sampling.top_p,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        jax.vmap(_uniform)(sampling.seed, position),
    )
    columns = jnp.stack(options, axis=1)
    return native.sample(logits, prompt_mask, counts, sampling.bias_ids, sampling.bias, columns)


def _sample(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    position: Int[Array, "B"],
    prompt_mask: Bool[Array, "B V"],
    counts: Int32[Array, "B V"],
) -> Int32[Array, "B"]:
    logits = _adjusted(logits, sampling, prompt_mask, counts)
    greedy = sampling.temperature < _GREEDY_TEMPERATURE

    def draw() -> Int32[Array, "B"]:
        scaled = logits / jnp.where(greedy, 1, sampling.temperature)[:, None]
        uniform = jax.vmap(_uniform)(sampling.seed, position)
        drawn = _inverse_cdf(_filtered_probs(scaled, sampling), uniform)
        return jax.lax.cond(greedy.any(), lambda: jnp.where(greedy, _argmax(logits), drawn), lambda: drawn)

    token = jax.lax.cond(greedy.all(), lambda: _argmax(logits), draw)
    return jnp.where((logits < jnp.inf).all(axis=-1), token, logits.shape[1])


def top_logprobs(logits: Float32[Array, "B V"], token: Int32[Array, "B"]) -> TopLogprobs:
    """Log-probabilities of the chosen token and of the most probable ones, most probable first."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(logprobs, min(MAX_TOP_LOGPROBS, logits.shape[1]))
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    return TopLogprobs(chosen, top, ids.astype(jnp.int32))


def wanted_logprobs(logits: Float32[Array, "B V"], token: Int32[Array, "B"], wanted: Bool[Array, "B"]) -> TopLogprobs:
    """As `top_logprobs` if a row wants them, else zeros: a loop of no turns costs nothing."""
    turns = wanted.any().astype(jnp.int32)
    zeros = TopLogprobs.zeros(token.shape, logits.shape[1])
    return jax.lax.fori_loop(0, turns, lambda turn, _: top_logprobs(_inside(logits, turn), token), zeros)


def _inside(logits: Float32[Array, "B V"], turn: Int32[Array, ""]) -> Float32[Array, "B V"]:
    """The same in a loop's only turn, whose number is 0: XLA moves what does not depend on it out of the loop."""
    return logits + turn.astype(jnp.float32)


def _adjusted(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    prompt_mask: Bool[Array, "B V"],
    counts: Int32[Array, "B V"],
) -> Float32[Array, "B V"]:
    """With what the rows add to some tokens' logits, then with penalties.

    Few requests add anything, and then a loop of no turns costs nothing. It leaves the raw logits as they are: they
    would be copied if it wrote to them, since log-probabilities are of them.
    """
    rows = jnp.arange(logits.shape[0])[:, None]

    def with_bias(turn: Int32[Array, ""], _: Array) -> Array:
        biased = _inside(logits, turn).at[rows, sampling.bias_ids].add(sampling.bias)
        return _penalize(biased, sampling, prompt_mask, counts)

    turns = (sampling.bias != 0).any().astype(jnp.int32)
    return jax.lax.fori_loop(0, turns, with_bias, _penalize(logits, sampling, prompt_mask, counts))


def _penalize(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    prompt_mask: Bool[Array, "B V"],
    counts: Int32[Array, "B V"],
) -> Float32[Array, "B V"]:
    """Repetition penalty of CTRL (Keskar et al. 2019), presence and frequency penalties of OpenAI's API."""
    answered = counts > 0
    repetition = jnp.where(prompt_mask | answered, sampling.repetition_penalty[:, None], 1)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - sampling.frequency_penalty[:, None] * counts.astype(jnp.float32)
    return logits - sampling.presence_penalty[:, None] * answered.astype(jnp.float32)


def _filtered_probs(logits: Float32[Array, "B V"], sampling: Sampling) -> Float32[Array, "B V"]:
    """Unnormalised probabilities after min-p, top-k and top-p, one after the other."""
    top = logits.max(axis=-1, keepdims=True)
    logits = jnp.where(logits < top + jnp.log(sampling.min_p)[:, None], -jnp.inf, logits)

    def top_k(logits: Array) -> Array:
        k = jnp.where(sampling.top_k > 0, sampling.top_k, logits.shape[1]).astype(jnp.float32)
        return jnp.where(_heaviest(logits, jnp.ones_like(logits), k), logits, -jnp.inf)

    def top_p(probs: Array) -> Array:
        mass = probs.sum(axis=-1) * sampling.top_p * (1 - _MASS_ROUNDING)
        keep = _heaviest(logits, probs, mass) | (sampling.top_p >= 1)[:, None]
        return jnp.where(keep, probs, 0)

    logits = jax.lax.cond((sampling.top_k > 0).any(), top_k, lambda x: x, logits)
    probs = jnp.exp(logits - top)
    return jax.lax.cond((sampling.top_p < 1).any(), top_p, lambda x: x, probs)


def _heaviest(
    logits: Float32[Array, "B V"], weights: Float32[Array, "B V"], need: Float32[Array, "B"]
) -> Bool[Array, "B V"]:
    """The smallest set of largest logits whose weights sum to `need`; of equal logits the first ones."""
    lowest = _threshold(logits, weights, need)[:, None]
    above, tied = logits > lowest, logits == lowest
    ids = jnp.arange(logits.shape[1], dtype=jnp.float32)[None]

    def first_tied() -> Bool[Array, "B V"]:
        rest = need - jnp.where(above, weights, 0).sum(axis=-1)
        # Counting ids downwards turns "the first ids" into a threshold, too.
        return tied & (-ids >= _threshold(-jnp.where(tied, ids, jnp.inf), weights, rest)[:, None])

    return above | jax.lax.cond((tied.sum(axis=-1) > 1).any(), first_tied, lambda: tied)


def _threshold(
    x: Float32[Array, "B V"], weights: Float32[Array, "B V"], need: Float32[Array, "B"]
) -> Float32[Array, "B"]:
    """Each row's largest t for which the weights of the numbers x >= t sum to `need`; -inf if there is none.

    Weights must not be negative; a need that is not above 0 is met by the first that has any. Found by bisection: each
    bit of t takes a sum over the row.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    need = jnp.maximum(need, tiny)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        reached = jnp.where(x >= _in_order(middle)[:, None], weights, 0).sum(axis=-1) >= need
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle - 1)

    low, high = (jnp.full(need.shape, place, jnp.int32) for place in (-(2**31), 2**31 - 1))
    t = jnp.fmax(_in_order(jax.lax.fori_loop(0, 32, halve, (low, high))[0]), -jnp.inf)
    # Some processors take subnormal numbers for zeros.
    return jnp.where(jnp.abs(t) < tiny, 0, t)


def _in_order(place: Int32[Array, "B"]) -> Float32[Array, "B"]:
    """The number at a place in the order of all numbers of f32, 0 at 0; NaN before and after the infinities."""
    # The bits of negative numbers without their sign count downwards.
    return jax.lax.bitcast_convert_type(jnp.where(place < 0, place ^ 0x7FFFFFFF, place), jnp.float32)


def _uniform(seed: UInt32[Array, "2"], position: Int[Array, ""]) -> Float32[Array, ""]:
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")  # of a seed below 2**32, jax.random.key(seed)
    return jax.random.uniform(jax.random.fold_in(key, position))


def _inverse_cdf(probs: Float32[Array, "B V"], uniform: Float32[Array, "B"]) -> Int32[Array, "B"]:
    """Where the running sum passes uniform * total: first among blocks of tokens, then inside one."""
    blocks = jnp.pad(probs, ((0, 0), (0, -probs.shape[1] % _BLOCK))).reshape(probs.shape[0], -1, _BLOCK)
    block, target = _passes(blocks.sum(axis=-1), uniform * blocks.sum(axis=(1, 2)))
    token, _ = _passes(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], target)
    return block * _BLOCK + token


def _passes(
    weights: Float32[Array, "B M"], target: Float32[Array, "B"]
) -> tuple[Int32[Array, "B"], Float32[Array, "B"]]:
    """Where the running sum passes the target, and what of the target is left there."""
    sums = jnp.cumsum(weights, axis=-1)
    # Rounding may leave the target at or past the last sum: then the last token with any weight is meant.
    passed = (sums > jnp.minimum(target, jnp.nextafter(sums[:, -1], 0))[:, None]) & (weights > 0)
    index = _argmax(passed.astype(jnp.int32))
    before = jnp.take_along_axis(sums - weights, index[:, None], axis=1)[:, 0]
    return index, jnp.maximum(target - before, 0)


def _argmax(x: Array) -> Int32[Array, "B"]:
    # XLA's CPU argmax takes nine times as long as its two reductions (228 µs against 25 for 49,152 numbers).
    ids = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return jnp.where(x == x.max(axis=-1, keepdims=True), ids, x.shape[1]).min(axis=-1)
