"""Answers as they are generated, as the events of each endpoint's stream. Knows no HTTP and no engine."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
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
      model: the name that clients know it by.
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
    _output: list[dict[str, Any]] = field(default_factory=list)
    _text: list[str] = field(default_factory=list)
    _where: dict[str, Any] = field(default_factory=dict)  # where the open message's text is; empty if none is open

    def begin(self) -> Iterator[bytes]:
        response = response_body(self.info, self.body)
        yield self._event("response.created", response=response)
        yield self._event("response.in_progress", response=response)

    def piece(self, index: int, choice: Choice) -> Iterator[bytes]:
        for part in choice.parts:
            if not isinstance(part, str):
                yield from self._end_message("completed")
                yield from self._call(_call(part))
            elif part:
                yield from self._begin_message()
                self._text.append(part)
                yield self._event("response.output_text.delta", **self._where, delta=part, logprobs=[])

    def end(self, completions: Sequence[Completion]) -> Iterator[bytes]:
        [completion] = completions
        if not self._output:
            yield from self._begin_message()
        yield from self._end_message(_status(completion.finish_reason))
        response = response_body(self.info, self.body, completion, self._output)
        yield self._event(f"response.{response['status']}", response=response)

    def error(self, error: Mapping[str, Any]) -> bytes:
        return self._event("error", **{name: error[name] for name in ("code", "message", "param")})

    def _begin_message(self) -> Iterator[bytes]:
        if not self._where:
            at = len(self._output)
            item = _message(self.info, at, [], "in_progress")
            self._output.append(item)
            self._where = {"item_id": item["id"], "output_index": at, "content_index": 0}
            yield self._event("response.output_item.added", output_index=at, item=item)
            yield self._event("response.content_part.added", **self._where, part=_part(""))

    def _end_message(self, status: str) -> Iterator[bytes]:
        if self._where:
            text, at = "".join(self._text), self._where["output_index"]
            self._output[at] = _message(self.info, at, [_part(text)], status)
            yield self._event("response.output_text.done", **self._where, text=text, logprobs=[])
            yield self._event("response.content_part.done", **self._where, part=_part(text))
            yield self._event("response.output_item.done", output_index=at, item=self._output[at])
            self._where, self._text = {}, []

    def _call(self, item: dict[str, Any]) -> Iterator[bytes]:
        where = {"item_id": item["id"], "output_index": len(self._output)}
        self._output.append(item)
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=where["output_index"], item=begun)
        yield self._event("response.function_call_arguments.delta", **where, delta=item["arguments"])
        done = {name: item[name] for name in ("name", "arguments")}
        yield self._event("response.function_call_arguments.done", **where, **done)
        yield self._event("response.output_item.done", output_index=where["output_index"], item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._number = self._number, self._number + 1
        return f"event: {kind}\n".encode() + data_event({"type": kind, "sequence_number": number, **fields})


def response_output(info: AnswerInfo, choice: Choice) -> list[dict[str, Any]]:
    """What a whole choice says and calls, as items of `/v1/responses`."""
    output: list[dict[str, Any]] = []
    for is_text, parts in groupby(filter(None, choice.parts), lambda part: isinstance(part, str)):
        if is_text:
            output.append(_message(info, len(output), [_part("".join(map(str, parts)))], "completed"))
        else:
            output += [_call(part) for part in parts if isinstance(part, Mapping)]
    output = output or [_message(info, 0, [_part("")], "completed")]
    if output[-1]["type"] == "message":
        output[-1]["status"] = _status(choice.finish_reason)
    return output


def response_body(
    info: AnswerInfo,
    body: Mapping[str, Any],
    completion: Completion | None = None,
    output: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The object that `/v1/responses` answers with; of an answer that is still to come if there is no completion."""
    status = _status(completion.finish_reason) if completion else "in_progress"
    took = completion and usage([completion])
    return {
        "id": info.id,
        "object": "response",
        "created_at": info.created,
        "model": info.model,
        **info.others,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "output": output,
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": body.get("temperature"),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
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


def _status(finish_reason: str | None) -> str:
    return "incomplete" if finish_reason == "length" else "completed"


def _message(info: AnswerInfo, at: int, content: Sequence[Mapping[str, Any]], status: str) -> dict[str, Any]:
    """An item; `at` is its place in the output."""
    id = f"{info.id.replace('resp_', 'msg_')}_{at}"
    return {"type": "message", "id": id, "status": status, "role": "assistant", "content": content}


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call as an item of its own, from a chat's form."""
    id, function = call["id"], call["function"]
    said = {"call_id": id, "name": function["name"], "arguments": function["arguments"]}
    return {"type": "function_call", "id": id.replace("call_", "fc_"), "status": "completed", **said}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
