"""The GGUF reader against the gguf package's reader and writer, and on files built byte by byte."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from llamajax.errors import CheckpointError
from llamajax.formats import FORMATS
from llamajax.weights.gguf import read_gguf

DENSE = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}

UINT32, STRING, ARRAY = GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def key(name: bytes, type_: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", type_) + value


def tensor(name: bytes, dims: list[int], format: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, format, offset)


def container(
    *,
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    """A GGUF file of these entries; the numbers of them default to the true ones."""
    keys, tensors = keys or [], tensors or []
    header = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    header += b"".join(keys + tensors)
    return header + bytes(-len(header) % 32) + data


def test_default_model(smollm2_gguf: Path) -> None:
    file, oracle = read_gguf(smollm2_gguf), GGUFReader(smollm2_gguf)
    assert list(file.tensors) == [expected.name for expected in oracle.tensors]
    assert len(file.tensors) == 272
    for expected in oracle.tensors:
        actual = file.tensors[expected.name]
        assert actual.shape == tuple(expected.shape[::-1].tolist())
        assert actual.format == expected.tensor_type.name.lower()
        assert actual.data.shape == expected.data.shape
        assert actual.data.dtype == expected.data.dtype
        assert np.array_equal(actual.data.view(np.uint8), expected.data.view(np.uint8))
    fields = {name: field for name, field in oracle.fields.items() if not name.startswith("GGUF.")}
    assert file.metadata.keys() == fields.keys()
    for name, field in fields.items():
        actual_value = file.metadata[name]
        if isinstance(actual_value, np.ndarray):
            actual_value = actual_value.tolist()
        assert actual_value == field.contents(), name


@pytest.mark.parametrize("format", [*DENSE, *FORMATS])
def test_every_format(tmp_path: Path, format: str) -> None:
    rng = np.random.default_rng(0)
    if format in DENSE:
        stored = rng.standard_normal((2, 3, 40)).astype(DENSE[format])
        raw, shape = stored.view(np.uint8), (2, 3, 40)
    else:
        _, weights, size = FORMATS[format]
        stored = raw = rng.integers(0, 256, (2, 3, 5 * size), dtype=np.uint8)
        shape = (2, 3, 5 * weights)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("a", np.arange(3, dtype=np.float32))
    writer.add_tensor("w", raw, raw_dtype=GGMLQuantizationType[format.upper()])
    finish(writer)

    file = read_gguf(tmp_path / "x.gguf")
    actual = file.tensors["w"]
    assert (actual.name, actual.shape, actual.format) == ("w", shape, format)
    assert actual.data.dtype == stored.dtype
    np.testing.assert_array_equal(actual.data, stored)
    assert not actual.data.flags.writeable
    np.testing.assert_array_equal(file.tensors["a"].data, [0, 1, 2])


def test_every_kind_of_value(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    scalars: dict[str, Any] = {
        "uint8": 200,
        "int8": -100,
        "uint16": 60_000,
        "int16": -30_000,
        "uint32": 4_000_000_000,
        "int32": -2_000_000_000,
        "float32": 0.5,
        "uint64": 2**63 + 1,
        "int64": -(2**62),
        "float64": 0.1,
        "bool": True,
        "string": "αβ🦙\n",
    }
    for kind, value in scalars.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_array("words", ["", "a", "🦙"])
    writer.add_array("floats", [0.5, -1.5])
    writer.add_array("bools", [True, False, True])
    finish(writer)

    metadata = read_gguf(tmp_path / "x.gguf").metadata
    for kind, value in scalars.items():
        assert metadata[kind] == value
        assert type(metadata[kind]) is type(value)
    assert metadata["words"] == ["", "a", "🦙"]
    assert metadata["floats"].dtype == np.float32
    assert metadata["floats"].tolist() == [0.5, -1.5]
    assert metadata["bools"].tolist() == [True, False, True]


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(alignment)
    tensors = {f"t{i}": np.arange(3 + i, dtype=np.float32) for i in range(3)}
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    finish(writer)
    for name, stored in read_gguf(tmp_path / "x.gguf").tensors.items():
        np.testing.assert_array_equal(stored.data, tensors[name])


def test_bytes_that_are_not_utf8_come_back(tmp_path: Path) -> None:
    tokens = [b"\xff", b"ok", b"\xf0\x9f"]
    array = struct.pack("<IQ", STRING, len(tokens)) + b"".join(map(string, tokens))
    (tmp_path / "x.gguf").write_bytes(container(keys=[key(b"tokens", ARRAY, array)]))
    actual = read_gguf(tmp_path / "x.gguf").metadata["tokens"]
    assert [token.encode("utf-8", "surrogateescape") for token in actual] == tokens


def test_version_2(tmp_path: Path) -> None:
    data = np.arange(4, dtype=np.float32).tobytes()
    (tmp_path / "x.gguf").write_bytes(container(version=2, tensors=[tensor(b"t", [4])], data=data))
    np.testing.assert_array_equal(read_gguf(tmp_path / "x.gguf").tensors["t"].data, [0, 1, 2, 3])


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model of five tensors in three files."""
    writer = GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_uint32("llama.block_count", 7)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 3 + i), i, np.float32))
    finish(writer)
    return sorted(tmp_path.iterdir())


