"""Lines of a batch: what each asks for, and the line of its result. Knows no model and no files."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llamajax.errors import LlamaJaxError, RequestError
from llamajax.text import one_line, printable
from llamajax.tokenizers.base import Tokenizer
from llamajax.tools import ToolFormat, Tools, read_tools
from llamajax.types import Completion, Message
from llamajax.utf8 import from_utf8

from . import answers, protocol
from .answers import Choice

# An id that nests deeper could not be read back from the result.
_MAX_ID_DEPTH = 50
# Tokens of an answer whose line does not say, by its endpoint, as OpenAI's: None is to the context's end.
_LENGTHS = {None: 50, protocol.CHAT: None, protocol.COMPLETIONS: 16}


@dataclass(frozen=True)
class Defaults:
    """What holds for each line that does not say otherwise.

    Attributes:
      options: of `LLM.stream`; `seed` is the one that each line's seed is made of. chat_template_kwargs hold for chats.
      system: the system message.
      raw: continue a prompt as it is, without a chat template.
    """

    options: Mapping[str, Any]
    system: str | None = None
    raw: bool = False


class Asked(NamedTuple):
    """What a line asks for: a prompt, the options of each of its choices, for `LLM.stream_batch`, and its tools."""

    prompt: protocol.Prompt
    choices: list[dict[str, Any]]
    tools: Tools | None


class Source(NamedTuple):
    """What is remembered of a line until it is answered.

    Attributes:
      number: from 1.
      digest: of the line and of the options of the command.
      labels: the ids that the line gave itself.
      names: the fields of its request if it is in OpenAI's batch format.
      url: the endpoint of that.
    """

    number: int
    digest: str
    labels: Mapping[str, Any] = {}
    names: Collection[str] | None = None
    url: str | None = None

    def error(self, error: LlamaJaxError) -> dict[str, Any]:
        """The line that says why there is no answer."""
        if self.names is None:
            return {"line": self.number, "digest": self.digest, **self.labels, "error": one_line(error)}
        return self._response(answers.error_status(error), answers.error_body(error, self.names))

    def answer(
        self,
        completions: Sequence[Completion],
        tokenizer: Tokenizer,
        model: str,
        calls: tuple[ToolFormat, Tools] | None = None,
    ) -> dict[str, Any]:
        """The line of the answer, with all its choices, and the calls in them if any may be there."""
        answer_id = f"{'cmpl' if self.url == protocol.COMPLETIONS else 'chatcmpl'}-{self.number}"
        said = [Choice.of(completion) for completion in completions]
        if calls:
            said = answers.with_calls(said, *calls, answer_id)
        if self.names is not None and self.url is not None:
            return self._response(
                200,
                answers.answer_body(
                    self.url,
                    said,
                    tokenizer,
                    id=answer_id,
                    created=_CREATED,
                    model=model,
                    usage=answers.token_counts(completions),
                ),
            )
        choices = [_choice(choice, tokenizer) for choice in said]
        several = {"choices": [{"index": index, **choice} for index, choice in enumerate(choices)]}
        return {
            "line": self.number,
            "digest": self.digest,
            **self.labels,
            **(choices[0] if len(choices) == 1 else several),
            "usage": answers.token_counts(completions),
        }

    def _response(self, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": f"batch_req_{self.number}",
            "digest": self.digest,
            "custom_id": self.labels.get("custom_id"),
            "response": {"status_code": status, "request_id": f"req_{self.number}", "body": body},
            "error": None,
        }


# Not the time: a resumed run writes what an uninterrupted one does.
_CREATED = 0
_CONSTRAINTS = ("json_schema", "regex", "grammar")


def read_text(data: bytes) -> dict[str, Any]:
    """The fields of a line of text, which is a prompt. Raises RequestError."""
    return {"prompt": from_utf8(data, "the line").rstrip("\r\n")}


def read_source(number: int, digest: str, fields: Mapping[str, Any]) -> Source:
    """What to remember of a line. Raises RequestError for an id that nests too deep."""
    labels = {name: fields[name] for name in ("id", "custom_id") if name in fields}
    for name, value in labels.items():
        if not _is_shallow(value, _MAX_ID_DEPTH):
            raise RequestError(f"{name} nests more than {_MAX_ID_DEPTH} deep: use a string or a number")
    if not _is_openai(fields):
        return Source(number, digest, labels)
    body, url = fields.get("body"), fields.get("url")
    names = frozenset(body if isinstance(body, dict) else ())
    return Source(number, digest, labels, names, url if isinstance(url, str) else None)


def read_request(number: int, fields: Mapping[str, Any], defaults: Defaults) -> Asked:
    """A line's prompt and options.

    Args:
      number: the line's, from 1. Unless the line has a seed, it draws with one made of this and the default.

    Raises RequestError.
    """
    url = None
    if _is_openai(fields):
        url, body = _read_envelope(fields)
        others = {protocol.CHAT: ("messages", *protocol.TOOLS), protocol.COMPLETIONS: ("prompt",)}[url]
        said = protocol.read_options(body, *others)
    else:
        body = fields
        said = protocol.read_options(body, "prompt", "messages", "id", "custom_id", *protocol.TOOLS)
        if body.get("prompt") is not None and body.get("messages") is not None:
            raise RequestError("expected a prompt or messages, not both")
    prompt = _read_prompt(url, body, defaults)
    options = {"max_new_tokens": _LENGTHS[url], **defaults.options, **said}
    offered = protocol.read_tool_options(body) if url != protocol.COMPLETIONS else {}
    tools = read_tools(*map(offered.get, protocol.TOOLS))
    if tools or any(name in said for name in _CONSTRAINTS):  # what an answer must fit is said once
        options = {name: value for name, value in options.items() if name in said or name not in _CONSTRAINTS}
    if not _is_chat(prompt) and "chat_template_kwargs" not in said:
        options.pop("chat_template_kwargs", None)
    if "seed" not in said:
        options["seed"] = line_seed(defaults.options.get("seed", 0), number)
    if tools:
        options |= offered
    num_choices = protocol.read_num_choices(body)
    # The first keeps the seed as it is given, so that the engine says what is wrong with it.
    seeds = [options["seed"], *(protocol.choice_seed(options["seed"], i) for i in range(1, num_choices))]
    choices = [{**options, "seed": seed} for seed in seeds]
    return Asked(prompt, choices, tools)


def line_seed(seed: int, number: int) -> int:
    """The seed of a line that gives none: seed + number * 2**32, in 64 bits.

    No two lines and no two choices of them share one, so a prompt that comes twice is answered in two ways.
    """
    return protocol.int64(seed + (number << 32))


def as_line(value: Mapping[str, Any]) -> bytes:
    """A line of JSON in UTF-8; a lone surrogate, which UTF-8 cannot have, becomes JSON's escape of it."""
    return printable(json.dumps(value, ensure_ascii=False)).encode("utf-8", "backslashreplace") + b"\n"


