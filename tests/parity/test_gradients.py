"""A loss has gradients with respect to dense weights, through the whole model."""

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.model.cache import empty_cache
from llamajax.model.llama import Llama

from .. import tiny_model
from ..tiny_model import CONFIG, random_ids, random_weights

strict_promotion = tiny_model.strict_promotion


def loss(weights: dict[str, jax.Array], ids: jax.Array) -> jax.Array:
    """Nats a token, of all but the first."""
    model = Llama.with_weights(CONFIG, weights)
    x, _ = model(ids, empty_cache(CONFIG, len(ids), jnp.float32), jnp.int32(0))
    logprobs = jax.nn.log_softmax(model.logits(x)[:-1])
    return -jnp.take_along_axis(logprobs, ids[1:, None], axis=-1).mean()


def test_gradients_are_those_of_small_changes() -> None:
    """Along a random direction of each parameter, by central differences."""
    ids, rng = jnp.asarray(random_ids(12)), np.random.default_rng(1)
    weights = {path: jnp.asarray(x) for path, x in random_weights().items()}
    value, step = jax.jit(loss), 5e-3  # with twice that, the loss bends by 5 %; with half, its last bits count
    gradients = jax.jit(jax.grad(loss))(weights, ids)
    assert gradients.keys() == weights.keys()
    for path, weight in weights.items():
        direction = rng.standard_normal(weight.shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        up, down = (value(weights | {path: weight + sign * step * direction}, ids) for sign in (1, -1))
        along = (up - down) / (2 * step)
        np.testing.assert_allclose((gradients[path] * direction).sum(), along, rtol=0.05, atol=2e-4, err_msg=path)
        assert np.abs(gradients[path]).max() > 1e-4
