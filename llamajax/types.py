"""The values that pass between rooms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from llamajax import checks
from llamajax.errors import RequestError

DType = Literal["auto", "float32", "bfloat16", "float16", "int8", "q8_0", "q4_0", "q4_k"]
CacheDType = Literal["auto", "int8"]
Device = Literal["cpu", "gpu", "tpu"]
# Devices whose memory is known without one.
Chip = Literal["a100", "h100", "h200", "v5e", "v5p", "v6e"]
FinishReason = Literal["stop", "length", "cancelled", "timeout"]

MAX_TOP_LOGPROBS = 20
MAX_THREADS = 1024
MAX_LOGIT_BIAS = 300  # as OpenAI's API takes
MAX_GRAMMAR_CHARS = 1_000_000


class Message(TypedDict):
    """One turn of a conversation.

    Attributes:
      tool_calls: what an assistant's message asks of tools, as OpenAI's clients send it.
      tool_call_id: which of them a tool's message answers.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]


# Where messages come in, a content may also be a list of text parts, as OpenAI's clients send it; newlines join them.
Messages = Sequence[Message] | Sequence[Mapping[str, object]]


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are drawn. Order and ranges are vLLM's: logit bias, penalties, temperature, min-p,
    top-k, top-p. Integers may be written as floats (1.0) and numbers as numpy's.

    Attributes:
      temperature: in [0, 1000000]; 0 is greedy.
      top_p: in (0, 1]; keeps the smallest set of tokens whose probability mass reaches it.
      top_k: in `[0, 2**31)`; keeps the k most probable tokens; 0 or -1 keeps all.
      min_p: in [0, 1]; drops tokens less probable than min_p times the most probable one.
      repetition_penalty: in [0.001, 1000000]; divides positive and multiplies negative logits of tokens seen in
        the prompt or the answer (Keskar et al. 2019, CTRL); 1 is off.
      presence_penalty: in [-2, 2]; subtracted once from the logit of each token of the answer so far.
      frequency_penalty: in [-2, 2]; subtracted once for each time the token occurs in the answer so far.
      seed: in `[-2**63, 2**63)`; with the position it decides each token.
      logprobs: None, or how many of the most probable tokens to report beside the chosen one (0 to 20).
      logit_bias: None, or token id -> what is added to its logit, in [-100, 100]; at most 300 ids.
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
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for name, low, high, expected in (
            ("temperature", 0, 1e6, "in [0, 1000000]"),
            ("top_p", 5e-324, 1, "in (0, 1]"),
            ("min_p", 0, 1, "in [0, 1]"),
            ("repetition_penalty", 0.001, 1e6, "in [0.001, 1000000]"),
            ("presence_penalty", -2, 2, "in [-2, 2]"),
            ("frequency_penalty", -2, 2, "in [-2, 2]"),
        ):
            self._set(name, checks.number(name, getattr(self, name), low, high, expected))
        for name, low, high, expected in (
            ("top_k", -1, 2**31 - 1, "an integer in [-1, 2**31); 0 and -1 keep all tokens"),
            ("seed", -(2**63), 2**63 - 1, "an integer in [-2**63, 2**63)"),
            ("logprobs", 0, MAX_TOP_LOGPROBS, f"None or an integer from 0 to {MAX_TOP_LOGPROBS}"),
        ):
            value = getattr(self, name)
            if value is not None or name != "logprobs":
                self._set(name, checks.integer(name, value, low, high, expected))
        self._set("top_k", max(self.top_k, 0))
        self._set("logit_bias", None if self.logit_bias is None else _checked_bias(self.logit_bias))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _checked_bias(bias: Mapping[int, float]) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias must be a mapping of token ids to numbers, not {checks.shown(bias)}")
    if len(bias) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias may have {MAX_LOGIT_BIAS} token ids, not {len(bias)}")
    return {
        checks.integer("a token id of logit_bias", token_id, 0): checks.number(
            f"logit_bias of token {token_id}", value, -100, 100, "in [-100, 100]"
        )
        for token_id, value in bias.items()
    }


@dataclass(frozen=True)
class Grammar:
    """What an answer's text must fit.

    Attributes:
      kind: the option that it was given as, which says how `text` is read: a JSON schema, a regular expression, or a
        context-free grammar in llguidance's variant of Lark, which calls of tools are, too.
    """

    kind: Literal["json_schema", "regex", "grammar", "tools"]
    text: str


class Matcher(Protocol):
    """Follows one answer through a grammar, token by token.

    Attributes:
      ended: the answer fits, and nothing but its end may follow.
    """

    ended: bool

    def mask(self) -> bytes:
        """Which tokens may come next: bit i % 32 of integer i // 32 allows token i. It has `mask_len` integers.

        Raises RequestError if the grammar is too complex at this place, or nothing fits it.
        """

    def advance(self, token_id: int) -> None:
        """The answer has one more token. Raises RequestError as `mask` does."""


class Constraint(Protocol):
    """A grammar that is compiled for a model's tokens. Any number of answers may use it, in any thread."""

    def matcher(self) -> Matcher:
        """For an answer that begins."""


def mask_len(vocab_size: int) -> int:
    """Integers that a mask has: one bit for each token, and one for the end of a model that has no token for it."""
    return vocab_size // 32 + 1


@dataclass(frozen=True)
class Request:
    """A prompt of token ids and what is asked for.

    Attributes:
      token_ids: at least one.
      max_new_tokens: at least one.
      stop_ids: tokens that end the answer; they are not part of it.
      min_tokens: stop tokens cannot be drawn, and stop strings do not count, before the answer has so many.
      constraint: what the answer must fit, if anything. It decides where stop tokens may be drawn.
    """

    token_ids: Sequence[int]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    constraint: Constraint | None = None


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
