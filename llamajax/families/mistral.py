"""Mistral (Jiang et al. 2023): a Llama whose attention may be limited to a window. In GGUF it is called a Llama."""

from llamajax.config import LlamaConfig
from llamajax.families.family import Family

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM", "MistralModel"),
    gguf="llama",
    is_interleaved=True,
    # Newer models have no window: they say null.
    defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    fixed={"attention_bias": False, "mlp_bias": False},
    presets={
        "mistral-7b": LlamaConfig(
            vocab_size=32768,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=32768,
            rope_theta=1000000.0,
            family="mistral",
        ),
    },
)
