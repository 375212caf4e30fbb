"""Reads safetensors checkpoints, one file or sharded, mapped from disk.

The safetensors library checks a file's header (sizes, offsets, overlaps, the file's end); the tensors are
then views of the map, because the library's own numpy tensors are copies. Does not know what names mean.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from llamajax.errors import CheckpointError
from llamajax.formats import DENSE_DTYPES
from llamajax.text import one_line
from llamajax.weights.tensor import StoredTensor, map_file


def read_safetensors(path: str | Path) -> dict[str, StoredTensor]:
    """Tensors by name, of a file or of a directory.

    In a directory, model.safetensors is read, or the shards of model.safetensors.index.json, or every
    *.safetensors but adapters.

    Raises:
      CheckpointError: a file or shard is missing, truncated or corrupt; a tensor is in two files, or in the
        index but in no shard.
    """
    path = Path(path)
    index = path / "model.safetensors.index.json"
    if not path.is_dir():
        return _read_file(path)
    if (path / "model.safetensors").is_file():
        return _read_file(path / "model.safetensors")
    if index.is_file():
        return _read_sharded(index)
    tensors = _read_files(file for file in sorted(path.glob("*.safetensors")) if not file.name.startswith("adapter"))
    if tensors:
        return tensors
    if pickles := sorted(file.name for suffix in ("bin", "pt", "pth") for file in path.glob(f"*.{suffix}")):
        raise CheckpointError(
            f"{path}: expected model.safetensors, found {pickles[0]}: pickled weights can run code, and are not read; "
            "convert them to safetensors"
        )
    raise CheckpointError(f"{path}: no tensors here, expected model.safetensors or {index.name}")


def _read_sharded(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: unreadable or not an index of shards; download it again") from None
    if outside:
        raise CheckpointError(f"{index}: expected files beside the index, found {outside[0]!r}")
    # Compared with the names in the directory, since the system raises other errors for names that cannot be.
    missing = sorted(set(shards) - {path.name for path in index.parent.iterdir()})
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(shards)} shards missing, first {missing[0]!r:.200}; download them"
        )
    tensors = _read_files(index.parent / shard for shard in shards)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(
            f"{index}: {len(absent)} tensors are not in the shards, first {absent[0]!r}; download them again"
        )
    return tensors


def _read_files(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in _read_file(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is in another file of this directory too")
            tensors[name] = tensor
    return tensors


def _read_file(path: Path) -> dict[str, StoredTensor]:
    data = map_file(path)
    try:
        safe_open(path, "numpy")
    except SafetensorError as error:
        reason = one_line(error, longest=200)
        raise CheckpointError(f"{path}: truncated or corrupt ({reason}); download it again") from None
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    bytes_ = np.frombuffer(data, np.uint8)[start:]
    tensors = {}
    for name, info in header.items():
        format, shape = info["dtype"].lower(), tuple(info["shape"])
        begin, end = info["data_offsets"]
        tensor = bytes_[begin:end]
        if format in DENSE_DTYPES:
            try:
                tensor = tensor.view(DENSE_DTYPES[format]).reshape(shape)
            except (ValueError, OverflowError) as error:  # more dimensions than numpy has, or larger ones
                raise CheckpointError(f"{path}: tensor {name!r} has an impossible shape ({error})") from None
        tensors[name] = StoredTensor(name, shape, format, tensor)
    return tensors
