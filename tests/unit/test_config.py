"""Configurations: the published models', as each kind of file names them, and what is refused."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamajax.config import LlamaConfig
from llamajax.errors import ConfigError
from llamajax.families import CONFIGS, from_gguf, from_hf, from_meta
from llamajax.model.cache import empty_cache, paged_cache
from llamajax.ops import PAGE_LEN
from llamajax.placement import bytes_per_token

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
_LLAMA_3_8B = _LLAMA_3 | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3 = _QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "sliding_window": None,
}

# The published models' config.json.
HF: dict[str, dict[str, Any]] = {
    "llama3.2-1b": _LLAMA_3
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama3.2-3b": _LLAMA_3
    | {
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
        "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama3.1-8b": _LLAMA_3_8B | {"rope_scaling": _LLAMA3_ROPE | {"factor": 8.0}},
    "llama3-8b": _LLAMA_3_8B | {"max_position_embeddings": 8192, "rope_scaling": None, "eos_token_id": 128001},
    "tinyllama-1.1b": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
    },
    "qwen2.5-0.5b": _QWEN2
    | {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24},
    "qwen2.5-1.5b": _QWEN2
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 28},
    "qwen3-0.6b": _QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": _QWEN3 | {"hidden_size": 2048, "intermediate_size": 6144},
    "smollm3-3b": {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": 128012,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pad_token_id": 128004,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": False,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32768,
    },
}

_META = {
    "multiple_of": 1024,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
    "vocab_size": 128256,
}
_META_8B = _META | {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3}

# Meta's params.json.
META: dict[str, dict[str, Any]] = {
    "llama3.2-1b": _META | {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
    "llama3.2-3b": _META | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256},
    "llama3.1-8b": _META_8B,
    "llama3-8b": {key: value for key, value in _META_8B.items() if key != "use_scaled_rope"},
}


def gguf_metadata(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter writes of a config.json."""
    head_dim = hf.get("head_dim", hf["hidden_size"] // hf["num_attention_heads"])
    architecture = hf["model_type"].replace("mistral", "llama")
    keys = {
        "vocab_size": hf["vocab_size"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "block_count": hf["num_hidden_layers"],
        "feed_forward_length": hf["intermediate_size"],
        "rope.dimension_count": head_dim,
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": hf["rms_norm_eps"],
        "rope.freq_base": float(hf["rope_theta"]),
    }
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in keys.items()}


# Facts


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("llama3.1-8b", 8_030_261_248),
        ("llama3-8b", 8_030_261_248),
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("smollm3-3b", 3_075_098_624),
        ("mistral-7b", 7_248_023_552),
    ],
)
def test_num_parameters(name: str, published: int) -> None:
    assert CONFIGS[name].num_parameters == published


@pytest.mark.parametrize(
    ("name", "kib"),
    [
        ("llama3.2-1b", 32),
        ("llama3.2-3b", 112),
        ("llama3.1-8b", 128),
        ("llama3-8b", 128),
        ("tinyllama-1.1b", 22),
        ("smollm2-135m", 22.5),
        ("qwen2.5-0.5b", 12),
        ("qwen2.5-1.5b", 28),
        ("qwen3-0.6b", 112),
        ("qwen3-1.7b", 112),
        ("smollm3-3b", 72),
        ("mistral-7b", 128),
    ],
)
def test_bytes_of_a_cache(name: str, kib: float) -> None:
    config = CONFIGS[name]
    assert bytes_per_token(config, np.float16) == kib * 1024
    assert bytes_per_token(config, np.int8) <= 0.52 * kib * 1024
    for dtype in (np.float16, np.int8):
        whole, pages = partial(empty_cache, config, 10, dtype), partial(paged_cache, config, 3, dtype, None)
        for length, cache in ((10, whole), (3 * PAGE_LEN, pages)):
            arrays = jax.tree.leaves(jax.eval_shape(cache))
            num_bytes = sum(array.size * array.dtype.itemsize for array in arrays)
            assert num_bytes == length * bytes_per_token(config, dtype)


# The files


@pytest.mark.parametrize("name", CONFIGS)
def test_from_hf(name: str) -> None:
    assert from_hf(HF[name]) == CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_from_newer_hf(name: str) -> None:
    """One dictionary for RoPE, `dtype`, and the kind of RoPE named even where it is the default one."""
    hf = dict(HF[name])
    scaling = hf.pop("rope_scaling") or {"rope_type": "default"}
    hf["rope_parameters"] = scaling | {"rope_theta": hf.pop("rope_theta")}
    hf["dtype"] = hf.pop("torch_dtype")
    assert from_hf(hf) == CONFIGS[name]


