"""The work that is measured: synthetic prompts, when each arrives, and how much each asks for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from llamajax.types import SamplingParams


@dataclass(frozen=True)
class Workload:
    """R requests.

    Attributes:
      prompts: token ids of each.
      arrivals: seconds from the start, ascending; the first request is at 0.
      new_tokens: what each answer has, exactly.
      sampling: how they are drawn.
    """

    prompts: list[list[int]]
    arrivals: Float64[np.ndarray, "R"]
    new_tokens: int
    sampling: SamplingParams


def synthetic(
    requests: int,
    prompt_lens: Sequence[int],
    new_tokens: int,
    *,
    vocab_size: int,
    rate: float | None = None,
    sampling: SamplingParams,
    seed: int = 0,
    draw: int = 0,
) -> Workload:
    """Prompts of evenly drawn token ids, the same for the same seed; fewer requests are the first of more.

    Args:
      prompt_lens: each prompt's length is one of these, evenly drawn.
      rate: requests a second of a Poisson process; None lets all arrive at once.
      draw: another one gives prompts of other tokens, with the same lengths and arrivals.
    """
    tokens, gaps, lengths = (np.random.default_rng((seed % 2**64, *it)) for it in ((0, draw), (1,), (2,)))
    chosen = [prompt_lens[i] for i in lengths.integers(len(prompt_lens), size=requests)]
    prompts = np.split(tokens.integers(vocab_size, size=sum(chosen)), np.cumsum(chosen)[:-1])
    arrivals = np.cumsum(gaps.exponential(1 / rate if rate else 0, requests - 1))
    return Workload([prompt.tolist() for prompt in prompts], np.append(0.0, arrivals), new_tokens, sampling)


def sampling_name(sampling: SamplingParams) -> str:
    """What results call it: "greedy", or "temperature 0.6, top-p 0.9 (default)", with all that is not off."""
    options = [("top-p", sampling.top_p, 1), ("top-k", max(sampling.top_k, 0), 0), ("min-p", sampling.min_p, 0)]
    if sampling.temperature == 0:
        options = []  # the most probable token is never cut
    options.append(("repetition-penalty", sampling.repetition_penalty, 1))
    how = f"temperature {sampling.temperature:g}" if sampling.temperature else "greedy"
    named = ", ".join([how, *(f"{name} {value:g}" for name, value, off in options if value != off)])
    return named + " (default)" * (sampling == SamplingParams(seed=sampling.seed))
