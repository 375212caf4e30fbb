"""The sequential strategy: one request at a time, with the lowest latency. An engine of one slot."""

from collections import deque
from collections.abc import Callable, Iterator
from threading import RLock

from llamajax.engine.engine import Engine
from llamajax.engine.programs import Program
from llamajax.engine.runner import Runner
from llamajax.engine.scheduler import Job
from llamajax.errors import RequestError
from llamajax.types import FinishReason, Request, Token

# Ended prompts may keep only pages that take no memory beyond that of the longest sequence so far.
_PREFIX_BYTES = 1


class OneSlot(Engine):
    """An engine without a thread of its own: whoever waits for a token steps it.

    Attributes:
      runner: whose programs it runs.
      turn: held by the thread that uses it: for a step of a stream, or for all of a request that nobody reads along
        with.
    """

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner, num_slots=1, prefix_bytes=_PREFIX_BYTES)
        self.runner = runner
        self.turn = RLock()

    def go_on(self, job: Job) -> None:
        """A step for this job. Another one that has the slot waits, and goes on when it is stepped again."""
        try:
            if job.state == "new":
                if not job.given_up:  # else the step ends it as it waits
                    self._make_way()
                self.scheduler.submit(job)
            self.step()
        except BaseException:  # Ctrl-C, at any place
            self.abort(RequestError("an interrupt ended this request: ask again"))
            raise

    def _make_way(self) -> None:
        self._deliver_all()
        for job in self.scheduler:
            if reason := job.given_up:
                self._end(job, reason)
                continue
            if job.state != "waiting":
                for row in self._put_back([job]):
                    self._batch.leave(row, draws=True)
            self.scheduler.withdraw(job)

    def programs(self, num_positions: int) -> list[Program]:
        """All that sequences of up to this many positions need."""
        return self._batch.programs(num_positions)

    def programs_for(self, request: Request) -> list[Program]:
        """What the answer to a valid request needs, with the cache as it is; more when the answer makes it grow."""
        with self.turn:
            return self._batch.programs_for(request)

    def warm_up(self, num_positions: int) -> None:
        """Compiles all programs for a cache of this length, so that no request waits for them, and makes room there."""
        num_positions = min(num_positions, self.runner.max_seq_len)
        with self.turn:
            self._make_way()
            for program in self.programs(num_positions):
                if program.cache_len >= self.runner.bucket(num_positions):
                    self.runner.compile(program)
            self._batch.drop(self._batch.prompts([Request([0], 1)], [1], num_positions=num_positions))
            list(Sequential(self, Request([0], 2)))


class Sequential:
    """Tokens of one request, as they are drawn.

    Attributes:
      request: as it was given.
      cached_tokens: how many of the prompt's tokens the KV cache already held; known once iteration began.
      stopped: whether the answer ended by itself: by a stop token, which is not part of it, or where nothing more fits
        its constraint.
      goes_on: called before each chunk of the prompt with how many of its tokens are prefilled; False ends the request.
    """

    def __init__(self, engine: OneSlot, request: Request) -> None:
        self.request = request
        self.cached_tokens = 0
        self.stopped = False
        self.goes_on: Callable[[int], bool] = lambda num_prefilled: True
        self._engine = engine
        self._tokens = deque[Token]()
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[Token]:
        """Draws until a stop token or the limit: the first token alone, then blocks, each computed while the one before
        it is read.
        """
        engine, job = self._engine, self._engine.job(self.request, self)
        try:
            while self._tokens or job.state != "ended":
                with engine.turn:  # nobody else may begin before the whole prompt is prefilled
                    while not self._tokens and job.state != "ended":
                        done = engine.num_prefilled(job)
                        if done is not None and not self.goes_on(done):
                            job.cancel()
                        engine.go_on(job)
                while self._tokens:
                    yield self._tokens.popleft()
            if self._error:
                raise self._error
        finally:
            job.cancel()  # at the next step, whoever takes it

    def begin(self, num_cached: int) -> None:
        self.cached_tokens = num_cached

    def token(self, token: Token) -> bool:
        self._tokens.append(token)
        return True

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        self.stopped = reason == "stop"
        self._error = error
