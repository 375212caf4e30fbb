"""The installed `llamajax serve`, on a free port."""

import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from .command import start


@contextmanager
def serving(model: str, *options: str) -> Iterator[tuple["subprocess.Popen[bytes]", httpx.Client]]:
    """A server of the model on a free port that answers requests, though it may still compile."""
    process = start("serve", "-m", model, "--port", "0", "--max-seq-len", "512", "--slots", "2", *options)
    with answering(process) as client:
        yield process, client


@contextmanager
def answering(process: "subprocess.Popen[bytes]") -> Iterator[httpx.Client]:
    """A client of a server that has been started, once that answers. Kills the server in the end."""
    try:
        assert process.stderr
        line = process.stderr.readline().decode()
        found = re.fullmatch(r"\((http://[\d.]+:\d+): loading (\S+); Ctrl-C stops it\)\n", line)
        assert found, line
        with httpx.Client(base_url=found[1], timeout=60) as client:
            wait_for(client, "ready", "compiling")
            yield client
    finally:
        process.kill()
        process.wait()


def wait_for(client: httpx.Client, *states: str) -> httpx.Response:
    end = time.monotonic() + 180  # a busy machine compiles for a minute
    while time.monotonic() < end:
        response = client.get("/health")
        if response.json()["status"].startswith(states):
            return response
        assert response.status_code == 503
        time.sleep(0.05)
    raise AssertionError(f"not {states}")