def test_from_hf_without_what_may_be_missing() -> None:
    hf = {key: HF["tinyllama-1.1b"][key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    hf |= {"num_hidden_layers": 22, "num_attention_heads": 32, "head_dim": None, "rope_theta": None}
    assert from_hf(hf) == replace(CONFIGS["tinyllama-1.1b"], num_key_value_heads=32, rms_norm_eps=1e-6)


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_linear_scaling(kind: str) -> None:
    hf = HF["tinyllama-1.1b"] | {"rope_scaling": {kind: "linear", "factor": 2.5}}
    assert from_hf(hf) == replace(CONFIGS["tinyllama-1.1b"], rope_divisors=(2.5,) * 32)


def test_dynamic_scaling_changes_nothing_up_to_the_context() -> None:
    hf = HF["tinyllama-1.1b"] | {"rope_scaling": {"type": "dynamic", "factor": 3.0}}
    for max_len in (None, 100, 2048):
        assert from_hf(hf, max_len=max_len) == CONFIGS["tinyllama-1.1b"]


def test_dynamic_scaling_beyond_the_context_goes_up_to_its_factor() -> None:
    hf = HF["tinyllama-1.1b"] | {"rope_scaling": {"type": "dynamic", "factor": 3.0}}
    longer, longest = (from_hf(hf, max_len=max_len) for max_len in (4096, 10**6))
    assert (longer.max_position_embeddings, longest.max_position_embeddings) == (4096, 3 * 2048)
    assert longer.rope_divisors is not None and longest.rope_divisors is not None
    # Theta grows by (3 * 2 - 2) ** (64 / 62), so the slowest of 32 dimensions is slowed by 4.
    assert (longer.rope_divisors[0], longer.rope_divisors[-1]) == pytest.approx((1.0, 4.0))
    assert longest.rope_divisors[-1] == pytest.approx(3 * 3 - 2)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({}, 1 + 0.1 * np.log(16)),
        ({"mscale": 1.0}, 1 + 0.1 * np.log(16)),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (1 + 0.2 * np.log(16)) / (1 + 0.05 * np.log(16))),
        ({"mscale": 2.0, "mscale_all_dim": 0.5, "attention_factor": 1.5}, 1.5),
        ({"factor": None, "original_max_position_embeddings": 512}, 1 + 0.1 * np.log(4)),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarns_attention_factor(options: dict[str, Any], factor: float) -> None:
    hf = HF["tinyllama-1.1b"] | {"rope_scaling": {"rope_type": "yarn", "factor": 16.0} | options}
    assert from_hf(hf).rope_attention_factor == pytest.approx(factor)


def test_mistral_without_a_window_is_a_llama() -> None:
    hf = HF["llama3-8b"] | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    assert from_hf(hf) == replace(CONFIGS["llama3-8b"], family="mistral")


def test_an_architecture_is_enough() -> None:
    hf = {key: value for key, value in HF["mistral-7b"].items() if key != "model_type"}
    assert from_hf(hf) == CONFIGS["mistral-7b"]


def test_a_window_that_is_not_used() -> None:
    hf = HF["qwen2.5-0.5b"] | {"sliding_window": 4096, "use_sliding_window": None}
    assert from_hf(hf) == CONFIGS["qwen2.5-0.5b"]
    assert from_gguf(gguf_metadata(hf) | {"qwen2.attention.sliding_window": 4096}).sliding_window is None


def test_the_window_of_mistral() -> None:
    """As in transformers 4096 if config.json has no such key, and none if that says so or nothing is beyond it."""
    hf = {key: value for key, value in HF["mistral-7b"].items() if key != "sliding_window"}
    layers = {"layer_types": ["sliding_attention"] * 32}
    for window, expected in (({}, 4096), ({"sliding_window": 100} | layers, 100), ({"sliding_window": 32768}, None)):
        assert from_hf(hf | window) == replace(CONFIGS["mistral-7b"], sliding_window=expected)
    metadata = gguf_metadata(hf) | {"llama.attention.sliding_window": 100}
    assert from_gguf(metadata).sliding_window == 100


def test_layers_without_rope() -> None:
    hf = {key: value for key, value in HF["smollm3-3b"].items() if key != "no_rope_layers"}
    assert from_hf(hf) == CONFIGS["smollm3-3b"]
    assert from_hf(hf | {"no_rope_layer_interval": 12}).layers_without_rope == (11, 23, 35)
    assert from_hf(hf | {"no_rope_layers": [1] * 36 + [0]}).layers_without_rope == ()
    for malformed in ([1] * 35, [2] * 36, "1" * 36, {}):
        with pytest.raises(ConfigError, match="no_rope_layers must be 0 or 1"):
            from_hf(hf | {"no_rope_layers": malformed})


@pytest.mark.parametrize("name", META)
def test_from_meta(name: str) -> None:
    # Meta's files carry the head of tied models too.
    assert from_meta(META[name]) == replace(CONFIGS[name], tie_word_embeddings=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_from_gguf(name: str) -> None:
    tied, divisors = CONFIGS[name].tie_word_embeddings, CONFIGS[name].rope_divisors
    found = from_gguf(gguf_metadata(HF[name]), tie_word_embeddings=tied, rope_divisors=divisors)
    family = "llama" if CONFIGS[name].family == "mistral" else CONFIGS[name].family
    assert found == replace(CONFIGS[name], family=family)


def test_from_gguf_without_what_may_be_missing() -> None:
    metadata = gguf_metadata(HF["smollm2-135m"])
    for key in ("vocab_size", "attention.key_length", "attention.value_length", "rope.dimension_count"):
        del metadata[f"llama.{key}"]
    metadata["tokenizer.ggml.tokens"] = ["x"] * 49152
    assert from_gguf(metadata, tie_word_embeddings=True) == CONFIGS["smollm2-135m"]


def test_from_gguf_with_a_number_for_each_layer() -> None:
    metadata = gguf_metadata(HF["smollm2-135m"])
    keys = ("attention.head_count", "attention.head_count_kv", "feed_forward_length", "rope.dimension_count")
    metadata |= {f"llama.{key}": np.full(30, metadata[f"llama.{key}"], np.uint32) for key in keys}
    metadata["llama.rope.dimension_sections"] = np.arange(4)  # of no use to a Llama
    assert from_gguf(metadata, tie_word_embeddings=True) == CONFIGS["smollm2-135m"]
    for layers in (np.array([9, 9, 3] * 10), np.array([], np.uint32), ["9"]):
        metadata["llama.attention.head_count"] = layers
        with pytest.raises(ConfigError, match=r"expected one value of llama\.attention\.head_count for .*") as raised:
            from_gguf(metadata)
        assert "\n" not in str(raised.value)


def test_vocab_size_of_gguf_is_that_of_the_embedding() -> None:
    metadata = gguf_metadata(HF["smollm2-135m"]) | {"llama.vocab_size": 7}
    found = from_gguf(metadata, vocab_size=49152, tie_word_embeddings=True)
    assert found == CONFIGS["smollm2-135m"]


def test_gguf_whose_attention_is_not_causal() -> None:
    with pytest.raises(ConfigError, match="a model whose attention is not causal"):
        from_gguf(gguf_metadata(HF["llama3-8b"]) | {"llama.attention.causal": False})


def test_gguf_that_holds_no_model() -> None:
    with pytest.raises(ConfigError, match=r"holds 'adapter' \(general\.type\), expected a model"):
        from_gguf({"general.architecture": "llama", "general.type": "adapter"})


def test_linear_scaling_in_gguf() -> None:
    metadata = gguf_metadata(HF["tinyllama-1.1b"])
    metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert from_gguf(metadata).rope_divisors == (4.0,) * 32


def test_yarn_in_gguf() -> None:
    """As llama.cpp computes it: what the attention factor of the scaling is, attn_factor multiplies."""
    metadata = gguf_metadata(HF["tinyllama-1.1b"]) | {"llama.rope.scaling.type": "yarn"}
    keys = {"factor": 8.0, "original_context_length": 256, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0}
    metadata |= {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    scaling = {"factor": 8.0, "original_max_position_embeddings": 256, "beta_fast": 16.0, "beta_slow": 2.0}
    expected = from_hf(HF["tinyllama-1.1b"] | {"rope_scaling": scaling | {"type": "yarn"}})
    assert from_gguf(metadata) == expected
    sharper = from_gguf(metadata | {"llama.rope.scaling.attn_factor": 0.5})
    assert sharper == replace(expected, rope_attention_factor=expected.rope_attention_factor / 2)
    mscaled = from_gguf(metadata | {"llama.rope.scaling.yarn_log_multiplier": 0.5})
    assert mscaled.rope_attention_factor == pytest.approx((1 + 0.1 * np.log(8)) / (1 + 0.05 * np.log(8)))
    with pytest.raises(ConfigError, match="yarn_ext_factor"):
        from_gguf(metadata | {"llama.rope.scaling.yarn_ext_factor": 0.5})


def test_a_gguf_files_divisors_and_its_scaling_multiply() -> None:
    metadata = gguf_metadata(HF["tinyllama-1.1b"])
    metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert from_gguf(metadata, rope_divisors=(2.0,) * 32).rope_divisors == (8.0,) * 32


# Refusals


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_what_must_be_there(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        from_hf({name: value for name, value in HF["llama3.2-1b"].items() if name != key})


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_what_llama3_scaling_must_have(key: str) -> None:
    rope = {name: value for name, value in HF["llama3.2-1b"]["rope_scaling"].items() if name != key}
    with pytest.raises(ConfigError, match=key):
        from_hf(HF["llama3.2-1b"] | {"rope_scaling": rope})


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "ffn_dim_multiplier"])
def test_what_metas_params_must_have(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        from_meta({name: value for name, value in META["llama3.1-8b"].items() if name != key})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 5}, "multiple"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 63}, "even"),
        ({"head_dim": 2**40}, "head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": _LLAMA3_ROPE | {"factor": 0.0}}, "factor"),
        ({"rope_scaling": _LLAMA3_ROPE | {"factor": 8.0, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": ["linear"]}, "RoPE"),
        ({"rope_scaling": None, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"full_attention": {"rope_type": "yarn"}}}, "one object for all layers"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": -1.0}}, "beta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": -1.0}}, "attention_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": "no"}}, "truncate"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "factor"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"architectures": [], "model_type": "phi3"}, "phi3"),
        ({"architectures": None, "model_type": None}, "None"),
    ],
)
def test_values_that_make_no_llama(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_hf(HF["llama3.2-1b"] | changes)


def test_divisors_must_fit_head_dim() -> None:
    with pytest.raises(ConfigError, match="32 RoPE divisors, found 31"):
        from_gguf(gguf_metadata(HF["llama3.2-1b"]), rope_divisors=(1.0,) * 31)


# Garbage

_NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from((10**400, -(10**400))),
    st.floats(),
    st.sampled_from((np.uint32(7), np.float32(0.5), np.int64(-1))),
)
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)
_ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(("linear", "llama3", "yarn", "dynamic", "default"))},
    optional={
        key: _JSON
        for key in [*_LLAMA3_ROPE, "factor", "rope_theta", "beta_fast", "attention_factor", "mscale", "mscale_all_dim"]
        if key != "rope_type"
    },
)


