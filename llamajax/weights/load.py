"""Streams stored tensors into a model's weights, one parameter at a time.

Decides how a weight is kept in memory. Knows nothing of files' formats beyond `StoredTensor`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from llamajax.config import LlamaConfig
from llamajax.errors import CheckpointError
from llamajax.ops import Weight, native, quantize_int8
from llamajax.ops.packed import PACKED_FORMATS, PackedWeight, pack, pack_dense
from llamajax.ops.quantize import QUANTIZABLE, quantize
from llamajax.ops.quants import FORMATS, dequantize, split
from llamajax.types import DType
from llamajax.weights.names import Source, sources
from llamajax.weights.tensor import StoredTensor

_Rows = TypeVar("_Rows", jax.Array, np.ndarray)


def load_weights(
    config: LlamaConfig,
    tensors: Mapping[str, StoredTensor],
    device: jax.Device,
    dtype: DType = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Weight]:
    """The stored weights, by the paths of the model's parameters.

    Args:
      tensors: by the names of a Hugging Face, GGUF or Meta checkpoint; they fit the model (`check_fit`).
      device: where the weights are put, and converted.
      dtype: "auto" keeps dense weights in the precision they were shipped in (but on a CPU without the native kernels
        f16 and the embeddings in f32, in which products take a third of the time), and quantized ones in their blocks
        on a CPU with the native kernels, elsewhere dense in bf16; "int8" keeps all with a scale for each output;
        "q8_0", "q4_0" and "q4_k" round to these blocks (the embeddings and the head to q8_0), kept as such or in bf16
        as quantized ones are; another dtype makes all dense in it.
      progress: called with bytes read so far, and in all.

    Raises CheckpointError for rows that the blocks of `dtype` do not fit.
    """
    plan = sources(config, tensors)
    total = sum(tensors[source.name].data.nbytes for parts in plan.values() for source in parts)
    done = 0

    def stored(paths: Iterable[str]) -> Iterator[list[StoredTensor]]:
        """What each is made of; given back when the next is asked for."""
        nonlocal done
        for path in paths:
            layer = [tensors[part.name] for part in plan[path]]
            yield layer
            for tensor in layer:
                done += tensor.data.nbytes
                tensor.release()
            progress(done, total)

    def converted(paths: Iterable[str]) -> Iterator[Weight]:
        for path, layer in zip(paths, stored(paths), strict=True):
            weight = _convert(path, plan[path], layer, dtype, device.platform)
            yield jax.block_until_ready(jax.device_put(weight, device))

    def formats(path: str) -> tuple[str, ...]:
        return tuple(tensors[part.name].format for part in plan[path])

    loaded: dict[str, Weight] = {}
    for group in alike(plan, formats):
        first = group[0]
        with jax.default_device(device):
            weights: Iterable[Weight]
            if _is_moved(plan[first], formats(first), dtype, device.platform):
                layers = ([tensor.data for tensor in layer] for layer in stored(group))
                weights = native.pack(layers, group, _rows_in_order(plan[first]), formats(first)[0])
            else:
                weights = shared(converted(group), len(group), device.platform)
            loaded.update(zip(group, weights, strict=True))
    return loaded


def alike(paths: Iterable[str], kind: Callable[[str], Hashable] = lambda path: None) -> Collection[list[str]]:
    """Parameters' paths: together those of one kind that differ in their layer only."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for path in paths:
        groups[re.sub(r"\d+", "", path), kind(path)].append(path)
    return groups.values()


def shared(weights: Iterator[Weight], num_layers: int, platform: str) -> Iterable[Weight]:
    """Layers' weights of one kind, in one array where the native kernels can read them there."""
    first = next(weights)
    weights = chain([first], weights)
    read_in_place = isinstance(first, PackedWeight | tuple) or len(first.shape) == 1
    return native.stack(weights, num_layers) if num_layers > 1 and read_in_place and keeps_blocks(platform) else weights


def bytes_in_memory(
    config: LlamaConfig, tensors: Mapping[str, StoredTensor], dtype: DType = "auto", platform: str = "cpu"
) -> int:
    """What `load_weights` would take, from the tensors' shapes and formats alone."""
    plan = sources(config, tensors)
    converted = [
        jax.eval_shape(partial(_convert, path, parts, [tensors[part.name] for part in parts], dtype, platform))
        for path, parts in plan.items()
    ]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(converted))


def keeps_blocks(platform: str) -> bool:
    """Whether weights are packed for the native kernels, quantized ones in a file's blocks; else these are bf16."""
    return platform == "cpu" and native.available()


def block_format(path: str, dtype: DType) -> str:
    """The blocks of a parameter: embeddings and the head, which decides between tokens, are worth 8 bits."""
    return dtype if "proj" in path else "q8_0"


def in_blocks(weight: jax.Array, name: str, packed: bool) -> Weight:
    """A weight rounded to a format's blocks, kept in them (packed) or in bf16."""
    parts = quantize(weight, name)
    return pack(parts, name) if packed else parts.dequantized().astype(jnp.bfloat16)


