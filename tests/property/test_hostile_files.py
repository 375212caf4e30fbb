"""Whatever happens to a file or a request, it is read or refused with a LlamaJaxError, in little memory.

`scripts/fuzz.py` tries many more of the same inputs, and loads and asks some of the models.
"""

import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import pytest

from llamajax.errors import CheckpointError, LlamaJaxError
from llamajax.weights.gguf import read_gguf
from llamajax.weights.safetensors import read_safetensors
from llamajax.weights.tensor import StoredTensor

from .hostile import cases, subjects
from .hostile.mutations import HUGE, mutate_bytes

MAX_BYTES = 2**20  # files are of some ten kilobytes


@pytest.mark.parametrize("kind", cases.CASES)
def test_broken_files_and_requests(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "LOADED", 0)
    outcomes = {cases.run(kind, seed, _empty(tmp_path / str(seed))) for seed in range(20)}
    assert outcomes <= {"answered", "refused"}


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.fixture(params=["gguf", "safetensors"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[bytes], Mapping[str, StoredTensor]]:
    """Reads a file of these bytes, in little memory."""
    path = tmp_path / f"x.{request.param}"

    def read(content: bytes) -> Mapping[str, StoredTensor]:
        path.unlink(missing_ok=True)  # bytes that are still mapped must not be cut
        path.write_bytes(content)
        tracemalloc.start()
        try:
            return read_gguf(path).tensors if request.param == "gguf" else read_safetensors(path)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MAX_BYTES

    return read


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> tuple[bytes, int]:
    """A file of the reader's kind, and the length of its header."""
    if request.node.callspec.params["reader"] == "safetensors":
        content = subjects.directory()["model.safetensors"]
        return content, 8 + int.from_bytes(content[:8], "little")
    file = subjects.tiny_gguf("q4_0")
    content = file.to_bytes()
    return content, content.index(file.tensors[0].data)


def test_truncations_are_refused(reader: Callable[[bytes], object], whole: tuple[bytes, int]) -> None:
    content, header = whole
    assert reader(content)
    for size in [*range(0, header, 11), *range(header, len(content), 997), len(content) - 1]:
        with pytest.raises(CheckpointError):
            reader(content[:size])


def test_huge_numbers_take_no_memory(reader: Callable[[bytes], object], whole: tuple[bytes, int]) -> None:
    content, header = whole
    for number in HUGE:
        for at in range(0, header - 8, 211):
            _read(reader, content[:at] + (number % 2**64).to_bytes(8, "little") + content[at + 8 :])


def test_changed_bytes_take_no_memory(reader: Callable[[bytes], object], whole: tuple[bytes, int]) -> None:
    content, header = whole
    for seed in range(300):
        _read(reader, mutate_bytes(Random(seed), content, header))


def _read(reader: Callable[[bytes], object], content: bytes) -> None:
    try:
        reader(content)
    except LlamaJaxError as error:
        assert "\n" not in str(error)
