"""Makes the runs of a measurement: warms up, counts compiled programs, and measures the memory's speed beside them."""

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from llamajax.bench.metrics import WarmUp
from llamajax.engine.compilations import on_compilation
from llamajax.errors import PromptTooLongError
from llamajax.llm import LLM
from llamajax.ops import PackedWeight, Stacked
from llamajax.placement import bytes_per_token

R = TypeVar("R")

_READS = 5
# Reads that an accelerator is given at once. One by one, it would wait for the host a quarter of the time.
_READS_AT_ONCE = 8
# Rows of 32 kB in the matrix that is read. It has as many bytes as decoding reads, since caches may hold a small
# model; beyond these sizes none does.
_ROW_LEN = 2**13
_MAX_MATRIX_BYTES = {"cpu": 2**28}
_MAX_MATRIX_BYTES_ELSEWHERE = 2**30


class Session:
    """A model on a device, and how often each kind of work is done.

    Attributes:
      llm: the model.
      repeat: runs of each kind of work.
      weight_bytes: of the weights that a decode step reads.
    """

    def __init__(self, llm: LLM, repeat: int) -> None:
        self.llm = llm
        self.repeat = repeat
        self.weight_bytes = _weight_bytes(llm)
        self._read_bandwidth = _reader(llm._runner.device, self.weight_bytes)

    def check(self, num_tokens: int, more: int) -> None:
        """Raises PromptTooLongError if a sequence of so many tokens cannot grow by so many more."""
        context = self.llm.max_seq_len
        if num_tokens + more > context:
            longer = ", or raise max_seq_len" if context < self.llm.config.max_position_embeddings else ""
            raise PromptTooLongError(
                f"{num_tokens} tokens and {more} more are beyond the context of {context}: ask for fewer{longer}"
            )

    def measure(self, warm_up: Callable[[], object], run: Callable[[], R]) -> tuple[list[R], dict[str, Any]]:
        """The runs, and the fields that every `Result` has but the bandwidth of decoding."""
        seconds: list[float] = []  # of each program
        with on_compilation(seconds.append):
            began = time.perf_counter()
            warm_up()
            warmed = WarmUp(time.perf_counter() - began, len(seconds), sum(seconds))
            runs, bandwidths = [], [self._read_bandwidth()]
            seconds.clear()  # jax may compile the reader anew, once it has imported all that it imports
            for _ in range(self.repeat):
                runs.append(run())
                bandwidths.append(self._read_bandwidth())
        return runs, {
            "read_bandwidth": max(bandwidths),
            "peak_bytes": _peak_bytes(self.llm._runner.device),
            "warm_up": warmed,
            "programs_while_measured": len(seconds),
        }

    def kv_bytes(self, positions: float) -> int:
        """Of one sequence's keys and values."""
        return round(positions * bytes_per_token(self.llm.config, self.llm._runner.placement.cache_dtype))


def kept_dtype(llm: LLM) -> str:
    """What the weight matrices are kept in, joined by "+", that of the most bytes first."""
    sizes: Counter[str] = Counter()
    weights = llm._runner.model.weights()
    for weight in jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, PackedWeight | Stacked)):
        if isinstance(weight, PackedWeight):
            sizes[weight.format.numbers if weight.format.is_dense else weight.name] += math.prod(weight.data.shape)
        elif len(weight.shape) > 1:
            sizes[weight.dtype.name] += weight.nbytes
    return "+".join(name for name, _ in sizes.most_common())


def _reader(device: jax.Device, nbytes: int) -> Callable[[], float]:
    """A function that measures the memory's bandwidth, in bytes a second: the fastest of a few reads of a matrix.

    It takes the maximum of each row, so that it only reads, as decoding does. The matrix has so many bytes, but no more
    than a processor's caches certainly cannot hold.
    """
    nbytes = min(nbytes, _MAX_MATRIX_BYTES.get(device.platform, _MAX_MATRIX_BYTES_ELSEWHERE))
    with jax.default_device(device):
        matrix = jnp.zeros((max(1, nbytes // (4 * _ROW_LEN)), _ROW_LEN), jnp.float32)
    reduce = jax.jit(lambda x: x.max(axis=1))
    reduce(matrix).block_until_ready()  # compiles
    at_once = 1 if device.platform == "cpu" else _READS_AT_ONCE

    def read() -> float:
        seconds = []
        for _ in range(_READS):
            began = time.perf_counter()
            jax.block_until_ready([reduce(matrix) for _ in range(at_once)])
            seconds.append((time.perf_counter() - began) / at_once)
        return matrix.nbytes / min(seconds)

    return read


def _weight_bytes(llm: LLM) -> int:
    model = llm._runner.model
    nbytes = sum(x.nbytes for x in model.arrays)
    if not llm.config.tie_word_embeddings:  # one row of the table is read
        nbytes -= sum(x.nbytes for x in jax.tree.leaves(model.weights()["embed_tokens.weight"]))
    return nbytes


def _peak_bytes(device: jax.Device) -> int:
    statistics = device.memory_stats()  # a CPU has none
    if statistics:
        return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
