"""Each family beside the Llamas: one answer in all strategies, without pages too, and from rounded weights."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

import llamajax
from llamajax.engine.runner import Runner
from llamajax.ops import native
from llamajax.tokenizers.hf import byte_alphabet
from llamajax.weights.checkpoint import open_checkpoint
from llamajax.weights.load import load_weights

from ..tiny_model import placed
from .test_strategies import agree
from .tiny import CASES, goldens, prompt, state_dict, write_hf

FAMILIES = ("qwen2", "qwen3", "smollm3", "mistral-window")


def checkpoint(case: str, path: Path) -> Path:
    """With a token for each byte, and no template."""
    write_hf(path / case, CASES[case], state_dict(case))
    tokenizer = Tokenizer(models.BPE(byte_alphabet(), []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / case / "tokenizer.json"))
    return path / case


def relative_error(found: np.ndarray, case: str) -> float:
    expected = goldens()[f"{case}/logits"]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def runner(case: str, path: Path, dtype: llamajax.types.DType = "auto", **kept: bool) -> Runner:
    opened = open_checkpoint(checkpoint(case, path))
    placement = placed(opened.config, dtype, **kept)
    return Runner(opened.config, load_weights(opened.config, opened.tensors, placement), placement)


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("case", FAMILIES)
def test_logits_without_pages(case: str, tmp_path: Path, has_kernels: bool) -> None:
    """With the native kernels' products, and by XLA alone."""
    kept = {"has_pages": False, **({} if has_kernels else {"has_kernels": False})}
    assert relative_error(runner(case, tmp_path, **kept).logits(prompt(case)), case) < 1e-4


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_of_rounded_weights(case: str, tmp_path: Path) -> None:
    assert 1e-4 < relative_error(runner(case, tmp_path, "q8_0").logits(prompt(case)), case) < 0.2


@pytest.mark.parametrize("case", FAMILIES)
def test_the_strategies_agree(case: str, tmp_path: Path) -> None:
    if not native.available():
        pytest.skip("to the last bit with the native kernels only")
    rng, vocab = random.Random(0), CASES[case]["vocab_size"]
    requests = [
        (
            [rng.randrange(vocab) for _ in range(rng.choice((1, 17, 40, 130)))],
            {"max_new_tokens": rng.randint(1, 30), "temperature": rng.choice((0, 1)), "seed": seed, "logprobs": 2},
        )
        for seed in range(12)
    ]
    agree(llamajax.load(checkpoint(case, tmp_path), max_seq_len=256), requests)
