"""A conversation on a terminal: questions, commands, Ctrl-C."""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from prompt_toolkit.completion import Completer, PathCompleter, WordCompleter, merge_completers

from llamajax import LLM, Conversation, LlamaJaxError, Stream, hub
from llamajax.engine.ahead import AheadCompiler
from llamajax.text import one_line
from llamajax.types import Completion, Message

from . import saved, settings
from .line_editor import LineEditor
from .render import note, note_cut, stats_line, write_stream
from .settings import Settings
from .terminal import Status, WordWrap, understands_escapes

# Programs for conversations of up to this many tokens are compiled while the user reads and types.
_AHEAD_TOKENS = 8192
# A wait that takes longer is explained on stderr.
_PATIENCE_SECONDS = 0.3
_LEAVE = ("/exit", "/quit", "/bye", "exit", "quit")

_HELP = """\
/regen             another answer to the last question
/edit [TEXT]       write the next message in $VISUAL or $EDITOR
/clear             forget the conversation
/system [TEXT]     show the system message; with a text, begin again with it
/set [NAME VALUE]  show or change temperature, top_p, top_k, min_p, penalties, seed, n, stop
/model [NAME]      show the model; with a name, go on with another
/save FILE         write the conversation as JSON
/load FILE         go on with a saved conversation (llamajax chat -c: with the last)
/stats             tokens so far, and the last answer's speed
/help              this list
/exit              leave (/bye, exit, quit, Ctrl-D)
Enter sends; Alt-Enter, or \\ at the end of a line, begins a new line; Tab completes commands and files.
Ctrl-C stops an answer."""


