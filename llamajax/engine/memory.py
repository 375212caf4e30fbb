"""What rows take of a device's memory, by formula. Asks no device."""

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

import jax
import numpy as np

from llamajax.config import LlamaConfig
from llamajax.engine import steps
from llamajax.placement import Placement, bytes_per_token

# Of a score in attention: in f32 as it is computed, and in 16 bits as a weight.
_SCORE_BYTES = 6
# Sampling has so many arrays of the vocabulary's length at once: on a GPU, and elsewhere.
_GPU_SAMPLING_ARRAYS, _SAMPLING_ARRAYS = 6, 5
# A TPU's arrays have rows of so many numbers.
_TPU_LANES = 128


_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Footprint:
    """What a model's rows take of a device, in bytes."""

    config: LlamaConfig
    placement: Placement

    @cached_property
    def position(self) -> int:
        """Of one position's keys and values: exact."""
        return bytes_per_token(self.config, self.placement.cache_dtype)

    def rows(self, num_rows: int, length: int) -> int:
        """Of rows with room for so many positions, or with pages for them: exact."""
        return num_rows * (self.position * length + self._beside_cache)

    def needed(self, num_rows: int, length: int, num_prompts: int = 0, prompt_len: int = 0, chunk_len: int = 0) -> int:
        """Of rows that are decoded while prompts are prefilled into caches of `prompt_len`: with temporary arrays."""
        temporary = self.temporary(num_rows, length, num_prompts, prompt_len, chunk_len)
        return self.rows(num_rows, length) + self.rows(num_prompts, prompt_len) + temporary

    def temporary(self, num_rows: int, length: int, num_prompts: int, prompt_len: int, chunk_len: int) -> int:
        """About what a step takes while it runs, of these."""
        return max(self._of_step(num_rows, length, 1), self._of_step(num_prompts, prompt_len, chunk_len))

    @cached_property
    def _beside_cache(self) -> int:
        """Of one row: what was asked for, and how far it is."""
        settings = {"config": self.config, "cache_dtype": self.placement.cache_dtype, "paged": True}
        _, *others = jax.eval_shape(partial(steps.empty_rows, num_rows=1, length=1, **settings))
        return sum(x.size * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(others))

    def _of_step(self, num_rows: int, length: int, num_queries: int) -> int:
        """About what a step with so many queries of each row takes."""
        num_arrays = _GPU_SAMPLING_ARRAYS if self.placement.platform == "gpu" else _SAMPLING_ARRAYS
        sampling = 4 * num_arrays * self.config.vocab_size
        if self.placement.has_pages:
            return num_rows * sampling
        scores = _SCORE_BYTES * self.config.num_attention_heads * num_queries * length
        # Shorter heads are written into another layout and back: the cache twice more.
        copied = self.placement.platform == "tpu" and self.config.head_dim % _TPU_LANES
        copies = 2 * self.position * length if copied else 0
        return num_rows * (sampling + scores + copies)


@cache
def cache_bytes() -> int:
    """What pages of a cache may take of the computer's memory, or of the container's: half of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" is no number
        total = min(total, int(_CONTAINER_LIMIT.read_text()))
    return total // 2


def prefix_cache_bytes() -> int:
    """What is kept of prompts that have ended, unless the user says how much: a 32nd of the computer's memory."""
    return cache_bytes() // 16


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host, had no memory for what was to be computed."""
    exhausted = isinstance(error, jax.errors.JaxRuntimeError) and str(error).startswith("RESOURCE_EXHAUSTED")
    return exhausted or isinstance(error, MemoryError)
