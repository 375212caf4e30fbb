"""Files of results, which outlive a crash: what is in them, what it is of, and who may write. Knows no model."""

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamajax.errors import DiskFullError, RequestError
from llamajax.text import one_line

from .batch_file import as_line
from .json_object import read_object

# How the lines that we write begin: with the number of the line that they answer.
_STARTS = (b'{"line": ', b'{"id": "batch_req_')
_NUMBERED = re.compile(b'(?:%s|%s)([0-9]+)[,"]' % tuple(map(re.escape, _STARTS)))


class ResultFile:
    """A file that grows by whole lines, each on the disk before the next one. Locked until the process ends.

    Args:
      resume: go on with what is there; a last line that a crash has torn is removed. Otherwise nothing may be.

    Attributes:
      done: the digests of the input lines that it had results of when it was opened, by their numbers.

    Raises RequestError for a file that is not ours to go on with, OSError for one that cannot be written.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        self.path = path
        self.done: dict[int, str] = {}
        # Unbuffered, so that closing writes nothing, and cannot fail.
        self._file = path.open("ab", buffering=0)
        self._on_disk = stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        if not self._on_disk:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"another run writes {path}: wait until it ends, or choose another file") from None
        except OSError:  # a file system without locks
            pass
        if path.stat().st_size:
            if not resume:
                raise RequestError(f"{path} has results already: --resume continues it, or choose another file")
            self._recover()

    def write(self, value: Mapping[str, Any]) -> None:
        """Adds a line.

        Raises DiskFullError if it does not fit.
        """
        data = as_line(value)
        try:
            while data:
                data = data[self._file.write(data) :]
            if self._on_disk:
                os.fsync(self._file.fileno())
        except OSError as e:
            raise DiskFullError(f"cannot write to {self.path}: {e.strerror}") from None

    def check(self, number: int, digest: str) -> bool:
        """Whether it has a result of this line.

        Raises RequestError if that is of another line, or was made with other options.
        """
        if number in self.done and self.done[number] != digest:
            raise RequestError(
                f"line {number} of the input is not the one that {self.path} has a result of: lines were changed, "
                "inserted, removed or moved, or an option was changed. Put it back, or choose another file"
            )
        return number in self.done

    def _recover(self) -> None:
        with self.path.open("r+b") as file:
            whole = 0
            for data in file:
                match = _NUMBERED.match(data)
                fields = _parsed(data) if match and data.endswith(b"\n") else None
                if not match or fields is None:
                    # Only a line whose beginning is one of ours may be removed.
                    torn = not file.read(1) and any(data.startswith(s) or s.startswith(data) for s in _STARTS)
                    if not torn:
                        raise RequestError(f"{self.path} is not an output of llamajax batch: choose another file")
                    file.truncate(whole)
                    return
                if not isinstance(digest := fields.get("digest"), str):
                    raise RequestError(
                        f"{self.path} was written by an earlier version, without digests of the input's lines, so it "
                        "cannot be continued: choose another file"
                    )
                self.done[int(match[1])] = digest
                whole += len(data)


class Settings:
    """The options of a run that change its answers.

    They are part of each result's digest. A file beside the results keeps their values, to say what differs.

    Args:
      values: JSON values by the options' names.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._hash = hashlib.sha256(json.dumps(self._values, sort_keys=True).encode())

    def digest(self, data: bytes, *, as_json: bool) -> str:
        """What tells a line, read with these options, from any other: 16 hexadecimal digits."""
        digest = self._hash.copy()
        digest.update(b"JSON" if as_json else b"text")
        data = data.removeprefix(b"\xef\xbb\xbf")
        digest.update(data.strip() if as_json else data.rstrip(b"\r\n"))
        return digest.hexdigest()[:16]

    def check(self, path: Path) -> None:
        """Raises RequestError, naming the options, if those that were saved differ from these."""
        saved = _parsed(path.read_bytes()) if path.is_file() else None
        if saved is None:  # the digests of the lines still show whether they differ
            return
        missing = object()
        differing = [
            f"{name} was {_shown(saved.get(name))} and is {_shown(self._values.get(name))}"
            for name in sorted(saved.keys() | self._values)
            if saved.get(name, missing) != self._values.get(name, missing)
        ]
        if differing:
            raise RequestError(
                f"{path.name.removesuffix(SETTINGS_SUFFIX)} was made with other options: {'; '.join(differing)}. "
                "Give the same ones, or choose another file"
            )

    def save(self, path: Path) -> None:
        """Writes the values, all or none of them."""
        data = json.dumps(self._values, ensure_ascii=False, indent=2).encode("utf-8", "backslashreplace") + b"\n"
        temporary = path.with_name(path.name + ".new")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as e:
            with suppress(OSError):
                temporary.unlink()
            raise DiskFullError(f"cannot write to {path}: {e.strerror}") from None


SETTINGS_SUFFIX = ".options.json"


def _shown(value: Any) -> str:
    return one_line(json.dumps(value), longest=60)


def _parsed(data: bytes) -> dict[str, Any] | None:
    """The object that is written there; None if it is not a whole one."""
    try:
        return read_object(data)
    except RequestError:
        return None
