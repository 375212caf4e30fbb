"""Rotary position embedding (Su et al. 2021), in the half-split order of Hugging Face checkpoints."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from llamajax.config import LlamaConfig
from llamajax.ops import Positions


def rope_tables(
    config: LlamaConfig, positions: Int[Array, "T"]
) -> tuple[Float32[Array, "T H/2"], Float32[Array, "T H/2"]]:
    """Cosines and sines of each position's angles, position * theta ** (-2i / H) / divisor[i], times YaRN's factor."""
    inverse = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    inverse = inverse / (config.rope_divisors or 1.0)
    angles = jnp.outer(positions.astype(jnp.float32), jnp.asarray(inverse, jnp.float32))
    factor = jnp.float32(config.rope_attention_factor)
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def of_layer(config: LlamaConfig, at: Positions, layer: Array | int) -> Positions:
    """The positions for a layer: one without RoPE turns by no angle."""
    if not config.layers_without_rope:
        return at
    turns = ~np.isin(np.arange(config.num_hidden_layers), config.layers_without_rope)
    return Positions(
        at.start, jnp.where(jnp.asarray(turns)[layer], at.cos, 1), jnp.where(jnp.asarray(turns)[layer], at.sin, 0)
    )
