"""Ctrl-C at any moment, from the first on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from .command import COMMAND, environment, notes

IMPORTED = "import time:"  # how each line of Python's account of imports begins


@pytest.mark.parametrize("command", ["chat", "batch", "bench"])
@pytest.mark.parametrize("part", range(3))
def test_ctrl_c_ends_a_command_that_begins(shallow_model: str, tmp_path: Path, command: str, part: int) -> None:
    """Most of these two seconds are imports: a KeyboardInterrupt in jaxlib's, say, would be a SIGABRT."""
    (tmp_path / "prompts.txt").write_text("Hi\n" * 20)
    arguments = {
        "chat": ["-p", "Hi", "-n", "2000"],
        "batch": [str(tmp_path / "prompts.txt"), "-n", "500", "-o", str(tmp_path / "answers.jsonl")],
        "bench": ["--requests", "20", "-n", "200"],
    }[command]
    with subprocess.Popen(
        [COMMAND, command, "-m", shallow_model, *arguments],
        env=environment(PYTHONPROFILEIMPORTTIME="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr
        # Python's own start is not ours: an interrupt then is a KeyboardInterrupt in its `site`, say.
        while b"llamajax_cli.main" not in process.stderr.readline():
            pass
        process.stderr.readline()
        time.sleep(Random(f"{command} {part}").uniform(part, part + 1) * 2 / 3)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    said = "".join(line for line in stderr.decode().splitlines(keepends=True) if not line.startswith(IMPORTED))
    assert process.returncode == 130, said
    assert [line for line in notes(said) if not line.startswith(("(stopped; ", "(sequential: "))] == []
    assert stdout.strip() == b"" or command == "chat"
    if (answers := tmp_path / "answers.jsonl").exists():
        for line in answers.read_bytes().splitlines():
            json.loads(line)


def test_an_interrupt_that_is_ignored_stays_ignored(shallow_model: str) -> None:
    """As in a shell's background."""
    script = f"trap '' INT; exec {COMMAND} chat -m '{shallow_model}' -p Hi -n 3"
    with subprocess.Popen(["sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        for _ in range(5):
            time.sleep(0.2)
            os.kill(process.pid, signal.SIGINT)
        assert process.stdout and process.stdout.read().strip()
        assert process.wait(60) == 0


# In a program that uses the library, at the moment at which Python would drop it.

# Collects garbage all the time; the first collection after `interrupt()` is interrupted.
PROGRAM = """
import gc, signal, sys, time, llamajax
from llamajax.interrupts import keep_interrupts

def callback(phase, info):
    gc.callbacks.remove(callback)
    signal.raise_signal(signal.SIGINT)

def collect():
    gc.callbacks.append(callback)
    end = time.monotonic() + 30
    while time.monotonic() < end:
        gc.collect(0)
    print("lost")

try:
    {body}
except KeyboardInterrupt:
    print("kept")
"""


def outcome(body: str, *arguments: str) -> tuple[str, str]:
    """What a program writes to stdout and stderr. It takes the package that is installed, not the clone's sources."""
    command = [sys.executable, "-P", "-c", PROGRAM.format(body=body), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout.strip(), done.stderr


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_kept() -> None:
    assert outcome("keep_interrupts(); keep_interrupts(); collect()") == ("kept", "")


def test_ctrl_c_ends_a_program_that_serves(shallow_model: str) -> None:
    served = "with llamajax.load(sys.argv[1]).serve_requests() as server: server.submit('Hi').finish(); collect()"
    assert outcome(served, shallow_model) == ("kept", "")


def test_other_errors_that_cannot_be_raised_are_still_told() -> None:
    body = "keep_interrupts(); type('Broken', (), {'__del__': lambda self: 1 / 0})()"
    written, told = outcome(body)
    assert written == "" and "ZeroDivisionError" in told
