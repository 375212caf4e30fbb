"""Renders chat templates, in a process of its own.

Knows Jinja, and what Hugging Face's renderer gives a template: trimmed blocks, loop controls, `{% generation %}`,
`raise_exception`, `strftime_now` and a plain `tojson` (transformers, utils/chat_template_utils.py). Imports nothing of
llamajax: sandbox.py starts the process, with little more than Jinja to import, and says what a request is.
"""

import json
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def answer(source: str, each: list[dict[str, Any]], now: str, max_chars: int) -> tuple[str, list[str]]:
    """What became of a template with each set of variables: "text" and the texts, or "refused" or "failed" and why."""
    try:
        given = {"strftime_now": datetime.fromisoformat(now).strftime}
        template = _template(source)
        return "text", ["".join(_bounded(template.generate(given | variables), max_chars)) for variables in each]
    except _RefusedError as error:
        return "refused", [str(error)[:1000]]
    except Exception as error:  # a template may fail in any way
        return "failed", [f"{type(error).__name__}: {error}"[:1000]]


@lru_cache(maxsize=16)
def _template(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training and prints it as it is."""

    tags = {"generation"}  # noqa: RUF012 - declared so in jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _RefusedError(Exception):
    """The template does not take this conversation."""


def _refuse(message: Any) -> NoReturn:
    raise _RefusedError(message)


def _bounded(chunks: Iterable[str], max_chars: int) -> Iterator[str]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > max_chars:
            raise OverflowError(f"wrote more than {max_chars} characters")
        yield chunk


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
