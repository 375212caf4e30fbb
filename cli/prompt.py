"""Reads a command's text from an argument, a file or stdin."""

import os
import stat
import sys
import time
from contextlib import suppress
from pathlib import Path
from select import select

from llamajax.errors import RequestError
from llamajax.utf8 import from_utf8

from .render import note

# How long to wait for a pipe's first byte: if the pipe is another program's output, and if not.
_PRODUCER_SECONDS = 30
_OTHER_SECONDS = 3


def read_prompt(prompt: str | None) -> str | None:
    """The prompt; None where a conversation is wanted.

    "-", or no prompt when stdin is not a terminal, is stdin. What is piped into stdin beside a prompt comes before
    it, after a space, as in `llm`.
    """
    if prompt is None and sys.stdin.isatty():
        return None
    if prompt is None or prompt == "-":
        return from_utf8(sys.stdin.buffer.read(), "stdin")
    text = read_text(prompt, "the prompt")
    piped = from_utf8(_piped(), "stdin")
    return f"{piped} {text}" if piped.strip() else text


def read_text(argument: str, name: str) -> str:
    """An argument's text; of "@FILE", the file's."""
    if not argument.startswith("@"):
        return from_utf8(argument.encode("utf-8", "surrogateescape"), name)
    path = Path(argument[1:])
    try:
        return from_utf8(path.read_bytes(), str(path))
    except OSError as e:
        raise RequestError(f"cannot read {name} from {path}: {e.strerror}") from None


def _piped() -> bytes:
    """What is piped into stdin, to its end; b"" for a terminal, /dev/null, and a pipe that stays silent.

    A script's stdin, which the command inherits, may be open as long as the script runs, with nobody who writes.
    """
    stdin = os.fstat(sys.stdin.fileno())
    if stat.S_ISFIFO(stdin.st_mode) or stat.S_ISSOCK(stdin.st_mode):
        began = time.monotonic()
        while not select([sys.stdin], [], [], 1)[0]:
            seconds = _PRODUCER_SECONDS if _is_output(stdin) else _OTHER_SECONDS
            if time.monotonic() - began > seconds:
                note(f"(nothing has come from stdin for {seconds} s: ignored; '< /dev/null' saves the wait)")
                return b""
    elif not stat.S_ISREG(stdin.st_mode):
        return b""
    return sys.stdin.buffer.read()


def _is_output(pipe: os.stat_result) -> bool:
    """Whether a program's stdout or stderr is the pipe, as in `make | llamajax chat ...`. False off Linux."""
    for stream in Path("/proc").glob("[0-9]*/fd/[12]"):
        with suppress(OSError):
            if os.path.samestat(stream.stat(), pipe):
                return True
    return False