def test_split_file(parts: list[Path]) -> None:
    assert [part.name for part in parts] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        file = read_gguf(part)
        assert file.metadata["llama.block_count"] == 7
        assert {name: stored.shape for name, stored in file.tensors.items()} == {f"t{i}": (2, 3 + i) for i in range(5)}
        assert all((stored.data == int(name[1])).all() for name, stored in file.tensors.items())


def test_split_file_problems(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match=r"'t2' is in two of the 3 parts"):
        read_gguf(parts[0])
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.gguf: No such file"):
        read_gguf(parts[0])
    with pytest.raises(CheckpointError, match=r"one of 3 parts, expected .*-00001-of-00003\.gguf"):
        read_gguf(parts[0].rename(parts[0].with_name("renamed.gguf")))


def test_truncated_download(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("t0", np.zeros((8, 32), np.float32))
    writer.add_tensor("t1", np.zeros((8, 32), np.float32))
    finish(writer)
    whole = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"tensor 't1' needs {len(whole)} bytes, found {len(whole) - 1}"):
        read_gguf(tmp_path / "x.gguf")


def test_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.gguf: No such file"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_gguf(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match=r"empty\.gguf: the file is empty"):
        read_gguf(tmp_path / "empty.gguf")


def test_big_endian(tmp_path: Path) -> None:
    finish(GGUFWriter(tmp_path / "x.gguf", "llama", endianess=gguf.GGUFEndian.BIG))
    with pytest.raises(CheckpointError, match="big-endian"):
        read_gguf(tmp_path / "x.gguf")


HUGE = 2**63
F32 = bytes(16)  # [4]

