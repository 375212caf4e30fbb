"""Reads GGUF files: metadata, and tensors mapped from disk as they are stored.

Knows the container (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3,
little-endian) and that a file may be hostile: every length is checked against the file's end before anything
of that length is read, made or looped over. Does not know what the metadata or the names mean.
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llamajax.errors import CheckpointError
from llamajax.formats import DENSE_DTYPES, FORMATS
from llamajax.weights.tensor import StoredTensor, map_file

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "u1",
    1: "i1",
    2: "u2",
    3: "i2",
    4: "u4",
    5: "i4",
    6: "f4",
    7: "?",
    10: "u8",
    11: "i8",
    12: "f8",
}

# ggml's number of a tensor format -> name, weights a block, bytes a block.
_FORMATS = {0: ("f32", 1, 4), 1: ("f16", 1, 2), 30: ("bf16", 1, 2)} | {
    ggml_type: (name, weights, size) for name, (ggml_type, weights, size) in FORMATS.items()
}

_LENGTH = struct.Struct("<Q")
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4  # GGML_MAX_DIMS

_PART_NAME = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file holds.

    Attributes:
      metadata: strings, ints, floats and bools; arrays are lists of strings or numpy arrays of numbers. A
        string's bytes that are not UTF-8 (a token may be any bytes) are lone surrogates, which
        `.encode("utf-8", "surrogateescape")` turns back.
      tensors: by name, in the file's order.
    """

    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(path: str | Path) -> GGUFFile:
    """Reads a file, or all parts of a model split as name-00001-of-0000N.gguf, given any of them.

    Raises:
      CheckpointError: a part is missing, truncated, corrupt, big-endian, of version 1, or has a tensor in a
        format other than F32, F16, BF16 and those of `ops.quants.FORMATS`.
    """
    path = Path(path)
    file = _read_part(path)
    count = file.metadata.get("split.count")
    if not isinstance(count, int) or count < 2:
        return file
    name = _PART_NAME.fullmatch(path.name)
    if name is None or int(name[2]) != count:
        raise CheckpointError(f"{path}: one of {count} parts, expected a file name ending in -00001-of-{count:05}.gguf")
    parts = [_read_part(path.with_name(f"{name[1]}-{number:05}-of-{count:05}.gguf")) for number in range(1, count + 1)]
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        if twice := tensors.keys() & part.tensors.keys():
            raise CheckpointError(f"{path}: tensor {min(twice)!r:.100} is in two of the {count} parts")
        tensors |= part.tensors
    return GGUFFile(parts[0].metadata, tensors)


class _TensorInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


def _read_part(path: Path) -> GGUFFile:
    reader = _Reader(path)
    if reader.take(4) != b"GGUF":
        raise reader.error("not a GGUF file")
    (version,) = reader.unpack("<I")
    if version and version % 65536 == 0:
        raise reader.error("big-endian GGUF, expected little-endian; convert it again")
    if version not in (2, 3):
        raise reader.error(f"GGUF version {version}, expected 2 or 3; convert it again")
    tensor_count, metadata_count = reader.unpack("<QQ")

    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = reader.string()
        if key in metadata:
            raise reader.error(f"corrupt: key {key!r:.100} is there twice")
        metadata[key] = reader.value(key)

    infos = [reader.tensor_info() for _ in range(tensor_count)]

    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise reader.error("corrupt: general.alignment is not a power of two")
    return GGUFFile(metadata, _map_tensors(reader, infos, alignment))


def _map_tensors(reader: "_Reader", infos: list[_TensorInfo], alignment: int) -> dict[str, StoredTensor]:
    """Views of the tensors' bytes, which are stored one after the other, each padded to the alignment."""
    start = _round_up(reader.position, alignment)
    bytes_ = np.frombuffer(reader.data, np.uint8)
    tensors: dict[str, StoredTensor] = {}
    expected = 0
    for name, shape, ggml_type, offset in infos:
        if name in tensors:
            raise reader.error(f"corrupt: tensor {name!r:.100} is there twice")
        format, weights, size = _FORMATS.get(ggml_type, ("", 0, 0))
        if not format:
            raise reader.error(
                f"tensor {name!r:.100} has format number {ggml_type}, expected one of "
                f"{', '.join(known for known, _, _ in _FORMATS.values())}; choose another quantization"
            )
        if shape[-1] % weights:
            raise reader.error(f"corrupt: tensor {name!r:.100} has rows of {shape[-1]}, not of {format}'s {weights}s")
        if offset != expected:
            raise reader.error(f"corrupt: tensor {name!r:.100} is at offset {offset}, expected {expected}")
        row = shape[-1] // weights * size
        begin, end = start + offset, start + offset + math.prod(shape[:-1]) * row
        if end > len(bytes_):
            raise reader.truncated(end, f"tensor {name!r:.100}")
        data = bytes_[begin:end].view(DENSE_DTYPES.get(format, np.uint8)).reshape(*shape[:-1], -1)
        tensors[name] = StoredTensor(name, shape, format, data)
        expected = _round_up(end - start, alignment)
    return tensors


def _round_up(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


class _Reader:
    """A position in a mapped file, which moves over what is read."""

    def __init__(self, path: Path):
        self.path = path
        self.data = map_file(path)
        self.position = 0

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")

    def truncated(self, end: int, what: str) -> CheckpointError:
        return self.error(f"truncated or corrupt: {what} needs {end} bytes, found {len(self.data)}; download it again")

    def take(self, size: int) -> bytes:
        begin, end = self.position, self.position + size
        if end > len(self.data):
            raise self.truncated(end, "the header")
        self.position = end
        return self.data[begin:end]

    def unpack(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """Vocabularies have 100,000s of them: the one loop here that must be quick."""
        if self.position + 8 * count > len(self.data):
            raise self.truncated(self.position + 8 * count, "the header")
        data, end, size = self.data, self.position, len(self.data)
        strings = []
        for _ in range(count):
            begin = end + 8
            end = begin + (_LENGTH.unpack_from(data, end)[0] if begin <= size else 0)
            if end > size:
                raise self.truncated(end, "the header")
            strings.append(data[begin:end].decode("utf-8", "surrogateescape"))
        self.position = end
        return strings

    def value(self, key: str) -> Any:
        (type_,) = self.unpack("<I")
        if type_ == _STRING:
            return self.string()
        if type_ != _ARRAY:
            return self.numbers(key, type_, 1).item()
        type_, count = self.unpack("<IQ")
        return self.strings(count) if type_ == _STRING else self.numbers(key, type_, count)

    def numbers(self, key: str, type_: int, count: int) -> np.ndarray:
        if type_ not in _NUMBERS:
            raise self.error(f"corrupt: {key!r:.100} holds values of unknown type {type_}")
        dtype = np.dtype(_NUMBERS[type_])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def tensor_info(self) -> _TensorInfo:
        name = self.string()
        (num_dims,) = self.unpack("<I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.error(f"corrupt: tensor {name!r:.100} has {num_dims} dimensions, expected 1 to {_MAX_DIMS}")
        # GGUF lists the fastest dimension first.
        shape = self.unpack(f"<{num_dims}Q")[::-1]
        if 0 in shape:
            raise self.error(f"corrupt: tensor {name!r:.100} has shape {shape}")
        return _TensorInfo(name, shape, *self.unpack("<IQ"))
