"""Functions that a model may call: what a request offers, how a family of models writes calls, and calls read back.

Two forms, each with the marks by which a checkpoint's template shows that its model was trained on it:

- ChatML's, of Hermes, Qwen and SmolLM2: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of times,
  with text before and between. The closing mark may be missing at the answer's end, and a list may have several calls.
- Llama 3's: the whole answer is `{"name": …, "parameters": {…}}`, maybe several with ";" or spaces between, maybe after
  `<|python_tag|>`.

All but calls of the offered functions is text. For models whose template knows no tools, the system message describes
ChatML's form. Knows no model and no tokenizer.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llamajax import checks
from llamajax.errors import RequestError
from llamajax.json_schema import JSON_OPTIONS, schema_text
from llamajax.text import one_line
from llamajax.types import MAX_GRAMMAR_CHARS, Grammar

MAX_CALLS = 8  # in an answer that must be calls
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for.

    Attributes:
      arguments: an object in JSON.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class Tools:
    """What a request offers.

    Attributes:
      definitions: in OpenAI's form, each with a function that has a name and maybe a description and parameters.
      choice: "auto"; "required"; or the name of the function to call.
      parallel: whether an answer may have several calls.
    """

    definitions: Sequence[Mapping[str, Any]]
    choice: str = "auto"
    parallel: bool = True

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.definitions]

    @property
    def must_call(self) -> list[Mapping[str, Any]]:
        """The functions of which the answer must call one; none if it need not."""
        functions = [tool["function"] for tool in self.definitions]
        if self.choice == "auto":
            return []
        return [function for function in functions if self.choice in ("required", function["name"])]


def read_tools(tools: Any, choice: Any = None, parallel: Any = None) -> Tools | None:
    """OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`; None if no function may be called.

    Raises RequestError for what is malformed.
    """
    if choice not in (None, "none", "auto", "required") and not isinstance(choice, Mapping):
        raise RequestError(f"tool_choice must be none, auto, required or name a function, not {checks.shown(choice)}")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools")
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise RequestError(f"tools must be a list, not {checks.shown(tools)}")
    if (length := _length(tools)) > MAX_GRAMMAR_CHARS:
        raise RequestError(f"tools may have {MAX_GRAMMAR_CHARS:,} characters, not {length:,}")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"each of tools must be of type function, with a name, not {checks.shown(tool)}")
        if not _NAME.fullmatch(function["name"]):
            raise RequestError(
                f"a function's name has 1 to 64 letters, digits, _, - and dots, not {checks.shown(function['name'])}"
            )
        if not isinstance(function.get("parameters"), Mapping | None):
            raise RequestError(f"the parameters of {function['name']} must be a JSON schema")
    read = Tools(tools, _chosen(choice), True if parallel is None else checks.flag("parallel_tool_calls", parallel))
    if len(set(read.names)) < len(read.names):
        raise RequestError("two of tools have the same name")
    if read.choice not in ("none", "auto", "required", *read.names):
        raise RequestError(f"tool_choice names {checks.shown(read.choice)}, which is none of tools")
    return None if read.choice == "none" else read


def _length(tools: Any) -> int:
    try:
        return len(json.dumps(tools, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"tools must be what JSON can express: {one_line(error)}") from None


def _chosen(choice: Any) -> str:
    if not isinstance(choice, Mapping):
        return choice or "auto"
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else choice.get("name")
    if not isinstance(name, str):
        raise RequestError('tool_choice must be {"type": "function", "function": {"name": …}}')
    return name


class Reader(Protocol):
    """Takes an answer's text piece by piece, and tells calls from what is said beside them, in their order."""

    def push(self, text: str) -> list[str | ToolCall]:
        """More of the answer. Returns what is certain now, beyond what was returned before."""

    def flush(self) -> list[str | ToolCall]:
        """The answer has ended. Returns the rest."""


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    Attributes:
      is_chatml: as ChatML; else as Llama 3.
      is_rendered: the checkpoint's template writes tools and calls; else they are written into messages as text.
    """

    is_chatml: bool
    is_rendered: bool

    @classmethod
    def of(cls, template: str) -> "ToolFormat":
        """By the source of a checkpoint's template."""
        is_rendered = bool(re.search(r"\btools\b", template))
        return cls(not is_rendered or _OPEN in template, is_rendered)

    def grammar(self, tools: Tools) -> Grammar | None:
        """What an answer must fit that has to call a function; None if it need not."""
        functions = tools.must_call
        if not functions:
            return None
        before, after = (f"{_OPEN}\n", f"\n{_CLOSE}") if self.is_chatml else ("", "")
        arguments = "arguments" if self.is_chatml else "parameters"
        more = f'("\\n" call){{0,{MAX_CALLS - 1}}}' if self.is_chatml and tools.parallel else ""
        rules = [f"start: call {more}", "call: " + " | ".join(f"call{i}" for i in range(len(functions)))]
        for i, function in enumerate(functions):
            opening = f'{before}{{"name": {json.dumps(function["name"])}, "{arguments}": '
            parameters = function.get("parameters") or {"properties": {}, "additionalProperties": False}
            schema = {"type": "object", **parameters, "x-guidance": JSON_OPTIONS}
            rules += [
                f"call{i}: {json.dumps(opening)} arguments{i} {json.dumps('}' + after)}",
                f"arguments{i}: %json {schema_text(schema, 'the parameters of ' + function['name'])}",
            ]
        return Grammar("tools", "\n".join(rules))

    def reader(self, tools: Tools) -> Reader:
        return (_ChatMLReader if self.is_chatml else _Llama3Reader)(tools.names, tools.parallel)

    def read(self, text: str, tools: Tools) -> list[str | ToolCall]:
        """A whole answer: the calls, and what is said beside them."""
        reader = self.reader(tools)
        return reader.push(text) + reader.flush()


class _ChatMLReader:
    def __init__(self, names: Collection[str], parallel: bool) -> None:
        self._names = names
        self._parallel = parallel
        self._text = ""
        self._num_calls = 0

    def push(self, text: str) -> list[str | ToolCall]:
        self._text += text
        found: list[str | ToolCall] = []
        while True:
            before, opened, after = self._text.partition(_OPEN)
            inside, closed, rest = after.partition(_CLOSE)
            if not closed:
                certain = len(before.rstrip()) if opened else _certain(before)
                found.append(before[:certain])
                self._text = self._text[certain:]
                return found
            calls = self._calls(inside)
            found += [before + opened + inside + closed] if calls is None else [before.rstrip(), *calls]
            self._text = rest

    def flush(self) -> list[str | ToolCall]:
        before, opened, inside = self._text.partition(_OPEN)
        if opened and (calls := self._calls(inside)) is not None:
            return [before.rstrip(), *calls]
        return [] if self._num_calls and not self._text.strip() else [self._text]

    def _calls(self, inside: str) -> list[ToolCall] | None:
        """The calls that count of those between two marks; None if that is text."""
        try:
            found = json.loads(inside)
        except (ValueError, RecursionError):
            return None
        calls = [_call(it, self._names) for it in (found if isinstance(found, list) else [found])]
        if None in calls:
            return None
        first = self._num_calls
        self._num_calls += len(calls)
        return [call for call in calls if call][: None if self._parallel else max(0, 1 - first)]


class _Llama3Reader:
    def __init__(self, names: Collection[str], parallel: bool) -> None:
        self._names = names
        self._parallel = parallel
        self._text = ""
        self._is_text = False

    def push(self, text: str) -> list[str | ToolCall]:
        self._text += text
        begun = self._text.lstrip()[: len(_PYTHON_TAG)]
        self._is_text = self._is_text or not (begun.startswith("{") or _PYTHON_TAG.startswith(begun))
        if not self._is_text:
            return []
        said, self._text = self._text, ""
        return [said]

    def flush(self) -> list[str | ToolCall]:
        calls, rest = list[ToolCall](), self._text.strip().removeprefix(_PYTHON_TAG)
        while rest := rest.lstrip("; \n\t"):
            try:
                found, end = _DECODER.raw_decode(rest)
            except (ValueError, RecursionError):
                return [self._text]
            if (call := _call(found, self._names)) is None:
                return [self._text]
            calls, rest = [*calls, call], rest[end:]
        return [*calls[: None if self._parallel else 1]] if calls else [self._text]


def written_out(messages: Sequence[Mapping[str, Any]], tools: Tools | None) -> list[dict[str, Any]]:
    """A conversation as text alone, for a template that knows no tools."""
    written: list[dict[str, Any]] = []
    for message in messages:
        message = dict(message)
        if calls := message.pop("tool_calls", None):
            lines = [
                f"{_OPEN}\n{json.dumps({'name': it['function']['name'], 'arguments': it['function'].get('arguments')})}"
                f"\n{_CLOSE}"
                for it in calls
            ]
            message["content"] = "\n".join(filter(None, [message.get("content"), *lines]))
        message.pop("tool_call_id", None)
        if message.get("role") == "tool":
            message = {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
        written.append(message)
    if tools is None:
        return written
    offered = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools.definitions)
    instructions = _INSTRUCTIONS.format(offered)
    if written and written[0].get("role") == "system":
        return [{"role": "system", "content": f"{written[0]['content']}\n\n{instructions}"}, *written[1:]]
    return [{"role": "system", "content": instructions}, *written]


_INSTRUCTIONS = """\
You may call functions to answer. These are there, as JSON:
<tools>
{}
</tools>
To call one, answer with its name and arguments, and nothing else:
<tool_call>
{{"name": "the name", "arguments": {{"an argument": "its value"}}}}
</tool_call>"""


def _call(found: Any, names: Collection[str]) -> ToolCall | None:
    if not isinstance(found, dict) or found.get("name") not in names:
        return None
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):  # JSON in a string
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return ToolCall(found["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _certain(text: str) -> int:
    """Characters that are text whatever follows: before the spaces and the part of a mark that may be at the end."""
    part = next((n for n in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:n])), 0)
    return len(text[: len(text) - part].rstrip())
