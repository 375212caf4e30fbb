"""The default model against transformers on the same dequantized weights, in f32 and in the smaller kinds of weights.

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

from llamajax import LLM, load
from llamajax.bench.perplexity import measure
from llamajax.config import LlamaConfig
from llamajax.model.cache import Cache
from llamajax.model.llama import Llama
from llamajax.ops import Parameter
from llamajax.ops.linear import MANY_TOKENS
from llamajax.types import DType
from llamajax.weights.checkpoint import open_checkpoint
from llamajax.weights.load import load_weights

from ..caches import caches
from ..tiny_model import placed
from .tiny import DATA, WINDOW, goldens

TEXT = (DATA / "text.txt").read_text(encoding="utf-8")
CONTINUATIONS = json.loads((DATA / "continuations.json").read_text(encoding="utf-8"))
LOSSES = goldens()["default/losses"]


@pytest.fixture(scope="module")
def float32(smollm2_gguf: Path) -> LLM:
    return load(smollm2_gguf, dtype="float32", max_seq_len=WINDOW)


@pytest.fixture(scope="module")
def windows(float32: LLM) -> list[list[int]]:
    """Parts of a text, which know nothing of each other."""
    ids = float32.tokenizer.encode(TEXT)
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
    found = np.concatenate([losses(float32.logits(ids), ids) for ids in windows[:2]])
    np.testing.assert_allclose(found, LOSSES[: len(found)], atol=1e-3)
    assert np.exp(found.mean(dtype=float)) == pytest.approx(np.exp(LOSSES[: len(found)].mean(dtype=float)), rel=1e-4)


def test_the_perplexity_of_second_halves_is_that_of_transformers(float32: LLM) -> None:
    measured = measure(float32, TEXT, context=WINDOW, max_windows=3)
    expected = LOSSES[: 3 * (WINDOW - 1)].reshape(3, WINDOW - 1)[:, WINDOW // 2 :]
    assert measured.tokens == expected.size
    assert measured.perplexity.value == pytest.approx(np.exp(expected.mean(dtype=float)), rel=1e-4)


@partial(jax.jit, donate_argnames="cache", static_argnames="config")
def forward(
    weights: dict[str, Parameter], cache: Cache, ids: jax.Array, start: jax.Array, *, config: LlamaConfig
) -> tuple[jax.Array, Cache]:
    model = Llama.with_weights(config, weights)
    x, cache = model(ids, cache, start)
    return model.logits(x), cache


def in_chunks(config: LlamaConfig, weights: dict[str, Parameter], ids: list[int], rows: int) -> np.ndarray:
    """Scores, computed for this many tokens at a time."""
    padded = np.zeros(WINDOW, np.int32)
    padded[: len(ids)] = ids
    (cache,) = caches(config, WINDOW, jnp.float32)
    scores = []
    for start in range(0, len(ids), rows):
        chunk, cache = forward(weights, cache, padded[start : start + rows], jnp.int32(start), config=config)
        scores.append(np.asarray(chunk))
    return np.concatenate(scores)[: len(ids)]


# Many rows at a time, as prompts are read, and few, as answers are drawn, may be computed in two ways. Each reads one
# window of every `part`: the whole text takes long.
@pytest.mark.parametrize(
    ("dtype", "rows", "part"),
    [("auto", WINDOW, 2), ("auto", MANY_TOKENS // 2, 5), ("int8", MANY_TOKENS // 2, 5)],
)
def test_smaller_weights_are_as_good(
    smollm2_gguf: Path, windows: list[list[int]], dtype: DType, rows: int, part: int
) -> None:
    """The text's perplexity, against f32's. A text this short tells it to 0.2 %, as sums in another order show."""
    checkpoint = open_checkpoint(smollm2_gguf)
    config = checkpoint.config
    weights = load_weights(config, checkpoint.tensors, placed(config, dtype))
    found = np.concatenate([losses(in_chunks(config, weights, ids, rows), ids) for ids in windows[::part]])
    ends = np.cumsum([len(ids) - 1 for ids in windows])
    expected = np.concatenate(np.split(LOSSES, ends[:-1])[::part])
    perplexities = np.exp([found.mean(dtype=float), expected.mean(dtype=float)])
    print(f"{dtype}, {rows} rows: perplexity {perplexities[0]:.4f}, in f32 {perplexities[1]:.4f}")
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.01)
