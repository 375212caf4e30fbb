"""Weights as the native products take them: 16 rows beside each other.

A group of 16 rows is stored block by block, with 16 or 32 weights of each row in a block. Dense weights are numbers of
a row beside those of the next: two of bf16, one of f16 or f32. Zeros fill a row's last block. docs/kernels.md draws it.

A quantized weight is scale * (quant - zero) + offset. A block has the rows' scales in f16, their offsets in f16 if the
format has any, and the quants, four of a row beside four of the next. Quants of 4 bits share a byte: its low half is of
the block's first half.

For 4-bit quants with offsets, scale and offset are instead one beside the other, as int16, in units of a step (f32)
that each row has before its first block: cpu/matmul.h says why.

Quants of 5 and 6 bits take 8 here, as IQ4_NL's values do, and those of 2 and 3 take 4. A K format's scale is a product
of two numbers; where it is kept in f16, it is rounded to one part in 2048.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Int16, Shaped, UInt8

from llamajax.formats import DENSE_NAMES, GROUP, PACKED_FORMATS, PackedFormat
from llamajax.ops import native
from llamajax.ops.quants import Parts
from llamajax.ops.stacked import Stacked, alone
from llamajax.ops.weight import Norm, Weight

_LARGEST = np.float32(2**15 - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight(Weight):
    """A weight of shape [N, K]; rows of zeros fill its last group. `name` is a key of PACKED_FORMATS."""

    data: UInt8[Array, "N/16 bytes"] | Stacked
    shape: tuple[int, int] = field(metadata={"static": True})
    name: str = field(metadata={"static": True})

    @property
    def format(self) -> PackedFormat:
        return PACKED_FORMATS[self.name]

    def product(self, x: Float32[Array, "T K"]) -> Float32[Array, "T N"]:
        return self.linear(x)

    def linear(
        self, x: Float32[Array, "T K"], norm: Norm | None = None, residual: Float32[Array, "T N"] | None = None
    ) -> Float32[Array, "T N"]:
        operation = _operation(0.0 if norm is None else norm.eps, gated=False)
        return operation(x, self, norm and norm.weight, residual)

    def gated_linear(self, x: Float32[Array, "T K"], norm: Norm) -> Float32[Array, "T N/2"]:
        if self.shape[0] % (2 * GROUP):
            return super().gated_linear(x, norm)
        return _operation(norm.eps, gated=True)(x, self, norm.weight, None)

    def rows(self, ids: Int[Array, "T"]) -> Float32[Array, "T K"]:
        format, T = self.format, len(ids)
        if format.is_dense:
            words = alone(self.data).reshape(self.data.shape[0], -1, GROUP, format.word_bytes)
            numbers = words[ids // GROUP, :, ids % GROUP].reshape(T, -1, format.bits // 8)
            return lax.bitcast_convert_type(numbers, format.numbers)[:, : self.shape[1]].astype(jnp.float32)
        steps, blocks = jnp.split(alone(self.data)[ids // GROUP], [format.first_block], axis=-1)
        columns = jnp.asarray(_columns(format))[ids % GROUP]
        block = jnp.take_along_axis(blocks.reshape(T, -1, format.block_bytes), columns[:, None], axis=-1)
        scale, offset, quants = jnp.split(block, [2, format.head_bytes], axis=-1)
        if format.bits == 4:
            quants = jnp.concatenate([quants & 15, quants >> 4], axis=-1)
        kept = jnp.int16 if format.has_steps else jnp.float16
        weights = _numbers(scale, kept) * (quants.astype(jnp.float32) - format.zero)
        if format.has_offsets:
            weights = weights + _numbers(offset, kept)
        weights = weights.reshape(T, -1)
        if format.has_steps:
            steps = lax.bitcast_convert_type(steps.reshape(T, GROUP, 4), jnp.float32)
            weights = weights * jnp.take_along_axis(steps, ids[:, None] % GROUP, axis=1)
        return weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fused(Weight):
    """Weights one below the other, whose formats differ."""

    parts: tuple[PackedWeight, ...]

    def product(self, x: Float32[Array, "T K"]) -> Float32[Array, "T N"]:
        return jnp.concatenate([part.product(x) for part in self.parts], axis=-1)


@cache
def _operation(eps: float, gated: bool) -> Callable[..., Array]:
    native_linear = partial(native.linear, eps=eps, gated=gated)
    product = custom_vmap(native_linear)

    @product.def_vmap
    def _(
        axis_size: int, in_batched: list, x: Array, weight: PackedWeight, norm: Array | None, residual: Array | None
    ) -> tuple[Array, bool]:
        assert not any(jax.tree.leaves(in_batched[1:3])), "weights are never batched"
        x, residual = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), (x, residual))
        rows = native_linear(x, weight, norm, residual)
        return rows.reshape(axis_size, -1, rows.shape[1]), True

    return product


def packed_layers(data: UInt8[np.ndarray, "L N/16 bytes"], shape: tuple[int, int], name: str) -> list[PackedWeight]:
    """The weights of layers, [N, K], as `kernels.pack` has made them."""
    return [PackedWeight(array, shape, name) for array in native.layers_of(data)]


def pack_dense(weight: Float[Array, "N K"]) -> PackedWeight:
    """Packs rows of f32, f16 or bf16 as they are."""
    name = DENSE_NAMES[weight.dtype.name]
    format = PACKED_FORMATS[name]
    N, K = weight.shape
    rows = jnp.pad(weight, ((0, -N % GROUP), (0, -K % format.block)))
    words = rows.reshape(len(rows) // GROUP, GROUP, -1, 8 * format.word_bytes // format.bits)
    if words.shape[-1] > 1:
        words = lax.bitcast_convert_type(words, jnp.uint32)[..., None]
    return PackedWeight(_bytes(words.swapaxes(1, 2), (len(words),)), (N, K), name)


def pack(parts: Parts, name: str) -> PackedWeight:
    """Packs rows of a quantized format, [N, K]."""
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
    steps = jnp.zeros((groups, 0))
    if offset is not None and format.has_steps:
        steps, pairs = _in_steps(scale, offset + format.zero * scale)
        heads = [pairs]
    else:
        heads = [x.astype(jnp.float16) for x in (scale, offset) if x is not None]
    fields = [x.reshape(groups, GROUP, blocks, -1).swapaxes(1, 2) for x in heads] + [fours.transpose(0, 2, 3, 1)]
    of_blocks = jnp.concatenate([_bytes(x, (groups, blocks)) for x in fields], axis=-1).reshape(groups, -1)
    return PackedWeight(jnp.concatenate([_bytes(steps, (groups,)), of_blocks], axis=-1), (num_rows, K), name)


def _in_steps(
    scale: Float32[Array, "N R"], offset: Float32[Array, "N R"]
) -> tuple[Float32[Array, "N"], Int16[Array, "N R 2"]]:
    """Both as multiples of their row's largest magnitude / (2^15 - 1), and these steps."""
    numbers = jnp.stack([scale, offset], axis=-1)
    most = jnp.abs(numbers).max(axis=(1, 2))
    inverse = jnp.where(most > 0, _LARGEST / jnp.where(most > 0, most, 1), 0)
    return most * (1 / _LARGEST), jnp.round(numbers * inverse[:, None, None]).astype(jnp.int16)


def _bytes(x: Shaped[Array, "..."], shape: tuple[int, ...]) -> UInt8[Array, "*shape bytes"]:
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(*shape, -1)


def _numbers(pairs: UInt8[Array, "... 2"], dtype: DTypeLike) -> Float32[Array, "... 1"]:
    return lax.bitcast_convert_type(pairs, dtype).astype(jnp.float32)[..., None]


@cache
def _columns(format: PackedFormat) -> Int[np.ndarray, "16 bytes"]:
    """Where in a group's block each row's bytes are: scale, offset, quants."""
    row = np.arange(GROUP)[:, None]
    fields = 1 + format.has_offsets
    from_row, from_field = (2 * fields, 2) if format.has_steps else (2, 2 * GROUP)
    head = [from_row * row + from_field * i + np.arange(2) for i in range(fields)]
    steps = np.arange(format.block * format.bits // 32)
    quants = 2 * GROUP * fields + 4 * (GROUP * steps + row)[..., None] + np.arange(4)
    return np.concatenate([*head, quants.reshape(GROUP, -1)], axis=1)
