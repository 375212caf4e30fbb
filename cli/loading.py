"""Loads a model for a command, with a progress bar when it takes long."""

import gc
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llamajax import hub
from llamajax.text import one_line
from llamajax.types import CacheDType, Device, DType

from .interrupt import raised
from .render import erase_if_interrupted, human_bytes, note

if TYPE_CHECKING:
    from jax import Array
    from rich.progress import Progress

    from llamajax import LLM

_BAR_AFTER_SECONDS = 1.0
# Fewer bytes of dense weights are fast enough: no note about them.
LARGE_BYTES = 500_000_000


def resolve(model: str) -> Path:
    """The path of the model's files, fetched if they are not on disk. Ctrl-C removes an incomplete download."""
    with raised():
        return hub.resolve(model)


def prepare_jax(device: Device | None) -> None:
    """Settings that jax reads when it is imported: it must not have been yet."""
    assert "jax" not in sys.modules
    # XLA's own notes (missing accelerators, features of the processor) are for developers.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    # Warnings of the library and of its dependencies become notes.
    logging.basicConfig(handlers=[_Notes()])
    warnings.showwarning = lambda message, *_: note(f"({one_line(message)})")


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        cause = f": {record.exc_info[1]!r}" if record.exc_info else ""
        note(f"({one_line(record.getMessage() + cause, longest=1000)})")


def load(
    model: str,
    *,
    max_seq_len: int | None,
    dtype: DType,
    cache_dtype: CacheDType,
    device: Device | None,
    max_memory: int | None = None,
) -> "LLM":
    """Loads a model as `llamajax.load` does, with a progress bar on stderr."""
    path = resolve(model)
    if "jax" not in sys.modules:  # the first model of this process
        prepare_jax(device)
    from llamajax.loading import load_opened, open_model

    with _collector_off():
        opened = open_model(
            path, max_seq_len=max_seq_len, dtype=dtype, cache_dtype=cache_dtype, device=device, max_memory=max_memory
        )
        from llamajax.ops import native

        gc.freeze()
        with erase_if_interrupted(), _Bar() as bar:
            llm = load_opened(opened, bar)
    placement = llm._runner.placement
    if placement.platform == "cpu" and not placement.has_kernels:
        note(f"(slower than it could be: computed by {native.implementation()})")
    if llm._runner.is_new:
        note("(first run of this model here: compiling for this machine; the next runs start quickly)")
    if placement.has_kernels:
        _note_size(llm)
    return llm


@contextmanager
def _collector_off() -> Iterator[None]:
    """Inside, the garbage collector is off: it would walk all modules again and again while they are imported."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _note_size(llm: "LLM") -> None:
    """Says how fast a large dense model can be on a CPU, and what makes it faster."""
    from llamajax.ops import PackedWeight, Stacked

    weights = llm._runner.model.weights().values()
    dense = [weight for weight in weights if isinstance(weight, PackedWeight) and weight.format.is_dense]
    size = sum(math.prod(weight.data.shape) for weight in dense)
    quantized = sum(math.prod(weight.shape) for weight in dense) * 34 // 32
    if size > LARGE_BYTES:
        arrays = [weight.data.layers if isinstance(weight.data, Stacked) else weight.data for weight in dense]
        speed = _read_speed(max(arrays, key=lambda array: array.nbytes)) / size
        less = "half" if size < 3 * quantized else "a quarter"
        note(
            f"(each token reads {human_bytes(size)} of dense weights: at most {speed:.{int(speed < 10)}f} tokens/s "
            f"with this memory; --quantize q8_0 makes it {less}, {human_bytes(quantized)}, for a perplexity about 1 % "
            "higher with the default model)"
        )


def _read_speed(array: "Array") -> float:
    """Bytes a second in which memory is read: the faster of two times."""
    import jax

    largest = jax.jit(lambda x: x.max(axis=-1))
    largest(array).block_until_ready()  # compiles
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        largest(array).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return array.nbytes / min(seconds)


class _Bar:
    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._began: float | None = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self._began = self._began or now
        if self._progress is None and now - self._began > _BAR_AFTER_SECONDS and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

            console = Console(stderr=True)
            self._progress = Progress(
                TextColumn("loading"), BarColumn(), DownloadColumn(), console=console, transient=True
            )
            self._task = self._progress.add_task("", total=total)
            self._progress.start()
        if self._progress is not None:
            self._progress.update(self._task, completed=done)
