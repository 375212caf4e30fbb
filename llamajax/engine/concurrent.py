"""The concurrent strategy: any thread submits requests at any time, and those that run are decoded together."""

from collections.abc import Callable
from threading import Condition, Thread

from llamajax.engine.engine import Engine
from llamajax.engine.scheduler import Job
from llamajax.errors import QueueFullError, RequestError


class Concurrent:
    """Runs an engine in a thread of its own, until it is closed.

    That thread calls `on_step` after each of the engine's steps.
    """

    def __init__(self, engine: Engine, on_step: Callable[[], None]) -> None:
        self._engine = engine
        self._on_step = on_step
        self._inbox: list[Job] = []
        self._num_submitted = 0
        self._closed = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="llamajax engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """False once the engine's thread has ended, for whatever reason."""
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Requests that were submitted and have no slot yet."""
        return len(self._inbox) + self._engine.scheduler.num_waiting

    def submit(self, job: Job, *, wait: bool = False) -> None:
        """Puts a job into the engine's queue.

        Args:
          job: a new job, made by this engine.
          wait: whether to wait for room if the queue is full.

        Raises QueueFullError if the queue is full, RequestError if the engine is closed.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closed or not self._is_full())
            if self._closed:
                raise RequestError("the server is closed")
            if self._is_full():
                raise QueueFullError(f"{self._engine.scheduler.max_waiting} requests wait already: try again later")
            self._inbox.append(job)
            self._num_submitted += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Cancels the unfinished requests, and waits until the engine has stopped. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _is_full(self) -> bool:
        scheduler = self._engine.scheduler
        # The engine's thread moves jobs meanwhile. The number of ended ones only grows, so that it is safe to read.
        return self._num_submitted - scheduler.num_ended >= scheduler.num_slots + scheduler.max_waiting

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # those who wait for this thread must learn that it has ended
            with self._changed:
                self._closed = True
                for job in self._inbox:
                    self._engine.scheduler.submit(job)
                self._inbox.clear()
                self._changed.notify_all()
            self._engine.abort()
            self._on_step()

    def _serve(self) -> None:
        busy = False
        while True:
            with self._changed:
                if not busy:
                    self._changed.wait_for(lambda: self._inbox or self._closed)
                for job in self._inbox:
                    self._engine.scheduler.submit(job)
                self._inbox.clear()
                if self._closed:
                    return
            busy = self._engine.step()
            self._on_step()
            with self._changed:
                self._changed.notify_all()  # there may be room in the queue
