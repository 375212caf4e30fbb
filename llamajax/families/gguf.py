"""From the metadata of a GGUF file. Source of its keys: ggml's docs/gguf.md."""

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from llamajax.config import LlamaConfig
from llamajax.errors import ConfigError
from llamajax.families.hf import config_of
from llamajax.families.registry import FAMILIES, unknown
from llamajax.fields import number
from llamajax.text import one_line

# What config.json calls them. Each begins with the architecture's name in the file.
_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
_YARN_KEYS = {
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "mscale_all_dim": "rope.scaling.yarn_log_multiplier",
}


def from_gguf(
    metadata: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    tie_word_embeddings: bool = False,
    rope_divisors: tuple[float, ...] | None = None,
) -> LlamaConfig:
    """From a GGUF file's metadata, and three facts that its tensors tell.

    Args:
      metadata: the key-value pairs of the file.
      vocab_size: rows of the file's `token_embd.weight`; None if they are not known. Keys that differ are wrong.
      tie_word_embeddings: whether the file has no `output.weight`.
      rope_divisors: the file's `rope_freqs.weight`, where it has one.

    Raises ConfigError for a missing key, and for any architecture or option that no family has.
    """
    kind, architecture = metadata.get("general.type", "model"), str(metadata.get("general.architecture"))
    if str(kind) != "model":
        raise ConfigError(f"the file holds {one_line(repr(kind), 80)} (general.type), expected a model")
    family = next((family for family in FAMILIES.values() if family.gguf == architecture), None)
    if family is None:
        raise unknown(one_line(architecture))
    keys = _of_all_layers(metadata, f"{family.gguf}.")
    hf = {name: keys[key] for name, key in _KEYS.items() if key in keys}
    tokens = metadata.get("tokenizer.ggml.tokens")
    if vocab_size is not None:
        hf["vocab_size"] = vocab_size
    elif "vocab_size" not in hf and isinstance(tokens, list):
        hf["vocab_size"] = len(tokens)
    if keys.get("expert_count", 0):
        raise ConfigError("a mixture of experts (Mixtral) is not supported: its layers are not a Llama's")
    if not metadata.get(f"{family.gguf}.attention.causal", True):
        raise ConfigError(
            "a model whose attention is not causal is not supported: it finds embeddings, and no next token"
        )
    said = {**hf, "tie_word_embeddings": tie_word_embeddings, **_rope_scaling(keys)}
    # As in config.json, a window does not count where the family says so.
    windows = {name: value for name, value in family.defaults.items() if name == "use_sliding_window"}
    config = config_of(family, {**windows, **said})
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.get(key, config.head_dim) != config.head_dim:
            raise ConfigError(f"{key}={keys[key]} is not supported: expected the head's size, {config.head_dim}")
    factor = number(keys, "rope.scaling.attn_factor", default=1.0)
    scaled = replace(config, rope_attention_factor=factor * config.rope_attention_factor)
    if rope_divisors is None:
        return scaled
    given = replace(scaled, rope_divisors=rope_divisors)
    if config.rope_divisors is None:
        return given
    return replace(given, rope_divisors=tuple(map(operator.mul, rope_divisors, config.rope_divisors)))


def _of_all_layers(metadata: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Numbers and strings by keys without the prefix; also of arrays that say the same of each layer, as some
    converters write."""
    values = {}
    for key, value in metadata.items():
        if not key.startswith(prefix):
            continue
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        name = key.removeprefix(prefix)
        if isinstance(value, str | int | float | np.number):
            values[name] = value
        elif name in _KEYS.values():
            raise ConfigError(f"expected one value of {key} for all layers, found {one_line(repr(value), 80)}")
    return values


def _rope_scaling(keys: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json would say of a file's RoPE scaling, with llama.cpp's defaults: linear, a factor of 1."""
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(f"RoPE scaling {kind!r:.80} is not supported: a GGUF file has none, linear or yarn")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    blend = keys.get("rope.scaling.yarn_ext_factor", 1.0)
    if kind == "yarn" and not (isinstance(blend, str) or blend < 0 or blend == 1):
        raise ConfigError(f"rope.scaling.yarn_ext_factor={blend} is not supported: YaRN has 1")
    scaling = {name: keys[key] for name, key in _YARN_KEYS.items() if key in keys}
    if scaling.get("mscale_all_dim"):
        scaling["mscale"] = 1.0
    return scaling | {"rope_type": kind, "factor": factor}
