"""`llamajax serve`: how it starts, says what it does, and stops."""

import re
import signal
import socket
import subprocess
import time
from contextlib import ExitStack

import httpx
import pytest

from llamajax_cli.commands.serve import _listening

from .command import COMMAND, notes, run
from .serving import serving

QUESTION = {"messages": [{"role": "user", "content": "Say hello."}], "ignore_eos": True}


def ended(process: "subprocess.Popen[bytes]") -> tuple[int, list[str]]:
    code = process.wait(60)
    assert process.stderr
    return code, notes(process.stderr.read())


def test_sigterm_lets_a_request_end(shallow_model: str) -> None:
    with serving(shallow_model, "--alias", "small") as (process, client):
        assert client.get("/v1/models").json()["data"][0]["id"] == "small"
        asked = {**QUESTION, "max_tokens": 300, "stream": True, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            data = [line for line in lines if line]
        assert data[-1] == "data: [DONE]" and '"completion_tokens":300' in data[-2]
        code, said = ended(process)
        assert code == 0
        assert said[-1] == "(stopping: running requests may end first; Ctrl-C stops at once)"


def test_a_request_that_takes_too_long_to_end_gets_an_error(shallow_model: str) -> None:
    with serving(shallow_model, "--shutdown", "0.1") as (process, client):
        asked = {**QUESTION, "max_tokens": 480, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            data = [line for line in lines if line]
        assert "the server is stopping" in data[-1]
        assert ended(process)[0] == 0


def test_more_clients_than_a_process_has_files_at_first(shallow_model: str) -> None:
    limited = ["sh", "-c", 'ulimit -S -n 128; exec "$0" "$@"', COMMAND]
    process = subprocess.Popen([*limited, "serve", "-m", shallow_model, "--port", "0"], stderr=subprocess.PIPE)
    try:
        assert process.stderr
        [port] = re.findall(r"127[.]0[.]0[.]1:(\d+)", process.stderr.readline().decode())
        with ExitStack() as clients:
            for _ in range(200):
                clients.enter_context(socket.create_connection(("127.0.0.1", int(port))))
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=30).json()["status"]
    finally:
        process.kill()
        process.wait()


def test_small_writes_do_not_wait_for_acknowledgements() -> None:
    with _listening("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_ctrl_c_ends_it_and_twice_at_once(shallow_model: str) -> None:
    with serving(shallow_model) as (process, _):
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 130
    with serving(shallow_model) as (process, client):
        asked = {**QUESTION, "max_tokens": 480, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            next(response.iter_lines())
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            assert ended(process)[0] == 130


def test_a_model_that_cannot_be_loaded_ends_it() -> None:
    finished = run("serve", "-m", "no-such-model", "--port", "0")
    assert finished.code == 1
    assert finished.stdout == ""
    assert finished.notes[-1].startswith("llamajax: unknown model 'no-such-model'")


def test_an_address_that_is_taken_is_said(shallow_model: str) -> None:
    with serving(shallow_model) as (_, client):
        port = str(client.base_url.port)
        error = run("serve", "-m", shallow_model, "--port", port).error
        assert error == f"cannot listen on 127.0.0.1, port {port}: Address already in use"
    assert "cannot listen on no.such.host.example" in run("serve", "--host", "no.such.host.example").error


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "70000"],
        ["--slots", "0"],
        ["--deadline", "0"],
        ["--deadline", "inf"],
        ["--max-body", "-1"],
        ["--max-body", "inf"],
    ],
)
def test_wrong_options_are_usage_errors(options: list[str]) -> None:
    assert run("serve", *options).code == 2


def test_a_key_comes_from_the_environment(shallow_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMAJAX_API_KEY", "secret")
    with serving(shallow_model) as (_, client):
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
