"""A handler of a web application that streams answers: `python web_handler.py`, then

curl -N http://127.0.0.1:8080/ask -d "What is a llama?"
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

import llamajax


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    llama = llamajax.load(max_seq_len=512)
    with llama.serve_requests(slots=8) as app.state.server:
        yield


async def ask(request: Request) -> StreamingResponse:
    """Streams the answer to the body. If the client goes away, nobody holds the stream any more, and it ends."""
    question = (await request.body()).decode()
    asked: list[llamajax.Message] = [{"role": "user", "content": question}]
    try:
        stream = request.app.state.server.submit(asked, max_new_tokens=100, deadline=60)
    except llamajax.QueueFullError:
        return StreamingResponse(iter(["busy"]), status_code=503)
    return StreamingResponse(stream, media_type="text/plain")


app = Starlette(routes=[Route("/ask", ask, methods=["POST"])], lifespan=lifespan)

if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app, port=8080)
