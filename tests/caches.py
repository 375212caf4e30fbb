"""KV caches for tests that run a model without the engine."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llamajax.config import LlamaConfig
from llamajax.model.cache import Cache, empty_cache, paged_cache
from llamajax.ops import PAGE_LEN, KeysValues

from .tiny_model import placed


def caches(config: LlamaConfig, length: int, dtype: DTypeLike, num_rows: int = 1) -> list[Cache]:
    """One a row, of this device's kind: pages are in a random order, in a pool that all share, with some of nobody."""
    if not placed(config).has_pages:
        return [empty_cache(config, length, dtype) for _ in range(num_rows)]
    num_pages = num_rows * -(-length // PAGE_LEN)
    order = np.random.default_rng(0).permutation(num_pages + 3)[:num_pages]
    tables = jnp.asarray(order.reshape(num_rows, -1), jnp.int32)
    (pool,) = paged_cache(config, num_pages + 3, dtype, tables[0])
    return [(pool._replace(table=table),) for table in tables]


def full_of_noise(cache: Cache) -> Cache:
    """As a cache that other text was in before."""

    def noise(x: jax.Array) -> jax.Array:
        return jnp.asarray(10 * np.random.default_rng(0).standard_normal(x.shape), x.dtype)

    return tuple(item._replace(key=noise(item.key), value=noise(item.value)) for item in cache)


def batched(rows: list[Cache]) -> tuple[Cache, Cache]:
    """Rows' caches as one, and the axes by which `jax.vmap` takes and gives it."""
    batch = jax.tree.map(lambda *x: jnp.stack(x), *rows)
    if rows[0][0].table is None:
        return batch, tuple(KeysValues(0, 0) for _ in batch)
    return (rows[0][0]._replace(table=batch[0].table),), (KeysValues(None, None, 0),)


def row_of(batch: Cache, row: int) -> Cache:
    if batch[0].table is None:
        return jax.tree.map(lambda x: x[row], batch)
    return (batch[0]._replace(table=batch[0].table[row]),)


def contents(cache: Cache) -> list[jax.Array]:
    """Keys and values of a row."""
    return [x if item.table is None else x[item.table] for item in cache for x in (item.key, item.value)]
