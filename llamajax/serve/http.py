"""A service as an ASGI app that speaks OpenAI's protocol. Knows HTTP, but not what an answer contains."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from anyio.to_thread import current_default_thread_limiter
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
from llamajax.errors import LlamaJaxError, RequestError
from llamajax.llm import LLM
from llamajax.options import template_variables
from llamajax.text import one_line

from . import answers, openapi, protocol
from .generation import Generation, IncompleteError, error_body, stopping
from .json_object import MAX_PARTS, read_object
from .metrics import CONTENT_TYPE
from .middleware import Bodies, Json, Key, error_response
from .requests import READERS
from .service import Service

T = TypeVar("T")

# A body of more bytes is read in another thread, so that it does not hold up the answers to others.
_LONG_BODY = 2**16
# Characters for /tokenize and ids for /detokenize: this many take a second at most.
_MAX_TOKENIZED, _MAX_DETOKENIZED = 1_000_000, 250_000
# A client that reads nothing for this long is disconnected.
SEND_SECONDS = 60.0
# Threads that parse requests. Each busy one keeps Python's lock from the event loop for up to 5 ms at a time.
_THREADS = 4
_OPEN_PATHS = ("/", "/health", "/version", "/docs", "/openapi.json", "/favicon.ico")
_PAGE = str(files("llamajax.serve") / "page")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # browsers ask for changes: files of two versions do not fit
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

    The end of its lifespan ends the engine. An app that it is mounted in calls `app.state.service.close()` instead.

    Args:
      llm: the model.
      name: the model's, in requests and answers.
      slots: how many requests are answered at once.
      max_waiting: how many more may wait.
      deadline: seconds that a request may take; None for no limit.
      api_key: what clients must send as their bearer token; None lets everybody in.
      cors: origins whose pages may ask; "*" is all.
      max_body_bytes: the largest request body.

    Raises RequestError for an empty key, which would let everybody in.
    """
    _check_key(api_key)  # first: if it raises, there is no running service to close
    service = Service(lambda: llm, name=name, slots=slots, max_waiting=max_waiting, deadline=deadline)
    return app_of(service, api_key=api_key, cors=cors, max_body_bytes=max_body_bytes)


def app_of(
    service: Service, *, api_key: str | None = None, cors: Collection[str] = (), max_body_bytes: int = 2**24
) -> Starlette:
    """As `app`, of a service that may still be loading its model.

    Raises RequestError for an empty key, which would let everybody in.
    """
    _check_key(api_key)
    middleware = [Middleware(Bodies, max_bytes=max_body_bytes)]
    if api_key is not None:
        middleware.insert(0, Middleware(Key, key=api_key, open_paths=_OPEN_PATHS))
    if cors:
        everything: Any = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": ["Retry-After"]}
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=list(cors), **everything))
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
        current_default_thread_limiter().total_tokens = _THREADS
        yield
        await run_in_threadpool(service.close)

    app = Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={
            HTTPException: _http_error,
            LlamaJaxError: _llamajax_error,
            IncompleteError: _incomplete,
            Exception: _internal_error,
        },
    )
    app.router.redirect_slashes = False  # a redirect would lead wherever the Host header says
    app.state.service = service
    return app


def _check_key(key: str | None) -> None:
    if key is not None and not key.strip():
        raise RequestError("the API key is empty: set one, or leave it out to let everybody in")


# ---- generation


async def _generate(url: str, request: Request) -> Response:
    service: Service = request.app.state.service
    body, asked = await _read(request, READERS[url])
    if (name := body.get("model")) not in (None, service.name):
        return _unknown_model(service, name)
    generation = Generation(url, asked, body, service)
    try:
        await generation.submit()
        if generation.request.streams:
            return _EventStream(generation)
        return Response(await generation.whole(), media_type="application/json")
    except asyncio.CancelledError:  # the server stops, or the client has disconnected
        generation.cancel()
        raise stopping() from None
    except BaseException:
        generation.cancel()
        raise


