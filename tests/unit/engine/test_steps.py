"""A cache that gets another size is not in memory twice."""

import jax.numpy as jnp
import numpy as np

from llamajax.engine import steps
from llamajax.engine.batch import Needs
from llamajax.engine.contiguous import ContiguousBatch
from llamajax.model.cache import Cache
from llamajax.ops import KeysValues

from ... import tiny_model
from ...tiny_model import tiny_runner

strict_promotion = tiny_model.strict_promotion


def test_a_layer_is_gone_before_the_next_one_is_made() -> None:
    old = [KeysValues(*(jnp.full((2, 3, 128, 8), number, jnp.float32) for number in (i, -i))) for i in range(1, 4)]

    def grow(layer: Cache) -> Cache:
        at = next(i for i, other in enumerate(old) if other is layer[0])
        assert all(array.is_deleted() for before in old[:at] for array in (before.key, before.value))
        return steps.resize(layer, np.arange(2, dtype=np.int32), length=256)

    layers = list(old)
    steps.by_layer(grow, layers)
    assert all(array.is_deleted() for layer in old for array in (layer.key, layer.value))
    for i, layer in enumerate(layers, 1):
        assert layer.key.shape == (2, 3, 256, 8)
        assert (np.asarray(layer.key[:, :, :128]) == i).all() and (np.asarray(layer.value[:, :, :128]) == -i).all()


def test_the_old_cache_of_rows_is_gone() -> None:
    batch = ContiguousBatch(tiny_runner(1024, has_pages=False), 4)
    list(batch.fit(Needs({}, longest=128, num_wanted=2)))
    for num_rows, length in ((2, 1024), (4, 1024), (4, 128)):
        assert batch._rows
        old = batch._rows.cache
        list(batch.fit(Needs({0: 100, 1: 100}, longest=length, num_wanted=num_rows)))
        assert all(array.is_deleted() for layer in old for array in (layer.key, layer.value))
        assert (batch.num_rows, batch.length) == (num_rows, length)
