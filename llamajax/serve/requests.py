"""The body of each endpoint that generates -> prompts, options and how the answer is to be sent. Knows no HTTP."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llamajax import checks
from llamajax.errors import RequestError
from llamajax.tools import Tools, read_tools
from llamajax.types import Message

from . import protocol


@dataclass(frozen=True)
class GenerationRequest:
    """What a request asks for.

    Attributes:
      prompts: each is answered `num_choices` times.
      options: of `LLM.stream`, but for the seed.
      seed: of the first choice; the i-th draws with seed + i.
      streams: the answer is sent as it is generated.
      include_usage: a stream ends with what the request took.
      tools: what the answers may call.
      echo: the prompt is a part of the answer.
      echo_only: and all of it: no tokens are wanted.
    """

    prompts: list[protocol.Prompt]
    options: Mapping[str, Any]
    seed: int
    num_choices: int = 1
    streams: bool = False
    include_usage: bool = False
    tools: Tools | None = None
    echo: bool = False
    echo_only: bool = False

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.num_choices

    @property
    def seeds(self) -> list[int]:
        """Of the answers to each prompt."""
        return [protocol.choice_seed(self.seed, i) for i in range(self.num_choices)]


def read_chat(body: Mapping[str, Any]) -> GenerationRequest:
    """A request to `/v1/chat/completions`. Raises RequestError."""
    return _offering(_read(body, [protocol.read_messages(body)], None, "messages", *protocol.TOOLS), body)


def read_completion(body: Mapping[str, Any]) -> GenerationRequest:
    """A request to `/v1/completions`. Raises RequestError."""
    echo_only = _flag(body, "echo") and body.get("max_tokens") == 0
    if echo_only:  # the engine draws at least one
        body = {**body, "max_tokens": 1}
    request = _read(body, list(protocol.read_prompts(body)), 16, "prompt", "echo")
    return replace(request, echo_only=echo_only)


def read_response(body: Mapping[str, Any]) -> GenerationRequest:
    """A request to `/v1/responses`: what was said before comes in the input. Raises RequestError."""
    given = body.get("input")
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
        raise RequestError("input must be a text, or a list of messages with a role and a content")
    messages: list[Message] = protocol.read_messages({"messages": _as_messages(items)})
    if (instructions := body.get("instructions")) is not None:
        messages.insert(0, {"role": "system", "content": protocol.text(instructions)})
    for name, neutral in (("n", (None, 1)), ("logprobs", (None, False)), ("top_logprobs", (None, 0))):
        if body.get(name) not in neutral:
            raise RequestError(f"{name} is not supported in responses: leave it out")
    if isinstance(tools := body.get("tools"), list):
        body = {**body, "tools": [_as_definition(tool) for tool in tools]}
    return _offering(_read(body, [messages], None, "input", "instructions", *protocol.TOOLS), body)


def _as_messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was said, called and returned, as a chat has it, where calls belong to the assistant's message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item.get("type"):
            case None | "message":
                messages.append({name: item[name] for name in _given(item) if name not in ("type", "id", "status")})
            case "function_call":
                if not all(isinstance(item.get(name), str) for name in ("call_id", "name", "arguments")):
                    raise RequestError("a function_call of input needs a call_id, a name and arguments: texts")
                function = {name: item[name] for name in ("name", "arguments")}
                call = {"id": item["call_id"], "type": "function", "function": function}
                if not messages or messages[-1].get("role") != "assistant":
                    messages.append({"role": "assistant", "content": None})
                said = messages[-1].get("tool_calls", [])
                if not isinstance(said, list):
                    raise RequestError(f"tool_calls of a message must be a list, not {checks.shown(said)}")
                messages[-1]["tool_calls"] = [*said, call]
            case "function_call_output":
                messages.append({"role": "tool", "content": item.get("output"), "tool_call_id": item.get("call_id")})
            case kind:
                raise RequestError(
                    f"input of type {checks.shown(kind)} is not supported: only messages, function_call and "
                    "function_call_output are"
                )
    return messages


def _as_definition(tool: Any) -> Any:
    """A function as a chat offers it, which has what says what it is in a member of its own."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {name: tool[name] for name in _given(tool) if name != "type"}}


READERS: dict[str, Callable[[Mapping[str, Any]], GenerationRequest]] = {
    protocol.CHAT: read_chat,
    protocol.COMPLETIONS: read_completion,
    protocol.RESPONSES: read_response,
}


def _read(
    body: Mapping[str, Any], prompts: list[protocol.Prompt], length: int | None, *others: str
) -> GenerationRequest:
    given = _given(body)
    options = {"max_new_tokens": length, **protocol.read_options(given, *others)}
    seed = options.pop("seed", None)  # a random one fits the 53 bits of a JavaScript number
    stream_options = given.get("stream_options", {})
    if not isinstance(stream_options, dict):
        raise RequestError(f"stream_options must be an object, not {checks.shown(stream_options)}")
    for name, value in stream_options.items():
        if value and name not in ("include_usage", "include_obfuscation"):
            raise RequestError(f"stream_options.{name:.80} is not supported: leave it out")
    return GenerationRequest(
        prompts,
        options,
        secrets.randbits(53) if seed is None else protocol.choice_seed(seed, 0),
        protocol.read_num_choices(given),
        _flag(given, "stream"),
        _flag(stream_options, "include_usage"),
        echo=_flag(given, "echo"),
    )


def _offering(request: GenerationRequest, body: Mapping[str, Any]) -> GenerationRequest:
    """With the tools that a chat's body names."""
    given = protocol.read_tool_options(body)
    return replace(request, options={**request.options, **given}, tools=read_tools(*map(given.get, protocol.TOOLS)))


def _given(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    return checks.flag(name, fields.get(name) or False)
