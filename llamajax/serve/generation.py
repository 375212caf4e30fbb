"""One request's answers, from the engine to what is sent: whole, or piece by piece. Knows no HTTP."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from starlette.concurrency import run_in_threadpool

import llamajax
from llamajax.answer import Piece, ServedStream
from llamajax.errors import InternalError, LlamaJaxError, RequestError
from llamajax.text import one_line
from llamajax.tools import Reader
from llamajax.types import Completion, FinishReason, TokenLogprobs

from . import answers, protocol
from .answers import Choice
from .bell import Bell, Wakeup
from .events import AnswerInfo, Events, encode_json, make_events, response_body, response_output
from .requests import GenerationRequest
from .service import Service

# A comment at this interval keeps proxies from closing an idle stream.
COMMENT_SECONDS = 15.0
# Of one request: each takes about 100 bytes of JSON.
MAX_LOGPROBS = 4_000_000
_ID_PREFIXES = {protocol.CHAT: "chatcmpl-", protocol.COMPLETIONS: "cmpl-", protocol.RESPONSES: "resp_"}


class IncompleteError(Exception):
    """An answer ended before it was whole, and not by the client.

    Attributes:
      status: HTTP's.
      body: the error in OpenAI's form.
    """

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def stopping() -> IncompleteError:
    """Why an answer ends that nobody ended."""
    return IncompleteError(503, "the server is stopping: the answer is not whole", "server_stopping")


def error_body(error: Exception) -> Mapping[str, Any]:
    """Any error in OpenAI's form."""
    if isinstance(error, IncompleteError):
        return error.body
    if not isinstance(error, LlamaJaxError):
        error = InternalError(f"internal error, {type(error).__name__}: {one_line(error)}")
    return answers.error_body(error)


@dataclass
class Generation:
    """The answers to one request.

    Attributes:
      url: the endpoint.
      request: what it asks for.
      body: the same, as it came.
    """

    url: str
    request: GenerationRequest
    body: Mapping[str, Any]
    service: Service
    _streams: list[ServedStream] = field(default_factory=list)

    async def submit(self) -> None:
        """Hands it to the engine. Raises as `Service.submit`; RequestError for too many log-probabilities."""
        self._info = AnswerInfo(
            f"{_ID_PREFIXES[self.url]}{secrets.token_hex(12)}",
            self.service.name,
            {"system_fingerprint": f"llamajax-{llamajax.__version__}", "seed": self.request.seed},
        )
        self._tokenizer = self.service.model.tokenizer
        self._format = self.service.model.tool_format
        await run_in_threadpool(self.service.submit, self.request, self._streams)
        wanted = 0
        for stream in self._streams:
            if (num_top := stream.request.sampling.logprobs) is not None:
                length = stream.request.max_new_tokens + self.request.echo * len(stream.request.token_ids)
                wanted += min(length, self.service.model.max_seq_len) * (num_top + 1)
        if wanted > MAX_LOGPROBS:
            raise RequestError(
                f"the answer may have {MAX_LOGPROBS} log-probabilities, not {wanted}: ask for fewer logprobs, tokens "
                "or answers at once"
            )

    def cancel(self) -> None:
        """Ends the unfinished answers."""
        for stream in self._streams:
            stream.cancel()

    async def whole(self) -> bytes:
        """The answers as JSON, when all of them are there."""
        echoes = await self._echoes()
        async for _ in _updates(self._streams, self.service.bell, only_ends=True):
            pass
        return await run_in_threadpool(self._whole, [self._completion(stream) for stream in self._streams], echoes)

    def _whole(self, completions: list[Completion], echoes: list[Choice] | None) -> bytes:
        choices = [Choice.of(completion) for completion in completions]
        if tools := self.request.tools:
            choices = answers.with_calls(choices, self._format, tools, self._info.id)
        if self.url == protocol.RESPONSES:
            output = response_output(self._info, choices[0])
            return encode_json(response_body(self._info, self.body, completions[0], output))
        if echoes is not None:
            choices = [_joined(echo, choice) for echo, choice in zip(echoes, choices, strict=True)]
        answer = answers.answer_body(
            self.url,
            choices,
            self._tokenizer,
            id=self._info.id,
            created=self._info.created,
            model=self._info.model,
            usage=answers.usage(completions, self.request.num_choices),
        )
        return encode_json({**answer, **self._info.others})

    async def events(self) -> AsyncIterator[bytes]:
        """The answers as server-sent events, as they come. An error on the way is the last event."""
        events = make_events(self.url, self.request, self._info, self._tokenizer, self.body)
        sent = [_SentSoFar(stream, self._calls(index)) for index, stream in enumerate(self._streams)]
        try:
            yield b"".join(events.begin())
            for index, echo in enumerate(await self._echoes() or ()):
                sent[index].num_chars = len(echo.text)
                yield b"".join(events.piece(index, echo))
            async for update in _updates(self._streams, self.service.bell):
                if update is None:
                    yield b": waiting\n\n"
                else:
                    for written in self._pieces(events, update, sent[update.stream]):
                        yield written
            yield b"".join(events.end([self._completion(stream) for stream in self._streams]))
        except asyncio.CancelledError:  # the server stops, or the client has disconnected
            yield events.error(stopping().body["error"])
        except Exception as error:
            yield events.error(error_body(error)["error"])

    def _pieces(self, events: Events, update: "_Update", sent: "_SentSoFar") -> Iterator[bytes]:
        """Text in one write, since a write to a socket costs more than making an event; then the end, or its error."""
        if update.pieces and not self.request.echo_only:
            # Tokens that came at once are one event: with 32 streams, one for each costs 4 % of the speed.
            text = "".join(piece.text for piece in update.pieces)
            yield b"".join(events.piece(update.stream, sent.part(text, update.pieces[-1].num_tokens)))
        if update.ended:
            completion = self._completion(sent.stream)
            last = sent.part("", len(completion.token_ids), completion.finish_reason)
            yield b"".join(events.piece(update.stream, last))

    def _calls(self, index: int) -> "_Calls | None":
        if self.request.tools is None:
            return None
        return _Calls(self._format.reader(self.request.tools), answers.call_ids(self._info.id, index))

    def _completion(self, stream: ServedStream) -> Completion:
        """An answer that has ended. Raises IncompleteError if it is not whole."""
        completion = stream.completion
        if completion.finish_reason == "timeout":
            raise IncompleteError(504, "the request took longer than this server allows", "deadline_exceeded")
        if completion.finish_reason == "cancelled":
            raise stopping()
        if self.request.echo_only:
            logprobs = None if completion.logprobs is None else ()
            return replace(completion, text="", token_ids=(), logprobs=logprobs, finish_reason="length")
        return completion

    async def _echoes(self) -> list[Choice] | None:
        """The prompts as parts of the answers, with log-probabilities if they are wanted; None without echo."""
        if not self.request.echo:
            return None
        echoes: list[Choice] = []
        firsts = self._streams[:: self.request.num_choices]
        for prompt, first in zip(self.request.prompts, firsts, strict=True):
            ids = list(first.request.token_ids)
            logprobs: Sequence[TokenLogprobs | None] | None = None
            if (num_top := first.request.sampling.logprobs) is not None:
                logprobs = await asyncio.wrap_future(self.service.prompt_logprobs(ids, num_top))
            text = prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)
            echoes += [Choice([text], ids, logprobs, None)] * self.request.num_choices
        return echoes


