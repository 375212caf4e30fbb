"""Random weights: what they are kept in, and that a model of them gives numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax.engine.runner import Runner
from llamajax.ops import Int8Weight, PackedWeight
from llamajax.ops.stacked import alone
from llamajax.types import DType
from llamajax.weights.random import random_weights

from ...tiny_model import CONFIG, placed, rows_of
from ...tiny_model import random_weights as tiny_weights


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32", "int8"])
def test_weights_are_kept_as_asked_and_give_varied_scores(dtype: DType) -> None:
    placement = placed(CONFIG, dtype, jax.devices("cpu")[0])
    weights = random_weights(CONFIG, placement, seed=1)
    assert {path: weight.shape for path, weight in weights.items()} == {
        path: weight.shape for path, weight in tiny_weights().items()
    }
    for weight in weights.values():
        if len(weight.shape) == 1:
            norm = alone(weight)
            assert norm.dtype == jnp.float32 and (norm == 1).all()
        elif dtype == "int8":
            assert isinstance(weight, Int8Weight) and weight.values.dtype == jnp.int8
        else:
            kept = weight.format.numbers if isinstance(weight, PackedWeight) else weight.dtype.name
            assert kept == ("bfloat16" if dtype == "auto" else dtype)
            assert float(jnp.linalg.norm(rows_of(weight), axis=1).mean()) == pytest.approx(1, rel=0.1)
    scores = Runner(CONFIG, weights, placement).logits(range(90))
    assert np.isfinite(scores).all()
    assert len(set(scores.argmax(axis=1))) > 10


def test_the_seed_decides_and_parameters_differ() -> None:
    models = [random_weights(CONFIG, placed(CONFIG, "float32", jax.devices("cpu")[0]), seed) for seed in (1, 1, 2)]
    first, again, other = ([rows_of(w) for w in model.values() if len(w.shape) == 2] for model in models)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not any((a == b).any() for a, b in zip(first, other, strict=True))
    q, k = (models[0][f"layers.{layer}.mlp.down_proj.weight"] for layer in (0, 1))
    assert (rows_of(q) != rows_of(k)).any()
