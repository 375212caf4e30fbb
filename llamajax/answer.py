"""Tokens to an answer: its text, where a stop string ends it, and how it is handed to whoever asked."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from threading import Condition, Lock
from typing import NamedTuple, Self

from llamajax.engine.sequential import Sequential
from llamajax.tokenizers.stream import StopStrings, StreamDecoder
from llamajax.types import Completion, FinishReason, Request, Timings, Token


class Answer:
    """What there is of an answer so far.

    Attributes:
      request: what was asked.
      stopped: a stop string ended the text.
      cached_tokens: how many of the prompt's tokens the KV cache already held.
    """

    def __init__(self, request: Request, decoder: StreamDecoder, stops: StopStrings) -> None:
        self.request = request
        self.cached_tokens = 0
        self._decoder = decoder
        self._stops = stops
        self._drawn: list[Token] = []
        self._times: list[float] = []
        self._text: list[str] = []
        self._finish_reason: FinishReason = "cancelled"
        self._began = time.perf_counter()

    @property
    def stopped(self) -> bool:
        return self._stops.matched

    @property
    def num_tokens(self) -> int:
        return len(self._drawn)

    def tokens(self, start: int, stop: int) -> list[Token]:
        """Some of those that were drawn."""
        return self._drawn[start:stop]

    def push(self, token: Token) -> str:
        """Adds a token. Returns the text that is certain now."""
        self._times.append(token.time - self._began)
        self._drawn.append(token)
        may_end = len(self._drawn) > self.request.min_tokens
        return self._add(self._stops.push(self._decoder.push(token.id), may_end=may_end))

    def finish(self, reason: FinishReason) -> str:
        """Ends the answer. Returns the rest of the text."""
        rest = self._add(self._stops.push(self._decoder.flush()) + self._stops.flush())
        self._finish_reason = "stop" if self.stopped else reason
        return rest

    @property
    def completion(self) -> Completion:
        """The answer so far; "cancelled" until it has ended in another way."""
        first, last = (self._times[0], self._times[-1]) if self._times else (0.0, 0.0)
        return Completion(
            text="".join(self._text),
            token_ids=tuple(token.id for token in self._drawn),
            finish_reason=self._finish_reason,
            prompt_tokens=len(self.request.token_ids),
            cached_tokens=self.cached_tokens,
            timings=Timings(first, last - first, tuple(self._times)),
            logprobs=None
            if self.request.sampling.logprobs is None
            else tuple(token.logprobs for token in self._drawn if token.logprobs is not None),
        )

    def _add(self, text: str) -> str:
        if text:
            self._text.append(text)
        return text


class Stream(Iterator[str]):
    """An answer's text, piece by piece, computed as it is read.

    Attributes:
      on_read: called before each chunk of prefill, with how many tokens of the prompt are done, and how many it has.
    """

    def __init__(self, tokens: Sequential, answer: Answer) -> None:
        self.on_read: Callable[[int, int], None] = lambda read, total: None
        self._tokens = tokens
        self._tokens.goes_on = self._goes_on
        self._answer = answer
        self._cancelled = False
        self._pieces = self._run()
        self._reading = Lock()  # a generator cannot be read by two threads at a time

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        with self._reading:
            return next(self._pieces)

    def cancel(self) -> None:
        """Ends the answer before its next token, or the next chunk of its prompt.

        May be called from anywhere, a signal handler too.
        """
        self._cancelled = True

    def finish(self) -> Completion:
        """The whole answer, once it is there."""
        for _ in self:
            pass
        return self.completion

    @property
    def request(self) -> Request:
        """What was asked, in token ids."""
        return self._answer.request

    @property
    def completion(self) -> Completion:
        """The answer so far; "cancelled" until it has ended in another way."""
        return self._answer.completion

    def _goes_on(self, read: int) -> bool:
        if not self._cancelled:
            self.on_read(read, len(self.request.token_ids))
        return not self._cancelled

    def _run(self) -> Iterator[str]:
        for token in self._tokens:
            self._answer.cached_tokens = self._tokens.cached_tokens
            if self._cancelled:
                break
            if piece := self._answer.push(token):
                yield piece
            if self._answer.stopped:
                break
        ended: FinishReason = "stop" if self._tokens.stopped else "cancelled" if self._cancelled else "length"
        if rest := self._answer.finish(ended):
            yield rest


class Piece(NamedTuple):
    """A part of an answer's text.

    Attributes:
      text: not empty.
      num_tokens: how many of the answer's tokens were drawn when it was certain.
    """

    text: str
    num_tokens: int


class ServedStream(Iterator[str]):
    """An answer's text, piece by piece, computed by a server whether it is read or not.

    An iterator of text, and an async one; or `take` what is there. One that nobody holds any more is cancelled.
    """

    def __init__(self, inbox: "Inbox", cancel: Callable[[], None]) -> None:
        self._inbox = inbox
        self._cancel = cancel

    @property
    def request(self) -> Request:
        """What was asked, in token ids."""
        return self._inbox.answer.request

    @property
    def ended(self) -> bool:
        """Whether the answer has ended and all of it was read; never if there is an error, which `take` raises."""
        return self._inbox.ended

    def on_change(self, callback: Callable[[bool], None]) -> None:
        """Has this called, from the engine's thread, when there is more to read: with True if the answer has ended."""
        self._inbox.on_change = callback

    def take(self) -> list[Piece]:
        """All pieces that are there and were not read, without waiting.

        Raises what went wrong with the request, if anything did, once all pieces are read.
        """
        return self._inbox.take()

    def tokens(self, start: int, stop: int) -> list[Token]:
        """Some of the answer's tokens."""
        return self._inbox.answer.tokens(start, stop)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """Waits for the next piece. Raises what went wrong with the request, if anything did."""
        piece = self._inbox.get()
        if piece is None:
            raise StopIteration
        return piece.text

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        try:
            piece = await self._inbox.get_async()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if piece is None:
            raise StopAsyncIteration
        return piece.text

    def __del__(self) -> None:
        self._cancel()

    def cancel(self) -> None:
        """Ends the answer within a block. May be called from any thread."""
        self._cancel()

    def finish(self) -> Completion:
        """The whole answer, once it is there. Raises what went wrong with the request, if anything did."""
        for _ in self:
            pass
        return self.completion

    async def finish_async(self) -> Completion:
        """As `finish`, without blocking the event loop."""
        async for _ in self:
            pass
        return self.completion

    @property
    def completion(self) -> Completion:
        """The answer so far; "cancelled" until it has ended in another way."""
        return self._inbox.answer.completion


