"""Runs a workload in each of the strategies, and measures the time that it takes."""

import time
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from llamajax.bench.metrics import Run, Served, figures
from llamajax.bench.session import Session
from llamajax.bench.workload import Workload, sampling_name
from llamajax.llm import LLM
from llamajax.types import Completion

Strategy = Literal["sequential", "concurrent", "batched"]


def serve(session: Session, strategy: Strategy, workload: Workload, *, slots: int) -> Served:
    """Runs a workload in a strategy that is warmed up, at most `slots` requests at once.

    Raises PromptTooLongError if a request does not fit the context.
    """
    llm = session.llm
    lengths = [len(prompt) for prompt in workload.prompts]
    longest = max(lengths) + workload.new_tokens
    session.check(max(lengths), workload.new_tokens)
    slots = min(slots, len(lengths))

    def warm_up() -> None:
        if strategy == "sequential":
            llm.warm_up(longest)
        else:
            llm.warm_up_batches(slots, longest)

    runs, measured = session.measure(warm_up, lambda: _STRATEGIES[strategy](llm, workload, slots))
    kv_bytes = session.kv_bytes(float(np.mean(lengths)) + workload.new_tokens / 2)
    bandwidths = [x for run in runs if (x := run.decode_bandwidth(session.weight_bytes, kv_bytes)) is not None]

    return Served(
        name=strategy,
        sampling=sampling_name(workload.sampling),
        requests=len(lengths),
        decode_bandwidth=float(np.median(bandwidths)) if bandwidths else None,
        **figures(runs),
        **measured,
    )


def _sequential(llm: LLM, workload: Workload, slots: int) -> Run:
    start = time.perf_counter()
    served = []
    for prompt, arrival in zip(workload.prompts, workload.arrivals, strict=True):
        _wait_until(start + arrival)
        submitted = time.perf_counter() - start
        served.append((submitted, llm.stream(prompt, **_options(workload)).finish()))
    return _run(start, workload, served)


def _concurrent(llm: LLM, workload: Workload, slots: int) -> Run:
    with llm.serve_requests(slots=slots, max_waiting=len(workload.prompts)) as server:
        start = time.perf_counter()
        submitted = []
        for prompt, arrival in zip(workload.prompts, workload.arrivals, strict=True):
            _wait_until(start + arrival)
            submitted.append((time.perf_counter() - start, server.submit(prompt, **_options(workload))))
        return _run(start, workload, [(at, answer.finish()) for at, answer in submitted])


def _batched(llm: LLM, workload: Workload, slots: int) -> Run:
    start = time.perf_counter()
    _wait_until(start + workload.arrivals[-1])
    submitted: list[float] = []

    def requests() -> Iterator[tuple[list[int], dict[str, Any]]]:
        for prompt in workload.prompts:
            submitted.append(time.perf_counter() - start)
            yield prompt, _options(workload)

    answers: list[tuple[int, Completion]] = []
    for index, answer in llm.stream_batch(requests(), slots=slots):
        if isinstance(answer, Exception):
            raise answer
        answers.append((index, answer))
    return _run(start, workload, [(submitted[index], answer) for index, answer in sorted(answers, key=itemgetter(0))])


_STRATEGIES: dict[Strategy, Callable[[LLM, Workload, int], Run]] = {
    "sequential": _sequential,
    "concurrent": _concurrent,
    "batched": _batched,
}


def _run(start: float, workload: Workload, served: list[tuple[float, Completion]]) -> Run:
    """From when each request was submitted, and its answer."""
    seconds = time.perf_counter() - start
    for _, answer in served:
        assert len(answer.token_ids) == len(answer.timings.token_times) == workload.new_tokens, answer.finish_reason
    times = [submitted + np.array(answer.timings.token_times) for submitted, answer in served]
    return Run(seconds, workload.arrivals, times)


def _options(workload: Workload) -> dict[str, Any]:
    return {"max_new_tokens": workload.new_tokens, "sampling": workload.sampling, "ignore_eos": True}


def _wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))
