"""Loading a model for a command."""

import gc
from pathlib import Path

import jax  # noqa: F401 (imported before: the command then leaves its settings alone)
import pytest

from llamajax.errors import CheckpointError
from llamajax_cli import loading


def test_the_collector_is_on_again_after_a_load_that_failed(tmp_path: Path) -> None:
    broken = tmp_path / "model.gguf"
    broken.write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="truncated"):
        loading.load(str(broken), max_seq_len=None, dtype="auto", cache_dtype="auto", device=None)
    assert gc.isenabled()
