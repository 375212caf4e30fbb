"""The mapping of tensors."""

import sys
from pathlib import Path

import numpy as np
import pytest

from llamajax.weights.gguf import read_gguf
from llamajax.weights.tensor import StoredTensor


def mapped_kb() -> int:
    """Memory that the process takes for pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssFile:")[1].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="where the system tells what memory is of files")
def test_a_released_tensor_takes_no_memory_and_can_still_be_read(smollm2_gguf: Path) -> None:
    tensor = read_gguf(smollm2_gguf).tensors["token_embd.weight"]
    before = mapped_kb()
    content = tensor.data.copy()
    assert mapped_kb() - before > tensor.data.nbytes / 1024 * 0.9
    tensor.release()
    assert mapped_kb() - before < tensor.data.nbytes / 1024 * 0.1
    np.testing.assert_array_equal(tensor.data, content)


def test_what_is_not_mapped_is_left_alone() -> None:
    tensor = StoredTensor("x", (3, 4), "f32", np.ones((3, 4), np.float32))
    tensor.release()
    assert tensor.data.sum() == 12
