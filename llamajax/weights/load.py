"""Streams stored tensors into a model's parameters, one parameter at a time.

Decides how a weight is kept in memory. Knows nothing of files' formats beyond `StoredTensor`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llamajax.config import LlamaConfig
from llamajax.errors import CheckpointError
from llamajax.model.llama import Llama
from llamajax.ops import Weight, native, quantize_int8
from llamajax.ops.packed import PackedWeight, pack
from llamajax.ops.quantize import QUANTIZABLE, quantize
from llamajax.ops.quants import FORMATS, dequantize, split
from llamajax.types import DType
from llamajax.weights.names import IGNORED, Source, sources
from llamajax.weights.tensor import StoredTensor

# Named in one message at most; a wrong file would name hundreds.
_NAMED = 8
_Rows = TypeVar("_Rows", jax.Array, np.ndarray)


def load_weights(
    model: Llama,
    tensors: Mapping[str, StoredTensor],
    device: jax.Device,
    dtype: DType = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Puts the stored weights in place of the model's shapes.

    Args:
      model: a structure; it is changed.
      tensors: by the names of a Hugging Face, GGUF or Meta checkpoint.
      device: where the weights are put, and converted.
      dtype: "auto" keeps dense weights in the precision they were shipped in (but on a CPU f16 and the embeddings in
        f32, in which products take a third of the time), and quantized ones in their blocks on a CPU with the native
        kernels, elsewhere dense in bf16; "int8" keeps all with a scale for each output; "q8_0", "q4_0" and "q4_k" round
        to these blocks (the embeddings and the head to q8_0), kept as such or in bf16 as quantized ones are; another
        dtype makes all dense in it.
      progress: called with bytes read so far, and in all.

    Raises CheckpointError naming all missing, unexpected and misshapen tensors.
    """
    plan = sources(model.config, tensors)
    _check(plan, tensors)
    total = sum(tensors[source.name].data.nbytes for parts in plan.values() for source in parts)
    done = 0
    state = dict(nnx.to_flat_state(nnx.state(model)))
    for path, parts in plan.items():
        parameter = state[tuple(int(key) if key.isdigit() else key for key in path.split("."))]
        with jax.default_device(device):
            weight: Weight | None = _moved(parts, tensors, dtype, device.platform)
            if weight is None:
                weight = _convert(path, parts, tensors, dtype, device.platform)
        parameter.set_value(jax.block_until_ready(jax.device_put(weight, device)))
        for source in parts:
            done += tensors[source.name].data.nbytes
            tensors[source.name].release()
        progress(done, total)


def bytes_in_memory(
    config: LlamaConfig, tensors: Mapping[str, StoredTensor], dtype: DType = "auto", platform: str = "cpu"
) -> int:
    """What `load_weights` would take, from the tensors' shapes and formats alone."""
    plan = sources(config, tensors)
    _check(plan, tensors)
    converted = [
        jax.eval_shape(partial(_convert, path, parts, tensors, dtype, platform)) for path, parts in plan.items()
    ]
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(converted))


def keeps_blocks(platform: str) -> bool:
    """Whether weights can be kept in a file's blocks; else such weights are kept in bf16."""
    return platform == "cpu" and native.available()


def block_format(path: str, dtype: DType) -> str:
    """The blocks of a parameter: embeddings and the head, which decides between tokens, are worth 8 bits."""
    return dtype if "proj" in path else "q8_0"


def in_blocks(weight: jax.Array, name: str, packed: bool) -> Weight:
    """A weight rounded to a format's blocks, kept in them (packed) or in bf16."""
    parts = quantize(weight, name)
    return pack(parts, name) if packed else parts.dequantized().astype(jnp.bfloat16)