def _is_moved(sources: list[Source], formats: tuple[str, ...], dtype: DType, platform: str) -> bool:
    """Whether a matrix is kept as it is stored, and its blocks need only be moved."""
    if len(set(formats)) > 1 or formats[0] not in native.MOVED_FORMATS or len(sources[0].shape) != 2:
        return False
    format = PACKED_FORMATS[formats[0]]
    as_stored = dtype in ("auto", format.numbers) and sources[0].shape[1] % format.block == 0
    return as_stored and keeps_blocks(platform)


def _rows_in_order(sources: list[Source]) -> Int[np.ndarray, "N"]:
    """Which of the stored rows, one part's below the other's, become a parameter's."""
    order, begin = [], 0
    for source in sources:
        rows = begin + np.arange(source.shape[0])[:, None]
        order.append(_half_split(rows, source.interleaved_heads)[:, 0])
        begin += len(rows)
    return np.concatenate(order)


def _convert(path: str, parts: list[Source], stored: list[StoredTensor], dtype: DType, platform: str) -> Weight:
    formats = tuple(tensor.format for tensor in stored)
    heads = tuple(part.interleaved_heads for part in parts)
    data = tuple(tensor.data for tensor in stored)
    is_matrix = len(parts[0].shape) == 2
    by_xla = platform == "cpu" and not native.available()
    if dtype == "auto" and is_matrix and keeps_blocks(platform) and set(formats) <= FORMATS.keys():
        weight, finite = _packed(data, formats, heads)
        # Abstract where only the memory is asked for.
        if not isinstance(finite, jax.core.Tracer) and not finite:
            raise CheckpointError(native.NOT_FINITE.format(path))
        return weight
    if dtype in QUANTIZABLE and is_matrix:
        name = block_format(path, dtype)
        if parts[0].shape[1] % FORMATS[name].weights:
            raise CheckpointError(
                f"{parts[0].name} has rows of {parts[0].shape[1]} numbers, {name} is for multiples of "
                f"{FORMATS[name].weights}: choose {'q8_0 or q4_0' if name == 'q4_k' else 'another dtype'}"
            )
        return _quantized(data, formats, heads, name, keeps_blocks(platform))
    kept: np.dtype | None
    if not is_matrix:
        kept = jnp.dtype(jnp.float32)
    elif dtype == "int8":
        kept = None
    elif dtype != "auto":
        kept = jnp.dtype(dtype)
    elif any(format in FORMATS for format in formats):
        kept = jnp.dtype(jnp.bfloat16)
    else:
        kept = jnp.result_type(*(jnp.float32 if tensor.format == "f64" else tensor.data.dtype for tensor in stored))
        if kept == jnp.float16 and by_xla:
            kept = jnp.dtype(jnp.float32)
    if path == "embed_tokens.weight" and by_xla and dtype == "auto":
        # A tied head in bf16 makes a decoding loop on a CPU a third slower (SmolLM2-135M: 25 tokens/s instead of 37).
        kept = jnp.dtype(jnp.float32)
    return _dense(data, formats, heads, kept, is_matrix and keeps_blocks(platform))


@partial(jax.jit, static_argnums=(1, 2))
def _packed(
    stored: tuple[jax.Array, ...], formats: tuple[str, ...], heads: tuple[int, ...]
) -> tuple[Weight, Bool[jax.Array, ""]]:
    """Parts in the blocks they are stored in: one weight if these are of one format, else one for each part.

    And whether their scales and offsets are finite.
    """
    parts = [
        jax.tree.map(partial(_half_split, num_heads=num_heads), split(data, format))
        for data, format, num_heads in zip(stored, formats, heads, strict=True)
    ]
    numbers = jax.tree.leaves([(part.scale, part.offset) for part in parts])
    finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
    if len(set(formats)) == 1:
        return pack(jax.tree.map(lambda *x: jnp.concatenate(x), *parts), formats[0]), finite
    return tuple(pack(part, format) for part, format in zip(parts, formats, strict=True)), finite


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantized(
    stored: tuple[jax.Array, ...], formats: tuple[str, ...], heads: tuple[int, ...], name: str, packed: bool
) -> Weight:
    """Parts, rounded to a block format."""
    return in_blocks(_dense(stored, formats, heads, jnp.dtype(jnp.float32)), name, packed)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _dense(
    stored: tuple[jax.Array, ...],
    formats: tuple[str, ...],
    heads: tuple[int, ...],
    kept: np.dtype | None,
    packed: bool = False,
) -> Weight:
    """Parts, dequantized, in one array, as it is kept (None: int8)."""
    rows = []
    for data, format, num_heads in zip(stored, formats, heads, strict=True):
        part = _half_split(dequantize(data, format) if format in FORMATS else data, num_heads)
        rows.append(quantize_int8(part) if kept is None else part.astype(kept))
    weight = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
    return pack_dense(weight) if packed and kept is not None else weight


def _half_split(rows: _Rows, num_heads: int) -> _Rows:
    """Rows of interleaved heads in half-split order; others as they are."""
    return rows.reshape(num_heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape) if num_heads else rows
