"""What a Llama is made of: sizes and constants, by name, from a Hugging Face config or from GGUF metadata.

Knows nothing of weights or files. Everything it refuses is computed differently from a Llama.
"""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llamajax.errors import ConfigError
from llamajax.fields import flag, integer, number
from llamajax.rope_scaling import llama3_divisors, rope_scaling
from llamajax.text import one_line


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama, under the names a Hugging Face config.json gives them.

    `rope_divisors`, head_dim / 2 of them, divide RoPE's inverse frequencies: every kind of RoPE scaling that
    a Llama uses comes down to them, and a GGUF file carries them as they are. None means no scaling. YaRN also
    multiplies the cosines and sines by `rope_attention_factor`, and so attention's scores by its square.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_divisors: tuple[float, ...] | None = None
    rope_attention_factor: float = 1.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in _SIZES:
            size = getattr(self, name)
            # The limits are far above any model; beyond them a broken file would only exhaust the memory.
            if not isinstance(size, int) or not 1 <= size <= _LIMITS.get(name, 2**31 - 1):
                raise ConfigError(f"{name} must be a positive integer of a possible size, not {size!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for RoPE, not {self.head_dim}")
        if not (self.rope_theta > 0 and self.rms_norm_eps > 0):
            raise ConfigError("rope_theta and rms_norm_eps must be positive")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ConfigError(f"expected {self.head_dim // 2} RoPE divisors, found {len(self.rope_divisors)}")
        if not all(0 < divisor < math.inf for divisor in self.rope_divisors or ()):
            raise ConfigError("RoPE divisors must be positive and finite: the scaling's factor is not")
        if not 0 < self.rope_attention_factor < math.inf:
            raise ConfigError(f"RoPE's attention_factor must be positive, not {self.rope_attention_factor}")

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied embedding counts once."""
        attention = self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        layer = self.hidden_size * (attention + 3 * self.intermediate_size + 2)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + self.hidden_size

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, max_len: int | None = None) -> "LlamaConfig":
        """From a parsed config.json.

        Args:
          hf: the keys and values of the file.
          max_len: as for `rope_scaling`.

        Raises ConfigError for a missing key, and for any architecture or option that is not a Llama's.
        """
        architecture = _hf_architecture(hf)
        # Newer configs put theta and scaling into one dictionary; older ones keep them apart.
        rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
            raise ConfigError(f"malformed RoPE scaling {rope!r:.200}: expected one object for all layers")
        hf = {name: value for name, value in {**hf, **rope}.items() if value is not None}
        if quantized := hf.get("quantization_config"):
            method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
            raise ConfigError(
                f"weights quantized by {method!r:.80} (quantization_config) cannot be read: choose the repository "
                "they were made from, or a GGUF file"
            )
        for key, llama in _HF_LLAMA_VALUES.items():
            if key in hf and hf[key] != llama:
                raise ConfigError(f"{architecture} with {key}={hf[key]!r:.80} is not supported: a Llama has {llama!r}")
        num_heads = integer(hf, "num_attention_heads")
        config = cls(
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
        )
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
        )

    @classmethod
    def from_meta(cls, params: Mapping[str, Any]) -> "LlamaConfig":
        """From the params.json of Meta's own layout.

        It names neither the context nor the scaling's factor: those follow the released models (8 for Llama
        3.1, 32 for the 1B and 3B of Llama 3.2).

        Raises ConfigError for a missing or malformed key.
        """
        dim, num_heads = integer(params, "dim"), integer(params, "n_heads")
        if "ffn_dim_multiplier" not in params and "hidden_dim" not in params:
            raise ConfigError("params.json needs 'ffn_dim_multiplier' or 'hidden_dim'")
        multiple = integer(params, "multiple_of", default=256)
        ffn = int(number(params, "ffn_dim_multiplier", default=1.0) * int(8 * dim / 3))
        scaled = flag(params, "use_scaled_rope", default=False)
        config = cls(
            vocab_size=integer(params, "vocab_size"),
            hidden_size=dim,
            intermediate_size=integer(params, "hidden_dim", default=-(-ffn // max(multiple, 1)) * multiple),
            num_hidden_layers=integer(params, "n_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=integer(params, "n_kv_heads", default=num_heads),
            head_dim=dim // max(num_heads, 1),
            max_position_embeddings=131072 if scaled else 8192,
            rms_norm_eps=number(params, "norm_eps"),
            rope_theta=number(params, "rope_theta", default=10000.0),
        )
        if not scaled:
            return config
        divisors = llama3_divisors(32.0 if dim < 4096 else 8.0, head_dim=config.head_dim, theta=config.rope_theta)
        return replace(config, rope_divisors=divisors)

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        vocab_size: int | None = None,
        tie_word_embeddings: bool = False,
        rope_divisors: tuple[float, ...] | None = None,
    ) -> "LlamaConfig":
        """From a GGUF file's metadata, and three facts that its tensors tell.

        Args:
          metadata: the key-value pairs of the file.
          vocab_size: rows of the file's `token_embd.weight`; None if they are not known. Keys that differ are wrong.
          tie_word_embeddings: whether the file has no `output.weight`.
          rope_divisors: the file's `rope_freqs.weight`, where it has one.

        Raises ConfigError for a missing key, and for any architecture or option that is not a Llama's.
        """
        tokens = metadata.get("tokenizer.ggml.tokens")
        metadata = _of_all_layers(metadata)
        kind = metadata.get("general.type", "model")
        if kind != "model":
            raise ConfigError(f"the file holds {kind!r:.80} (general.type), expected a model")
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise ConfigError(
                f"architecture {architecture!r:.80} is not supported: llamajax runs Llama models (GGUF 'llama')"
            )
        hf = {name: metadata[key] for name, key in _GGUF_KEYS.items() if key in metadata}
        if vocab_size is not None:
            hf["vocab_size"] = vocab_size
        elif "vocab_size" not in hf and isinstance(tokens, list):
            hf["vocab_size"] = len(tokens)
        hf["tie_word_embeddings"] = tie_word_embeddings
        hf["rope_scaling"] = _gguf_rope_scaling(metadata)
        if metadata.get("llama.expert_count", 0):
            raise ConfigError("a mixture of experts (Mixtral) is not supported: its layers are not a Llama's")
        config = cls.from_hf(hf)
        for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
            if metadata.get(key, config.head_dim) != config.head_dim:
                raise ConfigError(
                    f"{key}={metadata[key]} is not supported: a Llama has its head_dim, {config.head_dim}"
                )
        factor = number(metadata, "llama.rope.scaling.attn_factor", default=1.0)
        scaled = replace(config, rope_attention_factor=factor * config.rope_attention_factor)
        if rope_divisors is None:
            return scaled
        given = replace(scaled, rope_divisors=rope_divisors)
        if config.rope_divisors is None:
            return given
        return replace(given, rope_divisors=tuple(map(operator.mul, rope_divisors, config.rope_divisors)))


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)

_LIMITS = {"head_dim": 65536, "num_hidden_layers": 65536}

# Architectures whose computation is a Llama's as long as the options below have a Llama's values. One saved without
# its head is named a model; if it is tied, it is whole.
_HF_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "LlamaModel"),
    "mistral": ("MistralForCausalLM", "MistralModel"),
}
_HF_LLAMA_VALUES = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
}

_GGUF_KEYS = {
    "vocab_size": "llama.vocab_size",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
    "sliding_window": "llama.attention.sliding_window",
}
_GGUF_YARN_KEYS = {
    "original_max_position_embeddings": "llama.rope.scaling.original_context_length",
    "beta_fast": "llama.rope.scaling.yarn_beta_fast",
    "beta_slow": "llama.rope.scaling.yarn_beta_slow",
    "mscale_all_dim": "llama.rope.scaling.yarn_log_multiplier",
}


def _of_all_layers(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and strings; also of arrays that say the same of each layer, as some converters write."""
    values = {}
    for key, value in metadata.items():
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if isinstance(value, str | int | float | np.number):
            values[key] = value
        elif key in _GGUF_KEYS.values():
            raise ConfigError(f"expected one value of {key} for all layers, found {one_line(repr(value), 80)}")
    return values


