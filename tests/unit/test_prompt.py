"""What a command takes as its prompt, for each kind of stdin that a program may have."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

READ = "import sys; from llamajax_cli.prompt import read_prompt; print(ascii(read_prompt(*sys.argv[1:])), end='')"


def read(prompt: str, **stdin: Any) -> tuple[str, str]:
    """What it takes, and what it says."""
    command = [sys.executable, "-c", READ, prompt]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **stdin)
    assert done.returncode == 0 or "RequestError" in done.stderr, done.stderr
    return done.stdout or done.stderr.splitlines()[-1].partition(": ")[2], done.stderr


def read_in_shell(script: str) -> tuple[str, str]:
    """As `read`, where $READ in a shell's script is the command that does."""
    command = ["sh", "-c", script.replace("$READ", '"$0" -c "$1"'), sys.executable, READ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    return done.stdout, done.stderr


@pytest.fixture
def paste(tmp_path: Path) -> Path:
    path = tmp_path / "paste.txt"
    path.write_bytes("\ufeffGrüße\n".encode())
    return path


def test_what_is_piped_comes_before_the_prompt(paste: Path) -> None:
    together = r"'Gr\xfc\xdfe\n Summarize'"
    assert read("Summarize", input="Grüße\n") == (together, "")
    with paste.open() as file:
        assert read("Summarize", stdin=file) == (together, "")
    assert read(f"@{paste}", input="Grüße") == (r"'Gr\xfc\xdfe Gr\xfc\xdfe\n'", "")


def test_stdin_alone_is_the_prompt_where_it_is_asked_for() -> None:
    assert read("-", input="\ufeffHi\n") == (r"'Hi\n'", "")


@pytest.mark.parametrize("stdin", [{"input": ""}, {"input": " \n"}, {"stdin": subprocess.DEVNULL}], ids=str)
def test_nothing_is_added_where_nothing_is_piped(stdin: dict[str, Any]) -> None:
    assert read("Summarize", **stdin) == ("'Summarize'", "")


def test_a_closed_stdin_is_no_error() -> None:
    code = "from llamajax_cli.app import run; import sys; sys.argv = ['llamajax', '--version']; run()"
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "{code}" <&-'], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_slow_program_is_waited_for_and_read_to_its_end() -> None:
    written = read_in_shell("(sleep 5; echo one; sleep 2; echo two) | $READ Summarize")
    assert written == (r"'one\ntwo\n Summarize'", "")


def test_a_silent_stdin_is_left_out_and_said_so() -> None:
    """A pipe whose other end a parent holds, and a socket, which some parents use."""
    near, far = socket.socketpair()
    for stdin in (subprocess.PIPE, far):
        with subprocess.Popen(
            [sys.executable, "-c", READ, "Hi"], stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.wait(30) == 0
            assert process.stdout and process.stdout.read() == b"'Hi'"
            assert process.stderr and process.stderr.read().startswith(b"(nothing has come from stdin for 3 s")
    near.close()
    far.close()


@pytest.mark.parametrize("name", ["beside a prompt", "stdin", "file"])
def test_what_is_not_utf8_is_named(tmp_path: Path, name: str) -> None:
    data = "Grüße".encode("utf-16")
    path = tmp_path / "utf16.txt"
    path.write_bytes(data)
    source = str(path) if name == "file" else "stdin"
    prompt = {"stdin": "-", "file": f"@{path}", "beside a prompt": "Summarize"}[name]
    with path.open() as file:
        told, _ = read(prompt, stdin=subprocess.DEVNULL if name == "file" else file)
    assert told.startswith(f"{source} is UTF-16 text, expected UTF-8")
