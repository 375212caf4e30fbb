"""Arrays of several layers in one: a program's call looks at each of its arrays, which takes 1 to 2 us."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Int32, Shaped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stacked:
    """The array of one layer, among those of several."""

    layers: Shaped[Array, "L ..."]
    layer: Int32[Array, ""] | np.int32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layers.shape[1:]


def alone(array: Array | Stacked) -> Array:
    """An array, copied out if it is stacked: for what cannot read it in its place."""
    return array.layers[array.layer] if isinstance(array, Stacked) else array