def _gguf_rope_scaling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json would say of a file's RoPE scaling, with llama.cpp's defaults: linear, a factor of 1."""
    kind = metadata.get("llama.rope.scaling.type", "linear")
    factor = metadata.get("llama.rope.scaling.factor") or metadata.get("llama.rope.scale_linear") or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(f"RoPE scaling {kind!r:.80} is not supported: a Llama GGUF has none, linear or yarn")
    if kind == "none" or (kind == "linear" and factor == 1):
        return {}
    blend = metadata.get("llama.rope.scaling.yarn_ext_factor", 1.0)
    if kind == "yarn" and not (isinstance(blend, str) or blend < 0 or blend == 1):
        raise ConfigError(f"llama.rope.scaling.yarn_ext_factor={blend} is not supported: YaRN has 1")
    scaling = {name: metadata[key] for name, key in _GGUF_YARN_KEYS.items() if key in metadata}
    if scaling.get("mscale_all_dim"):
        scaling["mscale"] = 1.0
    return scaling | {"rope_type": kind, "factor": factor}


def _hf_architecture(hf: Mapping[str, Any]) -> str:
    model_type, architectures = hf.get("model_type", "llama"), hf.get("architectures")
    expected = _HF_ARCHITECTURES.get(str(model_type), ())
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    if not expected or named not in (None, *expected):
        raise ConfigError(
            f"architecture {named or model_type!r:.80} is not supported: llamajax runs Llama models "
            "(LlamaForCausalLM, or MistralForCausalLM without a sliding window)"
        )
    return named or expected[0]


_LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=500000.0,
)

#: The named configurations: an instruct model has its base model's. Source: each checkpoint's config.json.
CONFIGS: dict[str, LlamaConfig] = {
    "llama3.2-1b": LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_divisors=llama3_divisors(32.0, head_dim=64, theta=500000.0),
        tie_word_embeddings=True,
    ),
    "llama3.2-3b": LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_divisors=llama3_divisors(32.0, head_dim=128, theta=500000.0),
        tie_word_embeddings=True,
    ),
    "llama3.1-8b": replace(
        _LLAMA_3_8B,
        max_position_embeddings=131072,
        rope_divisors=llama3_divisors(8.0, head_dim=128, theta=500000.0),
    ),
    "llama3-8b": _LLAMA_3_8B,
    "tinyllama-1.1b": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
}