class Repl:
    """Reads questions and commands until the user leaves; answers go to stdout, all else to stderr.

    Args:
      llm: the model to begin with, and its name.
      load: gives a model by its name.
      messages: said before.
      asked: what each answer is asked for; `/set` changes it.
      template: options of `Conversation` for the chat template.
      stats: whether a line of figures follows each answer.
    """

    def __init__(
        self,
        llm: LLM,
        model: str,
        load: Callable[[str], LLM],
        messages: list[Message],
        asked: Settings,
        template: Mapping[str, Any],
        stats: bool,
    ) -> None:
        self._load_model = load
        self._asked = asked
        self._template = template
        self._stats = stats
        self._last: Completion | None = None
        self._again = 0
        self._keeps_last = True
        self._status = Status()
        self._llm, self._name, self._conversation = llm, model, Conversation(llm, **template)
        self._compiler = self._compile_ahead(messages)
        self._conversation.restart(messages=messages)
        files = PathCompleter(expanduser=True)
        names = WordCompleter(sorted(hub.ALIASES), sentence=True)
        self._commands: dict[str, tuple[Callable[[str], None], Completer | None]] = {
            "/regen": (self._regenerate, None),
            "/edit": (self._edit, None),
            "/clear": (self._clear, None),
            "/system": (self._system, None),
            "/set": (self._set, WordCompleter(list(settings.NAMES), sentence=True)),
            "/model": (self._model, merge_completers([names, files])),
            "/save": (self._save, files),
            "/load": (self._load, files),
            "/stats": (self._show_stats, None),
            "/help": (lambda _: note(_HELP), None),
            "/exit": (lambda _: None, None),
        }

    def run(self) -> None:
        """Returns when the user leaves."""
        if self._conversation.messages:
            note(f"(going on after {_count(len(self._conversation.messages), 'message')})")
        note("Ask something; /help lists the commands, Ctrl-D leaves.")
        editor = self._editor = LineEditor({name: completer for name, (_, completer) in self._commands.items()})
        with editor.open():
            while True:
                try:
                    line = editor.read()
                except KeyboardInterrupt:
                    note("(Ctrl-D or /exit leaves)")
                    continue
                except EOFError:
                    return
                if line in _LEAVE:
                    return
                try:
                    self._handle(line)
                except KeyboardInterrupt:
                    note("(stopped)")
                except LlamaJaxError as e:
                    note(str(e))
                finally:
                    self._status.clear()

    def _handle(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if not line:
            return
        if name in self._commands:
            self._commands[name][0](argument.strip())
        elif line.startswith("/") and "\n" not in line and "/" not in name[1:]:
            note(f"no such command: {name} (/help lists them)")
        else:
            self._ask(line)

    def _ask(self, question: str) -> None:
        self._again = 0
        asked = self._asked
        self._answer(
            self._conversation.ask(
                question, max_new_tokens=asked.max_new_tokens, stop=asked.stop, sampling=asked.sampling
            )
        )

    def _answer(self, stream: Stream) -> None:
        if self._conversation.forgotten:
            note(f"(the context is full, forgotten: {_count(self._conversation.forgotten, 'oldest exchange')})")
        with self._compiler.answering(stream.request):
            if not self._compiler.wait(_PATIENCE_SECONDS):
                self._status.show("compiling for this machine, once ...")
                self._compiler.wait()
                self._status.clear()
            self._write(stream)
        self._last = stream.completion
        self._keep()
        note_cut(self._last, self._asked.max_new_tokens, self._llm.max_seq_len)
        if self._last.finish_reason == "cancelled":
            note("(stopped)" if self._last.token_ids else "(stopped; /regen asks again)")
        if self._stats:
            note(stats_line(self._last))
        self._conversation.read_ahead()

    def _write(self, stream: Stream) -> None:
        began = time.monotonic()

        def show_progress(read: int, total: int) -> None:
            if time.monotonic() - began > _PATIENCE_SECONDS:
                self._status.show(f"reading {read:,} of {total:,} tokens")

        def pieces() -> Iterator[str]:
            for piece in stream:
                self._status.clear()
                yield piece
            self._status.clear()

        def stop(signum: int, frame: FrameType | None) -> None:
            stream.cancel()

        stream.on_read = show_progress
        before = signal.signal(signal.SIGINT, stop)
        try:
            write_stream(pieces(), WordWrap().push if sys.stdout.isatty() and understands_escapes() else None)
        finally:
            signal.signal(signal.SIGINT, before)

    def _keep(self) -> None:
        """Keeps the conversation for `--continue`."""
        try:
            saved.keep_last(self._conversation.messages)
        except OSError as e:
            if self._keeps_last:
                note(f"(not kept for --continue: {e.strerror})")
            self._keeps_last = False

    def _regenerate(self, _: str) -> None:
        # The same seed would draw the same answer.
        self._again += 1
        asked = self._asked
        sampling = replace(asked.sampling, seed=(asked.sampling.seed + self._again) % 2**32)
        self._answer(
            self._conversation.ask_again(max_new_tokens=asked.max_new_tokens, stop=asked.stop, sampling=sampling)
        )

    def _edit(self, text: str) -> None:
        if message := self._editor.compose(text):
            note(message)
            self._ask(message)
        else:
            note("(nothing written, nothing sent)")

    def _clear(self, _: str) -> None:
        self._conversation.restart(self._system_message)
        note("(forgotten)")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.restart(text)
            note("(begun again)")
        else:
            note(self._system_message or "(no system message, or the template's own)")

    @property
    def _system_message(self) -> str | None:
        messages = self._conversation.messages
        return messages[0]["content"] if messages and messages[0]["role"] == "system" else None

    def _set(self, text: str) -> None:
        name, *value = text.replace("=", " ", 1).split(maxsplit=1) or [""]
        names = [settings.name_of(name)] if name else settings.NAMES
        if value:
            self._asked = self._asked.changed(names[0], value[0])
        note("\n".join(map(self._asked.show, names)))

    def _model(self, name: str) -> None:
        if not name:
            note(self._name)
            return
        messages = self._conversation.messages
        try:
            llm = self._load_model(name)
        except (OSError, MemoryError, RuntimeError) as e:  # jax raises RuntimeError when a device's memory is full
            note(f"cannot load {name}: {one_line(e)}")
            return
        if messages:
            self._encode(llm, messages)  # raises if its template refuses them; the present model then stays
        self._compiler.close()
        self._conversation.restart()  # the other model need not read ahead
        self._llm, self._name, self._conversation = llm, name, Conversation(llm, **self._template)
        self._compiler = self._compile_ahead(messages)
        self._conversation.restart(messages=messages)
        note(f"({name}; {_count(len(messages), 'message')} kept)")

    def _encode(self, llm: LLM, messages: list[Message]) -> list[int]:
        return llm.encode_chat(messages, variables=self._template.get("chat_template_kwargs"))

    def _compile_ahead(self, messages: list[Message]) -> AheadCompiler:
        compiler = self._llm.compile_ahead(_AHEAD_TOKENS)
        with suppress(LlamaJaxError):  # the model cannot chat: the error comes with the first question
            question: Message = {"role": "user", "content": "A question of some ten words, as most first ones are?"}
            request, _ = self._llm.prepare(
                [*messages, question], max_new_tokens=self._asked.max_new_tokens, **self._template
            )
            compiler.expect(request)
        return compiler

    def _save(self, file: str) -> None:
        if not file:
            note("/save needs a file name")
            return
        if not self._conversation.messages:
            note("nothing to save: nothing was said yet")
            return
        try:
            saved.save(self._conversation.messages, Path(file).expanduser())
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
            messages = saved.load(Path(file).expanduser())
        except OSError as e:
            note(f"cannot read {file}: {e.strerror}")
            return
        except (ValueError, RuntimeError) as e:
            note(f"cannot read {file}: {e}")
            return
        # The template says what is wrong with malformed messages, before they replace the present ones.
        self._encode(self._llm, messages)
        self._conversation.restart(messages=messages)
        note(f"({_count(len(messages), 'message')})")

    def _show_stats(self, _: str) -> None:
        messages = self._conversation.messages
        tokens = len(self._encode(self._llm, messages)) if messages else 0
        note(f"{_count(len(messages), 'message')}, {tokens} of {self._llm.max_seq_len} tokens")
        if self._last:
            note(stats_line(self._last))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
