"""A model's life in a server: it is loaded, compiled, answers, and stops. Knows no HTTP."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Lock, Thread, Timer, main_thread
from typing import Literal
from weakref import WeakSet

from llamajax.answer import ServedStream
from llamajax.engine.compilations import on_compilation
from llamajax.errors import InternalError, RequestError, UnavailableError
from llamajax.llm import LLM, Server
from llamajax.types import TokenLogprobs

from .bell import Bell
from .metrics import Metrics
from .requests import GenerationRequest

State = Literal["loading", "compiling", "ready", "stopping", "failed"]


class Service:
    """A server's model. It accepts requests as soon as it is loaded.

    Args:
      load: gives the model; called in a thread.
      name: the model's, in requests and answers.
      slots: how many requests are answered at once.
      max_waiting: how many more may wait.
      deadline: seconds that a request may take; None for no limit.

    Attributes:
      error: why it has failed.
      llm: the model, once it is loaded.
      created: when the service was, in seconds since 1970.
      bell: rings after each step of the engine.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        *,
        name: str,
        slots: int = 16,
        max_waiting: int = 256,
        deadline: float | None = None,
        prefix_cache: int | None = None,
    ) -> None:
        self.name = name
        self.created = int(time.time())
        self.error: Exception | None = None
        self.llm: LLM | None = None
        self.metrics = Metrics(
            name,
            running=lambda: self._server.num_running if self._server else 0,
            waiting=lambda: self._server.num_waiting if self._server else 0,
            kv_usage=lambda: self._server.kv_usage if self._server else 0.0,
        )
        self.bell = Bell()
        self._load = load
        self._slots = slots
        self._max_waiting = max_waiting
        self._deadline = deadline
        self._prefix_cache = prefix_cache
        self._server: Server | None = None
        self._progress = 0, 0  # programs compiled, of how many
        self._is_compiled = self._is_stopping = self._is_closed = False
        self._changing = Lock()
        self._counting = ExitStack()
        self._streams: WeakSet[ServedStream] = WeakSet()
        # One text is scored at a time. Those of a client that has disconnected are skipped.
        self._scoring = ThreadPoolExecutor(1, "llamajax scores")
        # No daemon: XLA aborts the process if the interpreter ends a thread that compiles.
        self._starting = Thread(target=self._start, name="llamajax service")
        self._starting.start()

    @property
    def state(self) -> State:
        """ "compiling" takes requests, but the first of a kind may wait for a program."""
        if not self.is_alive:
            return "failed"
        if self._is_stopping:
            return "stopping"
        return "loading" if self._server is None else "ready" if self._is_compiled else "compiling"

    @property
    def is_alive(self) -> bool:
        """False if it can never answer again, though nobody closed it."""
        return self.error is None and (self._server is None or self._is_closed or self._server.is_alive)

    @property
    def status(self) -> str:
        """What it is doing, in words."""
        match self.state:
            case "failed":
                return f"failed: {self.error or 'the engine has stopped'}"
            case "loading":
                return f"loading {self.name}"
            case "compiling":
                return "compiling: {} of {} programs".format(*self._progress)
            case state:
                return state

    @property
    def model(self) -> LLM:
        """Raises UnavailableError while it is not loaded."""
        if self.llm is None:
            raise UnavailableError(f"{self.status}: try again soon")
        return self.llm

    @property
    def server(self) -> Server:
        """Raises UnavailableError if it takes no requests now."""
        if self._server is None or self.state not in ("compiling", "ready"):
            raise UnavailableError(f"{self.status}: try again later")
        return self._server

    def submit(self, request: GenerationRequest, streams: list[ServedStream]) -> None:
        """Asks for all answers to a request, and adds them to the list one by one.

        Raises UnavailableError before the model is loaded and after `stop`, QueueFullError, and what
        `Server.submit` raises; the answers that are in the list then are the caller's to cancel.
        """
        server, most = self.server, self._slots + self._max_waiting
        if request.num_answers > most:
            raise RequestError(
                f"a request may ask for {most} answers, not {request.num_answers}: send several requests"
            )
        for prompt in request.prompts:
            for stream in server.submit_each(prompt, request.seeds, deadline=self._deadline, **request.options):
                streams.append(stream)
                with self._changing:
                    self._streams.add(stream)

    def prompt_logprobs(self, token_ids: list[int], num_top: int) -> Future[tuple[TokenLogprobs | None, ...]]:
        """As `LLM.prompt_logprobs`, in its turn. Cancel it if it is not wanted any more."""
        return self._scoring.submit(self.model.prompt_logprobs, token_ids, num_top)

    def stop(self, seconds: float) -> None:
        """Takes no more requests; those that still run after so many seconds are cancelled. Returns at once."""
        self._is_stopping = True
        timer = Timer(seconds, self._cancel)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Cancels all requests and ends the engine. May be called again."""
        with self._changing:
            if not self.is_alive:
                self.error = self.error or InternalError("the engine has stopped")
            self._is_stopping = self._is_closed = True
        self._scoring.shutdown(wait=False, cancel_futures=True)
        if self._server:
            self._server.close()
        self._counting.close()

    def _cancel(self) -> None:
        with self._changing:
            streams = list(self._streams)
        for stream in streams:
            stream.cancel()

    def _start(self) -> None:
        try:
            llm = self._load()
            with self._changing:
                if self._is_closed:
                    return
                self.llm = llm
                self._server = llm.serve_requests(
                    slots=self._slots,
                    max_waiting=self._max_waiting,
                    prefix_cache=self._prefix_cache,
                    on_answer=self.metrics.answered,
                    on_step=self.bell.ring,
                )
            self._server.compile(self._note_progress)
            self._counting.enter_context(on_compilation(lambda seconds: self.metrics.compiled_late()))
            self._is_compiled = True
        except _StoppedError:
            pass
        except Exception as error:
            if not self._is_closed:
                self.error = error

    def _note_progress(self, done: int, total: int) -> None:
        self._progress = done, total
        if self._is_stopping or not main_thread().is_alive():  # the interpreter cannot exit before this thread ends
            raise _StoppedError


class _StoppedError(Exception):
    """What is left to compile is of no use any more."""
