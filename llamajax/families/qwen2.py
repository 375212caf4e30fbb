"""Qwen2 and Qwen2.5 (Qwen Team 2024): a Llama with biases on queries, keys and values."""

from dataclasses import replace

from llamajax.config import LlamaConfig
from llamajax.families.family import Family

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    gguf="qwen2",
    defaults={"max_position_embeddings": 32768, "use_sliding_window": False},
    fixed={"use_sliding_window": False, "use_mrope": False},
    differs=lambda config, hf: replace(config, qkv_bias=True),
    presets={
        "qwen2.5-0.5b": LlamaConfig(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            tie_word_embeddings=True,
            family="qwen2",
            qkv_bias=True,
        ),
        "qwen2.5-1.5b": LlamaConfig(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            head_dim=128,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            tie_word_embeddings=True,
            family="qwen2",
            qkv_bias=True,
        ),
    },
)