def _check(plan: Mapping[str, list[Source]], tensors: Mapping[str, StoredTensor]) -> None:
    expected = {source.name: source.shape for parts in plan.values() for source in parts}
    # A tied model's file may repeat the embedding as its head.
    known = {*expected, *IGNORED, "lm_head.weight"}
    problems = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in tensors],
        "unexpected": [f"{name} {tensor.shape}" for name, tensor in tensors.items() if name not in known],
        "misshapen": [
            f"{name} {tensors[name].shape}, expected {shape}"
            for name, shape in expected.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if any(problems.values()):
        raise CheckpointError(
            "the weights do not fit the configuration: "
            + "; ".join(f"{len(names)} {kind}: {_listed(names)}" for kind, names in problems.items() if names)
        )


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _moved(
    parts: list[Source], tensors: Mapping[str, StoredTensor], dtype: DType, platform: str
) -> PackedWeight | None:
    """What `_convert` makes of a matrix that is kept as it is stored, where its blocks need only be moved."""
    stored = [tensors[part.name] for part in parts]
    name = stored[0].format
    same = {tensor.format for tensor in stored} == {name} and name in native.MOVED_FORMATS
    if not same or len(parts[0].shape) != 2 or dtype != "auto" or not keeps_blocks(platform):
        return None
    order, begin = [], 0
    for part, tensor in zip(parts, stored, strict=True):
        rows = begin + np.arange(len(tensor.data))[:, None]
        order.append(_half_split(rows, part.interleaved_heads)[:, 0])
        begin += len(rows)
    return native.pack([tensor.data for tensor in stored], np.concatenate(order), name)


def _convert(
    path: str, parts: list[Source], tensors: Mapping[str, StoredTensor], dtype: DType, platform: str
) -> Weight:
    stored = [tensors[part.name] for part in parts]
    formats = tuple(tensor.format for tensor in stored)
    heads = tuple(part.interleaved_heads for part in parts)
    data = tuple(tensor.data for tensor in stored)
    is_matrix = len(parts[0].shape) == 2
    if dtype == "auto" and is_matrix and keeps_blocks(platform) and set(formats) <= FORMATS.keys():
        return _packed(data, formats, heads)
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
        kept = jnp.result_type(*(tensor.data.dtype for tensor in stored))
        if kept == jnp.float16 and platform == "cpu":
            kept = jnp.dtype(jnp.float32)
    if path == "embed_tokens.weight" and platform == "cpu" and dtype == "auto":
        # A tied head in bf16 makes a decoding loop on a CPU a third slower (SmolLM2-135M: 25 tokens/s instead of 37).
        kept = jnp.dtype(jnp.float32)
    return _dense(data, formats, heads, kept)


@partial(jax.jit, static_argnums=(1, 2))
def _packed(stored: tuple[jax.Array, ...], formats: tuple[str, ...], heads: tuple[int, ...]) -> Weight:
    """Parts in the blocks they are stored in: one weight if these are of one format, else one for each part."""
    parts = [
        jax.tree.map(partial(_half_split, num_heads=num_heads), split(data, format))
        for data, format, num_heads in zip(stored, formats, heads, strict=True)
    ]
    if len(set(formats)) == 1:
        return pack(jax.tree.map(lambda *x: jnp.concatenate(x), *parts), formats[0])
    return tuple(pack(part, format) for part, format in zip(parts, formats, strict=True))


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantized(
    stored: tuple[jax.Array, ...], formats: tuple[str, ...], heads: tuple[int, ...], name: str, packed: bool
) -> Weight:
    """Parts, rounded to a block format."""
    return in_blocks(_dense(stored, formats, heads, jnp.dtype(jnp.float32)), name, packed)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _dense(
    stored: tuple[jax.Array, ...], formats: tuple[str, ...], heads: tuple[int, ...], kept: np.dtype | None
) -> Weight:
    """Parts, dequantized, in one array, as it is kept (None: int8)."""
    rows = []
    for data, format, num_heads in zip(stored, formats, heads, strict=True):
        part = _half_split(dequantize(data, format) if format in FORMATS else data, num_heads)
        rows.append(quantize_int8(part) if kept is None else part.astype(kept))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)


def _half_split(rows: _Rows, num_heads: int) -> _Rows:
    """Rows of interleaved heads in half-split order; others as they are."""
    return rows.reshape(num_heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape) if num_heads else rows
