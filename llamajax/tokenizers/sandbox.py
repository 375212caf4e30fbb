"""Runs the Jinja templates that come with checkpoints: foreign code, in a process with limits of its own.

Jinja's sandbox keeps a template from files and from Python's insides, but one short expression, `9**(9**9)` or
`[1]|slice(10**9)|list`, can take all time and memory, and Python cannot interrupt it. An evaluator that counts would
have to know the price of each operator, filter and method. A process is ended from outside, whatever it does. It
starts while weights load (70 ms), is kept for all templates (20 MB), and takes 0.2 ms more for a conversation.

Knows the limits of a template, not Jinja (template_worker.py), nor what a chat is.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from llamajax.errors import RequestError, TokenizerError
from llamajax.sandbox import Sandbox
from llamajax.text import one_line

MAX_CHARS = 20_000_000  # several times what the longest contexts hold
MAX_SECONDS = 10.0
MAX_BYTES = 2**29

_sandbox = Sandbox(Path(__file__).with_name("template_worker.py"), max_bytes=MAX_BYTES)
start = _sandbox.start


def render(source: str, *variables: Mapping[str, Any]) -> list[str]:
    """A template's text with each set of variables.

    Args:
      source: Jinja.
      variables: what it may use: values that JSON can express.

    Raises:
      RequestError: the template itself refuses the variables (`raise_exception`), or JSON cannot express them.
      TokenizerError: it fails, leaves the sandbox, runs too long, takes too much memory or writes too much.
    """
    request = {
        "source": source,
        "each": variables,
        "now": datetime.now().isoformat(),
        "max_chars": MAX_CHARS,
    }
    try:
        line = json.dumps(request, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"a chat template's variables must be values that JSON has: {one_line(error)}") from None
    try:
        kind, texts = _sandbox.ask(line, MAX_SECONDS)
    except TimeoutError:
        raise TokenizerError(
            f"the chat template ran for more than {MAX_SECONDS:g} s: it is broken or hostile"
        ) from None
    except ChildProcessError:
        raise TokenizerError("the chat template broke the process that renders it: it is broken or hostile") from None
    except OSError as error:
        raise TokenizerError(f"cannot start the process that renders chat templates: {error}") from None
    if kind == "refused":
        raise RequestError(f"the chat template refuses this conversation: {one_line(texts[0])}")
    if kind == "failed":
        raise TokenizerError(f"the chat template failed: {one_line(texts[0])}")
    return texts
