"""ASGI middleware: the API key, the limit of a body, and cancelling when the client disconnects."""

import asyncio
import hmac
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .events import encode_json

# Read and drop up to this much of a body that is too long: a client that is still sending would not read the error.
_MAX_DROPPED_BYTES = 2**29
BODY_SECONDS = 60.0


class Json(JSONResponse):
    """JSON of what may have lone surrogates, which a client's JSON can and UTF-8 cannot: they become "?"."""

    def render(self, content: Any) -> bytes:
        return encode_json(content)


def error_response(
    status: int, message: str, kind: str = "invalid_request_error", code: str | None = None, **headers: str
) -> Json:
    """An error in OpenAI's form."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return Json({"error": error}, status, {name.replace("_", "-"): value for name, value in headers.items()})


class Key:
    """Lets only those pass who know the key, but for paths that are open to all."""

    def __init__(self, app: ASGIApp, key: str, open_paths: Collection[str]) -> None:
        self._app = app
        self._key = key.strip().encode()  # as the client's is: a key from a file may end in a newline
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            wrong = error_response(
                401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key", WWW_Authenticate="Bearer"
            )
            await wrong(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in self._open_paths or path.startswith("/page/"):
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


class Bodies:
    """Reads each request's body, up to a limit, and ends its work when the client goes away.

    Frameworks notice a client that is gone only when they send to it, or not at all; a row would be kept busy for
    nobody.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(receive)
        except TimeoutError:
            late = error_response(408, f"the body did not come within {BODY_SECONDS:g} s", Connection="close")
            await late(scope, receive, send)
            return
        if body is None:  # gone before all was sent
            return
        if len(body) > self._max_bytes:
            message = f"a body may have {self._max_bytes} bytes: send less at once"
            too_long = error_response(413, message, code="request_too_large", Connection="close")
            await too_long(scope, receive, send)
            return
        await self._run(scope, body, receive, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; only its first bytes if it is too long."""
        chunks, size, more = [], 0, True
        while more and size <= max(self._max_bytes, _MAX_DROPPED_BYTES):
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            if size <= self._max_bytes:
                chunks.append(message.get("body", b""))
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        return b"".join(chunks)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()  # `_disconnected` watches for the disconnect: this must never return
            raise AssertionError

        work = asyncio.ensure_future(self._app(scope, replay, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        with suppress(asyncio.CancelledError):  # the server stops: `work` answers with an error
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        has_left = gone.done()
        gone.cancel()
        work.cancel()
        try:
            await work
        except asyncio.CancelledError:
            if not has_left:
                raise


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