class Inbox:
    """A listener that keeps an answer's text until it is fetched, from another thread or an event loop.

    Attributes:
      on_change: called when there is more to read, with whether the answer has ended.
      on_end: called before that, when the answer has ended.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.on_change: Callable[[bool], None] = lambda ended: None
        self.on_end: Callable[[], None] = lambda: None
        self._pieces: deque[Piece] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._changed = Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def begin(self, num_cached: int) -> None:
        self.answer.cached_tokens = num_cached

    def token(self, token: Token) -> bool:
        self._put(self.answer.push(token))
        return not self.answer.stopped

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        rest = ""
        try:
            rest = self.answer.finish(reason)
        except Exception as failed:  # whoever reads must not wait for ever
            error = error or failed
        try:
            self.on_end()
        finally:
            self._put(rest, ended=True, error=error)

    @property
    def ended(self) -> bool:
        with self._changed:
            return self._ended and not self._pieces and not self._error

    def take(self) -> list[Piece]:
        """All pieces that are there. Raises what went wrong if there are none, and the answer has ended."""
        with self._changed:
            pieces = list(self._pieces)
            self._pieces.clear()
        if not pieces and self._ended and self._error:
            raise self._error
        return pieces

    def get(self) -> Piece | None:
        """Waits for a piece; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._pieces or self._ended)
            return self._pop()

    async def get_async(self) -> Piece | None:
        """As `get`, without blocking the event loop."""
        while True:
            with self._changed:
                if self._pieces or self._ended:
                    return self._pop()
                event = asyncio.Event()
                self._waiters.append((asyncio.get_running_loop(), event))
            await event.wait()

    def _pop(self) -> Piece | None:
        if self._pieces:
            return self._pieces.popleft()
        if self._error:
            raise self._error
        return None

    def _put(self, text: str, *, ended: bool = False, error: Exception | None = None) -> None:
        with self._changed:
            if text:
                self._pieces.append(Piece(text, self.answer.num_tokens))
            self._ended, self._error = ended, error
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, []
        for loop, event in waiters:
            with suppress(RuntimeError):  # its event loop was closed
                loop.call_soon_threadsafe(event.set)
        self.on_change(ended)


class Collector:
    """A listener that keeps an answer until it is whole."""

    def __init__(
        self, answer: Answer, on_token: Callable[[], None], done: Callable[[Completion | Exception], None]
    ) -> None:
        self._answer = answer
        self._on_token = on_token
        self._done = done

    def begin(self, num_cached: int) -> None:
        self._answer.cached_tokens = num_cached

    def token(self, token: Token) -> bool:
        self._on_token()
        self._answer.push(token)
        return not self._answer.stopped

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        try:
            self._answer.finish(reason)
        except Exception as failed:
            error = error or failed
        self._done(error or self._answer.completion)
