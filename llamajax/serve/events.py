"""Answers as they are generated, as the events of each endpoint's stream. Knows no HTTP and no engine."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llamajax.tokenizers.base import Tokenizer
from llamajax.types import Completion

from . import protocol
from .answers import Choice, chat_logprobs, text_logprobs, usage
from .requests import GenerationRequest


@dataclass
class AnswerInfo:
    """What all objects and events of an answer have in common.

    Attributes:
      id: the answer's.
      model: the name that it is served under.
      others: more fields for the objects of the answer.
    """

    id: str
    model: str
    others: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))


class Events(Protocol):
    """How an answer is sent: each method gives events to send, as bytes."""

    def begin(self) -> Iterator[bytes]:
        """Before any text."""

    def piece(self, index: int, choice: Choice) -> Iterator[bytes]:
        """More text of a choice; with a finish reason it is the last."""

    def end(self, completions: Sequence[Completion]) -> Iterator[bytes]:
        """After all choices."""

    def error(self, error: Mapping[str, Any]) -> bytes:
        """What a stream that cannot go on ends with; the error is in OpenAI's form."""


@dataclass
class ChunkEvents:
    """Chunks of a chat or of a completion."""

    request: GenerationRequest
    info: AnswerInfo
    tokenizer: Tokenizer
    is_chat: bool

    def begin(self) -> Iterator[bytes]:
        if self.is_chat:
            for index in range(len(self.request.prompts) * self.request.num_choices):
                delta = {"role": "assistant", "content": ""}
                yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, index: int, choice: Choice) -> Iterator[bytes]:
        if self.is_chat:
            delta: dict[str, Any] = {"content": choice.text} if choice.text else {}
            if choice.tool_calls:
                delta["tool_calls"] = choice.tool_calls
            said: dict[str, Any] = {"delta": delta}
        else:
            said = {"text": choice.text}
        logprobs = (chat_logprobs if self.is_chat else text_logprobs)(choice, self.tokenizer)
        yield self._chunk([{"index": index, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason}])

    def end(self, completions: Sequence[Completion]) -> Iterator[bytes]:
        if self.request.include_usage:
            yield self._chunk([], usage=usage(completions, self.request.num_choices))
        yield b"data: [DONE]\n\n"

    def error(self, error: Mapping[str, Any]) -> bytes:
        return data_event({"error": error})

    def _chunk(self, choices: list[dict[str, Any]], **others: Any) -> bytes:
        if self.request.include_usage:
            others = {"usage": None, **others}
        return data_event(
            {
                "id": self.info.id,
                "object": "chat.completion.chunk" if self.is_chat else "text_completion",
                "created": self.info.created,
                "model": self.info.model,
                **self.info.others,
                "choices": choices,
                **others,
            }
        )


@dataclass
class ResponseEvents:
    """Events of `/v1/responses`."""

    info: AnswerInfo
    body: Mapping[str, Any]
    _number: int = 0

    def begin(self) -> Iterator[bytes]:
        response = response_body(self.info, self.body, None)
        item = _message(self.info, None)
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **self._where(), part=_part(""))

    def piece(self, index: int, choice: Choice) -> Iterator[bytes]:
        if choice.text:
            yield self._event("response.output_text.delta", **self._where(), delta=choice.text, logprobs=[])

    def end(self, completions: Sequence[Completion]) -> Iterator[bytes]:
        [completion] = completions
        response = response_body(self.info, self.body, completion)
        yield self._event("response.output_text.done", **self._where(), text=completion.text, logprobs=[])
        yield self._event("response.content_part.done", **self._where(), part=_part(completion.text))
        yield self._event("response.output_item.done", output_index=0, item=_message(self.info, completion))
        yield self._event(f"response.{response['status']}", response=response)

    def error(self, error: Mapping[str, Any]) -> bytes:
        return self._event("error", **{name: error[name] for name in ("code", "message", "param")})

    def _where(self) -> dict[str, Any]:
        return {"item_id": _message_id(self.info), "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return f"event: {kind}\n".encode() + data_event({"type": kind, "sequence_number": number, **fields})


def response_body(info: AnswerInfo, body: Mapping[str, Any], completion: Completion | None) -> dict[str, Any]:
    """The object that `/v1/responses` answers with; of an answer that is still to come if there is no completion."""
    is_cut = completion is not None and completion.finish_reason == "length"
    took = completion and usage([completion])
    return {
        "id": info.id,
        "object": "response",
        "created_at": info.created,
        "model": info.model,
        **info.others,
        "status": "in_progress" if completion is None else "incomplete" if is_cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "output": [_message(info, completion)] if completion else [],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": body.get("temperature"),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": body.get("top_p"),
        "truncation": "disabled",
        "usage": took
        and {
            "input_tokens": took["prompt_tokens"],
            "input_tokens_details": {**took["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": took["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": took["total_tokens"],
        },
        "user": body.get("user"),
        "metadata": body.get("metadata") or {},
    }


def make_events(
    url: str, request: GenerationRequest, info: AnswerInfo, tokenizer: Tokenizer, body: Mapping[str, Any]
) -> Events:
    """The events of an endpoint's streams."""
    if url == protocol.RESPONSES:
        return ResponseEvents(info, body)
    return ChunkEvents(request, info, tokenizer, url == protocol.CHAT)


def data_event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event of JSON."""
    return b"data: " + encode_json(value) + b"\n\n"


def encode_json(value: Any) -> bytes:
    """JSON in UTF-8; lone surrogates, which it cannot have, become "?"."""
    return _encode(value).encode("utf-8", "replace")


_encode: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _message(info: AnswerInfo, completion: Completion | None) -> dict[str, Any]:
    status = (
        "in_progress" if completion is None else "incomplete" if completion.finish_reason == "length" else "completed"
    )
    return {
        "type": "message",
        "id": _message_id(info),
        "status": status,
        "role": "assistant",
        "content": [_part(completion.text)] if completion else [],
    }


def _message_id(info: AnswerInfo) -> str:
    return info.id.replace("resp_", "msg_")


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
