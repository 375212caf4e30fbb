"""A conversation on a terminal: line editing, commands, Ctrl-C."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from llamajax import LLM, Conversation, LlamaJaxError, SamplingParams, Stream
from llamajax.hub import home
from llamajax.types import Completion

from .render import note, stats_line, write_stream

# Programs for a conversation of this many tokens are compiled while the first question is typed.
_WARM_TOKENS = 1024

_HELP = """\
/regen           another answer to the last question
/clear           forget the conversation
/system [TEXT]   show the system message; with a text, begin again with it
/save FILE       write the conversation as JSON
/load FILE       go on with a saved conversation
/stats           tokens so far, and the last answer's speed
/help            this list
/exit            leave (Ctrl-D)
Enter sends; Alt-Enter, or \\ at the end of a line, begins a new line. Ctrl-C stops an answer."""


class Repl:
    """Reads questions and commands until /exit; answers go to stdout, all else to stderr."""

    def __init__(
        self, llm: LLM, system: str | None, sampling: SamplingParams, max_new_tokens: int, stop: list[str], stats: bool
    ) -> None:
        self._llm = llm
        self._conversation = Conversation(llm, system)
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        self._stop = stop
        self._stats = stats
        self._last: Completion | None = None
        self._again = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "/regen": self._regenerate,
            "/clear": self._clear,
            "/system": self._system,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._show_stats,
            "/help": lambda _: note(_HELP),
        }

    def run(self) -> None:
        """Returns when the user leaves."""
        warming = Thread(target=self._llm.warm_up, args=(_WARM_TOKENS,), daemon=True)
        warming.start()
        note("Ask something; /help lists the commands, Ctrl-D leaves.")
        session: PromptSession[str] = PromptSession(
            history=_history(), key_bindings=_keys(), multiline=True, output=create_output(sys.stderr)
        )
        while True:
            try:
                line = session.prompt("> ", prompt_continuation="  ").strip()
            except KeyboardInterrupt:
                note("(Ctrl-D or /exit leaves)")
                continue
            except EOFError:
                return
            if line in ("/exit", "/quit"):
                return
            if not line:
                continue
            try:
                warming.join()
                self._handle(line)
            except KeyboardInterrupt:
                note("(stopped)")
            except LlamaJaxError as e:
                note(str(e))

    def _handle(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if command := self._commands.get(name):
            command(argument.strip())
        elif line.startswith("/") and "\n" not in line and "/" not in name[1:]:
            note(f"no such command: {name} (/help lists them)")
        else:
            self._again = 0
            self._answer(
                self._conversation.ask(
                    line, max_new_tokens=self._max_new_tokens, stop=self._stop, sampling=self._sampling
                )
            )

    def _answer(self, stream: Stream) -> None:
        if self._conversation.forgotten:
            note(f"(the context is full, forgotten: {_count(self._conversation.forgotten, 'oldest exchange')})")

        def stop(signum: int, frame: FrameType | None) -> None:
            stream.cancel()

        before = signal.signal(signal.SIGINT, stop)
        try:
            with _no_echo():
                write_stream(stream)
        finally:
            signal.signal(signal.SIGINT, before)
        self._last = stream.completion
        if self._last.finish_reason == "length":
            room = self._llm.max_seq_len - self._last.prompt_tokens
            limit = f"-n {self._max_new_tokens}" if self._max_new_tokens <= room else "the context is full"
            note(f"(cut off: {limit})")
        elif self._last.finish_reason == "cancelled":
            note("(stopped)")
        if self._stats:
            note(stats_line(self._last))

    def _regenerate(self, _: str) -> None:
        # The same seed would draw the same answer.
        self._again += 1
        sampling = replace(self._sampling, seed=(self._sampling.seed + self._again) % 2**32)
        self._answer(
            self._conversation.ask_again(max_new_tokens=self._max_new_tokens, stop=self._stop, sampling=sampling)
        )

    def _clear(self, _: str) -> None:
        messages = self._conversation.messages
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self._conversation.restart(system)
        note("(forgotten)")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.restart(text)
            note("(begun again)")
            return
        messages = self._conversation.messages
        has_system = messages and messages[0]["role"] == "system"
        note(messages[0]["content"] if has_system else "(no system message, or the template's own)")

    def _save(self, file: str) -> None:
        if not file:
            note("/save needs a file name")
            return
        try:
            text = json.dumps({"messages": self._conversation.messages}, ensure_ascii=False, indent=1)
            Path(file).expanduser().write_text(text + "\n", "utf-8", errors="replace")
            note(f"(saved to {file})")
        except OSError as e:
            note(f"cannot write {file}: {e.strerror}")
        except (ValueError, RuntimeError) as e:  # a name that cannot be: ~ of no known user, a null byte
            note(f"cannot write {file}: {e}")

    def _load(self, file: str) -> None:
        if not file:
            note("/load needs a file name")
            return
        try:
            messages = list(json.loads(Path(file).expanduser().read_text("utf-8"))["messages"])
        except OSError as e:
            note(f"cannot read {file}: {e.strerror}")
            return
        except (ValueError, KeyError, TypeError, RuntimeError):
            note(f"{file} is not a saved conversation")
            return
        # The template says what is wrong with malformed messages, before they replace the present ones.
        self._llm.encode_chat(messages)
        self._conversation.restart(messages=messages)
        note(f"({_count(len(messages), 'message')})")

    def _show_stats(self, _: str) -> None:
        messages = self._conversation.messages
        tokens = len(self._llm.encode_chat(messages)) if messages else 0
        note(f"{_count(len(messages), 'message')}, {tokens} of {self._llm.max_seq_len} tokens")
        if self._last:
            note(stats_line(self._last))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


@contextmanager
def _no_echo() -> Iterator[None]:
    """Keys pressed while an answer is written do not show up in it."""
    if sys.platform == "win32":
        yield
        return
    import termios

    settings = termios.tcgetattr(sys.stdin)
    quiet = settings.copy()
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)


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
