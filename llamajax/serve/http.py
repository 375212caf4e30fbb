"""A service as an ASGI app that speaks OpenAI's protocol. Knows HTTP; what an answer is, it does not."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

import llamajax
from llamajax import checks
from llamajax.answer import Piece, ServedStream
from llamajax.errors import InternalError, LlamaJaxError, RequestError
from llamajax.llm import LLM
from llamajax.text import one_line
from llamajax.types import Completion, TokenLogprobs

from . import answers, openapi, protocol
from .answers import Choice
from .events import Events, Head, error_event, make_events, response_body
from .json_object import read_object
from .metrics import CONTENT_TYPE
from .middleware import Bodies, Json, Key, error_response
from .requests import READERS, Asked
from .service import Service

# While a request waits, a comment as often as this keeps proxies from giving it up.
COMMENT_SECONDS = 15.0
# A reader who takes nothing for so long is taken to be gone.
SEND_SECONDS = 60.0
_OPEN_PATHS = ("/", "/health", "/version", "/docs", "/openapi.json", "/favicon.ico")
_PAGE = str(files("llamajax.serve") / "page")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # browsers ask whether a file has changed: those of two versions do not fit
}


def app(
    llm: LLM,
    *,
    name: str = "llama",
    slots: int = 16,
    max_waiting: int = 256,
    deadline: float | None = None,
    api_key: str | None = None,
    cors: Collection[str] = (),
    max_body_bytes: int = 2**24,
) -> Starlette:
    """An ASGI app that serves a model, to run or to mount elsewhere.

    Args:
      llm: the model.
      name: that it is served under.
      slots: how many requests are answered at once.
      max_waiting: how many more may wait.
      deadline: seconds that a request may take; None for no limit.
      api_key: what clients must send as their bearer token; None lets all in.
      cors: origins whose pages may ask; "*" is all.
      max_body_bytes: of a request.
    """
    service = Service(lambda: llm, name=name, slots=slots, max_waiting=max_waiting, deadline=deadline)
    return app_of(service, api_key=api_key, cors=cors, max_body_bytes=max_body_bytes)


def app_of(
    service: Service, *, api_key: str | None = None, cors: Collection[str] = (), max_body_bytes: int = 2**24
) -> Starlette:
    """As `app`, of a service that may still be loading its model."""
    middleware = [Middleware(Bodies, max_bytes=max_body_bytes)]
    if api_key:
        middleware.insert(0, Middleware(Key, key=api_key, open_paths=_OPEN_PATHS))
    if cors:
        middleware.insert(
            0, Middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"])
        )
    routes = [
        Route("/", _page, methods=["GET"]),
        Mount("/page", _PageFiles(directory=_PAGE)),
        Route("/health", _health, methods=["GET"]),
        Route("/version", _version, methods=["GET"]),
        Route("/metrics", _metrics, methods=["GET"]),
        Route("/docs", _docs, methods=["GET"]),
        Route("/openapi.json", _openapi, methods=["GET"]),
        Route("/v1/models", _models, methods=["GET"]),
        Route("/v1/models/{name:path}", _model, methods=["GET"]),
        *(Route(url, partial(_generate, url), methods=["POST"]) for url in READERS),
        Route("/tokenize", _tokenize, methods=["POST"]),
        Route("/detokenize", _detokenize, methods=["POST"]),
        Route("/tokenizer_info", _tokenizer_info, methods=["GET"]),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    app = Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={
            HTTPException: _http_error,
            LlamaJaxError: _llamajax_error,
            _EndedError: _ended_error,
            Exception: _internal_error,
        },
    )
    app.router.redirect_slashes = False  # it would send clients where their Host header says
    app.state.service = service
    return app


# ---- generation


async def _generate(url: str, request: Request) -> Response:
    service: Service = request.app.state.service
    body = read_object(await request.body(), "the body")
    if (name := body.get("model")) not in (None, service.name):
        return _unknown_model(service, name)
    asked = READERS[url](body)
    head = Head(
        f"{_PREFIXES[url]}{secrets.token_hex(12)}",
        service.name,
        {"system_fingerprint": f"llamajax-{llamajax.__version__}", "seed": asked.seed},
    )
    streams: list[ServedStream] = []
    try:
        await run_in_threadpool(service.submit, asked.choices(), streams)
        echoes = await _echoes(service, asked, streams)
        if asked.streams:
            return _EventStream(_events(url, asked, head, body, service, streams, echoes), streams)
        return await _whole(url, asked, head, body, service, streams, echoes)
    except asyncio.CancelledError:  # the server ends, or nobody is there to read this
        _cancel(streams)
        raise _stopping() from None
    except BaseException:
        _cancel(streams)
        raise


_PREFIXES = {protocol.CHAT: "chatcmpl-", protocol.COMPLETIONS: "cmpl-", protocol.RESPONSES: "resp_"}


async def _whole(
    url: str,
    asked: Asked,
    head: Head,
    body: Mapping[str, Any],
    service: Service,
    streams: list[ServedStream],
    echoes: list[Choice] | None,
) -> Response:
    """The answer when all of it is there."""
    async for _ in _news(streams):
        pass
    completions = [_completion(stream) for stream in streams]
    if url == protocol.RESPONSES:
        return Json(response_body(head, asked, body, completions[0]))
    choices = [Choice.of(completion) for completion in completions]
    if echoes is not None:
        choices = [_joined(echo, choice) for echo, choice in zip(echoes, choices, strict=True)]
    answer = answers.answer_body(
        url,
        choices,
        service.model.tokenizer,
        id=head.id,
        created=head.created,
        model=head.model,
        usage=answers.usage(completions, asked.num_choices),
    )
    return Json({**answer, **head.others})


async def _events(
    url: str,
    asked: Asked,
    head: Head,
    body: Mapping[str, Any],
    service: Service,
    streams: list[ServedStream],
    echoes: list[Choice] | None,
) -> AsyncIterator[bytes]:
    """The answer as it comes. An error on the way is its last event."""
    events = make_events(url, asked, head, service.model.tokenizer, body)
    sent = [_Sent(stream) for stream in streams]
    try:
        for event in events.begin():
            yield event
        for index, echo in enumerate(echoes or ()):
            sent[index].num_chars = len(echo.text)
            for event in events.piece(index, echo):
                yield event
        async for news in _news(streams):
            if news is None:
                yield b": waiting\n\n"
                continue
            # What came together is sent together: to write to a socket takes longer than to make an event.
            yield b"".join(_choice_events(events, news, sent[news.choice]))
        for event in events.end([_completion(stream) for stream in streams]):
            yield event
    except asyncio.CancelledError:  # the server ends, or nobody is there to read this
        yield error_event(_stopping().body, url)
    except Exception as error:
        yield error_event(_as_error_body(error), url)


def _choice_events(events: Events, news: "_News", sent: "_Sent") -> Iterator[bytes]:
    for piece in news.pieces:
        yield from events.piece(news.choice, sent.part(piece.text, piece.num_tokens))
    if news.ended:
        completion = _completion(sent.stream)
        yield from events.piece(
            news.choice, sent.part("", len(completion.token_ids))._replace(finish_reason=completion.finish_reason)
        )


@dataclass
class _Sent:
    """How much of a choice was sent."""

    stream: ServedStream
    num_tokens: int = 0
    num_chars: int = 0

    def part(self, text: str, stop: int) -> Choice:
        """The next part, up to the token `stop`."""
        tokens = self.stream.tokens(self.num_tokens, stop)
        wanted = tokens and self.stream.request.sampling.logprobs is not None
        logprobs = [token.logprobs for token in tokens] if wanted else None
        part = Choice(text, [token.id for token in tokens], logprobs, None, self.num_chars)
        self.num_tokens = stop
        self.num_chars += len(text)
        return part


class _News(NamedTuple):
    """What has come of a stream.

    Attributes:
      choice: the stream's number.
      ended: there will be no more.
    """

    choice: int
    pieces: list[Piece]
    ended: bool


async def _news(streams: list[ServedStream]) -> AsyncIterator[_News | None]:
    """What there is to read, as soon as it is there, until all streams have ended; None if nothing came for a while.

    Raises what went wrong with a request.
    """
    bell = _Bell()
    for stream in streams:
        stream.on_change(bell.ring)
    left = set(range(len(streams)))
    while left:
        if not await bell.wait(COMMENT_SECONDS):
            yield None
        for index in sorted(left):
            news = _News(index, streams[index].take(), streams[index].ended)
            if news.ended:
                left.remove(index)
            if news.pieces or news.ended:
                yield news


class _Bell:
    """Wakes a task of an event loop from any thread, at most once until it has waited again."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._event.set()  # what came before is looked at first
        self._rung = False

    def ring(self) -> None:
        if not self._rung and not self._loop.is_closed():
            self._rung = True
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, seconds: float) -> bool:
        """False if it was not rung for so long."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        self._rung = False
        self._event.clear()
        return True


class _EventStream(Response):
    """Server-sent events; whatever ends it, its requests end with it."""

    def __init__(self, events: AsyncIterator[bytes], streams: list[ServedStream]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events = events
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            pass  # the connection is closed, since the response has no end
        finally:
            _cancel(self._streams)


def _completion(stream: ServedStream) -> Completion:
    """An answer that has ended. Raises what kept it from being whole."""
    completion = stream.completion
    if completion.finish_reason == "timeout":
        raise _EndedError(504, "the request took longer than this server allows", "deadline_exceeded")
    if completion.finish_reason == "cancelled":
        raise _stopping()
    return completion


def _cancel(streams: Iterable[ServedStream]) -> None:
    for stream in streams:
        stream.cancel()


# ---- echo


async def _echoes(service: Service, asked: Asked, streams: list[ServedStream]) -> list[Choice] | None:
    """The prompts as parts of the answers, with log-probabilities if they are wanted."""
    if not asked.echo:
        return None
    tokenizer = service.model.tokenizer
    echoes = []
    for prompt, first in zip(asked.prompts, streams[:: asked.num_choices], strict=True):
        ids = list(first.request.token_ids)
        logprobs: Sequence[TokenLogprobs | None] | None = None
        if (num_top := first.request.sampling.logprobs) is not None:
            logprobs = await asyncio.wrap_future(service.prompt_logprobs(ids, num_top))
        text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
        echoes += [Choice(text, ids, logprobs, None)] * asked.num_choices
    return echoes


def _joined(echo: Choice, choice: Choice) -> Choice:
    return choice._replace(
        text=echo.text + choice.text,
        token_ids=[*echo.token_ids, *choice.token_ids],
        logprobs=None if echo.logprobs is None or choice.logprobs is None else [*echo.logprobs, *choice.logprobs],
    )


# ---- what the model is


async def _models(request: Request) -> Response:
    return Json({"object": "list", "data": [_model_object(request.app.state.service)]})


async def _model(request: Request) -> Response:
    service: Service = request.app.state.service
    name = request.path_params["name"]
    return Json(_model_object(service)) if name == service.name else _unknown_model(service, name)


def _model_object(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "llamajax",
        "max_model_len": service.llm and service.llm.max_seq_len,
    }


def _unknown_model(service: Service, name: object) -> Response:
    message = f"there is no model {checks.shown(name)} here: the only one is {service.name!r}"
    return error_response(404, message, code="model_not_found")


async def _tokenize(request: Request) -> Response:
    llm = request.app.state.service.model
    body = read_object(await request.body(), "the body")
    asked = _Fields(body, "prompt", "messages", "add_special_tokens", "add_generation_prompt", "return_token_strs")
    ids = await run_in_threadpool(_token_ids, llm, asked)
    tokens = {"count": len(ids), "max_model_len": llm.max_seq_len, "tokens": ids}
    if asked.flag("return_token_strs", False):
        tokens["token_strs"] = [llm.tokenizer.token_bytes(i).decode(errors="replace") for i in ids]
    return Json(tokens)


def _token_ids(llm: LLM, asked: "_Fields") -> list[int]:
    if asked.get("messages") is not None:
        messages = protocol.read_messages(asked)
        return llm.encode_chat(messages, add_generation_prompt=asked.flag("add_generation_prompt", True))
    prompt = asked.get("prompt")
    if not isinstance(prompt, str):
        raise RequestError("expected a prompt, which is a text, or messages")
    begins = asked.flag("add_special_tokens", True) and llm.tokenizer.bos_id is not None
    return [llm.tokenizer.bos_id or 0] * begins + llm.tokenizer.encode(prompt)


async def _detokenize(request: Request) -> Response:
    llm = request.app.state.service.model
    tokens = _Fields(read_object(await request.body(), "the body"), "tokens").get("tokens")
    return Json({"prompt": await run_in_threadpool(_text, llm, tokens)})


def _text(llm: LLM, tokens: object) -> str:
    if not isinstance(tokens, list):
        raise RequestError("tokens must be a list of token ids")
    return llm.tokenizer.decode([checks.integer("each of tokens", i, 0, llm.config.vocab_size - 1) for i in tokens])


async def _tokenizer_info(request: Request) -> Response:
    llm = request.app.state.service.model
    literals = {i: literal for literal, i in llm.tokenizer.special_tokens.items()}
    ends = (literals[i] for i in sorted(llm.tokenizer.stop_ids) if i in literals)
    return Json(
        {
            "tokenizer_class": type(llm.tokenizer).__name__,
            "vocab_size": llm.config.vocab_size,
            "bos_token": literals.get(llm.tokenizer.bos_id),
            "eos_token": (llm.template and llm.template.eos_token) or next(ends, None),
            "bos_token_id": llm.tokenizer.bos_id,
            "stop_token_ids": sorted(llm.tokenizer.stop_ids),
            "special_tokens": dict(llm.tokenizer.special_tokens),
            "chat_template": llm.template and llm.template.source,
            "max_model_len": llm.max_seq_len,
        }
    )


class _Fields(dict[str, Any]):
    """A body's fields. Raises RequestError for one that is not among the names; `model` may always be there."""

    def __init__(self, body: Mapping[str, Any], *names: str) -> None:
        checks.known_options(body, [*names, "model"])
        super().__init__(body)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name)
        return default if value is None else checks.flag(name, value)


