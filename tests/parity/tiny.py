"""Tiny random checkpoints of every shape of the family, written in every layout that we read.

Weights come from their names: `scripts/make_goldens.py`, which has transformers compute reference logits, and
the tests make the same ones, and none are stored. Knows nothing of llamajax.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

DATA = Path(__file__).parent / "data"
PROMPT_LEN = 40
WINDOW = 256  # tokens of a text that the default model reads at once

Weights = dict[str, np.ndarray]


def _llama3_scaling(factor: float, original: int) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": original,
    }


_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}

#: What config.json says. Scaled-down original contexts put low, middle and high bands of RoPE within a prompt.
CASES: dict[str, dict[str, Any]] = {
    "llama3.2-1b": _LLAMA
    | {
        "vocab_size": 128,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": _llama3_scaling(32.0, 8192),
        "tie_word_embeddings": True,
    },
    "llama3.2-3b": _LLAMA
    | {
        "vocab_size": 112,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_theta": 500000.0} | _llama3_scaling(32.0, 96),
        "tie_word_embeddings": True,
    },
    "llama3.1-8b": _LLAMA
    | {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_theta": 500000.0,
        "rope_scaling": _llama3_scaling(8.0, 96),
        "tie_word_embeddings": False,
    },
    "llama3-8b": _LLAMA
    | {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    },
    "tinyllama": _LLAMA
    | {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "smollm2": _LLAMA
    | {
        "vocab_size": 256,
        "hidden_size": 72,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "linear-scaling": _LLAMA
    | {
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "tie_word_embeddings": False,
    },
    # The original context is shorter than the prompt, so that fast, middle and slow dimensions differ.
    "yarn": _LLAMA
    | {
        "vocab_size": 88,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
        "tie_word_embeddings": False,
    },
    "yarn-options": _LLAMA
    | {
        "vocab_size": 88,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.707,
            "truncate": False,
        },
        "tie_word_embeddings": True,
    },
    # Its frequencies depend on the text's length where that is more than the context: PROMPT_LEN here.
    "dynamic": _LLAMA
    | {
        "vocab_size": 88,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 24,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "tie_word_embeddings": False,
    },
    "small-head-dim": _LLAMA
    | {
        "vocab_size": 72,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "mistral": _LLAMA
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "qwen2": _LLAMA
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "sliding_window": 8,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    },
    "qwen3": _LLAMA
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "smollm3": _LLAMA
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "pad_token_id": None,
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "smollm3-layers": _LLAMA
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "pad_token_id": None,
        "vocab_size": 88,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_theta": 10000.0,
        "no_rope_layers": [0, 1, 1, 0],
        "tie_word_embeddings": False,
    },
    "mistral-window": _LLAMA
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "sliding_window": 9,
        "tie_word_embeddings": False,
    },
    # Everything that may be missing is.
    "bare": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


def goldens() -> dict[str, np.ndarray]:
    """What transformers computed, by the names that `scripts/make_goldens.py` gives it."""
    with np.load(DATA / "goldens.npz") as stored:
        return dict(stored)


def prompt(case: str) -> list[int]:
    """PROMPT_LEN token ids."""
    return (_bits(f"{case}/prompt", PROMPT_LEN) % CASES[case]["vocab_size"]).tolist()


def state_dict(case: str) -> Weights:
    """A case's weights in f32, by their Hugging Face names."""
    hf = CASES[case]
    hidden, ffn, heads = hf["hidden_size"], hf["intermediate_size"], hf["num_attention_heads"]
    head_dim = hf.get("head_dim", hidden // heads)
    q, kv = heads * head_dim, hf.get("num_key_value_heads", heads) * head_dim
    weights = {"model.embed_tokens.weight": _matrix(f"{case}/embed_tokens", hf["vocab_size"], hidden, gain=6)}
    for i in range(hf["num_hidden_layers"]):
        # Sharp attention, so that a wrong position or head shows.
        for name, rows, columns, gain in (
            ("self_attn.q_proj", q, hidden, 2),
            ("self_attn.k_proj", kv, hidden, 2),
            ("self_attn.v_proj", kv, hidden, 1),
            ("self_attn.o_proj", hidden, q, 1),
            ("mlp.gate_proj", ffn, hidden, 1),
            ("mlp.up_proj", ffn, hidden, 1),
            ("mlp.down_proj", hidden, ffn, 1),
        ):
            weights[f"model.layers.{i}.{name}.weight"] = _matrix(f"{case}/{i}/{name}", rows, columns, gain)
        if hf["model_type"] == "qwen2":
            for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
                weights[f"model.layers.{i}.self_attn.{name}.bias"] = _uniform(f"{case}/{i}/{name}.bias", rows)
        if hf["model_type"] == "qwen3":
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                weights[f"model.layers.{i}.{name}.weight"] = 1 + 0.5 * _uniform(f"{case}/{i}/{name}", head_dim)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = 1 + 0.5 * _uniform(f"{case}/{i}/{name}", hidden)
    weights["model.norm.weight"] = 1 + 0.5 * _uniform(f"{case}/norm", hidden)
    if not hf.get("tie_word_embeddings", False):
        weights["lm_head.weight"] = _matrix(f"{case}/lm_head", hf["vocab_size"], hidden)
    return weights


def _bits(name: str, count: int) -> np.ndarray:
    # The stream of a BitGenerator is the same in all versions of NumPy; that of a Generator need not be.
    return np.random.PCG64(zlib.crc32(name.encode())).random_raw(count) >> np.uint64(40)


def _uniform(name: str, count: int) -> np.ndarray:
    """In [-1, 1)."""
    return (_bits(name, count) / 2**23 - 1).astype(np.float32)


def _matrix(name: str, rows: int, columns: int, gain: float = 1) -> np.ndarray:
    """Maps inputs of unit variance to outputs of variance gain ** 2."""
    return _uniform(name, rows * columns).reshape(rows, columns) * np.float32(gain * (3 / columns) ** 0.5)


def write_hf(path: Path, hf: Mapping[str, Any], weights: Weights, *, num_shards: int = 1) -> Path:
    """A Hugging Face directory."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(hf))
    if num_shards == 1:
        safetensors.numpy.save_file(weights, path / "model.safetensors")
        return path
    names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    weight_map = {name: names[i % num_shards] for i, name in enumerate(weights)}
    for shard in names:
        safetensors.numpy.save_file(
            {name: weights[name] for name in weights if weight_map[name] == shard}, path / shard
        )
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


# In config.json and in GGUF.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
_INTERLEAVED = ("llama", "smollm3")
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def write_gguf(path: Path, hf: Mapping[str, Any], weights: Weights, divisors: np.ndarray | None) -> Path:
    """A .gguf file, as llama.cpp's converter writes it; `divisors` of llama3 scaling, where the case has it."""
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[hf["model_type"]])
    writer.add_vocab_size(hf["vocab_size"])
    writer.add_context_length(hf.get("max_position_embeddings", 2048))
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_feed_forward_length(hf["intermediate_size"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_head_count_kv(hf.get("num_key_value_heads", hf["num_attention_heads"]))
    writer.add_layer_norm_rms_eps(hf.get("rms_norm_eps", 1e-6))
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if hf["model_type"] == "mistral" and hf["sliding_window"]:
        writer.add_sliding_window(hf["sliding_window"])
    if "head_dim" in hf:
        writer.add_key_length(hf["head_dim"])
        writer.add_value_length(hf["head_dim"])
        writer.add_rope_dimension_count(hf["head_dim"])
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    heads = hf["num_attention_heads"] if writer.arch in _INTERLEAVED else 0
    for name, array in _renamed(hf, weights, _GGUF_NAMES, heads).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_meta(path: Path, hf: Mapping[str, Any], weights: Weights, *, ffn_dim_multiplier: float) -> Path:
    """A directory with Meta's params.json and names."""
    path.mkdir()
    params = {
        "dim": hf["hidden_size"],
        "n_layers": hf["num_hidden_layers"],
        "n_heads": hf["num_attention_heads"],
        "n_kv_heads": hf["num_key_value_heads"],
        "vocab_size": hf["vocab_size"],
        "ffn_dim_multiplier": ffn_dim_multiplier,
        "multiple_of": 32,
        "norm_eps": hf["rms_norm_eps"],
        "rope_theta": hf["rope_theta"],
        "use_scaled_rope": bool(hf.get("rope_scaling")),
    }
    (path / "params.json").write_text(json.dumps(params))
    # Meta stores the head of a tied model too.
    weights = {"lm_head.weight": weights["model.embed_tokens.weight"]} | weights
    renamed = _renamed(hf, weights, _META_NAMES, hf["num_attention_heads"])
    safetensors.numpy.save_file(renamed, path / "consolidated.safetensors")
    return path


def _renamed(hf: Mapping[str, Any], weights: Weights, names: Mapping[str, str], heads: int) -> Weights:
    """Under other names, with the rows of q and k in interleaved order if there are `heads`."""
    interleaved = {"q_proj": heads, "k_proj": hf.get("num_key_value_heads", heads)}
    renamed = {}
    for name, array in weights.items():
        for part, num_heads in interleaved.items():
            if part in name and heads:
                array = array.reshape(num_heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = array
    return renamed
