"""The description of the endpoints: OpenAPI's JSON, and a page of it. Made from the tables that read requests."""

import html
import inspect
import re
from collections.abc import Mapping
from typing import Any

import llamajax
from llamajax.options import AnswerOptions, Options
from llamajax.types import SamplingParams

from . import protocol

# Fields that are not options of the library, or mean something else here: type and meaning.
_FIELDS = {
    "model": ("string", "The model's name, as /v1/models has it; it may be left out."),
    "messages": ("array", "The conversation: objects with a role and a content, which is a text or text parts."),
    "prompt": ("string", "A text, or a list of token ids, or a list of several of these."),
    "input": ("string", "A text, or a list of messages, calls and their results."),
    "instructions": ("string", "A system message in front of the input."),
    "tokens": ("array", "Token ids."),
    "max_tokens": ("integer", "The longest answer, in tokens; the context may end it sooner."),
    "max_completion_tokens": ("integer", "As max_tokens, and counts before it."),
    "max_new_tokens": ("integer", "As max_tokens, which counts before it."),
    "max_output_tokens": ("integer", "The longest answer, in tokens."),
    "n": ("integer", "How many answers; the i-th draws with seed + i."),
    "best_of": ("integer", "Only as n."),
    "seed": ("integer", "In [-2**63, 2**63). If it is left out, one is drawn; the answer says which."),
    "stream": ("boolean", "Send the answer as it is generated, as server-sent events."),
    "stream_options": ("object", "include_usage: true lets a stream end with what the request took."),
    "echo": ("boolean", "The prompt is a part of the answer."),
    "logprobs": ("integer", "How many of the most probable tokens beside each; in chats true or false."),
    "top_logprobs": ("integer", "In chats, how many of the most probable tokens beside each; 0 to 20."),
    "logit_bias": ("object", "Token id -> what is added to its logit, in [-100, 100]."),
    "response_format": ("object", "json_object, or json_schema with the schema that the answer is valid under."),
    "text": ("object", "format: as response_format, with the schema beside its type."),
    "guided_json": ("object", "As json_schema."),
    "guided_regex": ("string", "As regex."),
    "guided_grammar": ("string", "As grammar."),
    "guided_choice": ("array", "The answer is one of these strings."),
    "structured_outputs": ("object", "One of json, regex, grammar and choice, as in guided_json and so on."),
    "json_schema": ("object", "The answer is JSON that is valid under this schema."),
    "tools": ("array", "Functions that the answer may call: each of type function, with name and parameters."),
    "tool_choice": ("string", "auto, required, none, or an object that names the function to call."),
    "parallel_tool_calls": ("boolean", "Whether an answer may have several calls; true if it is left out."),
    "chat_template_kwargs": ("object", 'What the chat template reads beside the messages: {"enable_thinking": false}.'),
    "add_special_tokens": ("boolean", "Begin with the token that begins a text; true if it is left out."),
    "return_token_strs": ("boolean", "Give the text of each token, too."),
}
_SENT = "model stream stream_options"
_TOOLS = " ".join(protocol.TOOLS)
_GENERATED = {
    protocol.CHAT: ("Answer a conversation.", f"messages {_TOOLS}"),
    protocol.COMPLETIONS: ("Continue a text.", "prompt echo"),
    protocol.RESPONSES: (
        "Answer in the form of the Responses API; nothing is stored.",
        f"input instructions {_TOOLS}",
    ),
}
# Supported fields that this endpoint lacks.
_LACKING = {
    protocol.CHAT: {"max_output_tokens", "text"},
    protocol.COMPLETIONS: {
        "max_output_tokens",
        "text",
        "top_logprobs",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
    },
    protocol.RESPONSES: {"logprobs", "top_logprobs", "n", "best_of", "response_format"},
}
_OTHERS = {
    ("post", "/tokenize"): (
        "Text or messages to token ids.",
        "prompt messages add_special_tokens add_generation_prompt chat_template_kwargs return_token_strs",
    ),
    ("post", "/detokenize"): ("Token ids to text.", "tokens"),
    ("get", "/tokenizer_info"): ("What the tokenizer is.", ""),
    ("get", "/v1/models"): ("The model that this server runs.", ""),
    ("get", "/v1/models/{name}"): ("The same, by its name.", ""),
    ("get", "/health"): ("200 if the server is ready, 503 and what it is doing if not.", ""),
    ("get", "/version"): ("The version of llamajax.", ""),
    ("get", "/metrics"): ("Counters for Prometheus.", ""),
}


def schema() -> dict[str, Any]:
    """The description as OpenAPI 3.1."""
    paths: dict[str, Any] = {}
    for url, (summary, fields) in _GENERATED.items():
        options = sorted(protocol.SUPPORTED_FIELDS - _LACKING[url])
        paths[url] = {"post": _operation(summary, [*fields.split(), *_SENT.split(), *options])}
    for (method, url), (summary, fields) in _OTHERS.items():
        paths[url] = {method: _operation(summary, fields.split())}
    return {
        "openapi": "3.1.0",
        "info": {"title": "llamajax", "version": llamajax.__version__},
        "paths": paths,
    }


def as_page(description: Mapping[str, Any]) -> str:
    """The description as HTML."""
    sections = []
    for url, methods in description["paths"].items():
        for method, operation in methods.items():
            sections.append(
                f"<h2><code>{method.upper()} {html.escape(url)}</code></h2>"
                f"<p>{html.escape(operation['summary'])}</p>{_table(operation)}"
            )
    return _PAGE.format(title=f"llamajax {llamajax.__version__}", sections="".join(sections))


def _operation(summary: str, names: list[str]) -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "The answer."}}}
    if names:
        properties = {name: _property(name) for name in names}
        content = {"application/json": {"schema": {"type": "object", "properties": properties}}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _property(name: str) -> dict[str, str]:
    if name in _FIELDS:
        kind, meaning = _FIELDS[name]
        return {"type": kind, "description": meaning}
    for source in (SamplingParams, AnswerOptions, Options):
        if said := _meanings(source).get(name):
            return {"type": _type(str(source.__annotations__[name])), "description": said[0].upper() + said[1:]}
    raise AssertionError(f"{name} has no meaning")


def _meanings(source: type) -> dict[str, str]:
    """What a class says of its attributes."""
    _, _, attributes = (inspect.getdoc(source) or "").partition("Attributes:\n")
    found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", attributes, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in found}


def _type(annotation: str) -> str:
    names = {"bool": "boolean", "int": "integer", "float": "number", "str": "string"}
    return next((kind for name, kind in names.items() if re.match(rf".*'?{name}\b", annotation)), "array")


def _table(operation: Mapping[str, Any]) -> str:
    if "requestBody" not in operation:
        return ""
    properties = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
    rows = (
        f"<tr><td><code>{name}</code></td><td>{field['type']}</td><td>{html.escape(field['description'])}</td></tr>"
        for name, field in properties.items()
    )
    return f"<table><tr><th>Field<th>Type<th>Meaning</tr>{''.join(rows)}</table>"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ margin-top: 2.5rem; font-size: 1.1rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-top: 1px solid #8884 }}
</style>
<h1>{title}</h1>
<p>OpenAI's protocol. A field that is not here is refused by name if it would change the answer.
The same as <a href="openapi.json">OpenAPI</a>.</p>
{sections}
</html>
"""