# ---- the server itself


async def _page(request: Request) -> Response:
    return FileResponse(f"{_PAGE}/index.html", headers=_PAGE_HEADERS)


class _PageFiles(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_PAGE_HEADERS)
        return response


async def _docs(request: Request) -> Response:
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return HTMLResponse(openapi.as_page(openapi.schema()), headers={"Content-Security-Policy": policy})


async def _openapi(request: Request) -> Response:
    return Json(openapi.schema())


async def _health(request: Request) -> Response:
    service: Service = request.app.state.service
    return Json({"status": service.status}, 200 if service.is_ready else 503)


async def _version(request: Request) -> Response:
    return Json({"version": llamajax.__version__})


async def _metrics(request: Request) -> Response:
    return Response(request.app.state.service.metrics.text(), media_type=CONTENT_TYPE)


# ---- errors


class _EndedError(Exception):
    """An answer ended before it was whole, and not by the client."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "server_error", "param": None, "code": code}}


def _stopping() -> _EndedError:
    return _EndedError(503, "the server is stopping: the answer is not whole", "server_stopping")


def _as_error_body(error: Exception) -> Mapping[str, Any]:
    if isinstance(error, _EndedError):
        return error.body
    if not isinstance(error, LlamaJaxError):
        error = InternalError(f"internal error, {type(error).__name__}: {one_line(error)}")
    return answers.error_body(error)


async def _llamajax_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LlamaJaxError)
    status = answers.error_status(error)
    names: Collection[str] = ()
    if status == 400:
        with suppress(RequestError):
            names = read_object(await request.body()).keys()
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return Json(answers.error_body(error, names), status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {one_line(request.scope['path'], 80)} here (see /docs)",
        405: f"{request.method} is not for this path",
    }
    return error_response(error.status_code, message.get(error.status_code, str(error.detail)), **(error.headers or {}))


async def _ended_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, _EndedError)
    # Clients that try again by themselves would wait as long again.
    return Json(error.body, error.status, {"x-should-retry": "false"} if error.status == 504 else None)


async def _internal_error(request: Request, error: Exception) -> Response:
    return Json(_as_error_body(error), 500)
