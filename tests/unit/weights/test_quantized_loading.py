"""Weights that are rounded to blocks while they are loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

import llamajax
from llamajax.bench.session import kept_dtype
from llamajax.engine.runner import Runner
from llamajax.errors import CheckpointError
from llamajax.formats import FORMATS
from llamajax.model import llama
from llamajax.model.llama import Llama
from llamajax.ops import native
from llamajax.types import DType
from llamajax.weights.checkpoint import open_checkpoint
from llamajax.weights.kept import bytes_in_memory
from llamajax.weights.load import load_weights
from llamajax.weights.tensor import StoredTensor

from ...caches import caches
from ...tiny_model import placed, rows_of
from ..ops.test_quants import random_blocks


def log_probabilities(llm: llamajax.LLM) -> np.ndarray:
    logits = llm.logits(llm.tokenizer.encode("The first of May is a holiday in many countries of the world."))
    return logits - np.log(np.exp(logits.astype(float)).sum(axis=1, keepdims=True))


def test_q8_0_is_near_and_q4_0_is_not_so_near(smollm2_gguf: Path) -> None:
    exact = log_probabilities(llamajax.load(smollm2_gguf, dtype="float32"))
    divergence = {}
    for name in ("q8_0", "q4_0"):
        llm = llamajax.load(smollm2_gguf, dtype=name)
        # The tied embeddings have eight bits in any case.
        blocks = {"q8_0": "q8_0", "q4_0": "q4_0+q8_0"}[name]
        assert kept_dtype(llm) == (blocks if native.available() else "bfloat16")
        divergence[name] = (np.exp(exact) * (exact - log_probabilities(llm))).sum(axis=1).mean()
    assert 0 < divergence["q8_0"] < 0.02 < divergence["q4_0"] < 1


def test_rows_that_are_no_whole_blocks_are_refused(smollm2_gguf: Path) -> None:
    with pytest.raises(CheckpointError, match="rows of 576 numbers, q4_k is for multiples of 256: choose q8_0 or q4_0"):
        llamajax.load(smollm2_gguf, dtype="q4_k")


@pytest.mark.parametrize("dtype", get_args(DType))
def test_the_memory_that_weights_take_is_known_beforehand(smollm2_gguf: Path, dtype: DType) -> None:
    """Of blocks of one format, of several in a layer, and of what is rounded."""
    checkpoint = open_checkpoint(smollm2_gguf)
    config = replace(checkpoint.config, num_hidden_layers=2)
    tensors = {name: x for name, x in checkpoint.tensors.items() if not name.startswith("blk.") or name[4:6] in "0.1."}
    tensors["blk.0.attn_v.weight"] = in_q8_0(tensors["blk.0.attn_v.weight"])
    placement = placed(config, dtype, jax.devices("cpu")[0])
    if dtype == "q4_k":
        with pytest.raises(CheckpointError, match="multiples of 256"):
            bytes_in_memory(config, tensors, placement)
        return
    loaded = jax.tree.leaves(load_weights(config, tensors, placement))
    arrays = {id(x): x.nbytes for x in loaded if isinstance(x, jax.Array)}
    assert bytes_in_memory(config, tensors, placement) == sum(arrays.values())


def in_q8_0(stored: StoredTensor) -> StoredTensor:
    blocks = gguf.quantize(dequantized(stored), GGMLQuantizationType.Q8_0)
    return StoredTensor(stored.name, stored.shape, "q8_0", blocks)


def test_layers_may_be_of_different_formats(smollm2_gguf: Path) -> None:
    """As in files of mixed formats: more bits in some layers, and for some of a fused weight's parts."""
    checkpoint = open_checkpoint(smollm2_gguf)
    tensors = dict(checkpoint.tensors)
    for layer in (0, 3, 29):
        for name in (f"blk.{layer}.ffn_down.weight", f"blk.{layer}.attn_v.weight"):
            tensors[name] = in_q8_0(tensors[name])
    weights = load_weights(checkpoint.config, tensors, placed(checkpoint.config))
    for layer in range(30):
        found = rows_of(weights[f"layers.{layer}.mlp.down_proj.weight"])
        stored = dequantized(tensors[f"blk.{layer}.ffn_down.weight"])
        # Of the row's largest: scales may be rounded to 15 bits, and meet quants of up to 8 there.
        assert (np.abs(found - stored) <= 2.0**-12 * np.abs(stored).max(axis=1, keepdims=True)).all()
    plain = llamajax.load(smollm2_gguf)
    ids = plain.tokenizer.encode("The first of May is a holiday in many countries of the world.")
    scores = Runner(checkpoint.config, weights, placed(checkpoint.config)).logits(ids)
    assert np.abs(scores - plain.logits(ids)).mean() < 0.5


