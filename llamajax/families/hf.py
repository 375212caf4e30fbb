"""From a Hugging Face config.json, and from what others say in its names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamajax.config import LlamaConfig
from llamajax.errors import ConfigError
from llamajax.families.family import Family
from llamajax.families.registry import FAMILIES, unknown
from llamajax.fields import flag, integer, number
from llamajax.rope_scaling import rope_scaling


def from_hf(hf: Mapping[str, Any], *, max_len: int | None = None) -> LlamaConfig:
    """From a parsed config.json.

    Args:
      hf: the keys and values of the file.
      max_len: as for `rope_scaling`.

    Raises ConfigError for a missing key, and for any architecture or option that no family has.
    """
    architectures = hf.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    likely = (family.name for family in FAMILIES.values() if named in family.architectures)
    model_type = hf.get("model_type", next(likely, "llama"))
    family = FAMILIES.get(str(model_type))
    if family is None or named not in (None, *family.architectures):
        raise unknown(named or model_type)
    # Newer configs put theta and scaling into one dictionary; older ones keep them apart.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        raise ConfigError(f"malformed RoPE scaling {rope!r:.200}: expected one object for all layers")
    said = {key: value for key, value in hf.items() if value is not None or key == "sliding_window"}  # null: none
    hf = {**family.defaults, **said, **rope}
    if quantized := hf.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ConfigError(
            f"weights quantized by {method!r:.80} (quantization_config) cannot be read: choose the repository "
            "they were made from, or a GGUF file"
        )
    for key, value in family.options.items():
        if hf.get(key) not in (None, value):
            raise ConfigError(
                f"{named or family.architectures[0]} with {key}={hf[key]!r:.80} is not supported: expected {value!r}"
            )
    expected = "full_attention" if _window(hf) is None else "sliding_attention"
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != expected for kind in kinds):
        raise ConfigError(f"layer_types {kinds!r:.200} are not supported: expected {expected!r} for all layers")
    return config_of(family, hf, max_len=max_len)


def config_of(family: Family, hf: Mapping[str, Any], *, max_len: int | None = None) -> LlamaConfig:
    """A family's configuration from the keys of config.json, with those of RoPE scaling among them."""
    hf = {name: value for name, value in hf.items() if value is not None}
    num_heads = integer(hf, "num_attention_heads")
    config = LlamaConfig(
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=integer(hf, "hidden_size"),
        intermediate_size=integer(hf, "intermediate_size"),
        num_hidden_layers=integer(hf, "num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=integer(hf, "num_key_value_heads", default=num_heads),
        head_dim=integer(hf, "head_dim", default=integer(hf, "hidden_size") // max(num_heads, 1)),
        max_position_embeddings=integer(hf, "max_position_embeddings", default=2048),
        rms_norm_eps=number(hf, "rms_norm_eps", default=1e-6),
        rope_theta=number(hf, "rope_theta", default=10000.0),
        tie_word_embeddings=flag(hf, "tie_word_embeddings", default=False),
        family=family.name,
    )
    config, window = family.differs(config, hf), _window(hf)
    scaling = rope_scaling(
        hf,
        head_dim=config.head_dim,
        theta=config.rope_theta,
        context=config.max_position_embeddings,
        max_len=max_len,
    )
    return replace(
        config,
        rope_divisors=scaling.divisors,
        rope_attention_factor=scaling.attention_factor,
        max_position_embeddings=scaling.context,
        sliding_window=window if window and window < scaling.context else None,
    )


def _window(hf: Mapping[str, Any]) -> int | None:
    """The positions that attention sees, if they are limited."""
    if hf.get("sliding_window") is None or not flag(hf, "use_sliding_window", default=True):
        return None
    window = integer(hf, "sliding_window")
    if window < 1:
        raise ConfigError(f"sliding_window must be at least 1, not {window}")
    return window
