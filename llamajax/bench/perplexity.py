"""How well a model predicts a text, and how far its predictions are from those of another run.

As llama.cpp's perplexity tool does, a text is read in windows that know nothing of each other, and only tokens of a
window's second half are scored: each has at least half a window before it.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float16, Float32, Int32
from optax.losses import kl_divergence_with_log_targets, softmax_cross_entropy_with_integer_labels

from llamajax.bench.saved_logits import SavedLogits, save_logits
from llamajax.errors import CheckpointError, PromptTooLongError, RequestError
from llamajax.llm import LLM

# The shortest window: two of its tokens are scored, as many as a standard error needs.
MIN_CONTEXT = 5


@dataclass(frozen=True)
class Estimate:
    """A figure of a sample of N tokens, and its standard error. Tokens are taken to be independent."""

    value: float
    error: float

    @classmethod
    def of_mean(cls, sample: Float[np.ndarray, "N"]) -> "Estimate":
        """The error is the sample's standard deviation / sqrt(N)."""
        return cls(float(sample.mean()), float(sample.std(ddof=1) / math.sqrt(len(sample))))

    @classmethod
    def of_exp_mean(cls, sample: Float[np.ndarray, "N"]) -> "Estimate":
        """exp(mean). To first order, its error is exp(mean) times that of the mean (the delta method)."""
        mean = cls.of_mean(sample)
        return cls(math.exp(mean.value), math.exp(mean.value) * mean.error)


@dataclass(frozen=True)
class Comparison:
    """This run against a saved one, over the same tokens.

    Attributes:
      saved_perplexity: the saved run's.
      perplexity_ratio: this run's over the saved one's. Its error is less than that of either, since it is of the
        differences, token by token.
      kl_divergence: KL(saved || this), in nats a token.
      same_top: the fraction of tokens for which both found the same one the most probable.
    """

    saved_perplexity: Estimate
    perplexity_ratio: Estimate
    kl_divergence: Estimate
    same_top: Estimate


@dataclass(frozen=True)
class Measured:
    """What came of a text.

    Attributes:
      context: tokens of a window.
      tokens: how many were scored, in all windows.
      perplexity: exp(mean negative log-likelihood of the scored tokens).
      tokens_per_second: read, not scored; of the median window, so that compiling, for which the first one waits,
        does not count if there are three.
    """

    context: int
    windows: int
    tokens: int
    perplexity: Estimate
    tokens_per_second: float
    comparison: Comparison | None


def measure(
    llm: LLM,
    text: str,
    *,
    context: int = 512,
    max_windows: int | None = None,
    save: Path | None = None,
    saved: SavedLogits | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Scores a text.

    Args:
      context: tokens of a window, as in `windows`.
      max_windows: only the first so many.
      save: a file to write what a later run can be compared with, 2 bytes a logit.
      saved: another run's, to compare with.
      progress: called with windows done so far, and in all.

    Raises as `windows`, `save_logits` and `SavedLogits.check` do; CheckpointError if the scores are not numbers.
    """
    ids = windows(llm, text, context)[:max_windows]
    middle, vocab_size = ids.shape[1] // 2, llm.config.vocab_size
    next_ids = ids[:, middle + 1 :]
    if saved:
        saved.check(text, ids, next_ids.shape[1], vocab_size)
    losses, compared, seconds = [], [], []
    with save_logits(save, text, ids, next_ids.shape[1], vocab_size) if save else nullcontext() as write:
        for i in range(len(ids)):
            began = time.perf_counter()
            logits = llm.logits(ids[i].tolist())[middle:-1]
            seconds.append(time.perf_counter() - began)
            losses.append(np.asarray(_losses(logits, next_ids[i]), float))
            if not np.isfinite(losses[-1]).all():
                raise CheckpointError("the model's scores are not numbers (NaN): its weights are broken")
            if write:
                write(logits)
            if saved:
                compared.append(_compare(logits, saved[i], next_ids[i]))
                if not np.isfinite(compared[-1].divergences).all():
                    raise RequestError("the saved logits are not numbers (NaN): save them again")
            progress(i + 1, len(ids))
    return Measured(
        context=ids.shape[1],
        windows=len(ids),
        tokens=next_ids.size,
        perplexity=Estimate.of_exp_mean(np.concatenate(losses)),
        tokens_per_second=ids.shape[1] / float(np.median(seconds)),
        comparison=_comparison(np.concatenate(losses), compared) if saved else None,
    )


def windows(llm: LLM, text: str, context: int) -> Int32[np.ndarray, "W T"]:
    """A text's tokens, T = `context` at a time; what is left is dropped, but a text of less is one shorter window.

    If the tokenizer asks for BOS, each window is BOS and the next T - 1 tokens. (llama.cpp puts it in place of a
    window's first token.)

    Raises RequestError for less than MIN_CONTEXT tokens, PromptTooLongError for a window that is longer than the
    model's context.
    """
    if context > llm.max_seq_len:
        raise PromptTooLongError(f"windows of {context} tokens are more than the context, {llm.max_seq_len}")
    bos = [] if llm.tokenizer.bos_id is None else [llm.tokenizer.bos_id]
    ids = llm.tokenizer.encode(text)
    length = min(context - len(bos), len(ids))
    if len(bos) + length < MIN_CONTEXT:
        raise RequestError(f"a window must have {MIN_CONTEXT} tokens: the context has {context}, the text {len(ids)}")
    starts = range(0, len(ids) - length + 1, length)
    return np.array([bos + ids[start : start + length] for start in starts], np.int32)


class _Compared(NamedTuple):
    saved_losses: Float32[Array, "P"]
    divergences: Float32[Array, "P"]
    same_top: Bool[Array, "P"]


_losses = jax.jit(softmax_cross_entropy_with_integer_labels)


@jax.jit
def _compare(logits: Float32[Array, "P V"], saved: Float16[Array, "P V"], next_ids: Int32[Array, "P"]) -> _Compared:
    saved = saved.astype(jnp.float32)
    return _Compared(
        softmax_cross_entropy_with_integer_labels(saved, next_ids),
        kl_divergence_with_log_targets(jax.nn.log_softmax(logits), jax.nn.log_softmax(saved)),
        logits.argmax(axis=-1) == saved.argmax(axis=-1),
    )


def _comparison(losses: Float[np.ndarray, "N"], compared: list[_Compared]) -> Comparison:
    saved_losses, divergences, same_top = (np.concatenate(x).astype(float) for x in zip(*compared, strict=True))
    return Comparison(
        saved_perplexity=Estimate.of_exp_mean(saved_losses),
        perplexity_ratio=Estimate.of_exp_mean(losses - saved_losses),
        kl_divergence=Estimate.of_mean(divergences),
        same_top=Estimate.of_mean(same_top),
    )
