"""`llamajax serve`: a model for programs that speak OpenAI's protocol, and a page to chat with it."""

import gc
import os
import resource
import signal
import socket
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamajax.errors import InternalError, RequestError
from llamajax.hub.aliases import DEFAULT

from .. import loading, options
from ..interrupt import INTERRUPTED
from ..render import note

if TYPE_CHECKING:
    from llamajax.serve.service import Service


Host = Annotated[str, typer.Option("--host", help="The address to listen on; 0.0.0.0 is all.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0 is any that is free.")]
Slots = Annotated[int, typer.Option("--slots", min=1, help="How many requests are answered at the same time.")]
MaxWaiting = Annotated[
    int, typer.Option("--max-waiting", min=1, help="How many more may wait; further ones get a 429.")
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="LLAMAJAX_API_KEY", help="What clients must send as their key.", metavar="KEY"),
]
Cors = Annotated[
    list[str],
    typer.Option(
        "--cors", metavar="ORIGIN", help="An origin whose web pages may send requests; * is all. May be repeated."
    ),
]
Alias = Annotated[str | None, typer.Option("--alias", help="The name that clients ask for, in place of the model's.")]
Deadline = Annotated[
    float | None,
    typer.Option(
        "--deadline", min=0.001, callback=options.finite, help="Seconds that a request may take; no limit by default."
    ),
]
Shutdown = Annotated[
    float,
    typer.Option(
        "--shutdown",
        min=0,
        callback=options.finite,
        help="Seconds that requests have to end when the server is stopped.",
    ),
]
MaxBody = Annotated[
    float, typer.Option("--max-body", min=0.001, callback=options.finite, help="The longest request, in MB.")
]


def serve(
    model: options.Model = DEFAULT,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    slots: Slots = 16,
    max_waiting: MaxWaiting = 256,
    api_key: ApiKey = None,
    cors: Cors = [],  # noqa: B006 (Typer's way of an option that may be repeated)
    alias: Alias = None,
    deadline: Deadline = None,
    shutdown: Shutdown = 30.0,
    max_body: MaxBody = 16.0,
    max_memory: options.MaxMemory = None,
    prefix_cache: options.PrefixCache = None,
    max_seq_len: options.MaxSeqLen = None,
    dtype: options.DTypeOption = "auto",
    cache_dtype: options.CacheDTypeOption = "auto",
    device: options.DeviceOption = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Serve a model through OpenAI's protocol, and a page to chat with it in a browser.

    It listens at once; /health says when it is ready. SIGTERM and Ctrl-C let the running requests end first, a second
    Ctrl-C does not.
    """
    _allow_connections()
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))  # until uvicorn sets its own handler
    with _listening(host, port) as listening:
        url = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        name = alias or _name(Path(model)) or model
        note(f"({url}: loading {name}; Ctrl-C stops it)")
        loading.prepare_jax(device)
        from llamajax.serve.http import app_of
        from llamajax.serve.service import Service

        load = partial(
            loading.load,
            model,
            max_seq_len=max_seq_len,
            dtype=dtype,
            cache_dtype=cache_dtype,
            device=device,
            max_memory=options.to_bytes(max_memory),
        )
        service = Service(
            load,
            name=name,
            slots=slots,
            max_waiting=max_waiting,
            deadline=deadline,
            prefix_cache=options.to_bytes(prefix_cache),
        )
        app = app_of(service, api_key=api_key, cors=cors, max_body_bytes=round(max_body * 1e6))
        _run(app, service, listening, url, shutdown)


def _allow_connections() -> None:
    """Raises the limit of open files, of which each client takes one: on most systems it is 1,024 at first."""
    given, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # the system allows fewer
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(given, min(most, 2**16)), most))


def _name(model: Path) -> str | None:
    """The name of a model on disk."""
    return model.stem if model.is_file() else model.resolve().name if model.is_dir() else None


def _listening(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listening = socket.create_server(found[0][4][:2], family=found[0][0], backlog=2048)
    except socket.gaierror as e:
        raise RequestError(f"cannot listen on {host}: {e.strerror}") from None
    except OSError as e:
        raise RequestError(f"cannot listen on {host}, port {port}: {os.strerror(e.errno or 0)}") from None
    # Connections inherit it. Without it, the second of two small writes waits for the client's delayed
    # acknowledgement: 40 ms on Linux. (asyncio sets it only where a socket's protocol is given as TCP.)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _run(app: Any, service: "Service", listening: socket.socket, url: str, shutdown: float) -> None:
    """Serves until a signal comes. Raises what keeps the model from answering, if anything does."""
    import uvicorn

    from llamajax.serve.connection import IDLE_SECONDS, Connection

    class Server(uvicorn.Server):
        interrupted = failed = False
        said = "loading"

        def handle_exit(self, number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.should_exit:
                os._exit(INTERRUPTED)
            self.interrupted = number == signal.SIGINT
            self.should_exit = True

        async def on_tick(self, counter: int) -> bool:
            if service.state != self.said:
                self.said = service.state
                if self.said == "ready":
                    # Programs and the vocabulary are never freed. A collection that walks them stops all answers
                    # for 0.4 s.
                    gc.freeze()
                if text := _NOTES.get(service.state):
                    note(f"({url}: {text})")
            self.failed = not service.is_alive
            return await super().on_tick(counter) or self.failed

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if not self.failed:
                service.stop(shutdown)
                note("(stopping: running requests may end first; Ctrl-C stops at once)")
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",
        access_log=False,
        # 5 s more, so that cancelled requests still get their error.
        timeout_graceful_shutdown=round(shutdown) + 5,
        http=Connection,
        timeout_keep_alive=IDLE_SECONDS,
        ws="none",
    )
    server = Server(config)
    server.run([listening])
    if server.failed or service.error:
        raise service.error or InternalError("the engine has failed: the lines above say why")
    if server.interrupted:
        raise typer.Exit(INTERRUPTED)


_NOTES = {
    "compiling": "answers; the first requests may wait while programs are compiled",
    "ready": "ready",
}
