"""What a terminal shows and takes beside the line that is edited: words that wrap, a line of progress, waiting keys."""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from prompt_toolkit.utils import get_cwidth

from llamajax.text import printable

_TAB = 8
_JOINER = "\u200d"


def understands_escapes() -> bool:
    """Whether the cursor can be moved."""
    return os.environ.get("TERM") != "dumb"


class WordWrap:
    """Breaks lines between words at the terminal's width, in text that comes piece by piece.

    A word that turns out to be too long for its line is taken back and written on the next one. Code between lines of
    ``` is left as it is: whoever copies it wants its own line breaks.
    """

    def __init__(self) -> None:
        self._in_code = False
        self._begin_line()

    def push(self, piece: str) -> str:
        """What to write for the next piece."""
        width = shutil.get_terminal_size().columns
        return "".join(self._put(char, width) for char in printable(piece))

    def _begin_line(self, word: str = "", cells: int = 0) -> None:
        self._column = cells  # where the cursor is
        self._word, self._word_cells = word, cells  # at the end of the line
        self._start = ""  # of the model's own line
        self._joined = False

    def _put(self, char: str, width: int) -> str:
        if char == "\n":
            if self._start.lstrip().startswith("```"):
                self._in_code = not self._in_code
            self._begin_line()
            return char
        self._start += char
        cells = _TAB - self._column % _TAB if char == "\t" else 0 if self._joined else get_cwidth(char)
        self._joined = char == _JOINER
        full = self._column + cells > width and not self._in_code
        if char in " \t":
            self._word, self._word_cells = "", 0
            self._column += 0 if full else cells
            return "" if full else char
        if cells == 2:  # between wide characters a line may break
            self._word, self._word_cells = "", 0
        before = self._break_line() if full else ""
        self._word += char
        self._word_cells += cells
        self._column += cells
        return before + char

    def _break_line(self) -> str:
        """Begins a line with the present word, unless this word alone fills the line."""
        start, moved = self._start, self._column - self._word_cells
        word, cells = (self._word, self._word_cells) if moved > 0 else ("", 0)
        self._begin_line(word, cells)
        self._start = start
        return f"\r\x1b[{moved}C\x1b[K\n{word}" if word else "\n"


class Status:
    """One line on a terminal's stderr that says what is waited for, and goes when the wait is over."""

    def __init__(self) -> None:
        self._shown = False

    def show(self, text: str) -> None:
        """In place of what it said before."""
        if sys.stderr.isatty() and understands_escapes():
            self._write(f"\r\x1b[2m{text}\x1b[0m\x1b[K")
            self._shown = True

    def clear(self) -> None:
        """Leaves no trace."""
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = False

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


@contextmanager
def keys_wait() -> Iterator[None]:
    """Keys pressed while no line is edited are not shown. They wait for the next line, and begin it."""
    if sys.platform == "win32":
        yield
        return
    import termios

    settings = termios.tcgetattr(sys.stdin)
    waiting = termios.tcgetattr(sys.stdin)
    # Without ICANON, since a line of the terminal's own ends at 4096 bytes; Ctrl-C stays a signal.
    waiting[0] &= ~termios.ICRNL
    waiting[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, waiting)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, settings)
