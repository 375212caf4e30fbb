"""A connection of uvicorn's, with what it lacks: limits, and errors in JSON for what is no request. Knows no app."""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from .middleware import error_response

# Of a request's head, or of the chunk headers and trailers of its body.
MAX_HEAD_BYTES = 2**16
# A connection on which nothing happens for so long is closed: longer than clients and proxies keep theirs, so that none
# sends a request into one that is being closed.
IDLE_SECONDS = 75


class Connection(HttpToolsProtocol):
    """Refuses what is no request in OpenAI's form, and drops a client that does nothing."""

    _head_bytes = 0
    _running: RequestResponseCycle | None = None  # uvicorn's `cycle` is the last of several pipelined requests

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._look(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        if self._running and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay()
            self.data_received(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "this is no HTTP/1.1 request, or its length is not what it says")
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(431, f"the headers of a request may have {MAX_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _stay(self) -> None:
        """Reads a request to go on in another protocol as one without that wish, as HTTP allows.

        The parser takes what follows for the other protocol, though it is the body. (Java's client always asks.)
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse(405, "CONNECT is not for this server")
            return
        lines = [b"%s: %s" % pair for pair in self.headers if pair[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"\r\n".join([b"%s %s HTTP/%s" % (method, self.url, version), *lines, b"", b""]))

    def _refuse(self, status: int, message: str) -> None:
        """Says why, unless an answer has begun, and closes the connection."""
        if self.transport.is_closing():
            return
        running = self._running
        if running is None or running.response_complete or not running.response_started:
            response = error_response(status, message, Connection="close")
            head = [STATUS_LINE[status], *(b"%s: %s\r\n" % pair for pair in response.raw_headers), b"\r\n"]
            self.transport.write(b"".join(head) + bytes(response.body))
        self.transport.close()

    def _look(self, before: object) -> None:
        """Drops the client if, since the last look, no request came or ran, and it took nothing that was sent."""
        runs = self.cycle is not None and not self.cycle.response_complete and not self.transport.is_closing()
        now = None if runs else (self.cycle, self.transport.get_write_buffer_size())
        if now is not None and now == before:
            self.transport.abort()
        else:
            self._timer = self.loop.call_later(IDLE_SECONDS, self._look, now)
