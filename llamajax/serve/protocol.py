"""Requests as JSON, in OpenAI's form or in our own: what their fields mean.

Each field is supported, or changes no answer, or must have the value with which it does nothing. Any other is refused
by name: an answer that lacks what its request asks for is wrong.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from llamajax import checks
from llamajax.errors import RequestError
from llamajax.types import MAX_GRAMMAR_CHARS, Message, SamplingParams

from .json_object import MAX_PARTS, num_parts

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"

MAX_CHOICES = 128

# "text" in chats, the others in responses.
_TEXT_PARTS = ("text", "input_text", "output_text")
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")

Prompt = str | Sequence[Message] | Sequence[int]

# Fields that are options of `LLM.stream` as they are, which checks their values.
_OPTIONS = {field.name for field in fields(SamplingParams)} - {"logprobs", "logit_bias"} | {
    "min_tokens",
    "stop_token_ids",
    "ignore_eos",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "stop",
}
# What an answer must fit: fields of vLLM and of llama.cpp, and the option that each is.
_CONSTRAINTS = {
    "json_schema": "json_schema",
    "regex": "regex",
    "grammar": "grammar",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "grammar",
    "guided_choice": "choice",
}
_STRUCTURED_OUTPUTS = {"json": "json_schema", "regex": "regex", "grammar": "grammar", "choice": "choice"}
_FORM = ("type", "json_schema", "schema", "name", "description", "strict")
# Fields about the tools that a chat may call.
TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_LENGTHS = ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens")  # the last one counts
SUPPORTED_FIELDS = (
    _OPTIONS
    | {*_LENGTHS, "logit_bias", "logprobs", "top_logprobs", "n", "best_of"}
    | {*_CONSTRAINTS, "structured_outputs", "response_format", "text"}
)

# Fields that change no answer: whose request it is, how it is transported, when it runs. There is one model.
_WITHOUT_EFFECT = """
model user metadata store service_tier stream stream_options safety_identifier prompt_cache_key prompt_cache_retention
prediction parallel_tool_calls priority request_id cache_salt cache_prompt id_slot timings_per_token
"""
# Fields that are not supported, and do nothing if they are empty, false or 0.
_OFF_IF_EMPTY = """
echo suffix tools functions audio web_search_options use_beam_search bad_words allowed_token_ids documents
chat_template guided_decoding_backend guided_whitespace_pattern logits_processors vllm_xargs
mm_processor_kwargs
include_stop_str_in_output return_tokens_as_token_ids return_token_ids mirostat xtc_probability
dry_multiplier dynatemp_range n_probs lora top_a epsilon_cutoff eta_cutoff no_repeat_ngram_size penalty_alpha
watermark return_full_text truncate background include previous_response_id conversation
"""
_EMPTY: Sequence[Any] = (False, "", [], {})
# All that are not supported, with the values that do nothing.
_NEUTRAL: dict[str, Sequence[Any]] = dict.fromkeys(_OFF_IF_EMPTY.split(), _EMPTY) | {
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "reasoning": ({}, {"effort": "none"}),
    "verbosity": ("medium",),
    "truncation": ("disabled",),
    "length_penalty": (1,),
    "repeat_penalty": (1,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "do_sample": (True,),
}


def read_messages(body: Mapping[str, Any]) -> list[Message]:
    """The conversation that a request asks to be continued.

    Raises RequestError for anything else, and for what a message has that is not supported.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RequestError("messages must be a list of objects with a role and a content")
    if sum(num_parts(arguments, 0) for arguments in _arguments(messages)) > MAX_PARTS:
        raise RequestError(f"arguments of calls may have {MAX_PARTS:,} objects, lists, names and fractions: send less")
    return [_message(message) for message in messages]


def read_prompts(body: Mapping[str, Any]) -> list[str | list[int]]:
    """The texts, or lists of token ids, that a request asks to be continued; most ask for one.

    Raises RequestError for what is neither.
    """
    prompt = body.get("prompt")
    prompts: list[Any] = [prompt]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompts = prompt
    if not all(isinstance(it, str) or _are_ids(it) for it in prompts):
        raise RequestError("expected a prompt: a text or a list of token ids, or a list of several")
    return prompts


