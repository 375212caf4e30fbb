"""Connections of clients that send what is no HTTP, or send and take nothing, to an app that says what it was sent."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from llamajax.serve import connection
from llamajax.serve.connection import Connection
from llamajax.serve.middleware import Bodies

LARGE = 2**25  # more than the buffers of sockets hold


left = threading.Event()


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    if scope["path"] == "/wait":
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
    body = b"x" * LARGE if scope["path"] == "/large" else scope["method"].encode() + b" " + message["body"]
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving() -> Iterator[tuple[str, int]]:
    app = Bodies(echo, max_bytes=2**20)
    config = uvicorn.Config(app, log_level="critical", ws="none", lifespan="off", http=Connection)
    server, listening = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[str, int]]:
    with serving() as address:
        yield address


def connect(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=20)


def rest(client: socket.socket) -> bytes:
    """All that comes until the connection ends."""
    data = b""
    try:
        while part := client.recv(2**20):
            data += part
    except ConnectionResetError:
        pass
    return data


def exchange(address: tuple[str, int], *parts: bytes) -> tuple[int, bytes]:
    """Sends parts, and reads the one response: its status and its body."""
    with connect(address) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(0.02)
        head, _, body = rest(client).partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_a_request_to_upgrade_is_read_with_its_body(address: tuple[str, int]) -> None:
    upgrade = (
        b"POST / HTTP/1.1\r\nHost: x\r\nConnection: %s, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: AAEAAEAA\r\n"
    )
    for wish in (b"h2c", b"websocket"):
        head = upgrade % (b"close, Upgrade", wish)
        assert exchange(address, head + b"Content-Length: 5\r\n\r\nhello") == (200, b"POST hello")
        assert exchange(address, head + b"Content-Length: 5\r\n\r\n", b"he", b"llo") == (200, b"POST hello")
        assert exchange(address, head + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n", b"0\r\n\r\n") == (
            200,
            b"POST he",
        )
    assert exchange(address, (upgrade % (b"close, Upgrade", b"h2c")).replace(b"POST", b"GET") + b"\r\n") == (
        200,
        b"GET ",
    )
    assert exchange(address, b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 405


def test_an_upgrade_is_not_the_end_of_a_connection(address: tuple[str, int]) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n\r\n"
    with connect(address) as client:
        for _ in range(2):
            client.sendall(head + b"hi")
            data = b""
            while not data.endswith(b"POST hi"):
                data += client.recv(1000)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_who_leaves_after_several_requests_at_once_is_gone_for_the_first(address: tuple[str, int], count: int) -> None:
    left.clear()
    with connect(address) as client:
        client.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" * count)
        time.sleep(0.1)
        assert not left.is_set()
    assert left.wait(20)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhello",
    ],
)
def test_what_is_no_request_is_refused_in_json(address: tuple[str, int], data: bytes) -> None:
    status, body = exchange(address, data)
    assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    ("begin", "part"),
    [
        (b"GET / HTTP/1.1\r\nX: ", b"a" * 1000),
        (b"GET / HTTP/1.1\r\n", b"X: y\r\n" * 100),
        (b"", b"\r\n" * 500),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"a" * 1000),
    ],
)
def test_a_head_without_an_end_is_refused(address: tuple[str, int], begin: bytes, part: bytes) -> None:
    with connect(address) as client:
        client.sendall(begin)
        sent = 0
        try:
            while sent < 2**22:
                client.sendall(part)
                sent += len(part)
        except OSError:
            pass
        assert rest(client)[9:12] in (b"431", b"")  # what comes after a reset is lost
    assert sent < 2**22


def test_a_client_that_does_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.2)
    with serving() as address:
        for data in (b"", b"GET / HTTP/1.1\r\n", b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"):
            with connect(address) as client:
                client.sendall(data)
                time.sleep(1)
                assert len(rest(client)) < LARGE
        with connect(address) as client, pytest.raises(OSError):
            while True:
                client.sendall(b"X" if client.getsockname() else b"")
                time.sleep(0.05)


def test_a_client_that_is_slow_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "IDLE_SECONDS", 0.3)
    with serving() as address:
        with connect(address) as client:
            client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            size, end = 0, time.monotonic() + 1.5
            while time.monotonic() < end:
                size += len(client.recv(2**18))
                time.sleep(0.02)
            assert size + len(rest(client)) > LARGE
        with connect(address) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 5\r\n\r\n")
            for byte in b"hello":
                time.sleep(0.2)
                client.sendall(bytes([byte]))
            assert rest(client).endswith(b"POST hello")
