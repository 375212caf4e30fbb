"""Reads a line, or several, from a terminal: keys, history, completion, and the user's own editor."""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from llamajax.errors import RequestError
from llamajax.hub import home
from llamajax.utf8 import from_utf8

from .terminal import keys_wait


class LineEditor:
    """Reads what a user says.

    Args:
      commands: each command's name, such as "/save", and what completes its argument.
    """

    def __init__(self, commands: Mapping[str, Completer | None]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            key_bindings=_keys(),
            multiline=True,
            output=create_output(sys.stderr),
            completer=_CommandCompleter(commands),
            complete_while_typing=False,
        )

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, what is typed or pasted while no line is read waits for the next one."""
        with keys_wait():
            try:
                yield
            finally:
                self._session.output.disable_bracketed_paste()
                self._session.output.flush()

    def read(self) -> str:
        """The next line. Raises KeyboardInterrupt for Ctrl-C, EOFError for Ctrl-D."""
        try:
            return self._session.prompt("> ", prompt_continuation="  ").strip()
        finally:
            # A paste stays one message even if it comes before the next line is read.
            self._session.output.enable_bracketed_paste()
            self._session.output.flush()

    def compose(self, text: str) -> str:
        """Lets the user write in $VISUAL or $EDITOR, beginning with a text. Raises RequestError if that fails."""
        command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        with tempfile.TemporaryDirectory(prefix="llamajax-") as folder:
            file = Path(folder, "message.md")
            file.write_text(text, "utf-8", errors="replace")
            try:
                code = self._run([*shlex.split(command), str(file)])
            except (OSError, ValueError) as e:
                raise RequestError(f"cannot run the editor {command!r} (set EDITOR to another): {e}") from None
            if code != 0:
                raise RequestError(f"the editor {command!r} ended with code {code}: nothing is sent")
            written = from_utf8(file.read_bytes(), "the message").strip()
        if written:
            self._session.history.append_string(written)
        return written

    def _run(self, command: list[str]) -> int:
        """Runs a program that has the terminal to itself."""
        self._session.output.disable_bracketed_paste()
        self._session.output.flush()
        with self._session.input.cooked_mode():
            return subprocess.run(command, stdout=sys.stderr, check=False).returncode


class _CommandCompleter(Completer):
    def __init__(self, commands: Mapping[str, Completer | None]) -> None:
        self._commands = commands

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        name, space, argument = document.text_before_cursor.partition(" ")
        if not space:
            names = [command for command in self._commands if name and command.startswith(name)]
            yield from (Completion(command, start_position=-len(name)) for command in names)
        elif completer := self._commands.get(name):
            yield from completer.get_completions(Document(argument.lstrip()), complete_event)


def _history() -> History:
    file = home() / "history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(file))


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
