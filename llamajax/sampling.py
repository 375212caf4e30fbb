"""Logits, a row's parameters and its randomness -> a token. Knows nothing of models, slots or text.

The order is vLLM's: logit bias, penalties, temperature, min-p, top-k, top-p. The vocabulary is never sorted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32, UInt32

from llamajax.ops import native
from llamajax.ops.threshold import heaviest, in_order
from llamajax.types import MAX_LOGIT_BIAS, MAX_TOP_LOGPROBS, SamplingParams

# Below this a temperature is 0: dividing by it would overflow.
_GREEDY_TEMPERATURE = 1e-5
# Sums of f32 probabilities carry rounding: a set whose mass is within this of top_p reaches it.
_MASS_ROUNDING = 1e-6
# The width of the blocks in which a draw walks through the vocabulary.
_BLOCK = 256
_LOW = 2**32 - 1

_T = TypeVar("_T")


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
      position: where the drawn token will be. (seed, position) alone decide a row's randomness.
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
    top, finite = logits.max(axis=-1), (logits < jnp.inf).all(axis=-1)
    greedy = sampling.temperature < _GREEDY_TEMPERATURE
    temperature = jnp.where(greedy, 1, sampling.temperature)
    # A greedy row among others keeps one token.
    filters = _Filters.of(replace(sampling, top_k=jnp.where(greedy, 1, sampling.top_k)))
    scaled_top = top / temperature

    def uniform() -> Float32[Array, "B"]:
        return jax.vmap(_uniform)(sampling.seed, position)

    # On a GPU this is one small kernel, which runs beside others here. A TPU needs 250 instructions for it, and so
    # computes it only where a token is drawn.
    early = jax.lax.platform_dependent(cuda=uniform, default=lambda: jnp.zeros_like(top))

    def first_of_top() -> Int32[Array, "B"]:
        ids = jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
        return jnp.where(logits == top[:, None], ids, logits.shape[1]).min(axis=-1)

    def draw(probs: Callable[..., Array]) -> Int32[Array, "B"]:
        drawn = jax.lax.platform_dependent(early, cuda=lambda x: x, default=lambda _: uniform())
        return _inverse_cdf(probs(logits / temperature[:, None], scaled_top, filters), drawn)

    # One conditional has all: XLA does not fuse work before a conditional into the kernels of a branch.
    draws = [partial(draw, probs) for probs in _PROBS]
    token = jax.lax.switch(jnp.where(greedy.all(), 0, 1 + filters.kind), [first_of_top, *draws])
    return jnp.where(finite, token, logits.shape[1])


def top_logprobs(logits: Float32[Array, "B V"], token: Int32[Array, "B"]) -> TopLogprobs:
    """Log-probabilities of the chosen token and of the most probable ones, most probable first."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.platform_dependent(
        logprobs, cuda=_top_in_parts, default=lambda x: tuple(jax.lax.top_k(x, min(MAX_TOP_LOGPROBS, x.shape[1])))
    )
    chosen = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    return TopLogprobs(chosen, top, ids.astype(jnp.int32))


def _top_in_parts(x: Float32[Array, "B V"]) -> tuple[Float32[Array, "B 20"], Int32[Array, "B 20"]]:
    """`jax.lax.top_k`, which sorts a GPU's vocabulary for more than 16."""
    ids = jnp.arange(x.shape[1])[None]
    found = []
    for start in range(0, min(MAX_TOP_LOGPROBS, x.shape[1]), 16):
        found.append(jax.lax.top_k(x, min(16, MAX_TOP_LOGPROBS - start, x.shape[1] - start)))
        last, place = (part[:, -1:] for part in found[-1])
        x = jnp.where((x < last) | (x == last) & (ids > place), x, -jnp.inf)
    top, places = zip(*found, strict=True)
    return jnp.concatenate(top, axis=1), jnp.concatenate(places, axis=1)


def wanted_logprobs(logits: Float32[Array, "B V"], token: Int32[Array, "B"], wanted: Bool[Array, "B"]) -> TopLogprobs:
    """As `top_logprobs` if a row wants them, else zeros."""
    zeros = TopLogprobs.zeros(token.shape, logits.shape[1])
    return _if_any(wanted, lambda logits: top_logprobs(logits, token), lambda _: zeros, logits)


def _if_any(wanted: Bool[Array, "..."], yes: Callable[[Array], _T], no: Callable[[Array], _T], x: Array) -> _T:
    """`yes(x)` if anything is wanted, else `no(x)`, which costs little.

    On a CPU, a loop of one turn or none: in the loop over tokens, XLA would copy the cache for a conditional. On a GPU,
    a conditional, which can be a part of a CUDA graph.
    """

    def loop(wanted: Array, x: Array) -> _T:
        # XLA moves out of a loop what does not depend on its turn, whose number is 0.
        turns = wanted.any().astype(jnp.int32)
        return jax.lax.fori_loop(0, turns, lambda turn, _: yes(x + turn.astype(x.dtype)), no(x))

    def conditional(wanted: Array, x: Array) -> _T:
        return jax.lax.cond(wanted.any(), yes, no, x)

    return jax.lax.platform_dependent(wanted, x, cuda=conditional, default=loop)


