"""The model against transformers' logits: every shape of the family, every layout of a checkpoint, every split."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

import llamajax
from llamajax.config import LlamaConfig
from llamajax.engine.runner import Runner
from llamajax.engine.sequential import OneSlot, Sequential
from llamajax.errors import CheckpointError, ConfigError, RequestError
from llamajax.families import from_gguf
from llamajax.model.cache import Cache
from llamajax.model.llama import Llama
from llamajax.ops import Parameter
from llamajax.tokenizers.hf import byte_alphabet
from llamajax.types import DType, Request, SamplingParams
from llamajax.weights.checkpoint import open_checkpoint
from llamajax.weights.load import load_weights

from .. import tiny_model
from ..caches import batched, caches, contents, full_of_noise, row_of
from ..tiny_model import placed
from .tiny import CASES, PROMPT_LEN, goldens, prompt, state_dict, write_gguf, write_hf, write_meta

strict_promotion = tiny_model.strict_promotion

GOLDENS = goldens()
DEVICE = jax.devices()[0]
Model = tuple[LlamaConfig, dict[str, Parameter]]


def load(path: Path, dtype: DType = "auto") -> Model:
    checkpoint = open_checkpoint(path, PROMPT_LEN)
    return checkpoint.config, load_weights(checkpoint.config, checkpoint.tensors, placed(checkpoint.config, dtype))


def logits(path: Path, case: str, dtype: DType = "auto") -> np.ndarray:
    config, weights = load(path, dtype)
    return Runner(config, weights, placed(config)).logits(prompt(case))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def divisors(case: str) -> np.ndarray | None:
    """Of llama3 scaling, from transformers' frequencies."""
    rope = CASES[case].get("rope_parameters") or CASES[case].get("rope_scaling") or {}
    if rope.get("rope_type") != "llama3":
        return None
    scaled = GOLDENS[f"{case}/inv_freq"]
    theta = (CASES[case] | rope)["rope_theta"]
    return theta ** -(np.arange(len(scaled)) / len(scaled)) / scaled


# The layouts


@pytest.mark.parametrize("case", CASES)
def test_hugging_face_and_gguf(case: str, tmp_path: Path) -> None:
    weights = state_dict(case)
    found = logits(write_hf(tmp_path / "hf", CASES[case], weights), case)
    assert relative_error(found, GOLDENS[f"{case}/logits"]) < 1e-4
    if case in ("dynamic", "yarn-options", "smollm3-layers"):  # which GGUF has no keys for
        return
    same = logits(write_gguf(tmp_path / "model.gguf", CASES[case], weights, divisors(case)), case)
    assert relative_error(same, found) < 1e-5


@pytest.mark.parametrize("axis", [0, 1])
def test_norms_of_gguf_as_matrices(axis: int, tmp_path: Path) -> None:
    case = "llama3-8b"
    weights = {n: np.expand_dims(a, axis) if "norm" in n else a for n, a in state_dict(case).items()}
    found = logits(write_gguf(tmp_path / "model.gguf", CASES[case], weights, None), case)
    assert relative_error(found, GOLDENS[f"{case}/logits"]) < 1e-4


@pytest.mark.parametrize(("case", "ffn_dim_multiplier"), [("llama3.2-1b", 0.5), ("llama3-8b", 0.5), ("tinyllama", 0.5)])
def test_meta(case: str, ffn_dim_multiplier: float, tmp_path: Path) -> None:
    path = write_meta(tmp_path / "meta", CASES[case], state_dict(case), ffn_dim_multiplier=ffn_dim_multiplier)
    assert relative_error(logits(path, case), GOLDENS[f"{case}/logits"]) < 1e-4


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    case, weights = "llama3.1-8b", state_dict("llama3.1-8b")
    whole = logits(write_hf(tmp_path / "whole", CASES[case], weights), case)
    sharded = logits(write_hf(tmp_path / "sharded", CASES[case], weights, num_shards=3), case)
    np.testing.assert_array_equal(sharded, whole)


@pytest.mark.parametrize(("dtype", "tolerance"), [(ml_dtypes.bfloat16, 3e-2), (np.float16, 4e-3)])
def test_half_precision(dtype: Any, tolerance: float, tmp_path: Path) -> None:
    """Stored in half, computed in f32, a model is the f32 one of the rounded weights; in half, it is near."""
    case = "llama3.1-8b"
    halves = {name: array.astype(dtype) for name, array in state_dict(case).items()}
    path = write_hf(tmp_path / "half", CASES[case], halves)
    rounded = {name: array.astype(np.float32) for name, array in halves.items()}
    expected = logits(write_hf(tmp_path / "rounded", CASES[case], rounded), case)
    np.testing.assert_array_equal(logits(path, case, "float32"), expected)
    assert relative_error(logits(path, case), expected) < tolerance
    assert relative_error(expected, GOLDENS[f"{case}/logits"]) < tolerance


