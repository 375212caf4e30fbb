"""A tensor as a checkpoint file stores it, and the mapping of such a file."""

import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamajax.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """A memory-mapped tensor, not yet converted.

    Attributes:
      name: its name in the file.
      shape: logical shape, row-major as in PyTorch: a linear layer's weight is [out, in].
      format: "f32", "f16", "bf16", "f64", or a GGUF block format in lower case ("q4_1", "q6_k", ...), or what else
        a safetensors file may hold ("i64", "bool", "f8_e4m3", ...) and no weight can be.
      data: read-only. Dense formats: an array of that dtype (bf16 through ml_dtypes) and shape, at whatever
        address the file has it (numpy's aligned flag may be off); block formats: uint8 [*shape[:-1], bytes a
        row]; others: uint8 [bytes].
    """

    name: str
    shape: tuple[int, ...]
    format: str
    data: np.ndarray

    def release(self) -> None:
        """Gives the mapped pages' memory back, where the system lets; they are read again if they are touched."""
        owner: object = self.data
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, memoryview):
            owner = owner.obj
        if not isinstance(owner, mmap.mmap) or not hasattr(owner, "madvise"):
            return
        start = self.data.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
        begin = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (start + self.data.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            owner.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def map_file(path: Path) -> mmap.mmap:
    """The bytes of a file, read from disk as they are touched. The map closes with the last array over it.

    Raises:
      CheckpointError: the file is missing, empty or unreadable.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{path}: the file is empty; download it again") from None
