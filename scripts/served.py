"""`llamajax serve` with a tiny model, in a process of its own, and a client that reads raw HTTP: for soak and fuzz."""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Self

import gguf
import numpy as np

from tests.property.hostile.mutations import GGUFTensor
from tests.property.hostile.subjects import tiny_gguf

COMMAND = str(Path(sys.executable).with_name("llamajax"))
CONTEXT = 256


def write_tiny_model(path: Path) -> None:
    """A model of one layer that draws readable text, in weights that give the same tokens whoever shares the batch."""
    file = tiny_gguf("q8_0")
    file.fields = [(name, kind, CONTEXT if name == "llama.context_length" else it) for name, kind, it in file.fields]
    vocabulary = next(value[1] for name, _, value in file.fields if name == "tokenizer.ggml.tokens")
    rng = np.random.default_rng(0)

    def random(tensor: GGUFTensor) -> GGUFTensor:
        if tensor.type == 0:
            return tensor
        weights = rng.normal(0, 0.2, tensor.dims[::-1])
        if tensor.name == "token_embd.weight":
            weights *= [[1.0 if token.isascii() and token.isprintable() else 0.2] for token in vocabulary]
        data = gguf.quantize(weights.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        return GGUFTensor(tensor.name, tensor.dims, tensor.type, data.tobytes())

    file.tensors = [random(tensor) for tensor in file.tensors]
    path.write_bytes(file.to_bytes())


class Client:
    """Asks a server on 127.0.0.1."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def connect(self, receive_bytes: int | None = None) -> "Connection":
        """A connection to it, of which few bytes are on their way if `receive_bytes` is small."""
        return await Connection.open(self.port, receive_bytes)

    async def get(self, path: str) -> "Reply":
        connection = await self.connect()
        try:
            await connection.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            return await connection.reply()
        finally:
            connection.close()

    async def metrics(self) -> dict[str, float]:
        """The counters, by their names and labels but for the model's name."""
        lines = (await self.get("/metrics")).body.decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {_without_model(name): float(value) for name, value in pairs}

    async def wait_until(self, is_idle: bool, seconds: float) -> float:
        """Waits until it is ready, and idle if that is asked. Returns the seconds that it took."""
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            if is_idle:
                found = await self.metrics()
                if not found["vllm:num_requests_running"] and not found["vllm:num_requests_waiting"]:
                    return time.monotonic() - began
            elif (await self.get("/health")).status == 200:
                return time.monotonic() - began
            await asyncio.sleep(0.005)
        raise TimeoutError(f"the server is not {'idle' if is_idle else 'ready'} after {seconds:.0f} s")


class Served(Client):
    """A server of the installed command. A context manager; it is stopped in the end, which must succeed.

    Attributes:
      model: the file that it serves.
    """

    def __init__(self, *options: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.model = Path(self._folder.name, "tiny.gguf")
        self._log = Path(self._folder.name, "stderr")
        write_tiny_model(self.model)
        with self._log.open("wb") as log:
            command = [COMMAND, "serve", "-m", str(self.model), "--port", "0", *options]
            self._process = subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)
        while "http://" not in (said := self._log.read_text()):
            assert self.is_alive, said
            time.sleep(0.05)
        super().__init__(int(said.split("http://127.0.0.1:")[1].split(":")[0]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        try:
            code: Any = self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = "after 60 s, by force"
        self._folder.cleanup()
        if code != 0 and exception[0] is None:
            sys.exit(f"the server ended with {code}")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def memory(self) -> int:
        """Bytes of it that are in memory."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])

    @property
    def num_files(self) -> int:
        """Files and connections that it has open."""
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    @property
    def complaints(self) -> list[str]:
        """What it wrote beside its notes."""
        return [line for line in self._log.read_text(errors="replace").splitlines() if not line.startswith("(")]


def _without_model(name: str) -> str:
    head, _, labels = name.rstrip("}").partition("{")
    kept = [label for label in labels.split(",") if label and not label.startswith("model_name=")]
    return f"{head}{{{','.join(kept)}}}" if kept else head


class Reply(NamedTuple):
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The error that it is; fails if it is none."""
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"], error
        return error


class Connection:
    """A client's connection, that sends and receives what HTTP clients would not."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, port: int, receive_bytes: int | None = None) -> Self:
        import socket

        connection = socket.socket()
        if receive_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=connection, limit=receive_bytes or 2**16))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, path: str, body: bytes) -> None:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        await self.send(head.encode() + body)

    async def reply(self, method: str = "POST", pause: float = 0.0) -> Reply:
        """Reads a response, with so many seconds between its parts. Raises EOFError if the connection ends before."""
        head = b""
        while not head or head.startswith(b"HTTP/1.1 100 "):
            head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").rstrip().split("\r\n")
        version, status = first.split(" ", 2)[:2]
        assert version == "HTTP/1.1", first
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if method == "HEAD":
            body = b""
        elif headers.get("transfer-encoding") == "chunked":
            body = b"".join([part async for part in self._chunks(pause)])
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            raise AssertionError(f"a response without an end: {headers}")
        return Reply(int(status), headers, body)

    async def _chunks(self, pause: float) -> Any:
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
            assert data.endswith(b"\r\n")
            if not size:
                return
            yield data[:-2]
            await asyncio.sleep(pause)

    def close(self) -> None:
        """Hangs up, whatever is on its way."""
        self.writer.transport.abort()


class Watch:
    """Looks at a server while it is misused: its memory, and how long `/health` takes.

    Attributes:
      memory: (share that was done, bytes), from the first look on.
      slowest: seconds that `/health` took at most.
    """

    def __init__(self, served: Served) -> None:
        self.memory: list[tuple[float, int]] = []
        self.slowest = 0.0
        self._served = served
        self._files = served.num_files

    async def look(self, share: float) -> None:
        began = time.monotonic()
        status = (await asyncio.wait_for(self._served.get("/health"), 30)).status
        assert status == 200, f"/health says {status}"
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.memory.append((share, self._served.memory))

    async def wrong(self, most_growth: float) -> list[str]:
        """What a server that was misused should not be like. It must be idle.

        Args:
          most_growth: MB by which the last tenth may take more memory than the second one.
        """
        tenths: list[list[int]] = [[] for _ in range(10)]
        for share, memory in self.memory:
            tenths[int(10 * share)].append(memory)
        medians = [sorted(it)[len(it) // 2] / 1e6 for it in tenths if it]
        print("memory, by tenths of the requests, in MB:", *(f"{median:.0f}" for median in medians))
        print(f"/health took {self.slowest * 1000:.0f} ms at most")
        wrong = [f"the server wrote: {line}" for line in self._served.complaints]
        if medians[-1] > medians[min(1, len(medians) - 1)] + most_growth:
            wrong.append("memory grew")
        if late := (await self._served.metrics())["llamajax:late_compilations_total"]:
            wrong.append(f"{late:.0f} programs were compiled after the server was ready")
        if self._served.num_files > self._files + 5:
            wrong.append(f"{self._served.num_files} files are open, {self._files} were before")
        return wrong


def choose(rng: Random, shares: dict[str, float]) -> str:
    """One of the names, as often as its share says."""
    return rng.choices(list(shares), list(shares.values()))[0]
