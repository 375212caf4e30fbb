"""Conversations as files: those a user names, and the last one, which is kept for `--continue`."""

import json
import os
import tempfile
from pathlib import Path

from llamajax.errors import RequestError
from llamajax.hub import home
from llamajax.types import Message
from llamajax.utf8 import from_utf8


def save(messages: list[Message], path: Path) -> None:
    """Writes a conversation as JSON. Raises OSError."""
    path.write_bytes(_as_json(messages))


def load(path: Path) -> list[Message]:
    """Reads what `save` wrote. Raises OSError, and RequestError for what is no conversation."""
    data = path.read_bytes()
    try:
        return list(json.loads(from_utf8(data, str(path)))["messages"])
    except (ValueError, KeyError, TypeError, RecursionError, RequestError):
        raise RequestError(f"{path} is not a saved conversation") from None


def keep_last(messages: list[Message]) -> None:
    """Keeps a conversation for `load_last`, for this user's eyes only. Of two at once, the last answer's counts.

    Raises OSError; the one kept before is then still there.
    """
    path = _last()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(_as_json(messages))
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_last() -> list[Message]:
    """The last conversation. Raises RequestError if there is none, OSError."""
    try:
        return load(_last())
    except FileNotFoundError:
        raise RequestError(f"no conversation to go on with in {_last().parent}: begin one without --continue") from None


def _last() -> Path:
    return home() / "conversation.json"


def _as_json(messages: list[Message]) -> bytes:
    return (json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace")