HOSTILE = {
    "other file": (b"PK\3\4" + bytes(64), "not a GGUF file"),
    "three bytes": (b"GGU", "truncated or corrupt: the header needs 4 bytes, found 3"),
    "version 1": (container(version=1), "GGUF version 1, expected 2 or 3"),
    "version 0": (container(version=0), "GGUF version 0"),
    "number of keys": (container(num_keys=HUGE), "truncated or corrupt"),
    "number of tensors": (container(num_tensors=HUGE), "truncated or corrupt"),
    "length of a key": (container(keys=[struct.pack("<Q", HUGE)]), "truncated or corrupt"),
    "length of a string": (
        container(keys=[key(b"k", STRING, struct.pack("<Q", 2**64 - 1))]),
        "truncated or corrupt",
    ),
    "number of strings": (
        container(keys=[key(b"k", ARRAY, struct.pack("<IQ", STRING, HUGE))]),
        "truncated or corrupt",
    ),
    "number of numbers": (
        container(keys=[key(b"k", ARRAY, struct.pack("<IQ", UINT32, 2**62))]),
        "truncated or corrupt",
    ),
    "array of arrays": (
        container(keys=[key(b"k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 10_000)]),
        "'k' holds values of unknown type 9",
    ),
    "type of a value": (container(keys=[key(b"k", 77, bytes(8))]), "'k' holds values of unknown type 77"),
    "key twice": (container(keys=[key(b"k", UINT32, bytes(4))] * 2), "key 'k' is there twice"),
    "tensor twice": (
        container(tensors=[tensor(b"t", [4]), tensor(b"t", [4], offset=32)], data=bytes(64)),
        "tensor 't' is there twice",
    ),
    "no dimensions": (container(tensors=[tensor(b"t", [])], data=F32), "0 dimensions, expected 1 to 4"),
    "five dimensions": (container(tensors=[tensor(b"t", [1] * 5)], data=F32), "5 dimensions"),
    "2**32 - 1 dimensions": (
        container(tensors=[string(b"t") + struct.pack("<I", 2**32 - 1)]),
        "4294967295 dimensions",
    ),
    "zero dimension": (container(tensors=[tensor(b"t", [4, 0])], data=F32), r"shape \(0, 4\)"),
    "huge dimension": (container(tensors=[tensor(b"t", [HUGE])], data=F32), "'t' needs .* bytes, found"),
    "product that wraps to 0": (
        container(tensors=[tensor(b"t", [2**32, 2**32])], data=F32),
        "'t' needs .* bytes, found",
    ),
    "partial block": (
        container(tensors=[tensor(b"t", [33], format=2)], data=bytes(36)),
        "rows of 33, not of q4_0's 32s",
    ),
    "format": (
        container(tensors=[tensor(b"t", [4], format=23)], data=F32),
        "format number 23, expected one of",
    ),
    "removed format": (container(tensors=[tensor(b"t", [4], format=4)], data=F32), "format number 4,"),
    "misaligned offset": (
        container(tensors=[tensor(b"t", [4], offset=4)], data=bytes(64)),
        "'t' is at offset 4, expected 0",
    ),
    "offset past the end": (container(tensors=[tensor(b"t", [4], offset=HUGE)], data=F32), "at offset"),
    "offset that wraps into the header": (
        container(tensors=[tensor(b"t", [4], offset=2**64 - 32)], data=F32),
        "at offset",
    ),
    "overlapping tensors": (
        container(tensors=[tensor(b"t", [16]), tensor(b"u", [16], offset=32)], data=bytes(128)),
        "'u' is at offset 32, expected 64",
    ),
    "alignment 0": (
        container(keys=[key(b"general.alignment", UINT32, struct.pack("<I", 0))]),
        "general.alignment is not a power of two",
    ),
    "alignment 24": (
        container(keys=[key(b"general.alignment", UINT32, struct.pack("<I", 24))]),
        "general.alignment is not a power of two",
    ),
    "alignment 'x'": (
        container(keys=[key(b"general.alignment", STRING, string(b"x"))]),
        "general.alignment is not a power of two",
    ),
    "alignment 2**31": (
        container(
            keys=[key(b"general.alignment", UINT32, struct.pack("<I", 2**31))],
            tensors=[tensor(b"t", [4])],
            data=F32,
        ),
        "'t' needs 2147483664 bytes, found",
    ),
    "name of two lines": (container(tensors=[tensor(b"a\nb\xff", [0])]), r"tensor 'a\\nb\\udcff' has shape"),
}


def test_false_count_is_seen_before_the_items_are_read(tmp_path: Path) -> None:
    zeros = bytes(2**23)  # a million empty strings, were they read
    strings = key(b"k", ARRAY, struct.pack("<IQ", STRING, 2**40))
    (tmp_path / "x.gguf").write_bytes(container(keys=[strings], data=zeros))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_gguf(tmp_path / "x.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(tmp_path: Path, case: str) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_gguf(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
