"""Weights that the native kernels take as they are stored, in another order: moved by threads of their own.

Needs no jax: the moving goes on as jax is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

import numpy as np

from llamajax import kernels
from llamajax.config import LlamaConfig
from llamajax.placement import Placement
from llamajax.weights.kept import alike, how_kept
from llamajax.weights.names import Source, sources
from llamajax.weights.tensor import StoredTensor

if TYPE_CHECKING:
    import jax
    from jaxtyping import Int, UInt8

_Rows = TypeVar("_Rows", "jax.Array", np.ndarray)
# A thread moves 0.6 GB a second, of the 2 to 4 that a memory gives.
_NUM_THREADS = 2
_SECONDS_BETWEEN_REPORTS = 0.05


class Packed(NamedTuple):
    """Layers of one kind, [N, K] each, as `kernels.pack` makes them."""

    data: UInt8[np.ndarray, "L N/16 bytes"]
    shape: tuple[int, int]
    name: str


class Packing:
    """The packing of those parameters that are moved. Begins at once, and ends with the `with` that it is in."""

    def __init__(self, config: LlamaConfig, tensors: Mapping[str, StoredTensor], placement: Placement) -> None:
        """Arguments as `load_weights` has them. The placement has the native kernels."""
        self._plan, self._tensors = sources(config, tensors), tensors
        self._num_bytes, self._lock = 0, Lock()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="llamajax packing")
        self._packed: dict[tuple[str, ...], Future[Packed]] = {}
        kept = {path: how_kept(path, parts, tensors, placement) for path, parts in self._plan.items()}
        for group in alike(self._plan, kind(self._plan, tensors)):
            if kept[group[0]].is_moved:
                self._packed[tuple(group)] = self._threads.submit(self._pack, group, kept[group[0]].formats[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(cancel_futures=True)

    @property
    def num_bytes(self) -> int:
        """How many bytes of the file are moved so far."""
        return self._num_bytes

    def wait(self, group: Sequence[str], report: Callable[[], None]) -> Packed:
        """What these parameters, all of one kind, are packed to; they are moved ones. `report` is called meanwhile.

        Raises CheckpointError for a scale or an offset that is not finite.
        """
        packed = self._packed.pop(tuple(group))
        while not wait([packed], _SECONDS_BETWEEN_REPORTS).done:
            report()
        return packed.result()

    def _pack(self, group: list[str], name: str) -> Packed:
        parts = self._plan[group[0]]
        order = _rows_in_order(parts)
        return Packed(kernels.pack(self._layers(group), group, order, name), (len(order), parts[0].shape[1]), name)

    def _layers(self, group: list[str]) -> Iterator[list[np.ndarray]]:
        """What each is made of; given back when the next is asked for."""
        for path in group:
            layer = [self._tensors[part.name] for part in self._plan[path]]
            yield [tensor.data for tensor in layer]
            for tensor in layer:
                tensor.release()
            with self._lock:
                self._num_bytes += sum(tensor.data.nbytes for tensor in layer)


def kind(plan: Mapping[str, list[Source]], tensors: Mapping[str, StoredTensor]) -> Callable[[str], Hashable]:
    """What layers must have in common, beside what they are, to be kept in one array."""
    return lambda path: tuple(tensors[part.name].format for part in plan[path])


def half_split(rows: _Rows, num_heads: int) -> _Rows:
    """Rows of interleaved heads in half-split order; others as they are."""
    return rows.reshape(num_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape) if num_heads else rows


def _rows_in_order(sources: list[Source]) -> Int[np.ndarray, N]:
    """Which of the stored rows, one part's below the other's, become a parameter's."""
    order, begin = [], 0
    for source in sources:
        rows = begin + np.arange(source.shape[0])[:, None]
        order.append(half_split(rows, source.interleaved_heads)[:, 0])
        begin += len(rows)
    return np.concatenate(order)