def _adjusted(
    logits: Float32[Array, "B V"],
    sampling: Sampling,
    prompt_mask: Bool[Array, "B V"],
    counts: Int32[Array, "B V"],
) -> Float32[Array, "B V"]:
    """With what the rows add to some tokens' logits, then with penalties.

    The raw logits stay as they are: they would be copied if this wrote to them, since log-probabilities are of them.
    """
    rows = jnp.arange(logits.shape[0])[:, None]

    def plain(logits: Array) -> Array:
        return _penalize(logits, sampling, prompt_mask, counts)

    def with_bias(logits: Array) -> Array:
        return plain(logits.at[rows, sampling.bias_ids].add(sampling.bias))

    return _if_any(sampling.bias != 0, with_bias, plain, logits)


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Filters:
    """What B rows keep of their tokens. All this is known before the loop over tokens, and computed there."""

    min_p: Float32[Array, "B"]
    num_kept: Float32[Array, "B"]  # infinite without top-k
    share: Float32[Array, "B"]  # of the mass; infinite without top-p
    kind: Int32[Array, ""]  # which of _PROBS applies all of them

    @classmethod
    def of(cls, sampling: Sampling) -> "_Filters":
        has_top_k, has_top_p = sampling.top_k > 0, sampling.top_p < 1
        return cls(
            sampling.min_p,
            jnp.where(has_top_k, sampling.top_k.astype(jnp.float32), jnp.inf),
            jnp.where(has_top_p, sampling.top_p * (1 - _MASS_ROUNDING), jnp.inf),
            jnp.where(has_top_k.any(), 2, has_top_p.any().astype(jnp.int32)),
        )


def _min_p(logits: Float32[Array, "B V"], top: Float32[Array, "B"], filters: _Filters) -> Float32[Array, "B V"]:
    """Unnormalised probabilities of the tokens that min-p keeps, 0 for the others; `top` are the largest logits."""
    probs = jnp.exp(logits - top[:, None])
    return jnp.where(probs < filters.min_p[:, None], 0, probs)


def _top_p(logits: Float32[Array, "B V"], top: Float32[Array, "B"], filters: _Filters) -> Float32[Array, "B V"]:
    """As `_min_p`, then top-p."""
    return heaviest(in_order(logits), _min_p(logits, top, filters), lambda mass: mass * filters.share)


def _top_k(logits: Float32[Array, "B V"], top: Float32[Array, "B"], filters: _Filters) -> Float32[Array, "B V"]:
    """As `_min_p`, then top-k, then top-p."""
    order, probs = in_order(logits), _min_p(logits, top, filters)
    ones = heaviest(order, (probs > 0).astype(jnp.float32), lambda _: filters.num_kept)
    return heaviest(order, jnp.where(ones > 0, probs, 0), lambda mass: mass * filters.share)


_Probs = Callable[[Float32[Array, "B V"], Float32[Array, "B"], _Filters], Float32[Array, "B V"]]
_PROBS: tuple[_Probs, ...] = (_min_p, _top_p, _top_k)


def _uniform(seed: UInt32[Array, "2"], position: Int[Array, ""]) -> Float32[Array, ""]:
    key = jax.random.wrap_key_data(seed, impl="threefry2x32")  # of a seed below 2**32, jax.random.key(seed)
    return jax.random.uniform(jax.random.fold_in(key, position))


def _inverse_cdf(probs: Float32[Array, "B V"], uniform: Float32[Array, "B"]) -> Int32[Array, "B"]:
    """Where the running sum passes uniform * total: first among blocks of tokens, then inside one."""
    blocks = jnp.pad(probs, ((0, 0), (0, -probs.shape[1] % _BLOCK))).reshape(probs.shape[0], -1, _BLOCK)
    sums = _running_sums(blocks.sum(axis=-1))
    target = uniform * sums[:, -1]
    block = (sums <= target[:, None]).sum(axis=-1, dtype=jnp.int32)
    rest = target - jnp.where(block > 0, jnp.take_along_axis(sums, block[:, None] - 1, axis=1)[:, 0], 0)
    lane = jnp.arange(_BLOCK, dtype=jnp.int32)[None]
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    over = _running_sums(inside - jnp.where(lane == 0, rest[:, None], 0))
    # Rounding may leave the rest at or past the last sum: then the last token with any weight is meant.
    passed = (over > 0) | (over >= over[:, -1:])
    return jnp.where(passed, block[:, None] * _BLOCK + lane, probs.shape[1]).min(axis=-1)


def _running_sums(weights: Float32[Array, "B M"]) -> Float32[Array, "B M"]:
    """Each is added up in the same order, so that none is below the one before. A GPU takes more kernels for cumsum."""
    places = jnp.arange(weights.shape[1])
    return jnp.where((places[None] <= places[:, None])[None], weights[:, None], 0).sum(axis=-1)
