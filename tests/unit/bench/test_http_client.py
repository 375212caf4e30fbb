"""Against a server that sends bytes as they are given here."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from llamajax.bench.http_client import Client, Response

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[tuple[Client, list[bytes]]]:
    """A client of a server that gives this answer to each request; the list is of requests, b"" a new connection."""
    asked: list[bytes] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(b"")
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int((head.partition(b"Content-Length: ")[2] or b"0").split()[0])
                asked.append(head + await reader.readexactly(length))
                await answer(writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    with Client(f"http://127.0.0.1:{port}/api", {"X-Y": "z"}) as client:
        yield client, asked
    listening.close()


def sends(*pieces: bytes, close: bool = False) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
        if close:
            writer.close()

    return answer


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def ask(answer: Answer, *bodies: bytes) -> tuple[list[Response], list[bytes]]:
    async def run() -> tuple[list[Response], list[bytes]]:
        async with server(answer) as (client, asked):
            return [await client.request("POST", "/x", body) for body in bodies], asked

    return asyncio.run(run())


def test_requests_one_after_another_share_a_connection() -> None:
    responses, asked = ask(sends(OK), b"one", b"two", b"three")
    assert [(x.status, x.body, x.headers) for x in responses] == [(200, b"ok", {"content-length": "2"})] * 3
    assert asked[0] == b"" and all(asked[1:]) and len(asked) == 4
    assert asked[1].startswith(b"POST /api/x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nX-Y: z\r\n" in asked[1] and asked[1].endswith(b"\r\n\r\none")


@pytest.mark.parametrize(
    "answer",
    [
        sends(OK, close=True),
        sends(OK.replace(b"Content", b"Connection: close\r\nContent")),
        sends(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nok", close=True),
        sends(OK, b"what nobody asked for"),
    ],
)
def test_a_connection_that_ended_is_not_used_again(answer: Answer) -> None:
    async def run() -> list[bytes]:
        async with server(answer) as (client, asked):
            for _ in range(2):
                assert (await client.request("GET", "/x")).body == b"ok"
                await asyncio.sleep(0.05)
            return asked

    assert asyncio.run(run()).count(b"") == 2


def test_requests_at_once_have_a_connection_each() -> None:
    async def run() -> list[bytes]:
        async with server(sends(OK)) as (client, asked):
            await asyncio.gather(*(client.request("GET", "/x") for _ in range(5)))
            return asked

    assert asyncio.run(run()).count(b"") == 5


def test_pieces_have_the_time_at_which_they_were_read() -> None:
    read: list[float] = []

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            await asyncio.sleep(0.02)
            read.append(time.perf_counter())
            writer.write(b"2\r\nab\r\n1\r\nc\r\n")
        writer.write(b"0\r\n\r\n")

    [response], _ = ask(answer, b"x")
    assert response.pieces == [b"ab", b"c"] * 3
    assert response.times[::2] == response.times[1::2]
    # Read after it was sent, and before what was sent next: the sender runs in the same thread.
    assert read[0] < response.times[0] < read[1] < response.times[2] < read[2] < response.times[4]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (sends(close=True), "the server hung up before the answer had ended"),
        (sends(OK[:-1], close=True), "the server hung up before the answer had ended"),
        (sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab", close=True), "hung up"),
        (sends(b"220 smtp.example.org\r\n\r\n"), "the answer is not HTTP"),
        (sends(OK[:17] + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "the answer is not HTTP"),
    ],
)
def test_an_answer_that_breaks_off(answer: Answer, says: str) -> None:
    with pytest.raises(OSError, match=r"the connection to http://127.0.0.1:\d+/api broke: .*") as e:
        ask(answer, b"x")
    assert says in str(e.value)


@pytest.mark.parametrize(
    ("url", "says"), [("http://127.0.0.1:1", "onnect"), ("http://no-such-host.invalid", "ame or service")]
)
def test_no_server(url: str, says: str) -> None:
    async def run() -> Any:
        with Client(url, {}) as client:
            await client.request("GET", "/")

    with pytest.raises(OSError, match=rf"cannot connect to {url} \(.*\): is a server running there\?") as e:
        asyncio.run(run())
    assert says in str(e.value) or "resolution" in str(e.value)
