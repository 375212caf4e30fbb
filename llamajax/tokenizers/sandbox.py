"""Runs the Jinja templates that come with checkpoints: foreign code, in a process with limits of its own.

Jinja's sandbox keeps a template from files and from Python's insides, but one short expression, `9**(9**9)` or
`[1]|slice(10**9)|list`, can take all time and memory, and Python cannot interrupt it. An evaluator that counts would
have to know the price of each operator, filter and method. A process is ended from outside, whatever it does. It
starts while weights load (70 ms), is kept for all templates (20 MB), and takes 0.2 ms more for a conversation.

Knows the process's limits and life, not Jinja (template_worker.py), nor what a chat is.
"""

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

from llamajax.errors import RequestError, TokenizerError
from llamajax.text import one_line

MAX_CHARS = 20_000_000  # several times what the longest contexts hold
MAX_SECONDS = 10.0
MAX_BYTES = 2**29


def start() -> None:
    """Starts the process ahead of the first template, and does not wait for it. `render` says what went wrong."""
    with _lock, suppress(TokenizerError):
        _running()


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
        "max_seconds": MAX_SECONDS,
    }
    try:
        line = json.dumps(request, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"a chat template's variables must be values that JSON has: {one_line(error)}") from None
    with _lock:
        kind, texts = _running().ask(line, MAX_SECONDS)
    if kind == "refused":
        raise RequestError(f"the chat template refuses this conversation: {one_line(texts[0])}")
    if kind == "failed":
        raise TokenizerError(f"the chat template failed: {one_line(texts[0])}")
    return texts


class _Process:
    """Python that runs the worker. It ends when we do, since its stdin then ends."""

    def __init__(self) -> None:
        code = f"import sys; sys.path[:] = sys.argv[1:]; import template_worker; template_worker.main({MAX_BYTES})"
        # The worker's folder comes last, so that its other modules hide no one else's.
        path = [*sys.path, str(Path(__file__).parent)]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code, *path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                errors="surrogatepass",  # lone surrogates tell text from special tokens
                start_new_session=True,  # Ctrl-C is not for it
            )
        except OSError as error:
            raise TokenizerError(f"cannot start the process that renders chat templates: {error}") from None
        self._parent = os.getpid()
        self._is_ready = False

    @property
    def is_usable(self) -> bool:
        return self._process.poll() is None and self._parent == os.getpid()  # a fork has its parent's

    def ask(self, request: str, max_seconds: float) -> tuple[str, list[str]]:
        """The reply to a request. After any failure, also Ctrl-C, the process is gone, and with it a late reply."""
        assert self._process.stdin and self._process.stdout
        try:
            if not self._is_ready:
                self._is_ready = bool(self._process.stdout.readline())
            began = time.monotonic()
            with suppress(BrokenPipeError):
                print(request, file=self._process.stdin, flush=True)
            if reply := self._process.stdout.readline():
                kind, texts = json.loads(reply)
                return kind, texts
            if not self._is_ready:
                raise TokenizerError(f"cannot start the process that renders chat templates ({sys.executable})")
            if time.monotonic() - began >= max_seconds:
                raise TokenizerError(f"the chat template ran for more than {max_seconds:g} s: it is broken or hostile")
            raise TokenizerError("the chat template broke the process that renders it: it is broken or hostile")
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        self._process.kill()
        with suppress(OSError), self._process:
            pass


_lock = Lock()
_process: _Process | None = None


def _running() -> _Process:
    global _process
    if _process is None or not _process.is_usable:
        _process = _Process()
    return _process


@atexit.register
def _end() -> None:
    if _process is not None and _process.is_usable:
        _process.end()