@dataclass
class _Calls:
    """The calls in a choice that is streamed.

    Attributes:
      number: how many were sent.
    """

    reader: Reader
    ids: Iterator[str]
    number: int = 0

    def part(self, choice: Choice) -> Choice:
        """What is certain of a part of a choice."""
        parts = self.reader.push(choice.text)
        if choice.finish_reason:
            parts += self.reader.flush()
        part = choice.saying(parts, self.ids)
        part = part._replace(parts=[it if isinstance(it, str) else self._numbered(it) for it in part.parts])
        if choice.finish_reason == "stop" and self.number:
            part = part._replace(finish_reason="tool_calls")
        return part

    def _numbered(self, call: Mapping[str, Any]) -> Mapping[str, Any]:
        number, self.number = self.number, self.number + 1
        return {"index": number, **call}


def _joined(echo: Choice, choice: Choice) -> Choice:
    return choice._replace(
        parts=[*echo.parts, *choice.parts],
        token_ids=[*echo.token_ids, *choice.token_ids],
        logprobs=None if echo.logprobs is None or choice.logprobs is None else [*echo.logprobs, *choice.logprobs],
    )


@dataclass
class _SentSoFar:
    """How much of a choice was sent."""

    stream: ServedStream
    calls: _Calls | None
    num_tokens: int = 0
    num_chars: int = 0

    def part(self, text: str, stop: int, finish_reason: FinishReason | None = None) -> Choice:
        """The next part, up to the token `stop`; with a finish reason it is the last."""
        tokens = self.stream.tokens(self.num_tokens, stop)
        wanted = tokens and self.stream.request.sampling.logprobs is not None
        logprobs = [token.logprobs for token in tokens] if wanted else None
        part = Choice([text], [token.id for token in tokens], logprobs, finish_reason, self.num_chars)
        self.num_tokens = stop
        self.num_chars += len(text)
        return self.calls.part(part) if self.calls else part


class _Update(NamedTuple):
    """What is new in a stream.

    Attributes:
      stream: its number.
      ended: there will be no more.
    """

    stream: int
    pieces: list[Piece]
    ended: bool


async def _updates(
    streams: list[ServedStream], bell: Bell, *, only_ends: bool = False
) -> AsyncIterator[_Update | None]:
    """What there is to read, as soon as it is there or once a stream has ended, until all have; None if nothing came
    for a while.

    Raises what went wrong with a request.
    """
    wakeup = Wakeup(bell, only_ends=only_ends)
    for stream in streams:
        stream.on_change(wakeup)
    left = set(range(len(streams)))
    while left:
        if not await wakeup.wait(COMMENT_SECONDS):
            yield None
        for index in sorted(left):
            news = True
            while news and index in left:  # `take` raises an answer's error only after its last piece
                update = _Update(index, streams[index].take(), streams[index].ended)
                if update.ended:
                    left.remove(index)
                if news := bool(update.pieces or update.ended):
                    yield update
