"""Reading and generating alone begin at their depth, and do the work that they are timed for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llamajax import LLM, PromptTooLongError, SamplingParams
from llamajax.bench.alone import generate, read_prompts
from llamajax.bench.model import _Mute
from llamajax.bench.session import Session
from llamajax.bench.workload import synthetic
from llamajax.engine.batch import Batch, Prompts
from llamajax.engine.engine import make_batch
from llamajax.types import Request

from ... import tiny_model
from ...tiny_model import CONFIG, answer_alone, tiny_runner

strict_promotion = tiny_model.strict_promotion

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(LLM(tiny_runner(1024), _Mute(CONFIG.vocab_size), None, frozenset()), repeat=2)


def answer(session: Session, prompt_len: int, new_tokens: int, sampling: SamplingParams = GREEDY) -> list[int]:
    """Of the prompt that is measured, by the sequential strategy."""
    [prompt] = synthetic(1, [prompt_len], 1, vocab_size=CONFIG.vocab_size, sampling=GREEDY).prompts
    return [token.id for token in answer_alone(session.llm._runner, Request(prompt, new_tokens, sampling))]


@pytest.mark.parametrize(("batch", "depth", "sampling"), [(1, 0, GREEDY), (3, 100, SamplingParams())])
def test_generating(
    session: Session, batch: int, depth: int, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ndarray] = []
    kind = type(make_batch(session.llm._runner, batch))
    decode = kind.decode

    def noted(self: Batch, rows: Sequence[int], num_steps: int, asked: None = None) -> Any:
        block = decode(self, rows, num_steps, asked)
        drawn.append(np.asarray(block.tokens)[:batch, :num_steps])
        return block

    monkeypatch.setattr(kind, "decode", noted)
    result = generate(session, 20, batch=batch, depth=depth, sampling=sampling)
    # A warm-up and two runs, each of 20 tokens a sequence after the one that comes of reading the prompt.
    tokens = np.concatenate(drawn, axis=1)
    expected = answer(session, depth or 1, 21, sampling)[1:] * 3
    assert tokens.tolist() == [expected] * batch
    assert (result.name, result.requests, result.depth, result.programs_while_measured) == ("tg20", batch, depth, 0)
    assert result.decode_bandwidth == pytest.approx(
        (session.weight_bytes + batch * session.kv_bytes(depth + 10)) * result.tokens_per_second.median / batch, rel=0.5
    )


@pytest.mark.parametrize(
    ("batch", "groups", "depth", "tokens"),
    [(1, [1], 0, 30), (2, [1, 1], 40, 30), (7, [4, 4], 40, 70), (9, [4, 4, 1], 40, 30), (1, [1], 530, 400)],
)
def test_reading(
    session: Session, batch: int, groups: list[int], depth: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    finished: list[int] = []
    kind = type(make_batch(session.llm._runner, batch))
    prefill = kind.prefill

    def noted(self: Batch, prompts: Prompts) -> Any:
        begun.append((prompts.num_cached, len(prompts.requests[0].token_ids)))
        drawn = prefill(self, prompts)
        if not prompts.chunks_left and prompts.num_cached == depth and begun[-1][1] > depth:
            finished.extend(np.asarray(drawn.tokens)[:, 0].tolist())
        return drawn

    expected = answer(session, depth + tokens, 1)
    monkeypatch.setattr(kind, "prefill", noted)
    result = read_prompts(session, tokens, batch=batch, depth=depth)
    # A warm-up and two runs; what is drawn after the whole prompt depends on all of it.
    assert finished == expected * sum(groups) * 3
    assert set(begun) == {(depth, depth + tokens), *([(0, depth)] if depth else [])}
    assert (result.name, result.requests, result.depth, result.programs_while_measured) == (
        f"pp{tokens}",
        batch,
        depth,
        0,
    )
    assert result.decode_bandwidth is None and result.sampling is None


def test_what_does_not_fit_is_refused(session: Session) -> None:
    for measure in (read_prompts, generate):
        with pytest.raises(PromptTooLongError, match="1000 tokens and 25 more are beyond the context of 1024"):
            measure(session, 25, batch=1, depth=1000)
    with pytest.raises(PromptTooLongError, match="1 tokens and 1024 more"):
        generate(session, 1024, batch=1)


def test_memory_is_read_beside_the_runs(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    speeds = iter([3.0, 5.0, 4.0])
    monkeypatch.setattr(session, "_read_bandwidth", lambda: (order.append("read"), next(speeds))[1])
    runs, measured = session.measure(lambda: order.append("warm-up"), lambda: order.append("run"))
    assert order == ["warm-up", "read", "run", "read", "run", "read"]
    assert (len(runs), measured["read_bandwidth"]) == (2, 5.0)
