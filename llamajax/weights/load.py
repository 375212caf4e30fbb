"""Streams stored tensors into a model's weights, one parameter at a time, as `kept` says that they are kept.

Knows nothing of files' formats beyond `StoredTensor`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from llamajax.config import LlamaConfig
from llamajax.errors import CheckpointError
from llamajax.formats import DENSE_DTYPES, FORMATS
from llamajax.kernels import NOT_FINITE
from llamajax.ops import Parameter, Weight, native, quantize_int8
from llamajax.ops.packed import Fused, PackedWeight, pack, pack_dense, packed_layers
from llamajax.ops.quantize import quantize
from llamajax.ops.quants import dequantize, split
from llamajax.placement import Placement
from llamajax.weights.kept import Kept, alike, how_kept
from llamajax.weights.names import Source, sources
from llamajax.weights.packing import Packing, half_split, kind
from llamajax.weights.tensor import StoredTensor


def load_weights(
    config: LlamaConfig,
    tensors: Mapping[str, StoredTensor],
    placement: Placement,
    progress: Callable[[int, int], None] = lambda done, total: None,
    packing: Packing | None = None,
) -> dict[str, Parameter]:
    """The stored weights, by the paths of the model's parameters.

    Args:
      tensors: by the names of a Hugging Face, GGUF or Meta checkpoint; they fit the model (`check_fit`).
      placement: the device on which they are converted and kept, and their dtype. "auto" keeps dense weights in the
        precision of their file. (On a CPU without the native kernels, f16 and the embeddings become f32, in which
        products take a third of the time.) "auto" keeps quantized weights in their blocks on a CPU with the native
        kernels, and elsewhere dense in bf16. "int8" keeps all with a scale for each output. "q8_0", "q4_0" and "q4_k"
        round to these blocks (the embeddings and the head to q8_0), which are then kept as quantized weights are.
        Another dtype makes all dense in it.
      progress: called with bytes read so far, and in all.
      packing: of the same weights, if it has begun already.

    Raises CheckpointError for rows that the blocks of the dtype do not fit.
    """
    plan = sources(config, tensors)
    total = sum(tensors[source.name].data.nbytes for parts in plan.values() for source in parts)
    kept = {path: how_kept(path, parts, tensors, placement) for path, parts in plan.items()}
    done = 0

    def report() -> None:
        progress(done + (packing.num_bytes if packing else 0), total)

    def converted(paths: Iterable[str]) -> Iterator[Parameter]:
        """Each is made when the one before is taken, and what it was made of is given back."""
        nonlocal done
        for path in paths:
            stored = [tensors[part.name] for part in plan[path]]
            weight = _convert(path, plan[path], stored, kept[path])
            yield jax.block_until_ready(jax.device_put(weight, placement.device))
            for tensor in stored:
                done += tensor.data.nbytes
                tensor.release()
            report()

    def packed(group: Sequence[str]) -> Sequence[Parameter]:
        assert packing
        weights = packed_layers(*packing.wait(group, report))
        report()
        return weights

    with ExitStack() as stack:
        if packing is None and placement.has_kernels:
            packing = stack.enter_context(Packing(config, tensors, placement))
        loaded: dict[str, Parameter] = {}
        for group in alike(plan, kind(plan, tensors)):
            with jax.default_device(placement.device):
                is_moved = kept[group[0]].is_moved
                weights = packed(group) if is_moved else shared(converted(group), len(group), placement)
                loaded.update(zip(group, weights, strict=True))
    return loaded


def shared(weights: Iterator[Parameter], num_layers: int, placement: Placement) -> Iterable[Parameter]:
    """Layers' weights of one kind, in one array where the native kernels can read them there."""
    first = next(weights)
    weights = chain([first], weights)
    is_vector = isinstance(first, jax.Array) and first.ndim == 1
    read_in_place = is_vector or isinstance(first, PackedWeight | Fused)
    return native.stack(weights, num_layers) if num_layers > 1 and read_in_place and placement.has_kernels else weights


def in_blocks(weight: jax.Array, name: str, packed: bool) -> Parameter:
    """A weight rounded to a format's blocks, kept in them (packed) or in bf16."""
    parts = quantize(weight, name)
    return pack(parts, name) if packed else parts.dequantized().astype(jnp.bfloat16)


def _convert(path: str, parts: list[Source], stored: list[StoredTensor], kept: Kept) -> Parameter:
    formats = tuple(tensor.format for tensor in stored)
    heads = tuple(part.interleaved_heads for part in parts)
    data = tuple(tensor.data for tensor in stored)
    if kept == Kept(formats) and formats[0] in DENSE_DTYPES:
        # As it is stored. To compile a program for that would take 25 ms of each start.
        return jax.device_put(half_split(np.array(data[0]), heads[0]))
    if kept.rounded_to:
        return _quantized(data, formats, heads, kept.rounded_to, kept.is_packed)
    if kept.formats[0] in FORMATS:
        weight, finite = _packed(data, formats, heads)
        if not finite:
            raise CheckpointError(NOT_FINITE.format(path))
        return weight
    dtype = None if kept.formats == ("int8",) else DENSE_DTYPES[kept.formats[0]]
    return _dense(data, formats, heads, dtype, kept.is_packed)


@partial(jax.jit, static_argnums=(1, 2))
def _packed(
    stored: tuple[jax.Array, ...], formats: tuple[str, ...], heads: tuple[int, ...]
) -> tuple[Weight, Bool[jax.Array, ""]]:
    """Parts in the blocks they are stored in: one weight if these are of one format, else one for each part.

    And whether their scales and offsets are finite.
    """
    parts = [
        jax.tree.map(partial(half_split, num_heads=num_heads), split(data, format))
        for data, format, num_heads in zip(stored, formats, heads, strict=True)
    ]
    numbers = jax.tree.leaves([(part.scale, part.offset) for part in parts])
    finite = jnp.stack([jnp.isfinite(x).all() for x in numbers]).all()
    if len(set(formats)) == 1:
        return pack(jax.tree.map(lambda *x: jnp.concatenate(x), *parts), formats[0]), finite
    return Fused(tuple(pack(part, format) for part, format in zip(parts, formats, strict=True))), finite


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantized(
    stored: tuple[jax.Array, ...], formats: tuple[str, ...], heads: tuple[int, ...], name: str, packed: bool
) -> Parameter:
    """Parts, rounded to a block format."""
    return in_blocks(_dense(stored, formats, heads, jnp.dtype(jnp.float32)), name, packed)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _dense(
    stored: tuple[jax.Array, ...],
    formats: tuple[str, ...],
    heads: tuple[int, ...],
    kept: np.dtype | None,
    packed: bool = False,
) -> Parameter:
    """Parts, dequantized, in one array, as it is kept (None: int8)."""
    rows = []
    for data, format, num_heads in zip(stored, formats, heads, strict=True):
        part = half_split(dequantize(data, format) if format in FORMATS else data, num_heads)
        rows.append(quantize_int8(part) if kept is None else part.astype(kept))
    weight = jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
    return pack_dense(weight) if packed and kept is not None else weight