def test_a_tied_model_may_store_its_head(tmp_path: Path) -> None:
    case, weights = "smollm2", state_dict("smollm2")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    found = logits(write_hf(tmp_path / "hf", CASES[case], weights), case)
    assert relative_error(found, GOLDENS[f"{case}/logits"]) < 1e-4


def test_a_tied_model_may_store_its_head_only(tmp_path: Path) -> None:
    case, weights = "smollm2", state_dict("smollm2")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    found = logits(write_hf(tmp_path / "hf", CASES[case], weights), case)
    assert relative_error(found, GOLDENS[f"{case}/logits"]) < 1e-4


def test_a_head_of_its_own_is_one_whatever_the_configuration_says(tmp_path: Path) -> None:
    case, weights = "llama3-8b", state_dict("llama3-8b")
    found = logits(write_hf(tmp_path / "hf", CASES[case] | {"tie_word_embeddings": True}, weights), case)
    assert relative_error(found, GOLDENS[f"{case}/logits"]) < 1e-4


@pytest.mark.parametrize(
    ("prefix", "architecture"),
    [
        ("_orig_mod.model.", "LlamaForCausalLM"),
        ("module.model.", "LlamaForCausalLM"),
        ("{0}\x1b.model.", "LlamaForCausalLM"),
        ("", "LlamaModel"),
    ],
)
@pytest.mark.parametrize("case", ["smollm2", "llama3-8b"])
def test_other_prefixes(case: str, prefix: str, architecture: str, tmp_path: Path) -> None:
    weights = {
        prefix + name.removeprefix("model.") if "model." in name else prefix.removesuffix("model.") + name: array
        for name, array in state_dict(case).items()
    }
    path = write_hf(tmp_path / "hf", CASES[case] | {"architectures": [architecture]}, weights)
    assert relative_error(logits(path, case), GOLDENS[f"{case}/logits"]) < 1e-4


def test_doubles_are_cast(tmp_path: Path) -> None:
    case = "llama3-8b"
    weights = {name: array.astype(np.float64) for name, array in state_dict(case).items()}
    expected = logits(write_hf(tmp_path / "f32", CASES[case], state_dict(case)), case)
    np.testing.assert_array_equal(logits(write_hf(tmp_path / "f64", CASES[case], weights), case), expected)


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    "model.rotary_emb.cos_cached": np.ones((4, 8), np.float32),
    "model.layers.1.self_attn.k_scale": np.ones(1, np.float32),
    "model.layers.1.self_attn.v_scale": np.ones((), ml_dtypes.bfloat16),
    "model.layers.0.self_attn.k_proj.k_scale": np.ones(1, np.float32),
    "model.layers.0.self_attn.bias": np.ones((1, 1, 4, 4), bool),
    "model.layers.1.self_attn.bias": np.ones((1, 1, 4, 4), np.float32),
    "model.layers.0.self_attn.masked_bias": np.float32([-1e9]),
    "model.position_ids": np.arange(4),
    "model.causal_mask": np.zeros((4, 4), np.uint8),
}


def test_buffers_are_ignored_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    case = "llama3-8b"
    found = logits(write_hf(tmp_path / "hf", CASES[case], state_dict(case) | BUFFERS), case)
    assert relative_error(found, GOLDENS[f"{case}/logits"]) < 1e-4
    [record] = caplog.records
    assert record.name == "llamajax"
    assert record.getMessage().startswith("ignoring 10 tensors that are no weights: ")
    assert record.getMessage().endswith(", and 2 more")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.bias",
        "model.layers.0.mlp.gate_proj.lora_A.weight",
        "model.layers.7.mlp.up_proj.weight",
    ],
)
def test_a_weight_that_is_not_known_is_never_ignored(name: str, tmp_path: Path) -> None:
    weights = state_dict("llama3-8b") | {name: np.ones(64, np.float32)}
    with pytest.raises(CheckpointError, match=f"1 unexpected: {name}"):
        open_checkpoint(write_hf(tmp_path / "hf", CASES["llama3-8b"], weights))


def test_a_weight_of_integers_is_refused(tmp_path: Path) -> None:
    weights = state_dict("llama3-8b")
    weights["model.layers.0.mlp.down_proj.weight"] = np.ones((64, 96), np.int8)
    with pytest.raises(
        CheckpointError, match=r"unreadable, expected F32.*: model\.layers\.0\.mlp\.down_proj.weight I8"
    ):
        open_checkpoint(write_hf(tmp_path / "hf", CASES["llama3-8b"], weights))


