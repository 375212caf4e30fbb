"""Llama (Touvron et al. 2023; Grattafiori et al. 2024), from which the others differ."""

from dataclasses import replace

from llamajax.config import LlamaConfig
from llamajax.families.family import Family
from llamajax.rope_scaling import llama3_divisors

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

_PRESETS = {
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

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    gguf="llama",
    is_interleaved=True,
    fixed={"attention_bias": False, "mlp_bias": False, "sliding_window": None},
    presets=_PRESETS,
)
