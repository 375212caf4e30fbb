"""Weights drawn at random, on the device: the speed of a model that was never downloaded."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llamajax.model.llama import Llama
from llamajax.ops import Weight, quantize_int8
from llamajax.types import DType


def random_weights(model: Llama, device: jax.Device, dtype: DType = "auto", seed: int = 0) -> None:
    """Puts random weights in place of the model's shapes, one parameter at a time, in the dtype it is kept in.

    Norms are ones; rows of the rest have a length of about one, so that activations stay finite.

    Args:
      model: a structure; it is changed.
      dtype: as `load_weights` keeps dense weights; "auto" is bf16.
    """
    kept = None if dtype == "int8" else jnp.dtype(jnp.bfloat16 if dtype == "auto" else dtype)
    for i, (_, parameter) in enumerate(nnx.to_flat_state(nnx.state(model))):
        with jax.default_device(device):
            # Not threefry, jax's default: on a CPU it takes ten times as long.
            key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), i)
            parameter.set_value(jax.block_until_ready(_random(key, parameter.get_value().shape, kept)))


@partial(jax.jit, static_argnums=(1, 2))
def _random(key: jax.Array, shape: tuple[int, ...], kept: np.dtype | None) -> Weight:
    if len(shape) == 1:
        return jnp.ones(shape, jnp.float32)
    bound = (3 / shape[-1]) ** 0.5
    drawn = jax.random.uniform(key, shape, kept or jnp.bfloat16, -bound, bound)
    return quantize_int8(drawn) if kept is None else drawn