# A GGUF file may hold an array of numbers anywhere.
_GGUF = _JSON | st.just(np.arange(3)) | st.just(np.arange(0))


def changed(
    good: Mapping[str, Any], garbage: st.SearchStrategy, also: Mapping[str, st.SearchStrategy] | None = None
) -> st.SearchStrategy[dict[str, Any]]:
    """The good mapping, with a few values replaced by garbage or by what `also` makes for a key."""
    strategies = dict.fromkeys(good, garbage) | {key: garbage | values for key, values in (also or {}).items()}
    keys = st.lists(st.sampled_from(sorted(strategies)), min_size=1, max_size=3, unique=True)
    return keys.flatmap(lambda keys: st.fixed_dictionaries({key: strategies[key] for key in keys})).map(
        lambda new: {**good, **new}
    )


def makes_a_config_or_refuses(make: Callable[[], LlamaConfig]) -> None:
    try:
        config = make()
    except ConfigError as error:
        assert "\n" not in str(error)
        return
    assert config.num_parameters > 0
    assert all(divisor > 0 and np.isfinite(divisor) for divisor in config.rope_divisors or ())


@settings(max_examples=300, deadline=None)
@given(
    hf=st.sampled_from(("llama3.2-1b", "qwen2.5-0.5b", "qwen3-0.6b", "smollm3-3b", "mistral-7b")).flatmap(
        lambda name: changed(
            HF[name], _JSON, {"rope_scaling": _ROPE, "rope_parameters": _ROPE, "sliding_window": _JSON}
        )
    )
)
def test_garbage_in_config_json(hf: dict[str, Any]) -> None:
    makes_a_config_or_refuses(lambda: from_hf(hf))
    makes_a_config_or_refuses(lambda: from_hf(hf, max_len=10**6))


