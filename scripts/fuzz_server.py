"""Sends broken HTTP to a server: each time it must answer, or refuse in JSON, and go on as if nothing had been.

    pip install '.[dev]'
    python -m scripts.fuzz_server --requests 10000 [--first 0]

Starts `llamajax serve` with a tiny model. Request i follows from its number alone, so that `--first 1234 --requests 1`
sends number 1234 again. They have mutated bodies, heads, methods and paths, wrong lengths, chunks, pipelined requests,
huge heads; they come slowly, in part, or half-closed. What comes back must be HTTP whose body is an error in OpenAI's
form, or an answer; nothing, only where the client left first.
`/health` is asked all the time. In the end nothing may run, and the server may have written nothing (no traceback).

All are sent twice. At first memory grows, by some 50 MB, since programs are read from disk when they are first needed.
The second time it must not grow by more than `--growth` MB after the first tenth. Exit code 1 if anything was wrong.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from tests.property.hostile.mutations import json_bytes, mutate_bytes, mutate_json, nested, odd_value

from .served import Client, Connection, Reply, Served, Watch

WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}
HI = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
SAMPLING = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1, "stop": ["x"], "n": 2, "logit_bias": {"5": 1.5}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 3, "logprobs": True, "top_logprobs": 2, **SAMPLING}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 3, **WITH_USAGE}),
    ("/v1/completions", {"prompt": ["Hi", "you"], "max_tokens": 3, "echo": True, "logprobs": 1, **SAMPLING}),
    ("/v1/completions", {"prompt": [[70, 71, 72], [73]], "max_tokens": 3, "stream": True, "min_tokens": 1}),
    ("/v1/responses", {"input": HI, "instructions": "Hi", "max_output_tokens": 3, "metadata": {"a": "b"}, "user": "u"}),
    ("/v1/responses", {"input": "Hi", "max_output_tokens": 3, "stream": True}),
    ("/tokenize", {"prompt": "Hi", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": HI, "add_generation_prompt": True}),
    ("/detokenize", {"tokens": [70, 71, 72]}),
]  # fmt: skip
PATHS = [
    "/", "/health", "/version", "/docs", "/openapi.json", "/v1/models", "/v1/models/tiny", "/v1/models/", "/metrics",
    "/tokenizer_info", "/page/", "/page/../http.py", "/page/%2e%2e/http.py", "/page/%00", "/health/", "//health",
    "/v1/chat/completions/", "/%ff%fe", "/é", "/" + "a" * 5000, "*", "http://x/health", "/health?a=%", "/health#x",
    "/v1/models/%0d%0aX:1", "/v1/models/" + "%F0%9F%A6%99" * 10, "", "/page/" + "a" * 300,
]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PROPFIND", "get", "X"]
HEADERS = [
    "Host: [", "Host: a b", "Host:", "Host: \xff", "Authorization: Bearer \xff", "Authorization:",
    "Expect: 100-continue", "Content-Type: text/plain", "Content-Type: multipart/form-data", "Accept: x",
    "Connection: close", "Connection: keep-alive", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c",
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA",
    "Origin: http://x", "Range: bytes=5-1", "Range: bytes=0-1", "If-None-Match: *", "If-Modified-Since: x",
    "Cookie: a=b", "X-Forwarded-For: x", "X: " + "y" * 5000, "Transfer-Encoding: identity", " folded: x",
    "Access-Control-Request-Method: POST", "X-HTTP-Method-Override: DELETE", "\0: x", "A\x01: x", "no colon",
]  # fmt: skip

NOISE = [
    b"\x16\x03\x01\x02\0\x01\0", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /\r\n\r\n", b"\r\n\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n", b"{}",
]  # fmt: skip


class Case:
    """One request, from its number: what is sent, how, and what may come back."""

    def __init__(self, number: int) -> None:
        self.rng = random.Random(number)
        self.url, self.body = self.rng.choice(BODIES)

    async def run(self, client: Client) -> str:
        """Says in a word what came of it; fails if that may not be."""
        kind = self.rng.choices(list(KINDS), [share for share, _ in KINDS.values()])[0]
        connection = await client.connect()
        try:
            return f"{kind}: {await KINDS[kind][1](self, connection)}"
        except (ConnectionError, EOFError) as error:
            raise AssertionError(f"{kind}: closed without an answer: {error!r}") from None
        except Exception as error:
            raise AssertionError(f"{kind}: {type(error).__name__}: {error!s:.500}") from error
        finally:
            connection.close()

    async def bad_body(self, connection: Connection) -> str:
        await connection.post(self.url, self.mutated())
        return judge(await connection.reply())

    def mutated(self) -> bytes:
        share = self.rng.random()
        if share < 0.75:
            return json_bytes(mutate_json(self.rng, self.body))
        data = json_bytes(self.body)
        if share < 0.9:
            return mutate_bytes(self.rng, data)
        return nested(self.rng, data) if share < 0.95 else json_bytes(odd_value(self.rng))

    async def other_path(self, connection: Connection) -> str:
        method, path = self.rng.choice(METHODS), self.rng.choice(PATHS)
        data = json_bytes(self.body) if self.rng.random() < 0.5 else b""
        await connection.send(self.head(method, path, data) + data)
        return judge(await connection.reply(method), is_page=path.startswith("/page") or path == "/")

    async def odd_headers(self, connection: Connection) -> str:
        chosen = self.rng.sample(HEADERS, self.rng.randrange(1, 4))
        data = json_bytes(self.body)
        await connection.send(self.head("POST", self.url, data, *chosen) + data)
        reply = await connection.reply()
        if all("Upgrade" in it or it.startswith(("Content-", "Accept", "Expect", "Cookie")) for it in chosen):
            assert reply.status == 200, reply  # they say nothing of the body
        return judge(reply)

    async def mutated_head(self, connection: Connection) -> str:
        data = json_bytes(self.body)
        await connection.send(mutate_bytes(self.rng, self.head("POST", self.url, data)) + data)
        connection.writer.write_eof()
        return await anything(connection)

    async def noise(self, connection: Connection) -> str:
        data = self.rng.choice([self.rng.randbytes(300), *NOISE])
        await connection.send(data)
        if self.rng.random() < 0.8:
            connection.writer.write_eof()
        else:
            await asyncio.sleep(self.rng.random() / 10)
            return "left"
        return await anything(connection)

    async def truncated(self, connection: Connection) -> str:
        """The client leaves, or ends its half, before all was sent."""
        data = json_bytes(self.body)
        whole = self.head("POST", self.url, data) + data
        await connection.send(whole[: self.rng.randrange(len(whole))])
        await asyncio.sleep(self.rng.choice([0, 0.01, 0.1]))
        if self.rng.random() < 0.5:
            connection.writer.write_eof()
            return await anything(connection)
        return "left"

    async def too_short(self, connection: Connection) -> str:
        """A length that is less than the body has: the rest is no request."""
        data = json_bytes(self.body)
        await connection.send(self.head("POST", self.url, data[: self.rng.randrange(len(data))]) + data)
        return judge(await connection.reply())

    async def chunked(self, connection: Connection) -> str:
        data = json_bytes(self.body)
        size = self.rng.choice([1, 7, len(data)])
        parts = [data[i : i + size] for i in range(0, len(data), size)]
        chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""]]
        is_broken = self.rng.random() < 0.5
        if is_broken:
            chunks[self.rng.randrange(len(chunks))] = self.rng.choice(
                [b"x\r\n", b"-1\r\n\r\n", b"ffffffffffffffffff\r\n", b"5;a=b\r\nab\r\n", b"\r\n", b"0\r\nX: y\r\n\r\n"]
            )
        await connection.send(
            f"POST {self.url} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + b"".join(chunks)
        )
        if not is_broken:
            reply = await connection.reply()
            assert reply.status == 200, reply
            return judge(reply)
        connection.writer.write_eof()
        return await anything(connection)

    async def slowly(self, connection: Connection) -> str:
        data = json_bytes(self.body)
        whole = self.head("POST", self.url, data) + data
        at = sorted(self.rng.sample(range(1, len(whole)), 4))
        for start, stop in zip([0, *at], [*at, None], strict=True):
            await connection.send(whole[start:stop])
            await asyncio.sleep(self.rng.random() * self.rng.choice([0.01, 0.3]))
        reply = await connection.reply()
        assert reply.status == 200, reply
        return judge(reply)

    async def pipelined(self, connection: Connection) -> str:
        """Several at once: as many answers, in their order."""
        count = self.rng.randrange(2, 6)
        kinds = [self.rng.random() < 0.5 for _ in range(count)]
        good, bad = json_bytes(self.body), b'{"x": 1}'
        await connection.send(
            b"".join(self.head("POST", self.url, data) + data for data in (good if it else bad for it in kinds))
        )
        if self.rng.random() < 0.3:
            await asyncio.sleep(self.rng.random() / 50)
            return "left"
        for is_good in kinds:
            reply = await connection.reply()
            assert reply.status == (200 if is_good else 400), reply
            judge(reply)
        return "answered"

    async def huge_head(self, connection: Connection) -> str:
        kilobytes = self.rng.choice([10, 40, 100, 1000])
        line = b"X: " + b"a" * (1000 if self.rng.random() < 0.5 else kilobytes * 1000) + b"\r\n"
        lines = line * max(1, kilobytes * 1000 // len(line))
        head = b"GET /health HTTP/1.1\r\nHost: x\r\n" + lines + (b"\r\n" if self.rng.random() < 0.7 else b"")
        try:
            await connection.send(head)
            connection.writer.write_eof()
        except OSError:
            pass  # it was refused before all was sent, and may have been reset
        return await anything(connection)

    async def good(self, connection: Connection) -> str:
        """Two on a connection, to see that all still works."""
        for _ in range(2):
            await connection.post(self.url, json_bytes(self.body))
            reply = await connection.reply()
            assert reply.status == 200, reply
        return judge(reply)

    def head(self, method: str, path: str, data: bytes, *headers: str) -> bytes:
        hosts = [] if any(header.startswith("Host") for header in headers) else ["Host: x"]
        lines = [f"{method} {path} HTTP/1.1", *hosts, *headers, f"Content-Length: {len(data)}", "", ""]
        return "\r\n".join(lines).encode("latin-1")


async def anything(connection: Connection) -> str:
    """All that comes until the connection ends: whole responses, or none."""
    said = "closed"
    while True:
        try:
            reply = await asyncio.wait_for(connection.reply(), 20)
        except asyncio.IncompleteReadError as error:
            # Whoever ends its half does not wait for the answer to come.
            return said if said != "closed" or not error.partial else "cut"
        except (ConnectionError, asyncio.LimitOverrunError):
            return said
        said = judge(reply)


def judge(reply: Reply, *, is_page: bool = False) -> str:
    """What a response is; fails if it is neither an answer nor an error in OpenAI's form, nor a file of the page."""
    kind = reply.headers.get("content-type", "")
    if reply.status >= 500:
        raise AssertionError(reply)
    if reply.status >= 400:
        if not (is_page and kind.startswith("text/plain")) and reply.body:
            assert kind == "application/json" and reply.error, reply
        return f"refused, {reply.status}"
    assert reply.status in (200, 206, 304), reply
    if kind == "text/event-stream":
        events = [line[6:] for line in reply.body.decode().split("\n") if line.startswith("data: ")]
        chunks = [json.loads(event) for event in events if event != "[DONE]"]
        assert events[-1] == "[DONE]" or chunks[-1]["type"].startswith("response."), events[-1]
        assert not any(chunk.get("error") for chunk in chunks), chunks[-1]
    elif reply.body and kind == "application/json":
        assert "error" not in json.loads(reply.body) or json.loads(reply.body)["error"] is None, reply
    return "answered"


