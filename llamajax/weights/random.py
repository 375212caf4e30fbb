"""Weights drawn at random, on the device: the speed of a model that was never downloaded."""

from functools import partial
from itertools import count

import jax
import jax.numpy as jnp

from llamajax.config import LlamaConfig
from llamajax.ops import Parameter, quantize_int8
from llamajax.ops.packed import pack_dense
from llamajax.ops.quantize import QUANTIZABLE
from llamajax.placement import Placement
from llamajax.weights.kept import alike, block_format
from llamajax.weights.load import in_blocks, shared
from llamajax.weights.names import sources


def random_weights(config: LlamaConfig, placement: Placement, seed: int = 0) -> dict[str, Parameter]:
    """Random weights by the paths of the model's parameters, made one at a time, in the dtype they are kept in.

    Norms and biases are ones; rows of the rest have a length of about one, so that activations stay finite.

    Args:
      placement: as `load_weights` takes it; "auto" is bf16.
    """
    dtype = placement.dtype
    numbers = count()

    def drawn(path: str, shape: tuple[int, ...]) -> Parameter:
        name = block_format(path, dtype) if dtype in QUANTIZABLE else {"auto": "bfloat16"}.get(dtype, dtype)
        # Not threefry, jax's default: on a CPU it takes ten times as long.
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), next(numbers))
        return jax.block_until_ready(_random(key, shape, name, placement.has_kernels))

    shapes = {path: _fused([part.shape for part in parts]) for path, parts in sources(config, ()).items()}
    made: dict[str, Parameter] = {}
    for group in alike(shapes):
        with jax.default_device(placement.device):
            weights = (drawn(path, shapes[path]) for path in group)
            made.update(zip(group, shared(weights, len(group), placement), strict=True))
    return made


def _fused(parts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of these parts in one matrix, one below the other."""
    return sum(part[0] for part in parts), *parts[0][1:]


@partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key: jax.Array, shape: tuple[int, ...], kept: str, packed: bool) -> Parameter:
    if len(shape) == 1:
        return jnp.ones(shape, jnp.float32)
    bound = (3 / shape[-1]) ** 0.5
    drawn = partial(jax.random.uniform, key, shape, minval=-bound, maxval=bound)
    if kept == "int8":
        return quantize_int8(drawn(jnp.bfloat16))
    if kept in QUANTIZABLE:
        return in_blocks(drawn(jnp.float32), kept, packed)
    return pack_dense(drawn(jnp.dtype(kept))) if packed else drawn(jnp.dtype(kept))