def test_a_dynamic_model_is_loaded_for_a_longer_context(tmp_path: Path) -> None:
    """For PROMPT_LEN tokens, as the logits of transformers are."""
    path = write_hf(tmp_path / "hf", CASES["dynamic"], state_dict("dynamic"))
    tokenizer = Tokenizer(models.BPE(byte_alphabet(), []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    found = llamajax.load(path, max_seq_len=PROMPT_LEN, dtype="float32").logits(prompt("dynamic"))
    assert relative_error(found, GOLDENS["dynamic/logits"]) < 1e-4
    for length in (49, "40", 2.5):
        with pytest.raises(RequestError, match="max_seq_len must be"):
            llamajax.load(path, max_seq_len=length)


# Refusals


def test_more_layers_than_memory_are_refused_before_they_are_built(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", CASES["llama3-8b"] | {"num_hidden_layers": 65536}, state_dict("llama3-8b"))
    with pytest.raises(CheckpointError, match=r"589806 missing: .*, and 589798 more"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("eos", ["2", ["2"], 2.5, True, {"id": 2}])
def test_stop_ids_that_are_none(name: str, eos: Any, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", CASES["llama3-8b"], state_dict("llama3-8b"))
    content = CASES["llama3-8b"] if name == "config.json" else {}
    (path / name).write_text(json.dumps(content | {"eos_token_id": eos}))
    with pytest.raises(ConfigError, match=f"/{name}: expected integers for 'eos_token_id'"):
        open_checkpoint(path)


def test_stop_ids_are_those_of_both_files_within_the_vocabulary(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", CASES["llama3-8b"] | {"eos_token_id": [2, -1, 10**30]}, state_dict("llama3-8b"))
    (path / "generation_config.json").write_text('{"eos_token_id": 3, "temperature": NaN}')
    assert open_checkpoint(path).stop_ids == {2, 3}


def test_all_misfits_are_reported_at_once(tmp_path: Path) -> None:
    weights = state_dict("llama3-8b")
    del weights["model.norm.weight"], weights["model.layers.1.self_attn.k_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
    weights["model.layers.2.mlp.up_proj.weight"] = np.zeros((96, 64), np.float32)
    weights["model.layers.0.mlp.down_proj.weight"] = np.zeros((96, 64), np.float32)
    weights["lm_head.weight"] = np.zeros((161, 64), np.float32)
    with pytest.raises(CheckpointError) as raised:
        load(write_hf(tmp_path / "hf", CASES["llama3-8b"], weights))
    missing, unexpected, misshapen = str(raised.value).split("; ")
    assert "2 missing" in missing
    assert "model.norm.weight (64,)" in missing
    assert "model.layers.1.self_attn.k_proj.weight (16, 64)" in missing
    assert "2 unexpected" in unexpected
    assert "model.layers.0.self_attn.q_proj.bias" in unexpected
    assert "model.layers.2.mlp.up_proj.weight" in unexpected
    assert "2 misshapen" in misshapen
    assert "model.layers.0.mlp.down_proj.weight (96, 64), expected (64, 96)" in misshapen
    assert "lm_head.weight (161, 64), expected (160, 64)" in misshapen


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    weights = state_dict("llama3-8b")
    del weights["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight \(160, 64\)"):
        load(write_hf(tmp_path / "hf", CASES["llama3-8b"], weights))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}, "Qwen2MoeForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True}, "sliding_window"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_mrope": True}, "use_mrope=True"),
        ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}, "Gemma2ForCausalLM"),
        ({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}, "MixtralForCausalLM"),
        ({"architectures": None, "model_type": "phi3"}, "phi3"),
        ({"sliding_window": 4096}, "LlamaForCausalLM with sliding_window=4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": True}, "attention_bias=True"),
        ({"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "no_rope_layer_interval": 0},
            "no_rope_layer_interval",
        ),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "quantized by 'fp8'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
    ],
)
def test_other_computations_are_refused_by_name(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = write_hf(tmp_path / "hf", CASES["llama3-8b"] | changes, {})
    with pytest.raises(ConfigError) as raised:
        open_checkpoint(path)
    assert named in str(raised.value)
    assert str(path / "config.json") in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("general.architecture", "gemma2", "gemma2"),
        ("llama.expert_count", 8, "Mixtral"),
        ("llama.attention.sliding_window", 0, "sliding_window must be at least 1"),
        ("llama.rope.scaling.type", "longrope", "longrope"),
        ("llama.rope.dimension_count", 8, "dimension_count"),
        ("llama.attention.value_length", 8, "value_length"),
    ],
)
def test_other_ggufs_are_refused_by_name(key: str, value: str | int, named: str) -> None:
    metadata = {
        "general.architecture": "llama",
        "llama.vocab_size": 160,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    from_gguf(metadata)
    with pytest.raises(ConfigError) as raised:
        from_gguf(metadata | {key: value})
    assert named in str(raised.value)


# Splits and batches

SPLIT_CASE = "llama3.2-3b"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_hf(tmp_path_factory.mktemp("splits") / "hf", CASES[SPLIT_CASE], state_dict(SPLIT_CASE)))


