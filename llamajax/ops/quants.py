"""GGUF's quantized block formats: their sizes, what they are made of, and their weights as float32.

A row of K weights is stored as K / Format.weights blocks of Format.bytes bytes. The layouts and formulas are
ggml's (ggml-common.h, the `block_*` structs; ggml-quants.c, `dequantize_row_*`). Numbers are little-endian. A
block has a scale and sometimes an offset in f16; the 256 weights of a K format's block are in groups, each
with a small scale of its own in units of the block's.

The product of scales and quant has at most 24 significant bits (11 of f16, up to 7 of a group's scale, up to
6 of the quant), so float32 holds it exactly: a compiler may fuse it with the addition that follows, and the
result stays ggml's bit for bit.

Knows nothing of files or of linear layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float32, Int8, UInt8

from llamajax.formats import FORMATS

# IQ4_NL's quants are places in this list (ggml-common.h, `kvalues_iq4nl`).
_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


class Parts(NamedTuple):
    """What weights are made of: scale * quant + offset, scale and offset for a run of K / R quants each."""

    quants: Int8[Array, "... K"] | UInt8[Array, "... K"]
    scale: Float32[Array, "... R"]
    offset: Float32[Array, "... R"] | None = None

    def dequantized(self) -> Float32[Array, "... K"]:
        """The weights."""
        weights = self.scale[..., None] * self.quants.reshape(*self.scale.shape, -1).astype(jnp.float32)
        if self.offset is not None:
            weights = weights + self.offset[..., None]
        return weights.reshape(self.quants.shape)


def split(blocks: UInt8[Array, "... bytes"], format: str) -> Parts:
    """Rows of whole blocks, taken apart; `format` is a key of FORMATS."""
    rows = blocks.shape[:-1]
    parts = _SPLIT[format](blocks.reshape(*rows, -1, FORMATS[format].bytes))
    return jax.tree.map(lambda x: x.reshape(*rows, -1), parts)


def dequantize(blocks: UInt8[Array, "... bytes"], format: str) -> Float32[Array, "... K"]:
    """The weights of rows of whole blocks; `format` is a key of FORMATS."""
    return split(blocks, format).dequantized()


def _fields(block: Array, *sizes: int) -> list[Array]:
    """The fields of a block: these many bytes each, and the rest."""
    return jnp.split(block, [sum(sizes[: i + 1]) for i in range(len(sizes))], axis=-1)


def _f16(field: Array) -> Array:
    """[..., 2] bytes -> [..., 1] float32."""
    return lax.bitcast_convert_type(field, jnp.float16)[..., None].astype(jnp.float32)


def _unpack(field: Array, width: int, axis: int = -2) -> Array:
    """[..., n] bytes -> [..., 8 / width, n] integers of `width` bits along `axis`, the lowest first."""
    # On CPU, XLA makes two stacked halves up to 10 times faster than shifts by an iota, but four or eight
    # stacked parts up to 4 times slower.
    if width == 4:
        return jnp.stack([field & 15, field >> 4], axis)
    parts = jnp.repeat(jnp.expand_dims(field, axis), 8 // width, axis)
    shifts = lax.broadcasted_iota(jnp.uint8, parts.shape, parts.ndim + axis) * width
    return parts >> shifts & 2**width - 1


def _unpack_runs(field: Array, width: int, run: int) -> Array:
    """As _unpack, for each run of `run` bytes by itself, in a row."""
    *rows, size = field.shape
    return _unpack(field.reshape(*rows, -1, run), width).reshape(*rows, size * 8 // width)


def _six_bits(field: Array) -> tuple[Array, Array]:
    """[..., 12] bytes -> 8 scales and 8 minimums of 6 bits, as float32 (ggml's `get_scale_min_k4`).

    Bytes 0-3 and 4-7 are the first four scales and minimums, and above each the top two bits of one of the
    last four; bytes 8-11 are the low four bits of the last scales, and above them those of the last minimums.
    """
    scale, minimum, low = jnp.split(field, 3, axis=-1)
    scales = jnp.concatenate([scale & 63, (low & 15) | (scale >> 6 << 4)], axis=-1)
    minimums = jnp.concatenate([minimum & 63, (low >> 4) | (minimum >> 6 << 4)], axis=-1)
    return scales.astype(jnp.float32), minimums.astype(jnp.float32)


def _q4_0(block: Array) -> Parts:
    d, qs = _fields(block, 2)
    return Parts(_unpack(qs, 4).astype(jnp.int8) - 8, _f16(d))


def _q4_1(block: Array) -> Parts:
    d, m, qs = _fields(block, 2, 2)
    return Parts(_unpack(qs, 4), _f16(d), _f16(m))


def _five_bits(qs: Array, qh: Array) -> Array:
    """Quants whose fifth bits are a 32-bit word."""
    low = _unpack(qs, 4)
    return low | _unpack(qh, 1, axis=-1).reshape(low.shape) << 4


def _q5_0(block: Array) -> Parts:
    d, qh, qs = _fields(block, 2, 4)
    return Parts(_five_bits(qs, qh).astype(jnp.int8) - 16, _f16(d))


def _q5_1(block: Array) -> Parts:
    d, m, qh, qs = _fields(block, 2, 2, 4)
    return Parts(_five_bits(qs, qh), _f16(d), _f16(m))


def _q8_0(block: Array) -> Parts:
    d, qs = _fields(block, 2)
    return Parts(lax.bitcast_convert_type(qs, jnp.int8), _f16(d))


def _q2_k(block: Array) -> Parts:
    """16 groups, whose 4-bit scale and minimum share a byte."""
    groups, qs, d, dmin = _fields(block, 16, 64, 2)
    scales, minimums = (groups & 15).astype(jnp.float32), (groups >> 4).astype(jnp.float32)
    return Parts(_unpack_runs(qs, 2, 32), _f16(d) * scales, -_f16(dmin) * minimums)


def _q3_k(block: Array) -> Parts:
    """16 groups with signed 6-bit scales; the quants' third bits are stored apart."""
    qh, qs, low_scales, high_scales, d = _fields(block, 32, 64, 8, 4)
    scales = _unpack_runs(low_scales, 4, 8) | _unpack_runs(high_scales, 2, 4) << 4
    quants = _unpack_runs(qs, 2, 32) | _unpack_runs(qh, 1, 32) << 2
    return Parts(quants.astype(jnp.int8) - 4, _f16(d) * (scales.astype(jnp.float32) - 32))


def _q4_k(block: Array) -> Parts:
    """8 groups with 6-bit scales and minimums."""
    d, dmin, groups, qs = _fields(block, 2, 2, 12)
    scales, minimums = _six_bits(groups)
    return Parts(_unpack_runs(qs, 4, 32), _f16(d) * scales, -_f16(dmin) * minimums)


def _q5_k(block: Array) -> Parts:
    """As Q4_K; the quants' fifth bits are stored apart."""
    d, dmin, groups, qh, qs = _fields(block, 2, 2, 12, 32)
    scales, minimums = _six_bits(groups)
    quants = _unpack_runs(qs, 4, 32) | _unpack_runs(qh, 1, 32) << 4
    return Parts(quants, _f16(d) * scales, -_f16(dmin) * minimums)


def _q6_k(block: Array) -> Parts:
    """16 groups with signed 8-bit scales; the quants' top two bits are stored apart."""
    qs, qh, groups, d = _fields(block, 128, 64, 16)
    scales = lax.bitcast_convert_type(groups, jnp.int8).astype(jnp.float32)
    quants = _unpack_runs(qs, 4, 64) | _unpack_runs(qh, 2, 32) << 4
    return Parts(quants.astype(jnp.int8) - 32, _f16(d) * scales)


def _iq4_nl(block: Array) -> Parts:
    """As Q8_0, of 16 values only."""
    d, qs = _fields(block, 2)
    return Parts(jnp.asarray(_IQ4_VALUES)[_unpack(qs, 4)], _f16(d))


_SPLIT: dict[str, Callable[[Array], Parts]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
}