def read_prompt(body: Mapping[str, Any]) -> str | list[int]:
    """The only text, or token ids, that a request asks to be continued.

    Raises RequestError for what is neither, and for several.
    """
    prompts = read_prompts(body) if body.get("prompt") is not None else []
    if len(prompts) != 1:
        raise RequestError("expected messages, or a prompt: one text, or one list of token ids")
    return prompts[0]


def read_options(body: Mapping[str, Any], *others: str) -> dict[str, Any]:
    """What a request says of its answer, as options of `LLM.stream`, which checks the values.

    Args:
      body: the request.
      others: fields that are read elsewhere, such as its prompt.

    Raises RequestError for a field that is unknown, or asks for something unsupported.
    """
    given = {name: value for name, value in body.items() if value is not None}
    _check_names(given, {*SUPPORTED_FIELDS, *_WITHOUT_EFFECT.split(), *others})
    options = {name: given[name] for name in _OPTIONS & given.keys()}
    for name in _LENGTHS:
        if name in given:
            options["max_new_tokens"] = checks.integer(name, given[name], 1)
    if "logit_bias" in given:
        options["logit_bias"] = _logit_bias(given["logit_bias"])
    if (logprobs := _logprobs(given)) is not None:
        options["logprobs"] = logprobs
    return options | _constraint(given)


