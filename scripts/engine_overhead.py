"""What the engine costs beside the device's own time for the same decode blocks, at 1, 8 and 32 slots.

    python scripts/engine_overhead.py [--model M] [--rounds 5] [--new-tokens 64]

Each round runs as many requests as there are slots through the engine, noting its decode blocks, and times it from the
first block's dispatch until the last answer has ended. Then the same prompts are put into the same rows and the same
blocks are dispatched one after the other, with nobody reading their tokens, until the device is done. The two take
turns; the medians' ratio is printed.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from unittest.mock import patch

import jax

import llamajax
from llamajax.engine.batch import Batch, Needs
from llamajax.engine.engine import Engine, make_batch
from llamajax.types import FinishReason, Request, SamplingParams, Token


class Discard:
    """A listener that wants every token, and keeps none."""

    def begin(self, num_cached: int) -> None:
        pass

    def token(self, token: Token) -> bool:
        return True

    def end(self, reason: FinishReason, error: Exception | None) -> None:
        assert reason == "length", error


def through_engine(engine: Engine, requests: list[Request]) -> tuple[float, list[int]]:
    """Seconds from the first decode block, and the blocks' lengths."""
    blocks: list[int] = []
    began = 0.0
    decode = engine._batch.decode

    def noted(rows: Sequence[int], num_steps: int, asked: None) -> object:
        nonlocal began
        began = began or time.perf_counter()
        blocks.append(num_steps)
        return decode(rows, num_steps, asked)

    for request in requests:
        engine.scheduler.submit(engine.job(request, Discard()))
    # All prompts are prefilled before the first block, so that all blocks have all rows.
    with patch.object(engine, "_decode", lambda: False):
        while len(engine.scheduler.running) < len(requests):
            engine.step()
    with patch.object(engine._batch, "decode", noted):
        while engine.step():
            pass
    return time.perf_counter() - began, blocks


def on_device(batch: Batch, requests: list[Request], blocks: list[int], length: int) -> float:
    """Seconds for the same blocks alone."""
    list(batch.fit(Needs({}, longest=length, num_wanted=len(requests))))
    for row, request in enumerate(requests):
        prompts = batch.prompts([request], [request.max_new_tokens])
        while prompts.chunks_left:
            batch.prefill(prompts)
        batch.insert(prompts, [0], [row])
    batch.reserve(dict.fromkeys(range(len(requests)), length))
    jax.block_until_ready(batch._rows)
    began = time.perf_counter()
    for num_steps in blocks:
        batch.decode(range(len(requests)), num_steps)
    jax.block_until_ready(batch._rows)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    llm = llamajax.load(arguments.model, max_seq_len=128)
    for slots in (1, 8, 32):
        engine, batch = Engine(llm._runner, num_slots=slots), make_batch(llm._runner, slots)
        requests = [
            Request([1 + i] * 20, arguments.new_tokens, SamplingParams(temperature=0.7, seed=i)) for i in range(slots)
        ]
        ratios, seconds = [], []
        for number in range(arguments.rounds + 1):  # the first one compiles
            engine_seconds, blocks = through_engine(engine, requests)
            device_seconds = on_device(batch, requests, blocks, 20 + arguments.new_tokens)
            for row in range(slots):
                batch.leave(row, draws=False)
            if number:
                ratios.append(engine_seconds / device_seconds)
                seconds.append((engine_seconds, device_seconds))
        engine_median, device_median = (statistics.median(column) for column in zip(*seconds, strict=True))
        print(
            f"{slots} slots, {len(blocks)} blocks: engine {engine_median:.3f} s, device {device_median:.3f} s, "
            f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
