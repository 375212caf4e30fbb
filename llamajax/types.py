"""The values that pass between rooms. Knows the standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Literal, TypedDict

from llamajax.errors import RequestError

DType = Literal["auto", "float32", "bfloat16", "float16", "int8", "q8_0", "q4_0", "q4_k"]
Device = Literal["cpu", "gpu", "tpu"]
FinishReason = Literal["stop", "length", "cancelled", "timeout"]

MAX_TOP_LOGPROBS = 20
MAX_THREADS = 1024


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn. Order and ranges are vLLM's: penalties, temperature, min-p, top-k,
    top-p.

    Attributes:
      temperature: in [0, 1000000]; 0 is greedy.
      top_p: in (0, 1]; keeps the smallest set of tokens whose probability mass reaches it.
      top_k: in [0, 2**31); keeps the k most probable tokens; 0 keeps all.
      min_p: in [0, 1]; drops tokens less probable than min_p times the most probable one.
      repetition_penalty: in [0.001, 1000000]; divides positive and multiplies negative logits of tokens seen in
        the prompt or the answer (Keskar et al. 2019, CTRL); 1 is off.
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
        for parameter in fields(self):
            value = getattr(self, parameter.name)
            optional = value is None and parameter.default is None
            if not optional and (not isinstance(value, Real) or isinstance(value, bool)):
                raise RequestError(f"{parameter.name} must be a number, not {value!r}")
        for name, ok, expected in (
            ("temperature", 0 <= self.temperature <= 1e6, "in [0, 1000000]"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            (
                "top_k",
                is_integer(self.top_k) and 0 <= self.top_k < 2**31,
                "an integer in [0, 2**31); 0 keeps all tokens",
            ),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", 0.001 <= self.repetition_penalty <= 1e6, "in [0.001, 1000000]"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("seed", is_integer(self.seed) and 0 <= self.seed < 2**32, "an integer in [0, 2**32)"),
            ("logprobs", self.logprobs is None or self.logprobs in range(MAX_TOP_LOGPROBS + 1), "None or 0 to 20"),
        ):
            if not ok:
                raise RequestError(f"{name} must be {expected}, not {getattr(self, name)}")


def is_integer(value: object) -> bool:
    """Whether a value is a whole number of Python or numpy, which booleans are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Request:
    """A prompt of token ids and what is asked for.

    Attributes:
      token_ids: at least one.
      max_new_tokens: at least one.
      stop_ids: tokens that end the answer; they are not part of it.
      reuse_cache: whether tokens that the KV cache holds already may be left unread. An answer's tokens were
        computed one by one, whose last bits differ from those of a prompt read at once: with reuse, a request's
        answer may depend on what was asked before.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()
    reuse_cache: bool = False


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of raw probabilities, before penalties, temperature and filters.

    Attributes:
      logprob: the drawn token's.
      top: (token id, logprob) of the most probable ones, most probable first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One drawn token.

    Attributes:
      time: when its block reached the host, by `time.perf_counter`.
    """

    id: int
    logprobs: TokenLogprobs | None
    time: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Timings:
    """Seconds, from the request to the first token, from there to the last, and from the request to each.

    A token's time is that of its block, so that tokens which came together have the same.
    """

    time_to_first_token: float
    decode_time: float
    token_times: tuple[float, ...] = ()


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      text: without the stop string or stop token that ended it.
      token_ids: of the answer, without the stop token; a stop string's tokens are among them.
      finish_reason: "stop" for a stop token or string, "length" for a limit, "cancelled", "timeout" for a deadline.
      prompt_tokens: how many tokens the prompt has.
      cached_tokens: how many of them the KV cache already held.
      logprobs: one for each of `token_ids` if they were asked for, else None.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    timings: Timings
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def tokens_per_second(self) -> float:
        """Of decoding: tokens after the first one, by the time they took; 0 if there are none."""
        after_first = len(self.token_ids) - 1
        return after_first / self.timings.decode_time if after_first > 0 and self.timings.decode_time > 0 else 0.0
