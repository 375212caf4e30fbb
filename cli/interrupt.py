"""What Ctrl-C does: the command ends at once.

Python's own handler raises a KeyboardInterrupt wherever the program is: jaxlib does not survive one while it is
imported, and callbacks of the garbage collector and of other languages drop it.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from select import select
from threading import current_thread, main_thread
from types import FrameType

INTERRUPTED = 130

_last_words: list[tuple[int, bytes]] = []


def exit_at_once() -> None:
    """From now on Ctrl-C ends the process with code 130, unless it is ignored, as in a job in the background."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    for stream, text in reversed(_last_words):
        with suppress(OSError):
            if select([], [stream], [], 0)[1]:  # a full pipe that nobody reads would block
                os.write(stream, text)
    os._exit(INTERRUPTED)


@contextmanager
def last_words(text: str, stream: int) -> Iterator[None]:
    """If Ctrl-C comes meanwhile, writes a text to a file descriptor and then ends the command; the innermost first."""
    _last_words.append((stream, text.encode()))
    try:
        yield
    finally:
        _last_words.pop()


@contextmanager
def raised() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt meanwhile: for code that has files or processes to clear away.

    Not in other threads than the main one, which Ctrl-C does not reach.
    """
    if current_thread() is not main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
