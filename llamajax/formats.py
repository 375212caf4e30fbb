"""The formats of weights, in files and in the native kernels: their names and sizes.

`ops.quants` knows what is in a file's blocks, `ops.packed` what is in the kernels'. Needs no jax: importing it takes
long.
"""

from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np

DENSE_DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f64": np.dtype(np.float64),
}
# By the names of numpy's types.
DENSE_NAMES = {dtype.name: name for name, dtype in DENSE_DTYPES.items()}


class Format(NamedTuple):
    """A block format: ggml's number for it, weights a block, bytes a block."""

    ggml_type: int
    weights: int
    bytes: int


FORMATS = {
    "q4_0": Format(2, 32, 18),
    "q4_1": Format(3, 32, 20),
    "q5_0": Format(6, 32, 22),
    "q5_1": Format(7, 32, 24),
    "q8_0": Format(8, 32, 34),
    "q2_k": Format(10, 256, 84),
    "q3_k": Format(11, 256, 110),
    "q4_k": Format(12, 256, 144),
    "q5_k": Format(13, 256, 176),
    "q6_k": Format(14, 256, 210),
    "iq4_nl": Format(20, 32, 18),
}

# Formats whose blocks hold in a file what they hold when packed: all but the order, or the scales' kind, is the same.
MOVED_FORMATS = ("f32", "f16", "bf16", "q4_0", "q4_1", "q8_0")

# Rows that the kernels have beside each other.
GROUP = 16


class PackedFormat(NamedTuple):
    """What weights or their quants are kept in, weights of a row's block, whether blocks have offsets, and the quant
    that means zero."""

    numbers: Literal["u4", "u8", "float16", "bfloat16", "float32"]
    block: int
    has_offsets: bool = False
    zero: int = 0

    @property
    def is_dense(self) -> bool:
        """Whether weights are numbers as they are."""
        return self.numbers not in ("u4", "u8")

    @property
    def bits(self) -> int:
        """Of a weight or its quant."""
        return 8 * DENSE_DTYPES[DENSE_NAMES[self.numbers]].itemsize if self.is_dense else int(self.numbers[1:])

    @property
    def word_bytes(self) -> int:
        """Bytes of a row that are stored beside those of the next."""
        return 2 if self.numbers == "float16" else 4

    @property
    def head_bytes(self) -> int:
        """Bytes of a row's scale and offset."""
        return 0 if self.is_dense else 2 + 2 * self.has_offsets

    @property
    def has_steps(self) -> bool:
        """Whether scales and offsets are integers, in units of a row's step."""
        return self.bits == 4 and self.has_offsets

    @property
    def first_block(self) -> int:
        """Bytes of a group before its first block."""
        return 4 * GROUP * self.has_steps

    @property
    def block_bytes(self) -> int:
        """Bytes of a group's block."""
        return GROUP * (self.head_bytes + self.block * self.bits // 8)


# By the format of a file: dense, or of FORMATS.
PACKED_FORMATS = {
    "f32": PackedFormat("float32", 32),
    "f16": PackedFormat("float16", 32),
    "bf16": PackedFormat("bfloat16", 32),
    "q4_0": PackedFormat("u4", 32, False, 8),
    "q4_1": PackedFormat("u4", 32, True, 8),
    "q5_0": PackedFormat("u8", 32, False, 16),
    "q5_1": PackedFormat("u8", 32, True, 0),
    "q8_0": PackedFormat("u8", 32, False, 128),
    "q2_k": PackedFormat("u4", 16, True, 2),
    "q3_k": PackedFormat("u4", 16, False, 4),
    "q4_k": PackedFormat("u4", 32, True, 8),
    "q5_k": PackedFormat("u8", 32, True, 0),
    "q6_k": PackedFormat("u8", 16, False, 32),
    "iq4_nl": PackedFormat("u8", 32, False, 128),
}
