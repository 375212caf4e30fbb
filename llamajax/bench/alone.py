"""Reads prompts and generates tokens alone, without a strategy, with so many tokens in the cache already.

All sequences grow at once. They are copies of one: which tokens they are of takes no time.
"""

import time

import jax
import numpy as np

from llamajax.bench.metrics import Alone, Spread
from llamajax.bench.session import Session
from llamajax.bench.workload import sampling_name, synthetic
from llamajax.engine.batch import GROUP_LEN, Batch, Needs, Prompts, Saved
from llamajax.engine.engine import make_batch
from llamajax.engine.runner import chunk_lens
from llamajax.engine.steps import BLOCK_LEN, Drawn
from llamajax.types import Request, SamplingParams

_GREEDY = SamplingParams(temperature=0)


def read_prompts(session: Session, tokens: int, *, batch: int, depth: int = 0, seed: int = 0) -> Alone:
    """Prompt processing: prefills so many tokens more in `batch` sequences of `depth` tokens; prompt tokens a second.

    Raises PromptTooLongError if they do not fit the context.
    """
    session.check(depth, tokens)
    engine, chunks = make_batch(session.llm._runner, batch, 0), chunk_lens(tokens)
    token_ids = _token_ids(session, depth + tokens, seed)
    whole, rest = divmod(batch, GROUP_LEN)
    # As the scheduler does: it prefills a few prompts one by one, since a padded group costs as much as a full one.
    sizes = [GROUP_LEN] * whole + ([GROUP_LEN] if 2 * rest > GROUP_LEN else [1] * rest)
    before, request = Request(token_ids[:depth] or token_ids, 1, _GREEDY), Request(token_ids, 1, _GREEDY)
    groups: dict[int, Prompts] = {}

    def warm_up() -> None:
        for size in set(sizes):
            group = engine.prompts([before] * size, [1] * size, num_positions=depth + sum(chunks))
            if depth:
                _prefill(engine, group)
            groups[size] = Prompts(session.llm._runner, [request] * size, [1] * size, chunks, num_cached=depth)
            groups[size].cache, groups[size].tables = group.cache, group.tables
        run()

    def run() -> float:
        began = time.perf_counter()
        for size in sizes:
            groups[size].chunks_left = len(chunks)
            _prefill(engine, groups[size])
        jax.block_until_ready([prompts.slots for prompts in groups.values()])
        return time.perf_counter() - began

    runs, measured = session.measure(warm_up, run)
    return Alone(
        name=f"pp{tokens}",
        sampling=None,
        requests=batch,
        depth=depth,
        tokens_per_second=Spread.of(batch * tokens / seconds for seconds in runs),
        decode_bandwidth=None,
        **measured,
    )


def generate(
    session: Session, tokens: int, *, batch: int, depth: int = 0, sampling: SamplingParams = _GREEDY, seed: int = 0
) -> Alone:
    """Token generation: `batch` sequences of `depth` tokens, or of one if that is 0, grow by so many; tokens a second.

    Raises PromptTooLongError if they do not fit the context.
    """
    length = max(depth, 1) + tokens
    session.check(length - tokens, tokens)
    engine = make_batch(session.llm._runner, batch, 0)
    # Prefill draws its first token, before the clock starts.
    request = Request(_token_ids(session, length - tokens, seed), tokens + 1, sampling)
    prompt = engine.prompts([request], [request.max_new_tokens], num_positions=length)
    saved: list[Saved] = []

    def warm_up() -> None:
        _prefill(engine, prompt)
        list(engine.fit(Needs({}, longest=length, num_wanted=batch, num_needed=batch)))
        engine.insert(prompt, [0], [0])
        saved.extend(engine.save({0: length - tokens}))
        run()

    def run() -> float:
        for row in range(batch):
            engine.leave(row, draws=False)
            engine.restore(saved[0], row)
        engine.reserve(dict.fromkeys(range(batch), length))
        np.asarray(engine.decode(range(batch), 0).tokens)  # waits until the sequences are copied
        began = time.perf_counter()
        pending: list[Drawn] = []
        for done in range(0, tokens, BLOCK_LEN):
            pending.append(engine.decode(range(batch), min(BLOCK_LEN, tokens - done)))
            if done:
                np.asarray(pending[-2].tokens)
        last = np.asarray(pending[-1].tokens)
        seconds = time.perf_counter() - began
        assert (last[:batch, (tokens - 1) % BLOCK_LEN] >= 0).all()
        return seconds

    runs, measured = session.measure(warm_up, run)
    step_bytes = session.weight_bytes + batch * session.kv_bytes(depth + tokens / 2)
    return Alone(
        name=f"tg{tokens}",
        sampling=sampling_name(sampling),
        requests=batch,
        depth=depth,
        tokens_per_second=Spread.of(batch * tokens / seconds for seconds in runs),
        decode_bandwidth=float(np.median([step_bytes * tokens / seconds for seconds in runs])),
        **measured,
    )


def _token_ids(session: Session, length: int, seed: int) -> list[int]:
    vocab_size = session.llm.config.vocab_size
    return synthetic(1, [length], 1, vocab_size=vocab_size, sampling=_GREEDY, seed=seed).prompts[0]


def _prefill(engine: Batch, prompts: Prompts) -> None:
    while prompts.chunks_left:
        engine.prefill(prompts)
