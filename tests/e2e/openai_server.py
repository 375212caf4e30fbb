"""A server of OpenAI's completions on 127.0.0.1 without a model: each test says what it answers, and when.

with OpenAIServer(lambda body: events(["a", " b"], usage={"completion_tokens": 2})) as server:
    subprocess.run([*command, "--url", server.url])
"""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Body = dict[str, Any]
Events = AsyncIterator[bytes]


def event(text: str | None, finish_reason: str | None = None, **others: Any) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}]
    return b"data: " + json.dumps({"object": "text_completion", "choices": choices, **others}).encode() + b"\n\n"


async def events(texts: Sequence[str], usage: Body | None = None, wait: float = 0, between: float = 0) -> Events:
    """A text in each event, so many seconds after the request and the event before."""
    await asyncio.sleep(wait)
    for i, text in enumerate(texts):
        await asyncio.sleep(between if i else 0)
        yield event(text)
    yield event("", "length")
    if usage is not None:
        yield event(None, usage=usage)
    yield b"data: [DONE]\n\n"


def error(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": "some_error"}}, status)


class OpenAIServer:
    """Serves while its `with` block runs.

    Attributes:
      url: its address.
      bodies: of the completions that were asked for.
      keys: the Authorization of each request for models.
      most_at_once: streams.
      hung_up: set when a client goes before its stream has ended.
    """

    def __init__(
        self,
        answer: Callable[[Body], Events | Response],
        *,
        models: Any = ({"id": "a-model"}, {"id": "another"}),
        vocab_size: int | None = 100,
        health: Response | None = None,
    ) -> None:
        self.bodies: list[Body] = []
        self.keys: list[str | None] = []
        self.most_at_once = self._at_once = 0
        self.hung_up = threading.Event()
        self._answer = answer
        self._models = models if isinstance(models, Response) else JSONResponse({"data": models})
        self._info = error(404, "no such thing") if vocab_size is None else JSONResponse({"vocab_size": vocab_size})
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        routes = [
            Route("/v1/models", self._list),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/tokenizer_info", lambda request: self._info),
            Route("/health", lambda request: health or Response()),
        ]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="critical"))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    async def _list(self, request: Request) -> Response:
        self.keys.append(request.headers.get("authorization"))
        return self._models

    async def _complete(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        answer = self._answer(self.bodies[-1])
        return answer if isinstance(answer, Response) else StreamingResponse(self._sent(answer), 200, _STREAM)

    async def _sent(self, answer: Events) -> Events:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            async for data in answer:
                yield data
        except asyncio.CancelledError:
            self.hung_up.set()
            raise
        finally:
            self._at_once -= 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)
        self._socket.close()


_STREAM = {"content-type": "text/event-stream; charset=utf-8"}