def _read_prompt(url: str | None, body: Mapping[str, Any], defaults: Defaults) -> protocol.Prompt:
    if url == protocol.CHAT or (url is None and body.get("messages") is not None):
        messages = protocol.read_messages(body)
    else:
        prompt = protocol.read_prompt(body)
        if url == protocol.COMPLETIONS or defaults.raw or not isinstance(prompt, str):
            return prompt
        if not prompt.strip():
            raise RequestError("the prompt is empty")
        messages = [{"role": "user", "content": prompt}]
    if defaults.system is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, Message(role="system", content=defaults.system))
    return messages


def _is_chat(prompt: protocol.Prompt) -> bool:
    return not isinstance(prompt, str) and isinstance(next(iter(prompt), None), dict)


def _is_openai(fields: Mapping[str, Any]) -> bool:
    return not fields.keys().isdisjoint(("body", "url", "method"))


def _read_envelope(fields: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The endpoint and the request of a line in OpenAI's batch format."""
    method, url, body = fields.get("method") or "POST", fields.get("url"), fields.get("body")
    if method != "POST" or url not in (protocol.CHAT, protocol.COMPLETIONS):
        raise RequestError(f"expected POST {protocol.CHAT} or {protocol.COMPLETIONS}, not {method!s:.80} {url!s:.80}")
    if not isinstance(body, dict):
        raise RequestError("body must be a JSON object")
    for name, value in fields.items():
        if name not in ("id", "custom_id", "method", "url", "body") and value is not None:
            raise RequestError(f"{name!r:.80} must be inside of body, or be left out")
    return url, body


def _choice(choice: Choice, tokenizer: Tokenizer) -> dict[str, Any]:
    logprobs = answers.chat_logprobs(choice, tokenizer)
    return {
        "text": choice.text,
        **({"tool_calls": choice.tool_calls} if choice.tool_calls else {}),
        "finish_reason": choice.finish_reason,
        **({"logprobs": logprobs} if logprobs else {}),
    }


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    return depth > 0 and all(
        _is_shallow(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value)
    )