def read_tool_options(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat says of tools, as options of `LLM.stream`, which checks the values."""
    return {name: body[name] for name in TOOLS if body.get(name) is not None}


def read_num_choices(body: Mapping[str, Any]) -> int:
    """How many answers a request asks for.

    Raises RequestError for a number out of range, or for the best of more.
    """
    n = body.get("n")
    n = 1 if n is None else checks.integer("n", n, 1, MAX_CHOICES)
    if body.get("best_of") not in (None, n):
        raise RequestError(f"best_of must be n, which is {n}: leave it out")
    return n


def choice_seed(seed: Any, choice: int) -> int:
    """The seed of one of several choices: the seeds follow each other, in 64 bits.

    Raises RequestError for a seed that is no integer.
    """
    return int64(checks.integer("seed", seed, -(2**63), 2**63 - 1) + choice)


def int64(value: int) -> int:
    """The last 64 bits of an integer, the first of them its sign."""
    return (value + 2**63) % 2**64 - 2**63


def _check_names(given: Mapping[str, Any], known: set[str]) -> None:
    for name, value in given.items():
        if name in known:
            continue
        if name in _NEUTRAL:
            if isinstance(value, dict):
                value = {key: item for key, item in value.items() if item is not None}
            if value not in _NEUTRAL[name]:
                raise RequestError(f"{name} is not supported: leave it out")
        elif near := get_close_matches(name[:80].lower(), known, n=1, cutoff=0.75):
            raise RequestError(f"unknown field {name!r:.80}: did you mean {near[0]}?")
        else:
            raise RequestError(f"unknown field {name!r:.80}: leave it out")


def _constraint(given: Mapping[str, Any]) -> dict[str, Any]:
    """The option that says what the answer must fit, if there is one."""
    found = [(name, option, given[name]) for name, option in _CONSTRAINTS.items() if name in given]
    outputs = _object(given, "structured_outputs")
    for name, value in outputs.items():
        if name in _STRUCTURED_OUTPUTS and value is not None:
            found.append((f"structured_outputs.{name}", _STRUCTURED_OUTPUTS[name], value))
        elif value:
            raise RequestError(f"structured_outputs.{name:.80} is not supported: leave it out")
    if (schema := _schema(_object(given, "response_format"), "response_format")) is not None:
        found.append(("response_format", "json_schema", schema))
    text = _object(given, "text")
    for name, value in text.items():
        if name != "format" and value is not None and value not in _NEUTRAL.get(name, _EMPTY):
            raise RequestError(f"text.{name:.80} is not supported: leave it out")
    if (schema := _schema(_object(text, "format"), "text.format")) is not None:
        found.append(("text.format", "json_schema", schema))
    if len(found) > 1:
        raise RequestError(f"give only one of {', '.join(name for name, _, _ in found)}")
    for name, option, value in found:
        if option == "choice":
            return {"regex": _any_of(name, value)}
        return {option: value}
    return {}


def _object(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = given.get(name)
    if value is not None and not isinstance(value, dict):
        raise RequestError(f"{name} must be an object, not {checks.shown(value)}")
    return value or {}


def _schema(form: Mapping[str, Any], name: str) -> Any:
    """Of `response_format`, or of the same with a schema's members beside its type, as responses have it."""
    for member, value in form.items():
        if member not in _FORM and value is not None:
            raise RequestError(f"{name}.{member:.80} is not supported: leave it out")
    match form.get("type") if form else "text":
        case "text":
            return None
        case "json_object" if isinstance(form.get("schema"), dict | None):  # llama.cpp's way to give a schema
            return form.get("schema") or {"type": "object"}
        case "json_object":
            raise RequestError(f"{name}.schema must be an object, not {checks.shown(form['schema'])}")
        case "json_schema":
            schema = (form.get("json_schema") or form) if isinstance(form.get("json_schema"), dict | None) else {}
            if isinstance(schema.get("schema"), dict):
                return schema["schema"]
            raise RequestError(f"{name} of type json_schema needs a schema, which must be an object")
        case kind:
            raise RequestError(f"{name} must be of type text, json_object or json_schema, not {checks.shown(kind)}")


def _any_of(name: str, choices: Any) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise RequestError(f"{name} must be a list of strings, not {checks.shown(choices)}")
    if (length := len(choices) + sum(map(len, choices))) > MAX_GRAMMAR_CHARS:
        raise RequestError(f"{name} may have {MAX_GRAMMAR_CHARS:,} characters, not {length:,}")
    return "|".join(map(re.escape, choices))


def _logit_bias(value: Any) -> dict[int, Any]:
    """JSON's keys are strings."""
    if not isinstance(value, dict) or not all(key.isascii() and key.isdigit() and len(key) < 20 for key in value):
        raise RequestError(f"logit_bias must be an object with token ids as its keys, not {checks.shown(value)}")
    return {int(key): bias for key, bias in value.items()}


def _logprobs(given: Mapping[str, Any]) -> Any:
    """A chat asks with a boolean, and counts in another field."""
    logprobs, top = given.get("logprobs"), given.get("top_logprobs", 0)
    if logprobs is True:
        return top
    if top != 0:
        raise RequestError("top_logprobs needs logprobs: true beside it")
    return None if logprobs is False else logprobs


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _message(message: Mapping[str, Any]) -> Message:
    for name, value in message.items():
        if name not in _MESSAGE_FIELDS and value is not None and value not in _EMPTY:
            raise RequestError(f"{name:.80} is not supported in messages: leave it out")
    role, calls = message.get("role", ""), message.get("tool_calls")
    if calls and message.get("content") is None:  # the message is its calls
        message = {**message, "content": ""}
    read: Message = {"role": "system" if role == "developer" else role, "content": text(message.get("content"))}
    if calls:
        read["tool_calls"] = [_tool_call(call) for call in calls] if isinstance(calls, list) else _tool_call(calls)
    if message.get("tool_call_id") is not None:
        read["tool_call_id"] = message["tool_call_id"]
    return read


def _arguments(messages: list[dict[str, Any]]) -> Iterator[str]:
    """JSON in texts, wherever messages have calls as they should be."""
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), str):
                yield arguments


def _tool_call(call: Any) -> Any:
    """With its arguments as an object: OpenAI's clients send JSON in a string, and templates expect what it says."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError("tool_calls must be a list of objects with a function, which has a name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
    return {**call, "function": {**function, "arguments": arguments}}


def text(content: Any) -> str:
    """The text of a content, which may come in parts.

    Raises RequestError for what is no text, such as an image.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)
        for part in content
    ):
        return "\n".join(part["text"] for part in content)
    raise RequestError(f"a message's content must be a string or a list of text parts, not {checks.shown(content)}")
