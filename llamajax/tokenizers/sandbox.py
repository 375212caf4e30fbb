"""Runs the Jinja templates that come with checkpoints: foreign code, to be contained.

Knows Jinja, and what Hugging Face's renderer gives a template: trimmed blocks, loop controls, `{% generation %}`,
`raise_exception`, `strftime_now` and a plain `tojson` (transformers, utils/chat_template_utils.py). Does not know
what a chat is. Bounds time and output; it is no defence against a template made to exhaust the memory.
"""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamajax.errors import RequestError, TokenizerError
from llamajax.text import one_line

MAX_CHARS = 20_000_000  # several times what the longest contexts hold
MAX_SECONDS = 10.0

_deadline: ContextVar[float] = ContextVar("_deadline")


def compile_template(source: str) -> Template:
    """Compiles a template whose loops and calls watch the clock.

    Raises:
      TokenizerError: a syntax error.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters |= {"tojson": _to_json, "_timed": _timed}
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        tree = environment.parse(source)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "_timed", [], [], None, None, lineno=loop.lineno)
        tree.set_environment(environment)
        return Template.from_code(environment, environment.compile(tree), environment.globals)
    except Exception as error:  # a template may fail in any way, constant expressions already here
        raise _failure(error) from error


def render(template: Template, variables: Mapping[str, Any]) -> str:
    """
    Raises:
      RequestError: the template itself refuses the variables (`raise_exception`).
      TokenizerError: it fails, leaves the sandbox, runs too long or writes too much.
    """
    token = _deadline.set(time.monotonic() + MAX_SECONDS)
    try:
        return "".join(_bounded(template.generate(**variables)))
    except (RequestError, TokenizerError):
        raise
    except Exception as error:
        raise _failure(error) from error
    finally:
        _deadline.reset(token)


class _Environment(ImmutableSandboxedEnvironment):
    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check_time()  # for macros that call themselves
        return super().call(context, obj, *args, **kwargs)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training and prints it as it is."""

    tags = {"generation"}  # noqa: RUF012 - declared so in jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _timed(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_time()
        yield item


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise TokenizerError(f"the chat template ran for more than {MAX_SECONDS:g} s: it is broken or hostile")


def _bounded(chunks: Iterable[str]) -> Iterator[str]:
    size = 0
    for chunk in chunks:
        size += len(chunk)
        if size > MAX_CHARS:
            raise TokenizerError(f"the chat template wrote more than {MAX_CHARS} characters: it is broken or hostile")
        yield chunk


def _raise(message: Any) -> NoReturn:
    raise RequestError(f"the chat template refuses this conversation: {one_line(message)}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _failure(error: Exception) -> TokenizerError:
    return TokenizerError(f"the chat template failed: {type(error).__name__}: {one_line(error)}")
