"""Serves a workload in each of the strategies, and measures what it took."""

import math
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.bench.metrics import Percentiles, Result, Run, Served, Spread, WarmUp
from llamajax.bench.workload import Workload, synthetic
from llamajax.errors import PromptTooLongError
from llamajax.llm import LLM
from llamajax.ops import PackedWeight, Stacked
from llamajax.types import Completion

Strategy = Literal["sequential", "concurrent", "batched"]


def serve(llm: LLM, strategy: Strategy, workload: Workload, *, slots: int, repeat: int) -> Served:
    """Serves a workload `repeat` times in a strategy that is warmed up, at most `slots` requests at once.

    Raises PromptTooLongError if a request does not fit the context.
    """
    runs, measured = _repeated(llm, strategy, workload, slots, repeat)
    return Served(
        name=strategy,
        requests=len(workload.prompts),
        tokens=runs[0].token_times.size,
        seconds=Spread.of(run.seconds for run in runs),
        tokens_per_second=Spread.of(run.tokens_per_second for run in runs),
        time_to_first_token=Percentiles.of(np.concatenate([run.time_to_first_token for run in runs])),
        inter_token_latency=Percentiles.of(np.concatenate([run.inter_token_latency for run in runs])),
        **measured,
    )


def read_prompts(llm: LLM, tokens: int, *, batch: int, repeat: int, seed: int = 0) -> Result:
    """Prompt processing: `batch` prompts, each read and answered with one token; prompt tokens a second."""
    workload = synthetic(batch, tokens, 1, vocab_size=llm.config.vocab_size, seed=seed)
    runs, measured = _repeated(llm, _strategy(batch), workload, batch, repeat)
    speed = Spread.of(batch * tokens / run.seconds for run in runs)
    return Result(name=f"pp{tokens}", requests=batch, tokens_per_second=speed, **measured)


def generate(llm: LLM, tokens: int, *, batch: int, repeat: int, seed: int = 0) -> Result:
    """Token generation: `batch` sequences grow by so many tokens, after a prompt of one token and a first answer's."""
    workload = synthetic(batch, 1, tokens + 1, vocab_size=llm.config.vocab_size, seed=seed)
    runs, measured = _repeated(llm, _strategy(batch), workload, batch, repeat)
    speed = Spread.of(batch * tokens / (run.token_times.max() - run.token_times.min()) for run in runs)
    return Result(name=f"tg{tokens}", requests=batch, tokens_per_second=speed, **measured)


def memory_bandwidth(device: jax.Device) -> float:
    """Bytes a second of the row-wise maximum of a float32 matrix: it only reads, as decoding does. The best of ten.

    The matrix has 1 GiB, or 256 MiB on a CPU: more than any cache.
    """
    with jax.default_device(device):
        matrix = jnp.zeros((2**13, 2**13 if device.platform == "cpu" else 2**15), jnp.float32)
    reduce = jax.jit(lambda x: x.max(axis=1))
    seconds = []
    for _ in range(11):  # the first compiles
        began = time.perf_counter()
        reduce(matrix).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return matrix.nbytes / min(seconds)


def kept_dtype(llm: LLM) -> str:
    """What the weight matrices are kept in, joined by "+", that of the most bytes first."""
    sizes: Counter[str] = Counter()
    weights = llm._runner.model.llama().weights()
    for weight in jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, PackedWeight | Stacked)):
        if isinstance(weight, PackedWeight):
            sizes[weight.name] += math.prod(weight.data.shape)
        elif len(weight.shape) > 1:
            sizes[weight.dtype.name] += weight.nbytes
    return "+".join(name for name, _ in sizes.most_common())


def _strategy(batch: int) -> Strategy:
    return "sequential" if batch == 1 else "batched"


def _repeated(
    llm: LLM, strategy: Strategy, workload: Workload, slots: int, repeat: int
) -> tuple[list[Run], dict[str, Any]]:
    """The runs, and what every `Result` says of them."""
    prompt_len, length = workload.prompts.shape[1], workload.prompts.shape[1] + workload.new_tokens
    if length > llm.max_seq_len:
        raise PromptTooLongError(
            f"{prompt_len} tokens of a prompt and {workload.new_tokens} of its answer are more than the context, "
            f"{llm.max_seq_len}"
        )
    slots = min(slots, len(workload.prompts))
    with _compilations() as compiled:
        began = time.perf_counter()
        if strategy == "sequential":
            llm.warm_up(length)
        else:
            llm.warm_up_batches(slots, length)
        warm_up = WarmUp(time.perf_counter() - began, len(compiled), sum(compiled))
    with _compilations() as compiled:
        runs = [_STRATEGIES[strategy](llm, workload, slots) for _ in range(repeat)]
    weight_bytes, kv_bytes = _step_bytes(llm, prompt_len + workload.new_tokens // 2)
    bandwidths = [x for run in runs if (x := run.decode_bandwidth(weight_bytes, kv_bytes)) is not None]
    return runs, {
        "decode_bandwidth": float(np.median(bandwidths)) if bandwidths else None,
        "peak_bytes": _peak_bytes(llm._runner.device),
        "warm_up": warm_up,
        "programs_while_measured": len(compiled),
    }


def _sequential(llm: LLM, workload: Workload, slots: int) -> Run:
    start = time.perf_counter()
    served = []
    for prompt, arrival in zip(workload.prompts.tolist(), workload.arrivals, strict=True):
        _wait_until(start + arrival)
        submitted = time.perf_counter() - start
        served.append((submitted, llm.stream(prompt, **_options(workload)).finish()))
    return _run(start, workload, served)


def _concurrent(llm: LLM, workload: Workload, slots: int) -> Run:
    with llm.serve_requests(slots=slots, max_waiting=len(workload.prompts)) as server:
        start = time.perf_counter()
        submitted = []
        for prompt, arrival in zip(workload.prompts.tolist(), workload.arrivals, strict=True):
            _wait_until(start + arrival)
            submitted.append((time.perf_counter() - start, server.submit(prompt, **_options(workload))))
        return _run(start, workload, [(at, answer.finish()) for at, answer in submitted])


def _batched(llm: LLM, workload: Workload, slots: int) -> Run:
    start = time.perf_counter()
    _wait_until(start + workload.arrivals[-1])
    submitted: list[float] = []

    def requests() -> Iterator[tuple[list[int], dict[str, Any]]]:
        for prompt in workload.prompts.tolist():
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
    times = np.array([submitted + np.array(answer.timings.token_times) for submitted, answer in served])
    return Run(seconds, workload.arrivals, times)


def _options(workload: Workload) -> dict[str, Any]:
    return {"max_new_tokens": workload.new_tokens, "sampling": workload.sampling, "ignore_eos": True}


def _wait_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


@contextmanager
def _compilations() -> Iterator[list[float]]:
    """Seconds of each program that XLA has compiled since, or read from its cache on disk."""
    compiled: list[float] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _step_bytes(llm: LLM, positions: int) -> tuple[int, int]:
    """Of the weights that a decode step reads, and of a sequence's keys and values for so many positions."""
    runner = llm._runner
    weights = sum(x.nbytes for x in runner.model.arrays)
    if not llm.config.tie_word_embeddings:  # one row of the table is read
        table = runner.model.llama().embed_tokens.weight.get_value()
        weights -= sum(x.nbytes for x in jax.tree.leaves(table))
    return weights, positions * llm.config.kv_bytes_per_token(jnp.dtype(runner.cache_dtype).itemsize)


def _peak_bytes(device: jax.Device) -> int:
    statistics = device.memory_stats()  # a CPU has none
    if statistics:
        return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
