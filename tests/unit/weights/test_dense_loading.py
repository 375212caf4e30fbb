"""Dense weights: kept as they are stored, in the order that the native kernels read."""

from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import llamajax
from llamajax.bench.session import kept_dtype
from llamajax.ops import PackedWeight, native
from llamajax.types import DType
from llamajax.weights.checkpoint import open_checkpoint
from llamajax.weights.kept import bytes_in_memory
from llamajax.weights.load import load_weights

from ...parity.tiny import CASES, state_dict, write_gguf, write_hf
from ...tiny_model import placed, rows_of

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.skipif(not native.available(), reason="no native kernels here")
@pytest.mark.parametrize("case", ["llama3.1-8b", "smollm2"])  # rows of whole blocks, and others
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", ["auto", *DTYPES])
def test_weights_are_packed_as_they_are_stored(case: str, stored: str, asked: DType, tmp_path: Path) -> None:
    weights = {name: array.astype(DTYPES[stored]) for name, array in state_dict(case).items()}
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", CASES[case], weights))
    placement = placed(checkpoint.config, asked, jax.devices("cpu")[0])
    loaded = load_weights(checkpoint.config, checkpoint.tensors, placement)
    kept = DTYPES[stored if asked == "auto" else asked]
    layer = "model.layers.1"
    for path, names in (
        ("embed_tokens", ["model.embed_tokens"]),
        ("layers.1.self_attn.qkv_proj", [f"{layer}.self_attn.{x}_proj" for x in "qkv"]),
        ("layers.1.mlp.down_proj", [f"{layer}.mlp.down_proj"]),
    ):
        weight = loaded[f"{path}.weight"]
        assert isinstance(weight, PackedWeight) and weight.format.numbers == np.dtype(kept).name
        expected = np.concatenate([weights[f"{name}.weight"] for name in names]).astype(kept)
        np.testing.assert_array_equal(rows_of(weight), expected.astype(np.float32))
    arrays = {id(x): x.nbytes for x in jax.tree.leaves(loaded) if isinstance(x, jax.Array)}
    assert bytes_in_memory(checkpoint.config, checkpoint.tensors, placement) == sum(arrays.values())


@pytest.mark.skipif(not native.available(), reason="no native kernels here")
def test_heads_of_a_gguf_are_half_split(tmp_path: Path) -> None:
    case = "llama3.1-8b"
    weights = {name: array.astype(np.float16) for name, array in state_dict(case).items()}
    loaded = []
    for path in (
        write_hf(tmp_path / "hf", CASES[case], weights),
        write_gguf(tmp_path / "model.gguf", CASES[case], weights, None),
    ):
        checkpoint = open_checkpoint(path)
        placement = placed(checkpoint.config, device=jax.devices("cpu")[0])
        loaded.append(load_weights(checkpoint.config, checkpoint.tensors, placement))
    for path, weight in loaded[0].items():
        if len(weight.shape) == 2:
            np.testing.assert_array_equal(rows_of(weight), rows_of(loaded[1][path]))


def test_the_kept_dtype_is_named_as_asked_for(smollm2_gguf: Path) -> None:
    assert kept_dtype(llamajax.load(smollm2_gguf, dtype="bfloat16", device="cpu")) == "bfloat16"
