"""Quantized weights as the native products take them: 16 rows beside each other.

A weight is scale * (quant - zero) + offset. Of each group of 16 rows stands one block after the other, of 16 or 32
weights a row: the rows' scales in f16, their offsets in f16 if the format has any, and the quants, four of a row beside
four of the next. Quants of 4 bits share a byte: its low half is of the block's first half.

Quants of 5 and 6 bits take 8 here, and those of 2 and 3 take 4. A K format's scale is a product of two numbers; it is
rounded to f16, to one part in 2048.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int, UInt8

from llamajax.ops.quants import Parts
from llamajax.ops.stacked import Stacked, alone

GROUP = 16


class PackedFormat(NamedTuple):
    """Bits of a quant, weights of a row's block, whether blocks have offsets, and the quant that means zero."""

    bits: int
    block: int
    has_offsets: bool
    zero: int


# By the format of a file, of `quants.FORMATS`.
PACKED_FORMATS = {
    "q4_0": PackedFormat(4, 32, False, 8),
    "q4_1": PackedFormat(4, 32, True, 0),
    "q5_0": PackedFormat(8, 32, False, 16),
    "q5_1": PackedFormat(8, 32, True, 0),
    "q8_0": PackedFormat(8, 32, False, 128),
    "q2_k": PackedFormat(4, 16, True, 0),
    "q3_k": PackedFormat(4, 16, False, 4),
    "q4_k": PackedFormat(4, 32, True, 0),
    "q5_k": PackedFormat(8, 32, True, 0),
    "q6_k": PackedFormat(8, 16, False, 32),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """A weight [num_rows, K]; rows of zeros fill its last group. `name` is a key of PACKED_FORMATS."""

    data: UInt8[Array, "N/16 K/block bytes"] | Stacked
    num_rows: int = field(metadata={"static": True})
    name: str = field(metadata={"static": True})

    @property
    def format(self) -> PackedFormat:
        return PACKED_FORMATS[self.name]

    @property
    def shape(self) -> tuple[int, int]:
        return self.num_rows, self.data.shape[1] * self.format.block


def pack(parts: Parts, name: str) -> PackedWeight:
    """Packs rows of a format, [N, K]."""
    format = PACKED_FORMATS[name]
    num_rows, K = parts.quants.shape
    padding = -num_rows % GROUP
    quants, scale, offset = jax.tree.map(lambda x: jnp.pad(x, ((0, padding), (0, 0))), parts)
    groups, blocks = quants.shape[0] // GROUP, K // format.block
    if quants.dtype == jnp.int8:
        quants = lax.bitcast_convert_type(quants + jnp.int8(format.zero - 256 * (format.zero > 127)), jnp.uint8)
    quants = quants.reshape(groups, GROUP, blocks, format.block)
    if format.bits == 4:
        first, second = jnp.split(quants, 2, axis=-1)
        quants = first | second << 4
    # Moved as whole words: XLA takes twice as long for bytes.
    fours = lax.bitcast_convert_type(quants.reshape(groups, GROUP, blocks, -1, 4), jnp.uint32)
    fields = [fours.transpose(0, 2, 3, 1)]
    for number in (offset, scale):
        if number is not None:
            fields.insert(0, number.astype(jnp.float16).reshape(groups, GROUP, blocks).swapaxes(1, 2))
    fields = [lax.bitcast_convert_type(x, jnp.uint8).reshape(groups, blocks, -1) for x in fields]
    return PackedWeight(jnp.concatenate(fields, axis=-1), num_rows, name)


def unpack_rows(weight: PackedWeight, rows: Int[Array, "T"]) -> Float32[Array, "T K"]:
    """Some rows, as float32."""
    format = weight.format
    columns = jnp.asarray(_columns(format))[rows % GROUP]
    block = jnp.take_along_axis(alone(weight.data)[rows // GROUP], columns[:, None], axis=-1)
    scale, offset, quants = jnp.split(block, [2, 2 + 2 * format.has_offsets], axis=-1)
    if format.bits == 4:
        quants = jnp.concatenate([quants & 15, quants >> 4], axis=-1)
    weights = _f16(scale) * (quants.astype(jnp.float32) - format.zero)
    if format.has_offsets:
        weights = weights + _f16(offset)
    return weights.reshape(len(rows), -1)


def _f16(halves: UInt8[Array, "... 2"]) -> Float32[Array, "... 1"]:
    return lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32)[..., None]


@cache
def _columns(format: PackedFormat) -> Int[np.ndarray, "16 bytes"]:
    """Where in a group's block each row's bytes are: scale, offset, quants."""
    row = np.arange(GROUP)[:, None]
    halves = 1 + format.has_offsets
    head = [2 * (GROUP * i + row) + [0, 1] for i in range(halves)]
    steps = np.arange(format.block * format.bits // 32)
    quants = 2 * GROUP * halves + 4 * (GROUP * steps + row)[..., None] + np.arange(4)
    return np.concatenate([*head, quants.reshape(GROUP, -1)], axis=1)
