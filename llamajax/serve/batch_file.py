"""The files of a batch: lines that ask, and lines of results that outlive a crash. Knows no model."""

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llamajax.errors import CapacityError, DiskFullError, RequestError
from llamajax.hub.cache import DISK_FULL
from llamajax.text import from_utf8, one_line
from llamajax.tokenizers.base import Tokenizer
from llamajax.types import Completion, Message

from . import protocol

# How the lines that we write begin: with the number of the line that they answer.
_STARTS = (b'{"line": ', b'{"id": "batch_req_')
_NUMBERED = re.compile(b'(?:%s|%s)([0-9]+)[,"]' % tuple(map(re.escape, _STARTS)))


@dataclass(frozen=True)
class Defaults:
    """What holds for each line that does not say otherwise.

    Attributes:
      options: of `LLM.stream`.
      system: the system message.
      raw: continue a prompt as it stands, without a chat template.
    """

    options: Mapping[str, Any]
    system: str | None = None
    raw: bool = False


class Source(NamedTuple):
    """What is remembered of a line until it is answered.

    Attributes:
      number: from 1.
      labels: the ids that the line gave itself.
      url: the endpoint if the line is in OpenAI's batch format.
    """

    number: int
    labels: Mapping[str, Any] = {}
    url: str | None = None

    def error(self, error: Exception) -> dict[str, Any]:
        """The line that says why there is no answer."""
        return {"line": self.number, **self.labels, "error": one_line(error)}

    def answer(self, completion: Completion, tokenizer: Tokenizer, model: str) -> dict[str, Any]:
        """The line of the answer."""
        if self.url is None:
            told = {
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "usage": protocol.usage(completion),
            }
            logprobs = protocol.chat_logprobs(completion, tokenizer)
            return {"line": self.number, **self.labels, **told, **({"logprobs": logprobs} if logprobs else {})}
        body = protocol.answer_body(self.url, completion, tokenizer, number=self.number, created=_CREATED, model=model)
        return {
            "id": f"batch_req_{self.number}",
            "custom_id": self.labels.get("custom_id"),
            "response": {"status_code": 200, "request_id": f"req_{self.number}", "body": body},
            "error": None,
        }


# Not the time: a resumed run writes what an uninterrupted one does.
_CREATED = 0


def read_fields(data: bytes, as_json: bool) -> dict[str, Any]:
    """The fields of a line's object; a line of text is a prompt.

    Raises RequestError.
    """
    # A byte order mark may be where files from Windows begin, wherever they were put together.
    text = from_utf8(data, "the line").rstrip("\r\n")
    if not as_json:
        return {"prompt": text}
    try:
        found = json.loads(text)
    except json.JSONDecodeError as e:
        raise RequestError(f"not JSON: {e.msg} (column {e.colno})") from None
    except (ValueError, RecursionError) as e:  # a number of too many digits; too deep
        raise RequestError(f"not JSON: {e}") from None
    if not isinstance(found, dict):
        raise RequestError(f"expected a JSON object, not {text:.80}")
    return found


def is_json(data: bytes) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        read_fields(data, as_json=True)
    except RequestError:
        return False
    return True


def read_source(number: int, fields: Mapping[str, Any]) -> Source:
    """What to remember of a line."""
    labels = {name: fields[name] for name in ("id", "custom_id") if name in fields}
    return Source(number, labels, fields.get("url") if "body" in fields else None)


def read_request(fields: Mapping[str, Any], defaults: Defaults) -> tuple[protocol.Prompt, dict[str, Any]]:
    """A line's prompt and options, for `LLM.stream_batch`.

    Raises RequestError.
    """
    url, body = None, fields
    if "body" in fields:
        url, method, body = fields.get("url"), fields.get("method") or "POST", fields["body"]
        if method != "POST" or url not in (protocol.CHAT, protocol.COMPLETIONS):
            raise RequestError(f"expected POST {protocol.CHAT} or {protocol.COMPLETIONS}, not {method} {url}")
        if not isinstance(body, dict):
            raise RequestError("body must be a JSON object")
    options = {**defaults.options, **protocol.read_options(body)}
    if url == protocol.CHAT or (url is None and body.get("messages") is not None):
        messages = protocol.read_messages(body)
    else:
        prompt = protocol.read_prompt(body)
        if url == protocol.COMPLETIONS or defaults.raw or not isinstance(prompt, str):
            return prompt, options
        if not prompt.strip():
            raise RequestError("the prompt is empty")
        messages = [{"role": "user", "content": prompt}]
    if defaults.system is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, Message(role="system", content=defaults.system))
    return messages, options


def as_line(value: Mapping[str, Any]) -> bytes:
    """A line of JSON in UTF-8; a lone surrogate, which UTF-8 cannot have, becomes JSON's escape of it."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


class ResultFile:
    """A file that grows by whole lines, each on the disk before the next one.

    Args:
      resume: go on with what is there; a last line that a crash has torn is removed. Otherwise nothing may be.

    Attributes:
      done: the input lines that it had results of when it was opened.

    Raises RequestError for a file that is not ours to go on with, OSError for one that cannot be written.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.done: set[int] = set()
        if path.is_file() and path.stat().st_size:
            if not resume:
                raise RequestError(f"{path} has results already: --resume continues it, or choose another file")
            self._recover()
        # Without a buffer, closing has nothing left to fail at.
        self._file = path.open("ab", buffering=0)
        self._on_disk = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)

    def write(self, value: Mapping[str, Any]) -> None:
        """Adds a line.

        Raises DiskFullError if it does not fit the disk, CapacityError if it cannot be written for another reason.
        """
        data = as_line(value)
        try:
            while data:
                data = data[self._file.write(data) :]
            if self._on_disk:
                os.fsync(self._file.fileno())
        except OSError as e:
            kind = DiskFullError if e.errno in DISK_FULL else CapacityError
            raise kind(f"cannot write to {self.path}: {e.strerror}") from None

    def _recover(self) -> None:
        with self.path.open("r+b") as file:
            whole = 0
            for data in file:
                match = _NUMBERED.match(data)
                if not match or not data.endswith(b"\n") or not is_json(data):
                    # Only what we have begun to write may be removed.
                    torn = not file.read(1) and any(data.startswith(s) or s.startswith(data) for s in _STARTS)
                    if not torn:
                        raise RequestError(f"{self.path} is not an output of llamajax batch: choose another file")
                    file.truncate(whole)
                    return
                self.done.add(int(match[1]))
                whole += len(data)
