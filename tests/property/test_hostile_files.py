"""Whatever happens to a checkpoint file, it loads or is refused with a CheckpointError, in little memory."""

import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from llamajax.errors import CheckpointError
from llamajax.weights.gguf import read_gguf
from llamajax.weights.safetensors import read_safetensors
from llamajax.weights.tensor import StoredTensor

Reader = Callable[[Path], Mapping[str, StoredTensor]]

# The files are of about a kilobyte.
MAX_BYTES = 2**20

# The deadline is there for endless loops, not for speed.
checked = settings(max_examples=300, deadline=10_000)

HUGE = st.sampled_from([2**31, 2**32 - 1, 2**32, 2**40, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1])


class Sample:
    """A small valid file: its bytes, where its header ends, and what reads it."""

    def __init__(self, path: Path, reader: Reader, header: int):
        self.path, self.reader, self.header = path, reader, header
        self.content = path.read_bytes()
        assert self.reader(path)

    def read(self, content: bytes) -> Mapping[str, StoredTensor] | None:
        """The tensors of a file of these bytes, looked at to the last; None if it was refused."""
        self.path.unlink()  # bytes that are still mapped must not be cut
        self.path.write_bytes(content)
        tracemalloc.start()
        try:
            tensors = self.reader(self.path)
            for tensor in tensors.values():
                assert tensor.data.tobytes() in content
        except CheckpointError as error:
            assert "\n" not in str(error)
            return None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MAX_BYTES
        return tensors


@pytest.fixture(scope="module", params=["gguf", "safetensors"])
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    path = tmp_path_factory.mktemp("hostile") / f"x.{request.param}"
    tensors: dict[str, Any] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(3, dtype=np.float16),
        "c": np.arange(8, dtype=np.float32).astype(ml_dtypes.bfloat16),
    }
    if request.param == "safetensors":
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
        return Sample(path, read_safetensors, 8 + int.from_bytes(path.read_bytes()[:8], "little"))
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("words", ["a", "", "🦙"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("flag", True)
    writer.add_tensor("a", tensors["a"])
    writer.add_tensor("b", tensors["b"])
    writer.add_tensor("q", np.arange(40, dtype=np.uint8), raw_dtype=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = path.read_bytes()
    return Sample(path, lambda file: read_gguf(file).tensors, content.index(tensors["a"].tobytes()))


def test_every_truncation_is_refused(sample: Sample) -> None:
    tensors = sample.read(sample.content)
    assert tensors is not None
    last = list(tensors.values())[-1].data.tobytes()
    end = sample.content.rindex(last) + len(last)  # a GGUF's last tensor is padded
    for size in range(end):
        assert sample.read(sample.content[:size]) is None


@checked
@given(st.data())
def test_flipped_bytes(sample: Sample, data: st.DataObject) -> None:
    content = bytearray(sample.content)
    position = st.integers(0, sample.header - 1)
    for index, byte in data.draw(st.lists(st.tuples(position, st.integers(0, 255)), min_size=1, max_size=4)):
        content[index] = byte
    sample.read(bytes(content))


@checked
@given(st.data())
def test_huge_numbers(sample: Sample, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([4, 8]))
    number = data.draw(HUGE) % 2 ** (8 * size)
    index = data.draw(st.integers(0, sample.header - size))
    sample.read(sample.content[:index] + number.to_bytes(size, "little") + sample.content[index + size :])


@pytest.mark.parametrize("sample", ["safetensors"], indirect=True)
@checked
@given(st.data())
def test_huge_numbers_in_text(sample: Sample, data: st.DataObject) -> None:
    """A safetensors header is text: one of its digits becomes a number, and its length stays true."""
    header, tensors = sample.content[8 : sample.header], sample.content[sample.header :]
    index = data.draw(st.sampled_from([i for i, byte in enumerate(header) if chr(byte).isdigit()]))
    header = header[:index] + str(data.draw(HUGE)).encode() + header[index + 1 :]
    sample.read(len(header).to_bytes(8, "little") + header + tensors)


@checked
@given(st.binary(max_size=200))
def test_anything_after_the_first_bytes(sample: Sample, tail: bytes) -> None:
    sample.read(sample.content[:8] + tail)
