"""Ctrl-C in programs that use the library. Knows only Python's signals and its garbage collector."""

import _thread
import sys
from collections.abc import Callable
from functools import cache, partial
from time import sleep


@cache
def keep_interrupts() -> None:
    """From now on a KeyboardInterrupt that Python would drop is raised again.

    Python drops the exceptions of the garbage collector's callbacks. Jax has one, so a Ctrl-C that comes during a
    collection would be lost. What else cannot be raised goes to the hook that was there before.
    """
    sys.unraisablehook = partial(_raise_again, sys.unraisablehook)


def _raise_again(hook: "Callable[[sys.UnraisableHookArgs], object]", dropped: "sys.UnraisableHookArgs") -> None:
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        _thread.start_new_thread(_interrupt_soon, ())
    else:
        hook(dropped)


def _interrupt_soon() -> None:
    sleep(0.05)  # by then the callback has returned
    _thread.interrupt_main()
