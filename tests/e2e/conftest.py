"""A model for what does not depend on the answer."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from llamajax.weights.gguf import read_gguf

_LAYERS = 2


@pytest.fixture(scope="session")
def shallow_model(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first two layers of the default model: it babbles, but starts in half the time."""
    whole = read_gguf(smollm2_gguf)
    path = tmp_path_factory.mktemp("shallow") / "shallow.gguf"
    writer = GGUFWriter(path, whole.metadata["general.architecture"])
    for key, value in (whole.metadata | {"llama.block_count": _LAYERS}).items():
        if key != "general.architecture":
            value = value.tolist() if isinstance(value, np.ndarray) else value
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for name, tensor in whole.tensors.items():
        if not name.startswith("blk.") or int(name.split(".")[1]) < _LAYERS:
            writer.add_tensor(name, tensor.data, raw_dtype=GGMLQuantizationType[tensor.format.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