KINDS: dict[str, tuple[int, Callable[[Case, Connection], Awaitable[str]]]] = {
    "bad body": (40, Case.bad_body),
    "other path": (10, Case.other_path),
    "odd headers": (10, Case.odd_headers),
    "mutated head": (8, Case.mutated_head),
    "noise": (4, Case.noise),
    "truncated": (8, Case.truncated),
    "too short": (3, Case.too_short),
    "chunked": (5, Case.chunked),
    "slow": (5, Case.slowly),
    "pipelined": (3, Case.pipelined),
    "huge head": (1, Case.huge_head),
    "good": (3, Case.good),
}


async def fuzz(served: Served, arguments: argparse.Namespace) -> list[str]:
    await served.wait_until(is_idle=False, seconds=600)
    watch, wrong, outcomes = Watch(served), list[str](), Counter[str]()
    began = time.monotonic()

    async def client(numbers: Iterator[int], is_watched: bool) -> None:
        for number in numbers:
            try:
                outcomes[await asyncio.wait_for(Case(number).run(served), 90)] += 1
            except Exception as error:
                wrong.append(f"request {number}: {error}" if str(error) else f"request {number}: {error!r}")
                print(wrong[-1], file=sys.stderr, flush=True)
            if not served.is_alive:
                raise SystemExit("the server has ended")
            done = number - arguments.first
            if is_watched and done % max(arguments.requests // 100, 1) == 0:
                await watch.look(done / arguments.requests)

    for is_watched in (False, True):
        numbers = iter(range(arguments.first, arguments.first + arguments.requests))
        await asyncio.gather(*(client(numbers, is_watched) for _ in range(arguments.in_flight)))
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:8} {outcome}")
    print(f"{2 * arguments.requests} requests in {time.monotonic() - began:.0f} s")
    await served.wait_until(is_idle=True, seconds=10)
    await asyncio.sleep(1)
    return wrong + await watch.wrong(arguments.growth)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--requests", type=int, default=10_000, help="how many")
    parser.add_argument("--in-flight", type=int, default=16, help="how many at a time")
    parser.add_argument("--growth", type=float, default=16, help="MB that memory may grow by after the first tenth")
    arguments = parser.parse_args()
    with Served("--slots", "4") as served:
        wrong = asyncio.run(fuzz(served, arguments))
    print("\n".join(wrong) or "nothing was wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
