"""Random weights: what they are kept in, and that a model of them gives numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax.engine.runner import Runner
from llamajax.model.llama import Llama
from llamajax.ops import Int8Weight
from llamajax.ops.stacked import alone
from llamajax.types import DType
from llamajax.weights.random import random_weights

from ...tiny_model import CONFIG


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32", "int8"])
def test_weights_are_kept_as_asked_and_give_varied_scores(dtype: DType) -> None:
    model = Llama(CONFIG)
    random_weights(model, jax.devices("cpu")[0], dtype, seed=1)
    weights = model.weights()
    shapes = [weight.shape for weight in Llama(CONFIG).weights()]
    assert [weight.shape for weight in weights] == shapes
    for weight in weights:
        if len(weight.shape) == 1:
            norm = alone(weight)
            assert norm.dtype == jnp.float32 and (norm == 1).all()
        elif dtype == "int8":
            assert isinstance(weight, Int8Weight) and weight.values.dtype == jnp.int8
        else:
            assert weight.dtype == (jnp.bfloat16 if dtype == "auto" else dtype)
            assert float(jnp.linalg.norm(weight.astype(jnp.float32), axis=1).mean()) == pytest.approx(1, rel=0.1)
    scores = Runner(model, device=jax.devices("cpu")[0], cache_dtype=np.float32).logits(range(90))
    assert np.isfinite(scores).all()
    assert len(set(scores.argmax(axis=1))) > 10


def test_the_seed_decides_and_parameters_differ() -> None:
    models = [Llama(CONFIG) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        random_weights(model, jax.devices("cpu")[0], "float32", seed)
    first, again, other = ([np.asarray(w) for w in model.weights() if len(w.shape) == 2] for model in models)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not any((a == b).any() for a, b in zip(first, other, strict=True))
    q, k = (model.layers[i].mlp.down_proj.weight.get_value() for model, i in ((models[0], 0), (models[0], 1)))
    assert (q != k).any()
