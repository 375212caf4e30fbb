"""Compiles programs before they are needed, in a thread of its own. Knows nothing of text."""

import atexit
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Condition, Thread

from llamajax.engine.programs import Program
from llamajax.engine.sequential import OneSlot
from llamajax.types import Request


class AheadCompiler:
    """Compiles all programs of a sequence of up to so many positions. Begins when it knows what is needed first."""

    def __init__(self, engine: OneSlot, num_positions: int) -> None:
        self._engine = engine
        self._num_positions = num_positions
        self._urgent: list[Program] = []
        self._only_urgent = False
        self._closed = False
        self._compiled: set[Program] = set()
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="llamajax compiler", daemon=True)
        self._thread.start()
        # A program that ends while XLA compiles would crash.
        atexit.register(self._join)

    def expect(self, request: Request) -> None:
        """Compiles the programs of this request before all others."""
        with self._changed:
            self._urgent = self._engine.programs_for(request)
            self._changed.notify_all()

    @contextmanager
    def answering(self, request: Request) -> Iterator[None]:
        """Inside, only what this request needs is compiled."""
        with self._changed:
            self._only_urgent = True
            self.expect(request)
        try:
            yield
        finally:
            with self._changed:
                self._only_urgent = False
                self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Until what was expected last is compiled: False if that takes longer than so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._compiled.issuperset(self._urgent), timeout)

    def close(self) -> None:
        """Stops after the present program."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next(self) -> Program | None:
        """What is to be compiled next: what is urgent, then the rest for caches of that length, longer, shorter."""
        programs = list(self._urgent)
        if programs and not self._only_urgent:
            length = programs[0].cache_len
            programs += sorted(self._engine.programs(self._num_positions), key=lambda other: other.cache_len < length)
        return next((program for program in programs if program not in self._compiled), None)

    def _join(self) -> None:
        self.close()
        self._thread.join()

    def _run(self) -> None:
        while program := self._wait_for_program():
            # What fails here fails again where the program is needed, and is reported there.
            with suppress(Exception):
                self._engine.runner.compile(program)
            with self._changed:
                self._compiled.add(program)
                self._changed.notify_all()
        atexit.unregister(self._join)

    def _wait_for_program(self) -> Program | None:
        """What is to be compiled next; None once it is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._next() is not None)
            return None if self._closed else self._next()
