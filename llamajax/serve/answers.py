"""Answers and errors as JSON, in OpenAI's form."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate, count
from typing import Any, Literal, NamedTuple

from llamajax.errors import (
    DeviceMemoryError,
    LlamaJaxError,
    PromptTooLongError,
    QueueFullError,
    RequestError,
    UnavailableError,
)
from llamajax.text import one_line
from llamajax.tokenizers.base import Tokenizer
from llamajax.tools import ToolCall, ToolFormat, Tools
from llamajax.types import Completion, FinishReason, TokenLogprobs

from .protocol import CHAT


class Choice(NamedTuple):
    """What is sent of an answer: all of it, or a part.

    Attributes:
      parts: text, and calls in OpenAI's form, in their order.
      logprobs: one for each of `token_ids`; None for a prompt's first token, or if they were not asked for.
      finish_reason: the completion's, or "tool_calls" for an answer that ended by itself and has calls.
      offset: characters of the choice that were sent before.
    """

    parts: Sequence[str | Mapping[str, Any]]
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs | None] | None
    finish_reason: FinishReason | Literal["tool_calls"] | None
    offset: int = 0

    @classmethod
    def of(cls, completion: Completion) -> "Choice":
        return cls([completion.text], completion.token_ids, completion.logprobs, completion.finish_reason)

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def tool_calls(self) -> list[Mapping[str, Any]]:
        return [part for part in self.parts if not isinstance(part, str)]

    def saying(self, parts: Sequence[str | ToolCall], call_ids: Iterator[str]) -> "Choice":
        """With these parts in place of its own."""

        def call(it: ToolCall) -> Mapping[str, Any]:
            function = {"name": it.name, "arguments": it.arguments}
            return {"id": next(call_ids), "type": "function", "function": function}

        return self._replace(parts=[part if isinstance(part, str) else call(part) for part in parts])


def with_calls(choices: Sequence[Choice], tool_format: ToolFormat, tools: Tools, answer_id: str) -> list[Choice]:
    """Whole choices, with the calls that their texts have."""
    read = [
        choice.saying(tool_format.read(choice.text, tools), call_ids(answer_id, index))
        for index, choice in enumerate(choices)
    ]
    return [
        choice._replace(finish_reason="tool_calls") if choice.finish_reason == "stop" and choice.tool_calls else choice
        for choice in read
    ]


def call_ids(answer_id: str, choice: int) -> Iterator[str]:
    """Of the calls of one choice of an answer."""
    return (f"call_{re.split('[-_]', answer_id)[-1]}_{choice}_{number}" for number in count())


def token_counts(completions: Sequence[Completion], num_choices: int | None = None) -> dict[str, int]:
    """How many tokens the prompts and the answers have.

    Args:
      completions: of one prompt, or of several, `num_choices` of each.
      num_choices: all if None.
    """
    prompt_tokens = sum(completion.prompt_tokens for completion in completions[:: num_choices or len(completions)])
    generated = sum(len(completion.token_ids) for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
    }


def usage(completions: Sequence[Completion], num_choices: int | None = None) -> dict[str, Any]:
    """As `token_counts`, in OpenAI's form."""
    cached = sum(completion.cached_tokens for completion in completions[:: num_choices or len(completions)])
    return {**token_counts(completions, num_choices), "prompt_tokens_details": {"cached_tokens": cached}}


def chat_logprobs(choice: Choice, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Of a choice's tokens, as a chat gives them; None if they were not asked for."""
    if choice.logprobs is None:
        return None

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            entry(i, at.logprob) | {"top_logprobs": [entry(*top) for top in at.top]}
            for i, at in zip(choice.token_ids, choice.logprobs, strict=True)
            if at is not None
        ]
    }


def text_logprobs(choice: Choice, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Of a choice's tokens, as a completion gives them; None if they were not asked for."""
    if choice.logprobs is None:
        return None

    def text(token_id: int) -> str:
        return tokenizer.token_bytes(token_id).decode(errors="replace")

    def top(token_id: int, at: TokenLogprobs) -> dict[str, float]:
        # Of several tokens that read the same (parts of characters) the most probable counts.
        found: dict[str, float] = {}
        for i, logprob in (*at.top, (token_id, at.logprob)):
            found.setdefault(text(i), logprob)
        return found

    tokens = [text(i) for i in choice.token_ids]
    return {
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=choice.offset))[: len(tokens)],
        "token_logprobs": [at and at.logprob for at in choice.logprobs],
        "tokens": tokens,
        "top_logprobs": [at and top(i, at) for i, at in zip(choice.token_ids, choice.logprobs, strict=True)],
    }


def answer_body(
    url: str,
    choices: Sequence[Choice],
    tokenizer: Tokenizer,
    *,
    id: str,
    created: int,
    model: str,
    usage: Mapping[str, Any],
) -> dict[str, Any]:
    """The object that an endpoint answers with."""
    is_chat = url == CHAT
    return {
        "id": id,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": index,
                **({"message": _message(it)} if is_chat else {"text": it.text}),
                "logprobs": (chat_logprobs if is_chat else text_logprobs)(it, tokenizer),
                "finish_reason": it.finish_reason,
            }
            for index, it in enumerate(choices)
        ],
        "usage": usage,
    }


def _message(choice: Choice) -> dict[str, Any]:
    if not choice.tool_calls:
        return {"role": "assistant", "content": choice.text}
    return {"role": "assistant", "content": choice.text or None, "tool_calls": choice.tool_calls}


def error_status(error: LlamaJaxError) -> int:
    """The HTTP status: 400 if the request must change, 429 or 503 if it may come again, 500 if it is not its fault."""
    if isinstance(error, QueueFullError):
        return 429
    if isinstance(error, UnavailableError | DeviceMemoryError):
        return 503
    return 400 if isinstance(error, RequestError | PromptTooLongError) else 500


def error_body(error: LlamaJaxError, names: Collection[str] = ()) -> dict[str, Any]:
    """The object that an endpoint answers a bad request with.

    Args:
      error: what is wrong.
      names: the fields of the request, one of which may be to blame; messages name the model for other reasons.
    """
    message = one_line(error)
    types = {400: "invalid_request_error", 429: "rate_limit_error"}
    return {
        "error": {
            "message": message,
            "type": types.get(error_status(error), "server_error"),
            "param": next((word for word in re.findall(r"\w+", message) if word in names and word != "model"), None),
            "code": "context_length_exceeded" if isinstance(error, PromptTooLongError) else None,
        }
    }
