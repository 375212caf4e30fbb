"""The work that is measured: synthetic prompts, when each arrives, and how much each asks for."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from llamajax.types import SamplingParams


@dataclass(frozen=True)
class Workload:
    """R requests of equal size.

    Attributes:
      prompts: token ids.
      arrivals: seconds from the start, ascending; the first request stands at 0.
      new_tokens: what each answer has, exactly.
      sampling: how they are drawn.
    """

    prompts: Int64[np.ndarray, "R T"]
    arrivals: Float64[np.ndarray, "R"]
    new_tokens: int
    sampling: SamplingParams


def synthetic(
    requests: int,
    prompt_len: int,
    new_tokens: int,
    *,
    vocab_size: int,
    rate: float | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Workload:
    """Prompts of evenly drawn token ids, the same for the same seed; fewer requests are the first of more.

    Args:
      rate: requests a second of a Poisson process; None lets all arrive at once.
    """
    prompts = np.random.default_rng((seed, 0)).integers(vocab_size, size=(requests, prompt_len))
    gaps = np.random.default_rng((seed, 1)).exponential(1 / rate if rate else 0, requests - 1)
    return Workload(
        prompts, np.concatenate([[0.0], np.cumsum(gaps)]), new_tokens, SamplingParams(temperature, seed=seed)
    )
