"""Runs what Python cannot interrupt in a process with limits of its own, which is ended from outside.

Knows the process's limits and life, not what it does: that is a worker, a module with a function `answer`.
"""

import atexit
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any


class Sandbox:
    """A process that answers one request at a time. It is started when it is first needed, and after it has ended."""

    def __init__(self, worker: Path, *, max_bytes: int) -> None:
        """
        Args:
          worker: a module whose `answer(**request)` gives the reply, in values that JSON has. It imports nothing of
            llamajax.
          max_bytes: of the process's memory, where the system can limit it.
        """
        self._worker = worker
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._process: _Process | None = None
        atexit.register(self.end)

    def start(self) -> None:
        """Starts the process ahead of the first request, and does not wait for it. `ask` says what went wrong."""
        with self._lock, suppress(OSError):
            self._running()

    def ask(self, request: str, max_seconds: float) -> Any:
        """The reply to a request, an object in JSON.

        Raises TimeoutError if it takes too long, ChildProcessError if it ended the process, such as by too much
        memory, another OSError if the process cannot be started.
        """
        with self._lock:
            return self._running().ask(request, max_seconds)

    def end(self) -> None:
        """Ends the process, if it runs."""
        if self._process is not None and self._process.is_usable:
            self._process.end()

    def _running(self) -> "_Process":
        if self._process is None or not self._process.is_usable:
            self._process = _Process(self._worker, self._max_bytes)
        return self._process


class _Process:
    """Python that runs the worker. It ends when we do, since its stdin then ends."""

    def __init__(self, worker: Path, max_bytes: int) -> None:
        code = (
            "import sys; sys.path[:] = sys.argv[1:]; import sandbox_worker, "
            f"{worker.stem}; sandbox_worker.main({worker.stem}.answer, {max_bytes})"
        )
        # The workers' folders come last, so that their other modules hide no one else's.
        path = [*sys.path, str(worker.parent), str(Path(__file__).parent)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code, *path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="surrogatepass",  # lone surrogates tell text from special tokens
            start_new_session=True,  # Ctrl-C is not for it
        )
        self._parent = os.getpid()
        self._is_ready = False

    @property
    def is_usable(self) -> bool:
        return self._process.poll() is None and self._parent == os.getpid()  # a fork has its parent's

    def ask(self, request: str, max_seconds: float) -> Any:
        """As `Sandbox.ask`. After any failure, also Ctrl-C, the process is gone, and with it a late reply."""
        assert self._process.stdin and self._process.stdout
        try:
            if not self._is_ready:
                self._is_ready = bool(self._process.stdout.readline())
            began = time.monotonic()
            with suppress(BrokenPipeError):
                print(f"{max_seconds} {request}", file=self._process.stdin, flush=True)
            if reply := self._process.stdout.readline():
                return json.loads(reply)
            if not self._is_ready:
                raise OSError(f"{sys.executable} ended")
            raise (TimeoutError if time.monotonic() - began >= max_seconds else ChildProcessError)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        self._process.kill()
        with suppress(OSError), self._process:
            pass
