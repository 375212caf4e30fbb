"""The compiled steps of a model, by name: compiled when they are first needed, and kept, in memory and on disk.

Knows what each step takes; not when it is needed.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache, partial
from threading import Lock
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.stages import Compiled, Lowered
from jaxtyping import Int32

from llamajax.engine import steps
from llamajax.engine.executables import Executables
from llamajax.engine.steps import FlatModel, Rows, Slots
from llamajax.errors import PlatformError
from llamajax.model.cache import Cache
from llamajax.ops import PAGE_LEN
from llamajax.placement import Placement
from llamajax.types import mask_len

# XLA's CPU compiler hands sums of 4096 numbers or more, over all rows, to a library that adds in another order: a row's
# last bits would depend on its neighbours and on the cache's length. So the library may compute products only.
_SUMS_IN_ONE_ORDER: dict[str, str | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}

# One CUDA graph for all work of a call. By default XLA leaves loops out of graphs, and what remains outside is too
# short to become a graph.
WHOLE_GRAPHS: dict[str, str | bool] = {
    "xla_gpu_enable_command_buffer": (
        "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION,WHILE"
    ),
    "xla_gpu_graph_min_graph_size": "1",
}

# Shared by all models of this process: those of the same shapes have the same programs.
_programs: dict[tuple[str, "Program"], Future[Compiled]] = {}
_lock = Lock()


class Program(NamedTuple):
    """A step compiled for rows of one shape.

    Attributes:
      cache_len: positions that each row has room for, or, with pages, all of them have, when the step has run; tokens,
        of logits and prompt_logprobs.
      chunk_len: of a prefill.
      num_rows: when the step has run; of those that a step takes by their numbers, which have pages.
      source: rows and positions of what an insert takes them from, or of what is resized; how many rows there are, of
        which a step takes some.
    """

    step: Literal[
        "empty_rows",
        "empty_pages",
        "put_page",
        "prefill",
        "decode",
        "decode_asking",
        "decode_rows",
        "forward",
        "forward_rows",
        "draw",
        "draw_rows",
        "insert",
        "resize",
        "keep",
        "stop",
        "logits",
        "prompt_logprobs",
    ]
    cache_len: int
    chunk_len: int = 0
    num_rows: int = 1
    source: tuple[int, int] = (1, 0)


class Programs:
    """The programs of a model. If the cache is in pages, a row has up to `table_len` of them."""

    def __init__(self, model: FlatModel, placement: Placement, table_len: int | None = None) -> None:
        assert placement.device is not None
        self._model = model
        self._device = placement.device
        self._table_len = table_len
        self._cache_settings = {"cache_dtype": placement.cache_dtype, "paged": placement.has_pages}
        arrays = [(array.shape, array.dtype.name) for array in model.arrays]
        self._options = graph_options() if placement.platform == "gpu" else {}
        settings = arrays, model.structure, self._cache_settings, table_len, self._options
        self._on_disk = Executables(self._device, repr(settings))

    def compile(self, program: Program) -> Compiled:
        """The program, ready to run: its arguments are the arrays that its step takes.

        Any thread may ask, and waits if another one makes the same program. No array on the device is touched.
        """
        key = self._on_disk.identity, program
        with _lock:
            found, made = _programs.get(key), Future[Compiled]()
            if found is None:
                _programs[key] = made
        if found is not None:
            return found.result()
        try:
            made.set_result(self._on_disk.get(_name(program), lambda: self.lowered(program), self._compiler_options))
        except BaseException as error:
            del _programs[key]
            made.set_exception(error)
        return made.result()

    def prepare(self, program: Program) -> None:
        """Compiles a program unless it is in memory or on disk. One that goes to disk does not stay in memory."""
        key, name = (self._on_disk.identity, program), _name(program)
        if key not in _programs and not self._on_disk.has(name):
            self.compile(program)
            if self._on_disk.has(name):
                _programs.pop(key, None)

    @property
    def is_new(self) -> bool:
        """Whether all programs have to be compiled, for the first time on this machine."""
        return self._on_disk.is_empty

    def shapes(self, num_rows: int, length: int) -> Rows:
        """Rows' arrays, without their values."""
        return self._without_values(partial(steps.empty_rows, **self._rows_settings(num_rows, length)))

    def _pages(self, length: int, num_rows: int | None = None) -> Cache:
        """Pages of so many positions, and a table for so many rows, without their values."""
        [pages] = self._without_values(partial(steps.empty_pages, **self._pages_settings(length)))
        if num_rows is not None:
            pages = pages._replace(table=jax.ShapeDtypeStruct((num_rows, self._table_len), np.int32))
        return (pages,)

    def _without_values(self, make: Callable[[], Any]) -> Any:
        sharding = jax.sharding.SingleDeviceSharding(self._device)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(make))

    def lowered(self, program: Program) -> Lowered:
        """A program before compilation. Needs only shapes: the device need not exist."""
        step, length, chunk_len, num_rows, source = program
        arrays, structure = self._model
        cache, slots, requests = rows = self.shapes(num_rows, length)
        if self._table_len is not None:
            cache = self._pages(length, num_rows)
        ids, number, places = np.zeros(length, np.int32), np.int32(1), np.zeros(source[0], np.int32)
        _, all_slots, all_requests = self.shapes(*source)
        some = np.zeros(num_rows, np.int32)
        match step:
            case "empty_rows":
                with jax.default_device(self._device):
                    return steps.empty_rows.lower(**self._rows_settings(num_rows, length))
            case "empty_pages":
                with jax.default_device(self._device):
                    return steps.empty_pages.lower(**self._pages_settings(length))
            case "put_page":
                page = jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), self._pages(PAGE_LEN))
                return steps.put_page.lower(self._pages(length), page, number)
            case "prefill":
                chunk, ones = np.zeros((num_rows, chunk_len), np.int32), np.ones(num_rows, np.int32)
                return steps.prefill.lower(arrays, cache, chunk, ones, ones, ones, requests, structure=structure)
            case "decode":
                return steps.decode.lower(arrays, cache, slots, number, requests, structure=structure)
            case "decode_rows" | "decode_asking":
                asked = np.ones(1, np.int32) if step == "decode_asking" else None
                rest = all_slots, number, all_requests, asked, some
                return steps.decode.lower(arrays, cache, *rest, structure=structure)
            case "forward":
                return steps.forward.lower(arrays, cache, slots, structure=structure)
            case "forward_rows":
                return steps.forward.lower(arrays, cache, all_slots, some, structure=structure)
            case "draw":
                return steps.draw.lower(self._scores(slots), slots, requests, self._mask(num_rows))
            case "draw_rows":
                return steps.draw.lower(self._scores(slots), all_slots, all_requests, self._mask(num_rows), some)
            case "insert":
                return steps.insert.lower(rows, self.shapes(*source), places, places)
            case "resize":
                return steps.resize.lower(self.shapes(*source).cache[:1], some, length=length)
            case "keep":
                return steps.keep.lower(all_slots, all_requests, some)
            case "stop":
                return steps.stop.lower(slots.left, number)
            case "logits":
                return steps.logits.lower(arrays, ids, structure=structure, **self._cache_settings)
            case "prompt_logprobs":
                return steps.prompt_logprobs.lower(arrays, ids, number, structure=structure, **self._cache_settings)

    def _compiler_options(self) -> dict[str, str | bool]:
        return {**_sums_in_one_order(), **self._options}

    def _scores(self, slots: Slots) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(slots.counts.shape, np.float32, sharding=slots.counts.sharding)

    def _mask(self, num_rows: int) -> Int32[np.ndarray, "B W"]:
        return np.zeros((num_rows, mask_len(self._model.structure.config.vocab_size)), np.int32)

    def _rows_settings(self, num_rows: int, length: int) -> dict[str, Any]:
        config = self._model.structure.config
        return {"num_rows": num_rows, "length": length, "config": config, **self._cache_settings}

    def _pages_settings(self, length: int) -> dict[str, Any]:
        dtype = self._cache_settings["cache_dtype"]
        return {"num_pages": length // PAGE_LEN, "config": self._model.structure.config, "cache_dtype": dtype}


def _name(program: Program) -> str:
    """The name of its file."""
    return "-".join(map(str, (*program[:-1], *program.source)))


def graph_options() -> dict[str, str | bool]:
    """XLA's options for LLAMAJAX_GRAPHS. Raises PlatformError for a value without a meaning."""
    wanted = os.environ.get("LLAMAJAX_GRAPHS", "")
    if wanted not in ("", "call"):
        raise PlatformError(f"LLAMAJAX_GRAPHS must be call or empty, not {wanted!r:.40}")
    return WHOLE_GRAPHS if wanted else {}


@cache
def _sums_in_one_order() -> dict[str, str | bool]:
    try:
        jax.jit(lambda x: x).lower(0).compile(_SUMS_IN_ONE_ORDER)
    except jax.errors.JaxRuntimeError:  # another version of XLA
        return {}
    return _SUMS_IN_ONE_ORDER
