"""Where a model computes, and how its weights and its KV cache are kept there. Needs no jax."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from llamajax import kernels
from llamajax.config import LlamaConfig
from llamajax.errors import PlatformError
from llamajax.formats import DENSE_DTYPES
from llamajax.types import MAX_THREADS, CacheDType, Chip, Device, DType

if TYPE_CHECKING:
    import jax
    from numpy.typing import DTypeLike

# Of a GPU's memory, what jax takes at the start.
_GPU_FRACTION = ".9"
# The platform, and MiB of memory: all of a GPU's, as its driver says, and what XLA leaves of a TPU's. The A100 is the
# one of 80 GB.
_CHIPS: dict[Chip, tuple[str, int]] = {
    "a100": ("gpu", 81920),
    "h100": ("gpu", 81559),
    "h200": ("gpu", 143771),
    "v5e": ("tpu", 16128),
    "v5p": ("tpu", 98038),
    "v6e": ("tpu", 32000),
}
# After the numbers of a row of int8: the step that they are multiples of, in f16.
_STEP_LEN = 2


@dataclass(frozen=True)
class Placement:
    """Where a model computes, and what that decides.

    Attributes:
      platform: jax's name of the device's kind.
      has_kernels: whether the native kernels compute: they keep weights packed, and quantized ones in their blocks.
        Otherwise XLA does.
      has_pages: whether the KV cache is in pages: where the native kernels read them. XLA would copy them at each step.
      dtype: of the weights, as `llamajax.load` takes it.
      cache_dtype: of the KV cache.
      device: None if nothing is to compute.
    """

    platform: str
    has_kernels: bool
    has_pages: bool
    dtype: DType
    cache_dtype: np.dtype
    device: jax.Device | None = None

    @classmethod
    def of(
        cls,
        config: LlamaConfig,
        platform: str,
        *,
        has_kernels: bool,
        dtype: DType = "auto",
        cache_dtype: CacheDType = "auto",
        device: jax.Device | None = None,
    ) -> Placement:
        """A model's, if the native kernels can be called on a CPU, or if not.

        Raises PlatformError for a KV cache in int8 where it is not supported.
        """
        has_kernels = has_kernels and platform == "cpu"
        has_pages = has_kernels and config.head_dim % 8 == 0
        if cache_dtype == "int8" and not has_pages:
            computed_by = kernels.described(kernels.library())
            found = f"heads of {config.head_dim} numbers on {platform}, computed by {computed_by}"
            raise PlatformError(
                "a KV cache in int8 needs a CPU with native kernels, and heads of a multiple of 8 numbers, not "
                f"{found}: leave out cache_dtype"
            )
        kept = np.dtype(np.int8) if cache_dtype == "int8" else _cache_dtype(dtype, platform, has_kernels)
        return cls(platform, has_kernels, has_pages, dtype, kept, device)


def _cache_dtype(dtype: DType, platform: str, has_kernels: bool) -> np.dtype:
    """In what the KV cache is kept, unless the user says it."""
    if dtype == "float32":
        return DENSE_DTYPES["f32"]
    if platform != "cpu":
        return DENSE_DTYPES["bf16"]
    # XLA's CPU products with few rows are slow in 16 bits, and it writes into bf16 arrays by way of f32.
    return DENSE_DTYPES["f16" if has_kernels else "f32"]


def is_cpu(wanted: Device | None) -> bool:
    """Whether the device is sure to be a CPU: it is asked for, or jax has support for no other."""
    if (wanted or os.environ.get("JAX_PLATFORMS")) == "cpu":
        return True
    others = find_spec("jax_plugins"), find_spec("libtpu"), os.environ.get("TPU_LIBRARY_PATH")
    return wanted is None and not any(others) and not entry_points(group="jax_plugins")


def limit_threads() -> None:
    """Has XLA compute on as many threads as LLAMAJAX_THREADS says. The native kernels take XLA's.

    It counts when jax looks for its devices for the first time.
    """
    if number := os.environ.get("LLAMAJAX_THREADS"):
        if not number.isdecimal() or not 1 <= int(number) <= MAX_THREADS:
            raise PlatformError(f"LLAMAJAX_THREADS must be a number from 1 to {MAX_THREADS}, not {number!r:.40}")
        os.environ["PJRT_NPROC"] = str(int(number))


def take_most_memory() -> None:
    """Has jax take 90 % of a GPU's memory at the start, unless the user says how much: its own default is 75 %.

    It counts when jax looks for its devices for the first time.
    """
    # jax knows this one by two names, and refuses both at once.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", _GPU_FRACTION)


def find_chip(name: Chip) -> tuple[str, int]:
    """A chip's platform, and the bytes of its memory that jax has for arrays."""
    platform, size = _CHIPS[name]
    return platform, int((size << 20) * (float(_GPU_FRACTION) if platform == "gpu" else 1))


def row_len(head_dim: int, dtype: DTypeLike) -> int:
    """Numbers that the cache has for one key or value of a head."""
    return head_dim + (_STEP_LEN if np.dtype(dtype) == np.int8 else 0)


def bytes_per_token(config: LlamaConfig, dtype: DTypeLike) -> int:
    """Bytes that one position takes in a cache."""
    row = row_len(config.head_dim, dtype) * np.dtype(dtype).itemsize
    return 2 * config.num_hidden_layers * config.num_key_value_heads * row
