"""The installed `llamajax` command, as a user runs it: in a process, or in a conversation on a terminal."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

import pexpect

COMMAND = str(Path(sys.executable).with_name("llamajax"))

# What "[37 prompt (12 cached) + 20 generated tokens, first token 0.46 s, 10.1 tokens/s, stop]" says.
STATS = re.compile(
    r"\[(?P<prompt>\d+) prompt( \((?P<cached>\d+) cached\))? \+ (?P<generated>\d+) generated tokens, "
    r"first token \d+\.\d\d s, \d+\.\d tokens/s, (?P<reason>stop|length|cancelled)\]"
)
# Lines that the cache of earlier runs decides, or whether there is a compiler.
_OF_THE_MACHINE = ("(first run of this model here", "(slower than it could be: computed by XLA")

_COLOURS = {"NO_COLOR", "FORCE_COLOR"}


def notes(stderr: str | bytes) -> list[str]:
    """Lines of stderr but those of the machine."""
    text = stderr if isinstance(stderr, str) else stderr.decode()
    return [line for line in text.splitlines() if not line.startswith(_OF_THE_MACHINE)]


class Finished(NamedTuple):
    """How a command ended, and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def notes(self) -> list[str]:
        return notes(self.stderr)

    @property
    def error(self) -> str:
        """The one line that a command says before it gives up, and nothing else."""
        assert self.stdout == ""
        [line] = self.notes
        assert line.startswith("llamajax: ")
        return line.removeprefix("llamajax: ")


def environment(**changes: str) -> dict[str, str]:
    """The session's, without wishes for colours."""
    return {name: value for name, value in os.environ.items() if name not in _COLOURS} | {"TERM": "xterm"} | changes


def run(*arguments: str, stdin: str | bytes = "", **env: str) -> Finished:
    """Runs `llamajax` away from a terminal: what it writes then never has escape sequences."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run([COMMAND, *arguments], input=data, capture_output=True, env=environment(**env), timeout=120)
    finished = Finished(done.returncode, done.stdout.decode(), done.stderr.decode())
    assert "\x1b" not in finished.stdout + finished.stderr
    return finished


def start(*arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    """Starts `llamajax` without waiting; Ctrl-C of the terminal that runs the tests does not reach it."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([COMMAND, *arguments], **{"env": environment(), **pipes, **options})


class Reply(NamedTuple):
    """What is written between a question and the next prompt: the answer, and notes, which are dimmed."""

    answer: str
    notes: list[str]

    @property
    def stats(self) -> dict[str, str | None]:
        """Of the last note."""
        match = STATS.fullmatch(self.notes[-1])
        assert match, self.notes
        return match.groupdict()


class Terminal:
    """`llamajax chat` on a terminal. A context manager; it is killed in the end if it is still there."""

    # The prompt is shown and keys are read; the line was taken, and a paste from now on stays one.
    _READY, _TAKEN = "\x1b[?2004h", "\x1b[?2004l\x1b[?2004h"
    # Lines of progress, and what takes them away.
    _PASSING = re.compile(r"\r\x1b\[2m[^\n]*?\x1b\[K|\r\x1b\[K")

    def __init__(self, *arguments: str, columns: int = 1000, **env: str) -> None:
        self.process = pexpect.spawn(
            COMMAND,
            ["chat", *arguments],
            # No terminal answers here where the cursor is.
            env=environment(PROMPT_TOOLKIT_NO_CPR="1", **env),
            dimensions=(30, columns),
            encoding="utf-8",
            timeout=120,
        )
        self.greeting = self.reply()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.close(force=True)

    def send(self, keys: str) -> None:
        """Presses keys and waits until the line is taken."""
        self.process.send(keys)
        self.process.expect_exact(self._TAKEN)

    def begun(self) -> str:
        """Waits for the answer's first character."""
        self.process.expect(r"\A(?:\r\x1b\[2m[^\x1b]*\x1b\[0m\x1b\[K|\r\x1b\[K)*[^\r\x1b]")
        return self._PASSING.sub("", self.process.after)

    def reply(self) -> Reply:
        """All that is written until the prompt is shown again."""
        self.process.expect_exact(self._READY)
        written = self._PASSING.sub("", self.process.before.replace("\r\n", "\n"))
        self.process.expect_exact("\x1b[?25h")
        note = r"\x1b\[2m(.*?)\x1b\[0m\n"
        return Reply(re.sub(note, "", written, flags=re.DOTALL), re.findall(note, written, flags=re.DOTALL))

    def ask(self, line: str) -> Reply:
        """Sends a line and waits for all that comes of it."""
        self.send(line + "\r")
        return self.reply()

    def note(self, line: str) -> str:
        """Sends a command that gives one note and nothing else."""
        answer, notes = self.ask(line)
        assert (answer, len(notes)) == ("", 1), (answer, notes)
        return notes[0]

    def end(self, keys: str) -> tuple[int | None, str]:
        """Presses keys that leave: the exit code (None if a signal killed it), and what was written meanwhile."""
        self.process.send(keys)
        self.process.expect(pexpect.EOF)
        self.process.close()
        return self.process.exitstatus, self.process.before