@partial(jax.jit, static_argnames="config")
def forward(
    weights: dict[str, Parameter], ids: jax.Array, cache: Cache, start: jax.Array, *, config: LlamaConfig
) -> tuple[jax.Array, Cache]:
    model = Llama.with_weights(config, weights)
    x, cache = model(ids, cache, start)
    return model.logits(x), cache


@settings(max_examples=12, deadline=None)
@given(
    chunks=st.lists(st.sampled_from((1, 3, 12)), max_size=PROMPT_LEN),
    used=st.booleans(),
)
def test_any_split_is_the_full_forward(model: Model, chunks: list[int], used: bool) -> None:
    ids = np.array(prompt(SPLIT_CASE), np.int32)
    config, weights = model
    (cache,) = caches(config, PROMPT_LEN + 3, jnp.float32)
    if used:
        cache = full_of_noise(cache)
    rows: list[np.ndarray] = []
    for length in [*chunks, *[1] * PROMPT_LEN]:
        start = len(rows)
        if start + length <= PROMPT_LEN:
            scores, cache = forward(weights, ids[start : start + length], cache, jnp.int32(start), config=config)
            rows += list(np.asarray(scores))
    assert relative_error(np.stack(rows), GOLDENS[f"{SPLIT_CASE}/logits"]) < 1e-4


def test_a_batch_is_its_rows(model: Model) -> None:
    config, weights = model
    ids = np.array(prompt(SPLIT_CASE), np.int32).reshape(5, 8)
    starts = np.array([0, 3, 30, 32, 17], np.int32)
    rows = [full_of_noise(cache) for cache in caches(config, PROMPT_LEN, jnp.float32, len(starts))]
    run = partial(forward, weights, config=config)
    batch, axes = batched(rows)
    scores, batch = jax.vmap(run, in_axes=(0, axes, 0), out_axes=(0, axes))(ids, batch, starts)
    for row, start in enumerate(starts):
        expected, cache = run(ids[row], rows[row], jnp.int32(start))
        assert relative_error(np.asarray(scores[row]), np.asarray(expected)) < 1e-5
        for x, y in zip(contents(row_of(batch, row)), contents(cache), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-4)


# The runner: chunks of fixed lengths, and a cache that is used again

RUNNER_CASE = "small-head-dim"
LONG = 512


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_hf(tmp_path_factory.mktemp("runner") / "hf", CASES[RUNNER_CASE], state_dict(RUNNER_CASE)))


def _texts() -> list[list[int]]:
    """Two, with a common beginning."""
    ids = np.random.default_rng(0).integers(CASES[RUNNER_CASE]["vocab_size"], size=(2, LONG))
    ids[1, :150] = ids[0, :150]
    return ids.tolist()


TEXTS = _texts()


@settings(max_examples=5, deadline=None)
@given(
    max_seq_len=st.integers(300, 512),
    requests=st.lists(st.tuples(st.sampled_from((0, 1)), st.floats(0, 1), st.integers(1, 24)), min_size=1, max_size=4),
)
# The last chunk passes the end of the cache, where a shorter one begins in the middle and a long one at 0.
@example(max_seq_len=509, requests=[(0, 0.8, 3), (0, 1.0, 1), (1, 0.97, 24)])
def test_the_runner_draws_what_a_full_forward_says(
    small: Model, max_seq_len: int, requests: list[tuple[int, float, int]]
) -> None:
    reference, runner = (Runner(*small, placed(small[0]), longest) for longest in (LONG, max_seq_len))
    engine = OneSlot(runner)
    for text, fraction, max_new_tokens in requests:
        ids = TEXTS[text][: 1 + round(fraction * (max_seq_len - 2))]
        request = Request(ids, max_new_tokens, SamplingParams(temperature=0))
        tokens = [token.id for token in Sequential(engine, request)]
        assert len(tokens) == min(max_new_tokens, max_seq_len - len(ids))

        padded = [*ids, *tokens, *[0] * LONG][:LONG]
        scores = reference.logits(padded)[len(ids) - 1 : len(ids) + len(tokens) - 1]
        drawn = scores[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(drawn, scores.max(axis=1), atol=1e-3)
