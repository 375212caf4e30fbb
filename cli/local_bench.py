"""`llamajax bench` of a model that runs here: in strategies, or reading and generating alone."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import typer

from llamajax.errors import PromptTooLongError
from llamajax.types import SamplingParams

from .bench_options import Alone
from .render import note

if TYPE_CHECKING:
    from llamajax.bench.metrics import Local
    from llamajax.bench.run import Strategy
    from llamajax.bench.session import Session
    from llamajax.bench.workload import Workload

_STRATEGIES: "tuple[Strategy, ...]" = ("sequential", "concurrent", "batched")


def measure_strategies(
    session: "Session",
    mode: "Strategy | Literal['all']",
    workload: "Callable[..., Workload]",
    numbers: Sequence[int],
    samplings: Sequence[SamplingParams],
    slots: int | None,
) -> "list[Local]":
    """A result for each number of requests and each sampling, in each strategy or in one.

    Args:
      workload: makes one of a number of requests, `vocab_size` and `sampling`.
    """
    from llamajax.bench.metrics import with_ratios
    from llamajax.bench.run import serve
    from llamajax.bench.workload import sampling_name

    vocab_size = session.llm.config.vocab_size
    works = [workload(n, vocab_size=vocab_size, sampling=sampling) for n, sampling in product(numbers, samplings)]
    results: list[Local] = []
    for name, work in product(_STRATEGIES if mode == "all" else (mode,), works):
        note(f"({name}: {len(work.prompts)} x {work.new_tokens} tokens, {sampling_name(work.sampling)})")
        results.append(serve(session, name, work, slots=slots or (16 if name == "concurrent" else 32)))
    return with_ratios(results)


def measure_alone(session: "Session", alone: Alone, samplings: Sequence[SamplingParams], seed: int) -> "list[Local]":
    """A result of reading and one for each sampling, for each depth and batch."""
    from llamajax.bench.alone import generate, read_prompts
    from llamajax.bench.metrics import with_ratios
    from llamajax.bench.workload import sampling_name

    pp, tg, batches, depths = alone
    check(session, "--depth and --pp", max(depths), pp or 0)
    check(session, "--depth and --tg", max(*depths, 1), tg or 0)
    results: list[Local] = []
    for depth, size in product(depths, batches):
        if pp is not None:
            note(f"(prefill: {size} x {pp} tokens at depth {depth})")
            results.append(read_prompts(session, pp, batch=size, depth=depth, seed=seed))
        if tg is not None:
            for sampling in samplings:
                note(f"(decode: {size} x {tg} tokens at depth {depth}, {sampling_name(sampling)})")
                results.append(generate(session, tg, batch=size, depth=depth, sampling=sampling, seed=seed))
    return with_ratios(results)


def check(session: "Session", options: str, num_tokens: int, more: int) -> None:
    """Raises a usage error if a sequence of so many tokens cannot grow by so many more."""
    try:
        session.check(num_tokens, more)
    except PromptTooLongError as e:
        raise typer.BadParameter(str(e), param_hint=options) from None


def about_model(
    session: "Session", model: str, random_weights: str | None, results: "Sequence[Local]"
) -> dict[str, Any]:
    """What all results have in common."""
    import jax

    from llamajax.bench.metrics import read_bandwidth
    from llamajax.bench.session import kept_dtype

    return {
        "model": f"{random_weights} (random weights)" if random_weights else model,
        "dtype": kept_dtype(session.llm),
        "device": session.llm._runner.device.device_kind,
        "jax": jax.__version__,
        "read_bandwidth": read_bandwidth(results),
    }
