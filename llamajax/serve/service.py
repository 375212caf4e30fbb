"""A model's life in a server: it is loaded, compiled, answers, and stops. Knows no HTTP."""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread, Timer, main_thread
from typing import Any, Literal
from weakref import WeakSet

import jax

from llamajax.answer import ServedStream
from llamajax.errors import RequestError, UnavailableError
from llamajax.llm import LLM, Server
from llamajax.types import TokenLogprobs

from .metrics import Metrics
from .protocol import Prompt

State = Literal["loading", "compiling", "ready", "stopping", "failed"]


class Service:
    """A model that is served. It accepts requests as soon as it is loaded.

    Args:
      load: gives the model; called in a thread.
      name: that it is served under.
      slots: how many requests are answered at once.
      max_waiting: how many more may wait.
      deadline: seconds that a request may take; None for no limit.

    Attributes:
      state: "compiling" is ready for requests, but the first of a kind may wait for a program.
      error: why it has failed.
      llm: the model, once it is loaded.
      created: when the service was, in seconds since 1970.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        *,
        name: str,
        slots: int = 16,
        max_waiting: int = 256,
        deadline: float | None = None,
    ) -> None:
        self.name = name
        self.max_waiting = max_waiting
        self.created = int(time.time())
        self.state: State = "loading"
        self.error: Exception | None = None
        self.llm: LLM | None = None
        self.metrics = Metrics(
            name,
            running=lambda: self._server.num_running if self._server else 0,
            waiting=lambda: self._server.num_waiting if self._server else 0,
            kv_usage=lambda: self._server.kv_usage if self._server else 0.0,
        )
        self._load = load
        self._slots = slots
        self._deadline = deadline
        self._server: Server | None = None
        self._compiled = 0, 0
        self._streams: WeakSet[ServedStream] = WeakSet()
        # Scores are computed one after the other, and those of a client that has left are not.
        self._scoring = ThreadPoolExecutor(1, "llamajax scores")
        # No daemon: XLA aborts the process if the interpreter ends a thread that compiles.
        self._starting = Thread(target=self._start, name="llamajax service")
        self._starting.start()

    @property
    def is_ready(self) -> bool:
        """Whether all is compiled, and the engine lives."""
        return self.state == "ready" and self.is_alive

    @property
    def is_alive(self) -> bool:
        """False if it can never answer again, though nobody asked it to stop."""
        return self.state != "failed" and (self._server is None or self.state == "stopping" or self._server.is_alive)

    @property
    def status(self) -> str:
        """What it is doing, in words."""
        if not self.is_alive:
            return f"failed: {self.error or 'the engine has stopped'}"
        if self.state == "loading":
            return f"loading {self.name}"
        if self.state == "compiling":
            done, total = self._compiled
            return f"compiling: {done} of {total} programs" if total else "compiling"
        return self.state

    def submit(self, asked: Iterable[tuple[Prompt, Mapping[str, Any]]], streams: list[ServedStream]) -> None:
        """Asks for answers to prompts, each with options of its own, and adds them to the list one by one.

        Raises UnavailableError before the model is loaded and after `stop`, QueueFullError, and what
        `Server.submit` raises; the answers that are in the list then are the caller's to cancel.
        """
        server = self.server
        asked = list(asked)
        if len(asked) > self.max_waiting:
            raise RequestError(
                f"a request may ask for {self.max_waiting} answers, not {len(asked)}: send several requests"
            )
        for prompt, options in asked:
            streams.append(server.submit(prompt, deadline=self._deadline, **options))
            self._streams.add(streams[-1])
        if self.state == "stopping":  # it came in between
            self._cancel()

    def prompt_logprobs(self, token_ids: list[int], num_top: int) -> Future[tuple[TokenLogprobs | None, ...]]:
        """As `LLM.prompt_logprobs`, in its turn. Cancel it if it is not wanted any more."""
        return self._scoring.submit(self.model.prompt_logprobs, token_ids, num_top)

    @property
    def model(self) -> LLM:
        """Raises UnavailableError while it is not loaded."""
        if self.llm is None:
            raise UnavailableError(f"{self.status}: try again soon")
        return self.llm

    @property
    def server(self) -> Server:
        """Raises UnavailableError if it takes no requests now."""
        if self._server is None or self.state == "stopping" or not self.is_alive:
            raise UnavailableError(f"{self.status}: try again later")
        return self._server

    def stop(self, seconds: float) -> None:
        """Takes no more requests; those that still run after so many seconds are cancelled. Returns at once."""
        self.state = "stopping"
        timer = Timer(seconds, self._cancel)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Cancels all requests and ends the engine."""
        self.state = "stopping"
        self._scoring.shutdown(wait=False, cancel_futures=True)
        if self._server:
            self._server.close()
        jax.monitoring.unregister_event_duration_listener(self._count_late)

    def _cancel(self) -> None:
        for stream in list(self._streams):
            stream.cancel()

    def _start(self) -> None:
        try:
            jax.monitoring.register_event_duration_secs_listener(self._count_late)
            self.llm = self._load()
            self._server = self.llm.serve_requests(
                slots=self._slots, max_waiting=self.max_waiting, on_answer=self.metrics.answered
            )
            self._go_on("loading", "compiling")
            self._server.compile(self._note_compiled)
            self._go_on("compiling", "ready")
        except _StoppedError:
            pass
        except Exception as error:
            self.error, self.state = error, "failed"

    def _go_on(self, before: State, after: State) -> None:
        if self.state == before:  # and was not stopped
            self.state = after

    def _note_compiled(self, done: int, total: int) -> None:
        self._compiled = done, total
        if self.state == "stopping" or not main_thread().is_alive():  # the interpreter waits for this thread
            raise _StoppedError

    def _count_late(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and self.state == "ready":
            self.metrics.compiled_late()


class _StoppedError(Exception):
    """What is left to compile is of no use any more."""