async def _read(request: Request, reader: Callable[[Mapping[str, Any]], T]) -> tuple[dict[str, Any], T]:
    """A body's fields, and what a reader makes of them."""
    data = await request.body()

    def read() -> tuple[dict[str, Any], T]:
        fields = read_object(data, "the body", MAX_PARTS)
        request.state.names = fields.keys()  # an error may be about one of them
        return fields, reader(fields)

    return await run_in_threadpool(read) if len(data) > _LONG_BODY else read()


class _EventStream(Response):
    """Server-sent events; whatever ends them, the generation ends with them."""

    def __init__(self, generation: Generation) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._generation.events():
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            pass  # the connection is closed, since the response has no end
        finally:
            self._generation.cancel()


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
    names = (
        "prompt",
        "messages",
        "add_special_tokens",
        "add_generation_prompt",
        "chat_template_kwargs",
        "return_token_strs",
    )
    _, asked = await _read(request, lambda body: _Fields(body, *names))
    ids = await run_in_threadpool(_token_ids, llm, asked)
    tokens = {"count": len(ids), "max_model_len": llm.max_seq_len, "tokens": ids}
    if asked.flag("return_token_strs", False):
        tokens["token_strs"] = [llm.tokenizer.token_bytes(i).decode(errors="replace") for i in ids]
    return Json(tokens)


def _token_ids(llm: LLM, asked: "_Fields") -> list[int]:
    if asked.get("messages") is not None:
        messages = protocol.read_messages(asked)
        _check_tokenized(*(message["content"] for message in messages))
        return llm.encode_chat(
            messages,
            add_generation_prompt=asked.flag("add_generation_prompt", True),
            variables=template_variables(asked.get("chat_template_kwargs")),
        )
    prompt = asked.get("prompt")
    if not isinstance(prompt, str):
        raise RequestError("expected a prompt, which is a text, or messages")
    _check_tokenized(prompt)
    begins = asked.flag("add_special_tokens", True) and llm.tokenizer.bos_id is not None
    return [llm.tokenizer.bos_id or 0] * begins + llm.tokenizer.encode(prompt)


def _check_tokenized(*texts: str) -> None:
    if (num_chars := sum(map(len, texts))) > _MAX_TOKENIZED:
        raise RequestError(f"/tokenize takes {_MAX_TOKENIZED:,} characters, not {num_chars:,}: send less")


async def _detokenize(request: Request) -> Response:
    llm = request.app.state.service.model
    _, asked = await _read(request, lambda body: _Fields(body, "tokens"))
    return Json({"prompt": await run_in_threadpool(_text, llm, asked.get("tokens"))})


def _text(llm: LLM, tokens: object) -> str:
    if not isinstance(tokens, list):
        raise RequestError("tokens must be a list of token ids")
    if len(tokens) > _MAX_DETOKENIZED:
        raise RequestError(f"/detokenize takes {_MAX_DETOKENIZED:,} tokens, not {len(tokens):,}: send less")
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
    return Json({"status": service.status}, 200 if service.state == "ready" else 503)


async def _version(request: Request) -> Response:
    return Json({"version": llamajax.__version__})


async def _metrics(request: Request) -> Response:
    return Response(request.app.state.service.metrics.text(), media_type=CONTENT_TYPE)


# ---- errors


async def _llamajax_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LlamaJaxError)
    status = answers.error_status(error)
    names = getattr(request.state, "names", ())
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return Json(answers.error_body(error, names), status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {one_line(request.scope['path'], 80)} here (see /docs)",
        405: f"{request.method} is not for this path",
    }
    return error_response(error.status_code, message.get(error.status_code, str(error.detail)), **(error.headers or {}))


async def _incomplete(request: Request, error: Exception) -> Response:
    assert isinstance(error, IncompleteError)
    # After a time-out, a client that retries by itself would only wait as long again.
    return Json(error.body, error.status, {"x-should-retry": "false"} if error.status == 504 else None)


async def _internal_error(request: Request, error: Exception) -> Response:
    return Json(error_body(error), 500)