@settings(max_examples=200, deadline=None)
@given(params=changed(META["llama3.2-1b"], _JSON))
def test_garbage_in_params_json(params: dict[str, Any]) -> None:
    makes_a_config_or_refuses(lambda: from_meta(params))


@settings(max_examples=200, deadline=None)
@given(
    metadata=changed(
        gguf_metadata(HF["llama3.2-1b"]),
        _GGUF,
        {
            "llama.rope.scaling.type": st.sampled_from(("linear", "yarn", "none")),
            "llama.rope.scaling.factor": _GGUF,
            "llama.rope.scaling.attn_factor": _GGUF,
            "llama.rope.scaling.original_context_length": _GGUF,
            "llama.rope.scaling.yarn_ext_factor": _GGUF,
            "llama.rope.scaling.yarn_log_multiplier": _GGUF,
            "llama.expert_count": _GGUF,
            "llama.attention.sliding_window": _GGUF,
            "tokenizer.ggml.tokens": _GGUF,
        },
    ),
    divisors=st.none() | st.lists(st.floats(), min_size=32, max_size=32).map(tuple),
)
def test_garbage_in_gguf_metadata(metadata: dict[str, Any], divisors: tuple[float, ...] | None) -> None:
    makes_a_config_or_refuses(lambda: from_gguf(metadata, rope_divisors=divisors))
