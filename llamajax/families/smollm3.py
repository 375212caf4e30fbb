"""SmolLM3 (Hugging Face 2025): a Llama with RoPE in three of four layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llamajax.config import LlamaConfig
from llamajax.errors import ConfigError
from llamajax.families.family import Family
from llamajax.fields import integer


def _without_rope(config: LlamaConfig, hf: Mapping[str, Any]) -> LlamaConfig:
    """Says which layers have none. In `no_rope_layers`, 0 does."""
    num_layers = config.num_hidden_layers
    interval = integer(hf, "no_rope_layer_interval", default=4)
    if interval < 1:
        raise ConfigError(f"no_rope_layer_interval must be at least 1, not {interval}")
    turns = hf.get("no_rope_layers", [int((i + 1) % interval != 0) for i in range(num_layers)])
    if not isinstance(turns, list) or len(turns) < num_layers or not all(turn in (0, 1) for turn in turns):
        raise ConfigError(f"no_rope_layers must be 0 or 1 for each of {num_layers} layers, not {turns!r:.80}")
    return replace(config, layers_without_rope=tuple(i for i in range(num_layers) if not turns[i]))


SMOLLM3 = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM", "SmolLM3Model"),
    gguf="smollm3",
    is_interleaved=True,
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    fixed={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    differs=_without_rope,
    presets={
        "smollm3-3b": LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=128,
            max_position_embeddings=65536,
            rms_norm_eps=1e-6,
            rope_theta=5000000.0,
            tie_word_embeddings=True,
            family="smollm3",
            layers_without_rope=tuple(range(3, 36, 4)),
        ),
    },
)
