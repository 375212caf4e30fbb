"""Weights drawn at random, on the device: the speed of a model that was never downloaded."""

from functools import partial
from itertools import count

import jax
import jax.numpy as jnp

from llamajax.model.llama import Llama
from llamajax.ops import Weight, quantize_int8
from llamajax.ops.quantize import QUANTIZABLE
from llamajax.types import DType
from llamajax.weights.load import alike, block_format, in_blocks, keeps_blocks, shared


def random_weights(model: Llama, device: jax.Device, dtype: DType = "auto", seed: int = 0) -> None:
    """Puts random weights in place of the model's shapes, one parameter at a time, in the dtype it is kept in.

    Norms are ones; rows of the rest have a length of about one, so that activations stay finite.

    Args:
      model: a structure; it is changed.
      dtype: as `load_weights` keeps dense weights; "auto" is bf16.
    """
    numbers = count()

    def drawn(path: str, shape: tuple[int, ...]) -> Weight:
        name = block_format(path, dtype) if dtype in QUANTIZABLE else {"auto": "bfloat16"}.get(dtype, dtype)
        # Not threefry, jax's default: on a CPU it takes ten times as long.
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), next(numbers))
        return jax.block_until_ready(_random(key, shape, name, keeps_blocks(device.platform)))

    for group in alike(model):
        with jax.default_device(device):
            weights = (drawn(path, parameter.get_value().shape) for path, parameter in group.items())
            for parameter, weight in zip(group.values(), shared(weights, len(group), device.platform), strict=True):
                parameter.set_value(weight)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key: jax.Array, shape: tuple[int, ...], kept: str, packed: bool) -> Weight:
    if len(shape) == 1:
        return jnp.ones(shape, jnp.float32)
    bound = (3 / shape[-1]) ** 0.5
    drawn = partial(jax.random.uniform, key, shape, minval=-bound, maxval=bound)
    if kept == "int8":
        return quantize_int8(drawn(jnp.bfloat16))
    return in_blocks(drawn(jnp.float32), kept, packed) if kept in QUANTIZABLE else drawn(jnp.dtype(kept))
