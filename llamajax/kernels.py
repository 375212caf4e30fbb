"""Our C++ library for CPUs: found, loaded, and asked to pack weights. `ops.native` calls its operations from XLA.

Installing compiles ops/cpu/kernels.cc where there is a compiler. LLAMAJAX_CPU limits what is used: one of
INSTRUCTION_SETS to that set and those below it, "xla" to none. Portable code is for tests: XLA's is five times as fast,
and it serves where the processor has no better. Needs no jax.
"""

from __future__ import annotations

import ctypes
import math
import os
import sysconfig
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llamajax.errors import CheckpointError, PlatformError
from llamajax.formats import GROUP, PACKED_FORMATS

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped, UInt8
    from numpy.typing import DTypeLike

# From the best to the worst.
INSTRUCTION_SETS = ("amx", "avx512bf16", "avx512", "avxvnni", "avx2", "neon", "portable")
NOT_FINITE = "{} has a scale that is not finite (NaN or infinite): the file is broken, fetch or convert it again"
_LIBRARY = Path(__file__).parent / "ops" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


@cache
def library() -> ctypes.CDLL | str:
    """The library, or why there is none.

    Raises PlatformError for a LLAMAJAX_CPU without a meaning.
    """
    wanted = os.environ.get("LLAMAJAX_CPU", "")
    if wanted not in ("", "xla", *INSTRUCTION_SETS):
        raise PlatformError(f"LLAMAJAX_CPU must be one of {', '.join(INSTRUCTION_SETS)} and xla, not {wanted!r}")
    if wanted == "xla":
        return "LLAMAJAX_CPU is set"
    if not _LIBRARY.is_file():
        return f"the native kernels are not built: {_how_to_build()}"
    try:
        loaded = ctypes.CDLL(str(_LIBRARY))
        loaded.llamajax_pack.restype = ctypes.c_bool
        loaded.llamajax_pack.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_int64] * 5,
            ctypes.c_uint8,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
    except Exception as e:  # built for another machine
        return not_loaded(e)
    loaded.llamajax_limit(wanted.encode())
    if not wanted and instruction_set(loaded) == "portable":
        return "this processor has neither AVX2 nor NEON with dot products"
    return loaded


def _how_to_build() -> str:
    package = Path(__file__).parent
    if (package.parent / "pyproject.toml").is_file():
        return f"{package} is a clone's; run Python in another folder, or install the clone with pip install -e"
    return "install a C++ compiler, then llamajax again"


def not_loaded(error: Exception) -> str:
    """Why there is no library, if it cannot be loaded."""
    return f"the native kernels cannot be loaded: {' '.join(str(error).split())}; install llamajax again"


def described(library: ctypes.CDLL | str) -> str:
    """What computes on a CPU, and why if it is XLA."""
    return f"XLA ({library})" if isinstance(library, str) else f"native kernels ({instruction_set(library)})"


def instruction_set(library: ctypes.CDLL) -> str:
    """The best of those that the processor has and LLAMAJAX_CPU allows."""
    library.llamajax_instruction_set.restype = ctypes.c_char_p
    return library.llamajax_instruction_set().decode()


def pack(
    layers: Iterable[Sequence[Shaped[np.ndarray, "n width"]]],
    paths: Sequence[str],
    order: Int[np.ndarray, N],
    name: str,
) -> UInt8[np.ndarray, "L N/16 bytes"]:
    """What `ops.packed` makes of rows of a file's blocks or numbers, of the parameters of these paths.

    A layer's rows are those stored, one array below the other, in this order, and are whole blocks. For MOVED_FORMATS
    only. XLA's programs take longer to be read from their cache than this does.

    Raises CheckpointError for a scale or an offset that is not finite.
    """
    format = PACKED_FORMATS[name]
    head, quants = format.head_bytes, format.block * format.bits // 8
    loaded = library()
    assert isinstance(loaded, ctypes.CDLL)
    signed = format.zero == 128
    for layer, stored in enumerate(layers):
        num_blocks = stored[0][0].nbytes // (head + quants)
        if layer == 0:
            group_bytes = format.first_block + num_blocks * format.block_bytes
            data = aligned((len(paths), -(-len(order) // GROUP), group_bytes), np.uint8)
        rows = np.concatenate([part.ctypes.data + part.strides[0] * np.arange(len(part)) for part in stored])[order]
        finite = loaded.llamajax_pack(
            rows.ctypes.data,
            len(rows),
            num_blocks,
            head,
            quants,
            format.word_bytes,
            128 * signed,
            format.zero,
            data[layer].ctypes.data,
        )
        if not finite:
            raise CheckpointError(NOT_FINITE.format(paths[layer]))
    return data


def aligned(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """Memory at a multiple of 64: JAX takes such arrays as they are, and copies others."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:size].view(dtype).reshape(shape)
