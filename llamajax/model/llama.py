"""The Llama: embedding, decoder layers, final norm, logits. One sequence; no batch, no sampling, no files."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int

from llamajax.config import LlamaConfig
from llamajax.model.attention import Attention
from llamajax.model.cache import Cache, KeysValues
from llamajax.model.layers import MLP, Embedding, Linear, RMSNorm
from llamajax.model.rope import rope_tables
from llamajax.ops import Weight


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(
        self,
        x: Float32[Array, "T D"],
        rope: tuple[Float32[Array, "T H/2"], Float32[Array, "T H/2"]],
        cache: KeysValues,
        layer: Int[Array, ""] | None,
        start: Int[Array, ""],
        only: Int[Array, ""] | None,
    ) -> tuple[Float32[Array, "T D"], KeysValues]:
        x, cache = self.self_attn(x, self.input_layernorm, rope, cache, layer, start, only)
        return self.mlp(x, self.post_attention_layernorm), cache


@partial(jax.jit, static_argnums=0)
def _apply(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x: Float32[Array, "T D"],
    rope: tuple[Float32[Array, "T H/2"], Float32[Array, "T H/2"]],
    cache: KeysValues,
    layer: Int[Array, ""] | None,
    start: Int[Array, ""],
    only: Int[Array, ""] | None,
) -> tuple[Float32[Array, "T D"], KeysValues]:
    # Layers differ in their weights only, so that one trace serves all: thirty take seconds at each start.
    return nnx.merge(graphdef, state)(x, rope, cache, layer, start, only)


class Llama(nnx.Module):
    """A Llama (Touvron et al. 2023; Grattafiori et al. 2024). Built, it is a structure without weights."""

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nnx.List([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    def __call__(
        self, token_ids: Int[Array, "T"], cache: Cache, start: Int[Array, ""], only: Int[Array, ""] | None = None
    ) -> tuple[Float32[Array, "T D"], Cache]:
        """Runs T tokens that stand at positions start .. start + T - 1, after what the cache holds.

        Returns the final hidden states, [1, D] of token start + `only` if it is given, and the cache with the T
        positions written.
        """
        x = self.embed_tokens(token_ids)
        rope = rope_tables(self.config, start + jnp.arange(token_ids.shape[0]))
        written, shared = list(cache), cache[0].key.ndim == 4
        for i, layer in enumerate(self.layers):
            item, place = (0, jnp.int32(i)) if shared else (i, None)
            # Of other tokens, the last layer has only keys and values to compute.
            only_here = only if layer is self.layers[-1] else None
            x, written[item] = _apply(*nnx.split(layer), x, rope, written[item], place, start, only_here)
        return self.norm(x), tuple(written)

    def logits(self, x: Float32[Array, "T D"]) -> Float32[Array, "T V"]:
        """Scores of the next token, from final hidden states."""
        return self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)

    @classmethod
    def with_weights(cls, config: LlamaConfig, weights: Mapping[str, Weight]) -> "Llama":
        """A model of these weights, by the paths of their parameters."""
        model = cls(config)
        for path, parameter in nnx.to_flat_state(nnx.state(model)):
            parameter.set_value(weights[".".join(map(str, path))])
        return model
