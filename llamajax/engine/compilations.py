"""Tells when XLA compiles a program."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


@contextmanager
def on_compilation(callback: Callable[[float], object]) -> Iterator[None]:
    """Inside, calls `callback` for each program that XLA compiles, or reads from its cache on disk.

    The thread that compiled calls it, with the seconds that it took.
    """

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            callback(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
