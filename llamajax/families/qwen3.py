"""Qwen3 (Qwen Team 2025): a Llama with an RMS norm of each query's and each key's head, whose size is given."""

from dataclasses import replace

from llamajax.config import LlamaConfig
from llamajax.families.family import Family

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    gguf="qwen3",
    defaults={"head_dim": 128, "max_position_embeddings": 32768, "use_sliding_window": False},
    fixed={"attention_bias": False, "use_sliding_window": False},
    differs=lambda config, hf: replace(config, qk_norm=True),
    presets={
        "qwen3-0.6b": LlamaConfig(
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            tie_word_embeddings=True,
            family="qwen3",
            qk_norm=True,
        ),
        "qwen3-1.7b": LlamaConfig(
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            tie_word_embeddings=True,
            family="qwen3",
            qk_norm=True,
        ),
    },
)
