"""Which stored tensors make which parameter: every rename, fusion and reordering of rows, for each naming.

Knows Hugging Face's, GGUF's and Meta's names. Does not read or convert anything.
"""

from collections.abc import Collection
from typing import NamedTuple

from llamajax.config import LlamaConfig
from llamajax.families import FAMILIES


class Source(NamedTuple):
    """A stored tensor, which is a parameter or the next rows of a fused one."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int = 0
    """Heads, if rows are in interleaved order: RoPE's pairs side by side, as in Meta's and GGUF's q and k."""


# Placeholders: {i} a layer. Modules of the model -> names of what they are made of, in each family that has them.
_HF = {
    "embed_tokens": ["model.embed_tokens"],
    "norm": ["model.norm"],
    "lm_head": ["lm_head"],
    "input_layernorm": ["model.layers.{i}.input_layernorm"],
    "self_attn.qkv_proj": [f"model.layers.{{i}}.self_attn.{x}_proj" for x in "qkv"],
    "self_attn.qk_norm": [f"model.layers.{{i}}.self_attn.{x}_norm" for x in "qk"],
    "self_attn.o_proj": ["model.layers.{i}.self_attn.o_proj"],
    "post_attention_layernorm": ["model.layers.{i}.post_attention_layernorm"],
    "mlp.gate_up_proj": ["model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"],
    "mlp.down_proj": ["model.layers.{i}.mlp.down_proj"],
}
_GGUF = {
    "embed_tokens": ["token_embd"],
    "norm": ["output_norm"],
    "lm_head": ["output"],
    "input_layernorm": ["blk.{i}.attn_norm"],
    "self_attn.qkv_proj": [f"blk.{{i}}.attn_{x}" for x in "qkv"],
    "self_attn.qk_norm": [f"blk.{{i}}.attn_{x}_norm" for x in "qk"],
    "self_attn.o_proj": ["blk.{i}.attn_output"],
    "post_attention_layernorm": ["blk.{i}.ffn_norm"],
    "mlp.gate_up_proj": ["blk.{i}.ffn_gate", "blk.{i}.ffn_up"],
    "mlp.down_proj": ["blk.{i}.ffn_down"],
}
_META = {
    "embed_tokens": ["tok_embeddings"],
    "norm": ["norm"],
    "lm_head": ["output"],
    "input_layernorm": ["layers.{i}.attention_norm"],
    "self_attn.qkv_proj": [f"layers.{{i}}.attention.w{x}" for x in "qkv"],
    "self_attn.o_proj": ["layers.{i}.attention.wo"],
    "post_attention_layernorm": ["layers.{i}.ffn_norm"],
    "mlp.gate_up_proj": ["layers.{i}.feed_forward.w1", "layers.{i}.feed_forward.w3"],
    "mlp.down_proj": ["layers.{i}.feed_forward.w2"],
}

_FIRST_NORM = "layers.0.input_layernorm.weight"


def embedding_and_head(stored: Collection[str]) -> tuple[str, str]:
    """The names that the two have in a Hugging Face checkpoint with these tensors."""
    prefix = _prefix(stored)
    return _prefixed("model.embed_tokens.weight", prefix), _prefixed("lm_head.weight", prefix)


def _prefix(stored: Collection[str]) -> str:
    """What comes before the names of layers: "model."; nothing in a model saved without its head;
    "_orig_mod.model." and the like, if a compiler or data parallelism wrapped the model when it was saved."""
    found = [name.removesuffix(_FIRST_NORM) for name in stored if name.endswith(_FIRST_NORM)]
    return min(found, key=len, default="model.")


def _prefixed(name: str, prefix: str) -> str:
    if name.startswith("model."):
        return prefix + name.removeprefix("model.")
    return prefix.removesuffix("model.") + name  # the head


def sources(config: LlamaConfig, stored: Collection[str]) -> dict[str, list[Source]]:
    """Each parameter's path in the model -> the tensors that make it, in the naming that `stored` follows."""
    prefix = "model."
    if "token_embd.weight" in stored:
        naming = _GGUF
    elif "tok_embeddings.weight" in stored:
        naming = _META
    else:
        naming, prefix = _HF, _prefix(stored)
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes: dict[str, list[tuple[int, ...]]] = {
        "embed_tokens.weight": [(c.vocab_size, c.hidden_size)],
        "norm.weight": [(c.hidden_size,)],
        "input_layernorm.weight": [(c.hidden_size,)],
        "self_attn.qkv_proj.weight": [(q, c.hidden_size), (kv, c.hidden_size), (kv, c.hidden_size)],
        "self_attn.o_proj.weight": [(c.hidden_size, q)],
        "post_attention_layernorm.weight": [(c.hidden_size,)],
        "mlp.gate_up_proj.weight": [(c.intermediate_size, c.hidden_size)] * 2,
        "mlp.down_proj.weight": [(c.hidden_size, c.intermediate_size)],
    }
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = [(c.vocab_size, c.hidden_size)]
    if c.qkv_bias:
        shapes["self_attn.qkv_proj.bias"] = [(q,), (kv,), (kv,)]
    if c.qk_norm:
        shapes["self_attn.qk_norm.weight"] = [(c.head_dim,)] * 2
    is_interleaved = naming is _META or (naming is _GGUF and FAMILIES[c.family].is_interleaved)
    heads = [c.num_attention_heads, c.num_key_value_heads, 0] if is_interleaved else [0] * 3

    plan = {}
    for parameter, parts in shapes.items():
        module, _, kind = parameter.rpartition(".")
        names = naming[module]
        for i in range(c.num_hidden_layers) if "{i}" in names[0] else [None]:
            path = parameter if i is None else f"layers.{i}.{parameter}"
            plan[path] = [
                Source(_prefixed(f"{name.format(i=i)}.{kind}", prefix), shape, h if "qkv" in module else 0)
                for name, shape, h in zip(names, parts, heads, strict=False)
            ]
    if naming is _HF and c.tie_word_embeddings:
        # Some tools save the tied tensor under the head's name only.
        [embedding], head = plan["embed_tokens.weight"], embedding_and_head(stored)[1]
        if embedding.name not in stored and head in stored:
            plan["embed_tokens.weight"] = [embedding._replace(name=head)]
    return plan
