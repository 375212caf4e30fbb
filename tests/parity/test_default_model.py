"""The default model against transformers on the same dequantized weights, and its default arithmetic against f32.

Run with -s to see the figures.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llamajax.config import LlamaConfig
from llamajax.llm import LLM, load
from llamajax.model.cache import Cache, empty_cache
from llamajax.model.llama import Llama
from llamajax.ops import Int8Weight, Weight
from llamajax.ops.linear import MANY_ROWS
from llamajax.weights.checkpoint import open_checkpoint
from llamajax.weights.load import load_weights

from .tiny import DATA, WINDOW, goldens

CONTINUATIONS = json.loads((DATA / "continuations.json").read_text(encoding="utf-8"))
LOSSES = goldens()["default/losses"]


@pytest.fixture(scope="module")
def float32(smollm2_gguf: Path) -> LLM:
    return load(smollm2_gguf, dtype="float32", max_seq_len=WINDOW)


@pytest.fixture(scope="module")
def default(smollm2_gguf: Path) -> Llama:
    checkpoint = open_checkpoint(smollm2_gguf)
    model = Llama(checkpoint.config)
    load_weights(model, checkpoint.tensors, jax.devices()[0])
    assert any(isinstance(weight, Int8Weight) for weight in model.weights())
    return model


@pytest.fixture(scope="module")
def windows(float32: LLM) -> list[list[int]]:
    """Parts of a text, which know nothing of each other."""
    ids = float32.tokenizer.encode((DATA / "text.txt").read_text(encoding="utf-8"))
    return [ids[begin : begin + WINDOW] for begin in range(0, len(ids), WINDOW)]


def losses(scores: np.ndarray, ids: list[int]) -> np.ndarray:
    """Of each token but the first."""
    return np.asarray(optax.losses.softmax_cross_entropy_with_integer_labels(scores[:-1], jnp.array(ids[1:])))


@pytest.mark.parametrize("stored", CONTINUATIONS, ids=lambda stored: stored["prompt"][:24])
def test_greedy_continuations(float32: LLM, stored: dict[str, Any]) -> None:
    expected, ties = stored["token_ids"], dict(stored["ties"])
    answer = float32.generate(stored["prompt"], max_new_tokens=len(expected), temperature=0)
    found = list(answer.token_ids)
    for step, (token, best) in enumerate(zip(found, expected, strict=False)):
        if token != best:  # a tie that came out in the other order: from here on the texts differ
            assert token == ties.get(step), f"at token {step}"
            return
    if answer.finish_reason == "stop":
        assert expected[len(found)] in float32.tokenizer.stop_ids
    else:
        assert len(found) == len(expected)


def test_float32_losses_are_those_of_transformers(float32: LLM, windows: list[list[int]]) -> None:
    found = np.concatenate([losses(float32.logits(ids), ids) for ids in windows[:4]])
    np.testing.assert_allclose(found, LOSSES[: len(found)], atol=1e-3)
    assert np.exp(found.mean(dtype=float)) == pytest.approx(np.exp(LOSSES[: len(found)].mean(dtype=float)), rel=1e-4)


@partial(jax.jit, donate_argnames="cache", static_argnames="config")
def forward(
    weights: list[Weight], cache: Cache, ids: jax.Array, start: jax.Array, *, config: LlamaConfig
) -> tuple[jax.Array, Cache]:
    model = Llama.with_weights(config, weights)
    x, cache = model(ids, cache, start)
    return model.logits(x), cache


def in_chunks(model: Llama, ids: list[int], rows: int) -> np.ndarray:
    """Scores, computed for this many tokens at a time."""
    padded = np.zeros(WINDOW, np.int32)
    padded[: len(ids)] = ids
    cache = empty_cache(model.config, WINDOW, jnp.float32)
    scores = []
    for start in range(0, len(ids), rows):
        chunk, cache = forward(
            model.weights(), cache, padded[start : start + rows], jnp.int32(start), config=model.config
        )
        scores.append(np.asarray(chunk))
    return np.concatenate(scores)[: len(ids)]


# Many rows at a time, as prompts are read, and few, as answers are drawn, are computed in two ways.
@pytest.mark.parametrize(("rows", "part"), [(WINDOW, 1), (MANY_ROWS // 2, 2)], ids=["prefill", "decode"])
def test_the_default_arithmetic_is_as_good(default: Llama, windows: list[list[int]], rows: int, part: int) -> None:
    """Its perplexity, against f32's."""
    found = np.concatenate([losses(in_chunks(default, ids, rows), ids) for ids in windows[::part]])
    splits = np.cumsum([len(ids) - 1 for ids in windows])[:-1]
    expected = np.concatenate(np.split(LOSSES, splits)[::part])
    perplexities = np.exp([found.mean(dtype=float), expected.mean(dtype=float)])
    print(f"{rows} rows: perplexity {perplexities[0]:.4f}, in f32 {perplexities[1]:.4f}")
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.005)
