"""The model of all families: embedding, layers, final norm, logits. One sequence; no batch, no sampling, no files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int

from llamajax.config import LlamaConfig
from llamajax.model.attention import Attention
from llamajax.model.cache import Cache
from llamajax.model.layers import MLP, Embedding, Linear, RMSNorm
from llamajax.model.rope import of_layer, rope_tables
from llamajax.ops import Dense, KeysValues, Parameter, Positions

_Layer = tuple[nnx.GraphDef, nnx.State]


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
        cache: KeysValues,
        at: Positions,
        only: Int[Array, ""] | None,
    ) -> tuple[Float32[Array, "T D"], KeysValues]:
        x, cache = self.self_attn(x, self.input_layernorm, cache, at, only)
        return self.mlp(x, self.post_attention_layernorm), cache


@partial(jax.jit, static_argnums=0)
def _apply(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    x: Float32[Array, "T D"],
    cache: KeysValues,
    at: Positions,
    only: Int[Array, ""] | None,
) -> tuple[Float32[Array, "T D"], KeysValues]:
    # Layers differ in their values only, so that one trace is enough: thirty take seconds.
    return nnx.merge(graphdef, state)(x, cache, at, only)


def _step(
    layer: _Layer,
    first: int,
    at: Callable[[Array | int], Positions],
    number: Int[Array, ""] | int,
    carry: tuple[Float32[Array, "T D"], KeysValues],
) -> tuple[Float32[Array, "T D"], KeysValues]:
    """Runs the layer that is `number` places behind this one, the `first`."""
    graphdef, state = layer
    x, cache = carry
    place = first + number
    state = jax.tree.map(lambda leaf: leaf + number if isinstance(leaf, np.int32) else leaf, state)
    return _apply(graphdef, state, x, _of_layer(cache, place), at(place), None)


def _of_layer(cache: KeysValues, layer: Array | int) -> KeysValues:
    """The cache for a layer that shares it with the others, if it does."""
    return cache if cache.table is None else cache._replace(layer=jnp.int32(layer))


def _runs(layers: Sequence[_Layer], looped: bool) -> Iterator[range]:
    """Layers that a loop can run, which makes programs half as large: they differ in their place in stacks only."""
    first = 0
    for i in range(1, len(layers) + 1):
        if i == len(layers) or not (looped and _follows(layers[i - 1], layers[i])):
            yield range(first, i)
            first = i


def _follows(layer: _Layer, other: _Layer) -> bool:
    (leaves, tree), (other_leaves, other_tree) = (_flat(state) for _, state in (layer, other))
    places = zip(leaves, other_leaves, strict=False)
    return (layer[0], tree) == (other[0], other_tree) and all(
        there == here + 1 if isinstance(here, np.int32) else there is here for here, there in places
    )


def _flat(state: nnx.State) -> tuple[list[Any], Any]:
    return jax.tree.flatten(state)


class Llama(nnx.Module):
    """A Llama (Touvron et al. 2023; Grattafiori et al. 2024), or a model like it, as its configuration says.

    Built, it is a structure without weights.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nnx.List([DecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    def __call__(
        self, token_ids: Int[Array, "T"], cache: Cache, start: Int[Array, ""], only: Int[Array, ""] | None = None
    ) -> tuple[Float32[Array, "T D"], Cache]:
        """Runs T tokens at positions start .. start + T - 1, after what the cache holds.

        Returns the final hidden states, [1, D] of token start + `only` if it is given, and the cache with the T
        positions written.
        """
        x = self.embed_tokens(token_ids)
        cos, sin = rope_tables(self.config, start + jnp.arange(token_ids.shape[0]))
        at = partial(of_layer, self.config, Positions(start, cos, sin))
        written, shared = list(cache), cache[0].table is not None
        layers = [nnx.split(layer) for layer in self.layers]
        for run in _runs(layers[:-1], shared):
            step = partial(_step, layers[run.start], run.start, at)
            item = 0 if shared else run.start
            carry = x, written[item]
            x, written[item] = step(0, carry) if len(run) == 1 else jax.lax.fori_loop(0, len(run), step, carry)
        # In the last layer only the wanted token needs a query; the others need keys and values.
        last = len(layers) - 1
        x, written[-1] = _apply(*layers[-1], x, _of_layer(written[-1], last), at(last), only)
        return self.norm(x), tuple(written)

    def logits(self, x: Float32[Array, "T D"]) -> Float32[Array, "T V"]:
        """Scores of the next token, from final hidden states."""
        return self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)

    @classmethod
    def with_weights(cls, config: LlamaConfig, weights: Mapping[str, Parameter]) -> "Llama":
        """A model of these weights, by the paths of their parameters."""
        model = cls(config)
        for path, parameter in nnx.to_flat_state(nnx.state(model)):
            weight = weights[".".join(map(str, path))]
            if isinstance(weight, jax.Array) and weight.ndim == 2:
                weight = Dense(weight)
            parameter.set_value(weight)
        return model
