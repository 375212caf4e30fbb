"""How a model's parameters are kept in memory, and what that takes. Decides; moves and converts nothing.

Needs no jax: importing it takes long.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from typing import NamedTuple

from llamajax.config import LlamaConfig
from llamajax.errors import CheckpointError
from llamajax.formats import DENSE_DTYPES, DENSE_NAMES, FORMATS, GROUP, MOVED_FORMATS, PACKED_FORMATS
from llamajax.placement import Placement
from llamajax.types import DType
from llamajax.weights.names import Source, sources
from llamajax.weights.tensor import StoredTensor


class Kept(NamedTuple):
    """How a parameter is kept.

    Attributes:
      formats: of `llamajax.formats`, or "int8": one for all of it, or one for each of its parts.
      is_packed: for the native kernels.
      rounded_to: the blocks that it is rounded to, packed or dense.
      is_moved: whether it is packed as it is stored, by whole blocks.
    """

    formats: tuple[str, ...]
    is_packed: bool = False
    rounded_to: str | None = None
    is_moved: bool = False


def how_kept(path: str, parts: list[Source], tensors: Mapping[str, StoredTensor], placement: Placement) -> Kept:
    """How `load_weights` keeps a parameter that is made of these parts.

    Raises CheckpointError for rows that the blocks of `dtype` do not fit.
    """
    width, is_matrix = parts[0].shape[-1], len(parts[0].shape) == 2
    dtype, packs = placement.dtype, placement.has_kernels
    by_xla = placement.platform == "cpu" and not packs
    formats = tuple(tensors[part.name].format for part in parts)
    if len(set(formats)) == 1:
        formats = formats[:1]
    if not is_matrix:
        return Kept(("f32",))
    if dtype == "auto" and packs and FORMATS.keys() >= {*formats}:
        return Kept(formats, True, is_moved=len(formats) == 1 and formats[0] in MOVED_FORMATS)
    if dtype in FORMATS:
        name = block_format(path, dtype)
        if width % FORMATS[name].weights:
            raise CheckpointError(
                f"{parts[0].name} has rows of {width} numbers, {name} is for multiples of {FORMATS[name].weights}: "
                f"choose {'q8_0 or q4_0' if name == 'q4_k' else 'another dtype'}"
            )
        return Kept((name if packs else "bf16",), packs, rounded_to=name)
    if dtype == "int8":
        return Kept(("int8",))
    if dtype != "auto":
        name = DENSE_NAMES[dtype]
    elif FORMATS.keys() & {*formats}:
        name = "bf16"
    else:
        # f32 holds all numbers of bf16 and of f16.
        name = "f32" if len(formats) > 1 or formats[0] == "f64" else formats[0]
        name = "f32" if name == "f16" and by_xla else name
    if path == "embed_tokens.weight" and by_xla and dtype == "auto":
        # A tied head in bf16 makes a decoding loop on a CPU a third slower (SmolLM2-135M: 25 tokens/s instead of 37).
        name = "f32"
    return Kept((name,), packs, is_moved=packs and formats == (name,) and width % PACKED_FORMATS[name].block == 0)


def block_format(path: str, dtype: DType) -> str:
    """The blocks of a parameter: embeddings and the head, which decides between tokens, get 8 bits."""
    return dtype if "proj" in path else "q8_0"


def alike(paths: Iterable[str], kind: Callable[[str], Hashable] = lambda path: None) -> Collection[list[str]]:
    """Parameters' paths: together those of one kind that differ in their layer only."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for path in paths:
        groups[re.sub(r"\d+", "", path), kind(path)].append(path)
    return groups.values()


def bytes_in_memory(config: LlamaConfig, tensors: Mapping[str, StoredTensor], placement: Placement) -> int:
    """What `load_weights` would take, from the tensors' shapes and formats alone."""
    total = 0
    for path, parts in sources(config, tensors).items():
        kept = how_kept(path, parts, tensors, placement)
        rows = [part.shape[0] for part in parts]
        if len(kept.formats) == 1:
            rows = [sum(rows)]
        for number, format in zip(rows, kept.formats, strict=True):
            total += _bytes(format, (number, *parts[0].shape[1:]), kept.is_packed)
    return total


def _bytes(format: str, shape: tuple[int, ...], is_packed: bool) -> int:
    if format == "int8":
        return math.prod(shape) + DENSE_DTYPES["f32"].itemsize * shape[0]
    if not is_packed:
        return math.prod(shape) * DENSE_DTYPES[format].itemsize
    packed, (rows, width) = PACKED_FORMATS[format], shape
    return -(-rows // GROUP) * (packed.first_block + -(-width // packed.block) * packed.block_bytes)
