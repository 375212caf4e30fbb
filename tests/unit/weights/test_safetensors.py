"""The safetensors reader on files that the safetensors library wrote, and on corrupt ones."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llamajax.errors import CheckpointError
from llamajax.weights.safetensors import read_safetensors

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64}


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def write(path: Path, header: dict[str, Any] | bytes, data: bytes = b"", size: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if size is None else size).to_bytes(8, "little") + raw + data)
    return path


def shard(directory: Path, files: dict[str, dict[str, np.ndarray]]) -> None:
    """Writes the files and the index that names their tensors."""
    for name, tensors in files.items():
        save_file(tensors, directory / name)
    index(directory, {tensor: name for name, tensors in files.items() for tensor in tensors})


def index(directory: Path, weight_map: Any) -> None:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("format", DTYPES)
def test_dtypes(tmp_path: Path, format: str) -> None:
    tensors = {
        "a.weight": normal(3, 5).astype(DTYPES[format]),
        "b": normal(7).astype(DTYPES[format]),
        "scalar": normal().astype(DTYPES[format]),
        "none": normal(0, 4).astype(DTYPES[format]),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    actual = read_safetensors(tmp_path / "x.safetensors")
    assert actual.keys() == tensors.keys()
    for name, expected in tensors.items():
        stored = actual[name]
        assert (stored.name, stored.shape, stored.format) == (name, expected.shape, format)
        assert stored.data.dtype == expected.dtype
        np.testing.assert_array_equal(stored.data, expected)
        assert not stored.data.flags.writeable


@pytest.mark.parametrize("format", DTYPES)
def test_odd_address(tmp_path: Path, format: str) -> None:
    expected = normal(6).astype(DTYPES[format])
    info = {"dtype": format.upper(), "shape": [2, 3], "data_offsets": [0, expected.nbytes]}
    header = json.dumps({"t": info}).encode()
    path = write(tmp_path / "x.safetensors", header + b" " * (1 - len(header) % 2), expected.tobytes())
    stored = read_safetensors(path)["t"]
    assert not stored.data.flags.aligned
    np.testing.assert_array_equal(stored.data.astype(np.float32), expected.astype(np.float32).reshape(2, 3))


def test_directory_of_one_file(tmp_path: Path) -> None:
    save_file({"t": normal(2)}, tmp_path / "model.safetensors")
    save_file({"other": normal(2)}, tmp_path / "consolidated.safetensors")
    assert read_safetensors(tmp_path).keys() == {"t"}


def test_sharded_directory(tmp_path: Path) -> None:
    a, b, c = normal(2, 3), normal(4).astype(np.float16), normal(5).astype(ml_dtypes.bfloat16)
    shard(tmp_path, {"model-00001-of-00002.safetensors": {"a": a, "b": b}, "other.safetensors": {"c": c}})
    save_file({"not in the index": a}, tmp_path / "adapter.safetensors")
    actual = read_safetensors(tmp_path)
    assert actual.keys() == {"a", "b", "c"}
    for name, expected in {"a": a, "b": b, "c": c}.items():
        np.testing.assert_array_equal(actual[name].data, expected)


def test_directory_without_index(tmp_path: Path) -> None:
    save_file({"a": normal(2)}, tmp_path / "consolidated.00.safetensors")
    save_file({"b": normal(2)}, tmp_path / "consolidated.01.safetensors")
    assert read_safetensors(tmp_path).keys() == {"a", "b"}


def test_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensors here, expected model\.safetensors or"):
        read_safetensors(tmp_path)


def test_adapters_are_not_weights(tmp_path: Path) -> None:
    save_file({"lora": normal(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="no tensors here"):
        read_safetensors(tmp_path)
    save_file({"t": normal(2)}, tmp_path / "model.fp16.safetensors")
    assert read_safetensors(tmp_path).keys() == {"t"}


def test_pickled_weights_are_named(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    with pytest.raises(CheckpointError, match=r"found pytorch_model-00001-of-00002\.bin: .*convert them"):
        read_safetensors(tmp_path)


def test_missing_shards(tmp_path: Path) -> None:
    shard(tmp_path, {f"{name}.safetensors": {name: normal(1)} for name in "abc"})
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 3 shards missing, first 'b\.safetensors'"):
        read_safetensors(tmp_path)


def test_tensor_that_is_not_in_its_shard(tmp_path: Path) -> None:
    shard(tmp_path, {"a.safetensors": {"a": normal(1)}})
    index(tmp_path, {"a": "a.safetensors", "b": "a.safetensors"})
    with pytest.raises(CheckpointError, match="1 tensors are not in the shards, first 'b'"):
        read_safetensors(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    shard(tmp_path, {"a.safetensors": {"a": normal(1), "t": normal(1)}, "b.safetensors": {"t": normal(1)}})
    with pytest.raises(CheckpointError, match=r"b\.safetensors: tensor 't' is in another file"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize("escape", ["../x.safetensors", "sub/x.safetensors", "/etc/passwd"])
def test_index_that_leaves_its_directory(tmp_path: Path, escape: str) -> None:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    save_file({"t": normal(1)}, tmp_path / "x.safetensors")
    save_file({"t": normal(1)}, model / "sub" / "x.safetensors")
    index(model, {"t": escape})
    with pytest.raises(CheckpointError, match=f"expected files beside the index, found '{escape}'"):
        read_safetensors(model)


@pytest.mark.parametrize("name", ["", ".", "..", "a\0.safetensors", "x" * 300, "\ud800"])
def test_index_of_odd_names(tmp_path: Path, name: str) -> None:
    index(tmp_path, {"t": name})
    with pytest.raises(CheckpointError, match=r"expected files beside|shards missing"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"t": 1}}', "[" * 100_000, "\udcff"]
)
def test_index_that_is_not_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="not an index of shards"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(("dtype", "size"), [("I64", 8), ("U16", 2), ("F8_E4M3", 1), ("BOOL", 1)])
def test_dtypes_that_are_not_for_weights_are_left_to_the_reader(tmp_path: Path, dtype: str, size: int) -> None:
    path = write(
        tmp_path / "x.safetensors",
        {"t": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}},
        bytes(2 * size),
    )
    stored = read_safetensors(path)["t"]
    assert (stored.format, stored.shape, stored.data.nbytes) == (dtype.lower(), (2,), 2 * size)


@pytest.mark.parametrize("shape", [(2**63, 0), (0, 2**62), (1,) * 100, (0,) * 65])
def test_shapes_that_numpy_lacks(tmp_path: Path, shape: tuple[int, ...]) -> None:
    size = 4 * int(np.prod(shape, dtype=object))
    path = write(tmp_path / "x.safetensors", {"t": info(*shape, begin=0, end=size)}, bytes(size))
    try:
        assert read_safetensors(path)["t"].shape == shape
    except CheckpointError as error:
        assert "impossible shape" in str(error)


def info(*shape: int, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


CORRUPT: dict[str, tuple[dict[str, Any] | bytes, bytes, int | None]] = {
    "size past the end": (b"{}", b"", 1000),
    "size of 2**63": (b"{}", b"", 2**63),
    "size of 2**64 - 8": (b"{}", b"", 2**64 - 8),
    "not JSON": (b"{]", b"", None),
    "not UTF-8": (b'{"\xff":{}}', b"", None),
    "nested deep": (b'{"t":' + b"[" * 100_000, b"", None),
    "data cut short": ({"t": info(4, begin=0, end=16)}, bytes(15), None),
    "data left over": ({"t": info(4, begin=0, end=16)}, bytes(17), None),
    "end before begin": ({"t": info(4, begin=16, end=0)}, bytes(16), None),
    "overlap": ({"t": info(4, begin=0, end=16), "u": info(4, begin=8, end=24)}, bytes(24), None),
    "offsets past the end": ({"t": info(4, begin=2**62, end=2**62 + 16)}, bytes(16), None),
    "shape that is not of the data": ({"t": info(5, begin=0, end=16)}, bytes(16), None),
    "product that wraps to 0": ({"t": info(2**32, 2**32, begin=0, end=0)}, b"", None),
    "negative shape": ({"t": info(-4, begin=0, end=16)}, bytes(16), None),
    "dtype of two lines": ({"t": info(4, begin=0, end=16, dtype="F\n32")}, bytes(16), None),
    "dtype of a megabyte": ({"t": info(4, begin=0, end=16, dtype="x" * 1_000_000)}, bytes(16), None),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_file(tmp_path: Path, case: str) -> None:
    header, data, size = CORRUPT[case]
    path = write(tmp_path / "x.safetensors", header, data, size)
    with pytest.raises(CheckpointError, match="truncated or corrupt") as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 500


def test_unreadable_paths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: No such file"):
        read_safetensors(tmp_path / "none.safetensors")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(CheckpointError, match="the file is empty"):
        read_safetensors(tmp_path / "empty.safetensors")
