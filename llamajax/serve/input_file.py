"""Where a batch's lines come from: files of several formats, and pipes. Knows no request."""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, BinaryIO, Literal, NamedTuple

from llamajax.errors import RequestError
from llamajax.utf8 import from_utf8

from .batch_file import read_text
from .json_object import read_object, without_repeats

Format = Literal["text", "jsonl", "json"]

_FORMATS: dict[str, Format] = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
# Lines of a pipe that are read before they are asked for.
_AHEAD = 1024


class Line(NamedTuple):
    """A line of the input, or an element of its JSON array.

    Attributes:
      number: from 1; blank lines are counted.
      data: as it was read.
      as_json: whether it is JSON, or text.
      guessed: the first line showed that the input is text; nobody said so.
    """

    number: int
    data: bytes
    as_json: bool
    guessed: bool = False

    @property
    def is_blank(self) -> bool:
        return not self.data.strip()

    def fields(self) -> dict[str, Any]:
        """What it says.

        Raises RequestError.
        """
        if self.as_json:
            return read_object(self.data)
        if self.guessed and _begins_json(self.data):
            raise RequestError("looks like JSON among lines of text: say which it is with --format")
        return read_text(self.data)


class Input:
    """The lines of a file or a pipe.

    Args:
      file: where they are read from.
      name: what messages call it. The end of a file's name says its format.
      format: "text" has a prompt in each line, "jsonl" an object in each; "json" is one document, an array of objects
        or one object, and is read whole. If None, the name decides, or else the first line.

    Attributes:
      is_counted: it can be read more than once, so that its lines can be counted.
    """

    def __init__(self, file: BinaryIO, name: str, format: Format | None) -> None:
        self._file = file
        self._name = name
        self._format: Format | None = format or _FORMATS.get(Path(name).suffix.lower())
        self._is_guessed = self._format is None
        self._elements: list[bytes] | None = None
        self._is_regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        self._start = file.tell() if self._is_regular else 0
        if self._format == "json":
            self._read_document(lines_too=format is None)
        self.is_counted = self._is_regular or self._elements is not None

    def lines(self, may_wait: Callable[[], bool] = lambda: True) -> Iterator[Line | None]:
        """The lines, from the first; of a pipe, those that are left.

        Args:
          may_wait: whether to wait for a pipe's next line; None is given in its place if not.

        Raises RequestError for UTF-16 text, and for an input whose first line leaves open what it is.
        """
        if self._elements is not None:
            for number, element in enumerate(self._elements, 1):
                yield Line(number, element, as_json=True)
            return
        number = 0
        for data in self._raw_lines(may_wait):
            if data is None:
                yield None
                continue
            number += 1
            if number == 1 and (b"\0" in data or data.startswith((b"\xff\xfe", b"\xfe\xff", b"\x1f\x8b"))):
                from_utf8(data, self._name)  # says what it is
            if self._format is None and data.strip():
                self._format = "jsonl" if self._shows_json(data) else "text"
            as_json = self._format != "text"
            yield Line(number, data, as_json, guessed=self._is_guessed and not as_json)

    def _raw_lines(self, may_wait: Callable[[], bool]) -> Iterator[bytes | None]:
        if self._is_regular:
            self._file.seek(self._start)
            yield from self._file
            return
        lines: Queue[bytes | Exception] = Queue(_AHEAD)
        # The thread gets a file of its own: to close a file blocks until another thread's read of it ends.
        file = os.fdopen(os.dup(self._file.fileno()), "rb")
        Thread(target=_pump, args=(file, lines), name="llamajax input", daemon=True).start()
        while True:
            try:
                data = lines.get(block=may_wait())
            except Empty:
                yield None
                continue
            if isinstance(data, Exception):
                raise data
            if not data:
                return
            yield data

    def _shows_json(self, data: bytes) -> bool:
        if not _begins_json(data):
            return False
        try:
            read_object(data)
        except RequestError as e:
            raise RequestError(
                f"{self._name} begins as JSON does, but its first line is not a whole object ({e}): say what it is "
                "with --format jsonl, json or text"
            ) from None
        return True

    def _read_document(self, lines_too: bool) -> None:
        text = from_utf8(self._file.read(), self._name)
        try:
            found = json.loads(text, object_pairs_hook=without_repeats) if text.strip() else []
            # Each becomes a line, so that one place reads it and says what is wrong with it.
            elements = found if isinstance(found, list) else [found]
            self._elements = [json.dumps(element).encode() for element in elements]
        except (ValueError, RecursionError) as e:
            # Many files named .json are JSON lines.
            first_line = text.lstrip().partition("\n")[0].encode("utf-8", "surrogatepass")
            if not lines_too or not self._is_regular or not _is_object(first_line):
                raise RequestError(f"{self._name} is not JSON: {e}") from None
            self._format = "jsonl"


def _begins_json(data: bytes) -> bool:
    start = data.removeprefix(b"\xef\xbb\xbf").strip()
    return start == b"[" or re.match(rb'\{|\[\s*["{\[]', start) is not None


def _is_object(data: bytes) -> bool:
    try:
        read_object(data)
    except RequestError:
        return False
    return True


def _pump(file: BinaryIO, lines: "Queue[bytes | Exception]") -> None:
    """Reads a pipe, however long its next line may take. Its end is an empty line."""
    try:
        for data in file:
            lines.put(data)
    except Exception as e:
        lines.put(e)
    lines.put(b"")
