"""The values that pass between rooms. Knows the standard library only."""

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

from llamajax.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled"]

MAX_TOP_LOGPROBS = 20


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn. Order and ranges are vLLM's: penalties, temperature, min-p, top-k,
    top-p.

    Attributes:
      temperature: >= 0; 0 is greedy.
      top_p: in (0, 1]; keeps the smallest set of tokens whose probability mass reaches it.
      top_k: >= 0; keeps the k most probable tokens; 0 keeps all.
      min_p: in [0, 1]; drops tokens less probable than min_p times the most probable one.
      repetition_penalty: > 0; divides positive and multiplies negative logits of tokens seen in the prompt or
        the answer (Keskar et al. 2019, CTRL); 1 is off.
      presence_penalty: in [-2, 2]; subtracted once from the logit of each token of the answer so far.
      frequency_penalty: in [-2, 2]; subtracted once for each time the token occurs in the answer so far.
      seed: in [0, 2**32); with the position it decides each token.
      logprobs: None, or how many of the most probable tokens to report beside the chosen one (0 to 20).
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 42
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, ok, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "a finite number >= 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, ">= 0 (0 keeps every token)"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number > 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2**32)"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_TOP_LOGPROBS, "None or 0 to 20"),
        ):
            if not ok:
                raise RequestError(f"{name} must be {expected}, not {getattr(self, name)}")
