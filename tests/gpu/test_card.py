"""What only a card can show: its logits, and what it does with a call that is one CUDA graph. Skipped without one."""

from pathlib import Path

import jax
import numpy as np
import pytest

from llamajax.bench.model import _Mute
from llamajax.engine.runner import Runner
from llamajax.llm import LLM
from llamajax.weights.checkpoint import open_checkpoint
from llamajax.weights.load import load_weights

from ..parity.tiny import CASES, PROMPT_LEN, goldens, prompt, state_dict, write_hf
from ..tiny_model import CONFIG, placed, random_ids, tiny_runner

DEVICE = jax.devices()[0]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.platform != "gpu", reason="there is no GPU")]

LENGTHS = 1, 7, 30, 65, 200, 3, 140, 61


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_references(case: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hf(tmp_path / "hf", CASES[case], state_dict(case)), PROMPT_LEN)
    placement = placed(checkpoint.config)
    weights = load_weights(checkpoint.config, checkpoint.tensors, placement)
    found = Runner(checkpoint.config, weights, placement).logits(prompt(case))
    expected = goldens()[f"{case}/logits"]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def answers() -> tuple[list[list[int]], list[list[int]]]:
    """The tokens of each request alone, and in a batch of four."""
    llm = LLM(tiny_runner(), _Mute(CONFIG.vocab_size), None, frozenset())
    requests = [
        (random_ids(length, length), {"max_new_tokens": 60, "temperature": 0.9 * (number % 3), "seed": number})
        for number, length in enumerate(LENGTHS)
    ]
    alone = [llm.generate(prompt, **options).token_ids for prompt, options in requests]
    return alone, [answer.token_ids for _, answer in sorted(llm.stream_batch(requests, slots=4))]


def test_a_call_that_is_one_graph_gives_the_same_tokens_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers()
    monkeypatch.setenv("LLAMAJAX_GRAPHS", "call")
    for _ in range(3):
        assert answers() == expected