@pytest.mark.skipif(not native.available(), reason="no native kernels here")
def test_layers_of_one_kind_run_in_a_loop(smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits as one after the other."""
    checkpoint = open_checkpoint(smollm2_gguf)
    config = replace(checkpoint.config, num_hidden_layers=9)
    tensors = {name: x for name, x in checkpoint.tensors.items() if not name.startswith("blk.") or name[5] == "."}
    for layer in (3, 4, 8):
        name = f"blk.{layer}.attn_v.weight"
        tensors[name] = in_q8_0(tensors[name])
    tensors = {name: x for name, x in tensors.items() if not name.startswith("blk.9.")}
    model = Llama.with_weights(config, load_weights(config, tensors, placed(config, device=jax.devices("cpu")[0])))
    (cache,) = caches(config, 70, np.float16)
    loops = []

    def scores(looped: bool) -> tuple[jax.Array, ...]:
        def runs(layers: Any, shared: bool) -> list[range]:
            found = list(every_run(layers, shared and looped))
            loops.append([len(run) for run in found])
            return found

        monkeypatch.setattr(llama, "_runs", runs)
        x, written = jax.jit(lambda ids: model(ids, cache, jnp.int32(3)))(np.arange(20, dtype=np.int32))
        return x, *written[0]

    every_run = llama._runs
    for found, expected in zip(scores(True), scores(False), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert loops == [[3, 2, 3], [1] * 8]


def test_iq4_nl_is_kept_as_it_is(smollm2_gguf: Path) -> None:
    """What files of smaller formats hold where rows are no multiples of 256; the loader stacks their layers."""
    checkpoint = open_checkpoint(smollm2_gguf)
    tensors = dict(checkpoint.tensors)
    for layer in range(30):
        name = f"blk.{layer}.attn_output.weight"
        blocks = random_blocks("iq4_nl", 576, 18, seed=layer, small=True)
        tensors[name] = StoredTensor(name, (576, 576), "iq4_nl", blocks)
    weights = load_weights(checkpoint.config, tensors, placed(checkpoint.config))
    for layer in (0, 29):
        found = rows_of(weights[f"layers.{layer}.self_attn.o_proj.weight"])
        stored = dequantized(tensors[f"blk.{layer}.attn_output.weight"])
        np.testing.assert_array_equal(np.asarray(found), stored if native.available() else stored.astype(jnp.bfloat16))


@pytest.mark.skipif(not native.available(), reason="no native kernels here")
@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q5_1"])
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
def test_a_scale_that_is_not_finite_is_named(smollm2_gguf: Path, format: str, value: float) -> None:
    """In any matrix: a few weights that are not numbers need not show in an answer."""
    checkpoint = open_checkpoint(smollm2_gguf)
    config = replace(checkpoint.config, num_hidden_layers=1)
    matrices = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 2 and name.startswith(("blk.0.", "token_embd"))
    }
    others = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith(("blk.0.", "output"))}
    others["token_embd.weight"] = checkpoint.tensors["token_embd.weight"]
    assert len(matrices) == 8
    for name, tensor in matrices.items():
        rows, width = tensor.shape
        blocks = random_blocks(format, rows, width // 32, small=True)
        blocks[rows // 3, FORMATS[format].bytes :][:2] = np.array([value], "<f2").view(np.uint8)
        tensors = {**others, name: StoredTensor(name, tensor.shape, format, blocks)}
        with pytest.raises(CheckpointError, match="has a scale that is not finite"):
            load_weights(config, tensors, placed(config))


def dequantized(stored: StoredTensor) -> np.ndarray:
    return gguf.dequantize(stored.data, GGMLQuantizationType[stored.format.upper()])


def test_a_norm_in_blocks_becomes_f32(smollm2_gguf: Path) -> None:
    checkpoint = open_checkpoint(smollm2_gguf)
    norm = checkpoint.tensors["output_norm.weight"]
    blocks = gguf.quantize(norm.data[None], GGMLQuantizationType.Q8_0)[0]
    tensors = {**checkpoint.tensors, norm.name: StoredTensor(norm.name, norm.shape, "q8_0", blocks)}
    weights = load_weights(checkpoint.config, tensors, placed(checkpoint.config))
    found = np.asarray(weights["norm.weight"])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, gguf.dequantize(blocks, GGMLQuantizationType.Q8_0))
