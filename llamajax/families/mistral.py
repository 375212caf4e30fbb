"""Mistral (Jiang et al. 2023): a Llama. In GGUF it is named one."""

from llamajax.families.family import Family

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM", "MistralModel"),
    gguf="llama",
    is_interleaved=True,
    fixed={"attention_bias": False, "mlp_bias": False, "sliding_window": None},
)
