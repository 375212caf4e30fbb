"""`llamajax bench`: how fast, in each strategy, here."""

import csv
import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, astuple
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from llamajax.errors import RequestError
from llamajax.hub.aliases import DEFAULT
from llamajax.types import Device, DType

from .. import loading, options
from ..render import human_bytes, note

if TYPE_CHECKING:
    from llamajax import LLM
    from llamajax.bench.metrics import Result, Spread
    from llamajax.bench.run import Strategy

_STRATEGIES: "tuple[Strategy, ...]" = ("sequential", "concurrent", "batched")
_PLOTS = (".png", ".svg", ".html")

_MICRO = "Alone, without a strategy"


def bench(
    mode: Annotated[
        Literal["sequential", "concurrent", "batched", "all"], typer.Option("--mode", help="The strategy to measure.")
    ] = "all",
    requests: Annotated[int, typer.Option("--requests", min=1, help="How many requests there are.")] = 10,
    new_tokens: Annotated[
        int, typer.Option("-n", "--new-tokens", min=1, help="Tokens that each request generates, exactly.")
    ] = 50,
    prompt_len: Annotated[int, typer.Option("--prompt-len", min=1, help="Tokens of each prompt, drawn evenly.")] = 32,
    arrival: Annotated[
        str, typer.Option("--arrival", help="When requests come: all, at once, or poisson:RATE, so many a second.")
    ] = "all",
    slots: Annotated[
        int | None, typer.Option("--slots", min=1, help="Requests served at once; 16 concurrent, 32 batched.")
    ] = None,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Runs of each; medians and spread are shown.")] = 3,
    pp: Annotated[
        int | None,
        typer.Option("--pp", min=1, help="Read prompts of so many tokens.", rich_help_panel=_MICRO),
    ] = None,
    tg: Annotated[
        int | None,
        typer.Option("--tg", min=1, help="Generate so many tokens.", rich_help_panel=_MICRO),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", help="Sequences at once: 1,8,32. Alone: --pp 512 --tg 128.", rich_help_panel=_MICRO),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    csv_file: Annotated[str | None, typer.Option("--csv", help="Write CSV to a file; - prints it instead.")] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw .png, .svg or .html; measures 1, 2, 4, ... up to --requests for it."),
    ] = None,
    model: options.Model = DEFAULT,
    random_weights: Annotated[
        str | None,
        typer.Option("--random-weights", help="Instead of a model: a name's size (llama3.2-1b), weights drawn here."),
    ] = None,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 42,
    max_seq_len: options.MaxSeqLen = None,
    dtype: options.DTypeOption = "auto",
    device: options.DeviceOption = None,
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Measure the speed of a model here, in three strategies of serving several requests.

    sequential: one after the other. The lowest latency for a single user; others wait.

    concurrent: as they come, joining those that run, as a server does. For many users at once.

    batched: all are known beforehand, and as many as fit run at once. The highest throughput, for offline work.

    Or, with --pp, --tg or --batch, measure reading prompts and generating tokens alone.

    Every request generates exactly -n tokens; they come in blocks.

    TTFT is the time from a request's arrival to its first token, ITL that between two tokens.

    Compiling is measured apart; what was compiled for one strategy is there for the next.

    Peak memory is that of all so far: --mode tells a strategy's own.
    """
    rate, batches = _rate(arrival), _batches("1" if batch is None else batch)
    micro = pp is not None or tg is not None or batch is not None
    if micro and mode != "all":
        raise typer.BadParameter("--pp, --tg and --batch measure without a strategy: leave out --mode")
    if pp is None and tg is None:
        pp, tg = (512, 128) if micro else (None, None)
    if as_json and csv_file == "-":
        raise typer.BadParameter("stdout takes either --json or --csv -: give --csv a file")
    if random_weights is not None and model != DEFAULT:
        raise typer.BadParameter("give either --model or --random-weights")
    if not 0 <= seed < 2**32 or not 0 <= temperature <= 1e6:
        raise typer.BadParameter("--seed must be in [0, 2**32), --temperature in [0, 1000000]")
    if plot is not None and plot.suffix not in _PLOTS:
        raise typer.BadParameter(f"must end in {', '.join(_PLOTS)}", param_hint="--plot")
    if plot is not None and not find_spec("matplotlib"):
        raise RequestError("--plot needs matplotlib: pip install 'llamajax[plot]'")

    llm = _load(random_weights or model, random_weights is not None, max_seq_len, dtype, device, seed)
    # After the settings that jax reads when it is imported.
    import jax

    from llamajax.bench.metrics import with_ratios
    from llamajax.bench.run import generate, kept_dtype, memory_bandwidth, read_prompts, serve
    from llamajax.bench.workload import synthetic
    from llamajax.llm import find_device

    results: list[Result] = []
    for name, measure, tokens in (("reading", read_prompts, pp), ("generating", generate, tg)):
        if tokens is not None:
            for size in batches:
                note(f"({name}: {size} x {tokens} tokens)")
                results.append(measure(llm, tokens, batch=size, repeat=repeat, seed=seed))
    for strategy in () if micro else _STRATEGIES if mode == "all" else (mode,):
        for count in _doubling(requests) if plot else [requests]:
            note(f"({strategy}: {count} x {new_tokens} tokens)")
            workload = synthetic(
                count,
                prompt_len,
                new_tokens,
                vocab_size=llm.config.vocab_size,
                rate=rate,
                temperature=temperature,
                seed=seed,
            )
            at_once = slots or (16 if strategy == "concurrent" else 32)
            results.append(serve(llm, strategy, workload, slots=at_once, repeat=repeat))
    chosen = find_device(device)
    bandwidth = memory_bandwidth(chosen)
    results = with_ratios(results, bandwidth)
    about: dict[str, Any] = {
        "model": f"{random_weights} (random weights)" if random_weights else model,
        "dtype": kept_dtype(llm),
        "device": chosen.device_kind,
        "jax": jax.__version__,
        "memory_bandwidth": bandwidth,
        "repeat": repeat,
        "seed": seed,
    }
    if not micro:
        about |= {"new_tokens": new_tokens, "prompt_len": prompt_len, "arrival": arrival, "temperature": temperature}

    if as_json:
        print(json.dumps(about | {"results": [asdict(result) for result in results]}))
    elif csv_file == "-":
        _write_csv(sys.stdout, results)
    else:
        _print_tables(about, results)
    if csv_file is not None and csv_file != "-":
        with Path(csv_file).open("w", newline="", encoding="utf-8") as file:
            _write_csv(file, results)
    if plot is not None:
        from llamajax.bench.plot import write_plot

        write_plot(plot, results, f"{about['model']} on {about['device']}")


def _rate(arrival: str) -> float | None:
    """Requests a second; None for all at once."""
    if arrival == "all":
        return None
    kind, _, rate = arrival.partition(":")
    with suppress(ValueError):
        if kind == "poisson" and 0 < float(rate) < math.inf:
            return float(rate)
    raise typer.BadParameter(
        f"must be all, or poisson:RATE with a rate above 0, not {arrival!r}", param_hint="--arrival"
    )


def _batches(batch: str) -> list[int]:
    """The sizes of "1,8,32"."""
    sizes = [int(size) if size.isdecimal() else 0 for size in batch.split(",")]
    if min(sizes) < 1:
        raise typer.BadParameter(f"must be numbers of at least 1, as in 1,8,32, not {batch!r}", param_hint="--batch")
    return sizes


def _doubling(last: int) -> list[int]:
    """1, 2, 4, ... and the last."""
    return [*(2**i for i in range((last - 1).bit_length())), last]


def _load(name: str, random: bool, max_seq_len: int | None, dtype: DType, device: Device | None, seed: int) -> "LLM":
    if not random:
        return loading.load(name, max_seq_len=max_seq_len, dtype=dtype, device=device)
    loading.prepare_jax(device)
    from llamajax.bench.model import random_llm

    return random_llm(name, dtype=dtype, device=device, max_seq_len=max_seq_len, seed=seed)


def _write_csv(file: TextIO, results: "Sequence[Result]") -> None:
    rows = [result.flat() for result in results]
    # A result that has no time between tokens has fewer cells.
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _print_tables(about: dict[str, Any], results: "Sequence[Result]") -> None:
    from rich.console import Console
    from rich.table import Table

    # Away from a terminal, a line is as long as it needs to be.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 1000)
    console.print(
        f"{about['model']}, {about['dtype']}, on {about['device']}, jax {about['jax']}; "
        f"memory is read at {human_bytes(round(about['memory_bandwidth']))}/s; medians of {about['repeat']}"
    )
    for requests in dict.fromkeys(result.requests for result in results):
        group = [result for result in results if result.requests == requests]
        table = Table(f"{requests} request{'s' * (requests > 1)}", box=None, pad_edge=False)
        for result in group:
            table.add_column(result.name, justify="right")
        columns = [_cells(result) for result in group]
        for label in columns[0]:
            table.add_row(label, *(cells[label] for cells in columns))
        console.print()
        console.print(table)


def _cells(result: "Result") -> dict[str, str]:
    from llamajax.bench.metrics import Served

    cells = {"tokens/s": _spread(result.tokens_per_second, 1)}
    if isinstance(result, Served):
        cells = {"time, s": _spread(result.seconds, 2)} | cells
        if result.speed_up is not None:
            cells["over sequential"] = f"{result.speed_up:.2f}"
        for name, times in (("TTFT", result.time_to_first_token), ("ITL", result.inter_token_latency)):
            if times is not None:
                cells[f"{name} p50/95/99, ms"] = "/".join(f"{1e3 * x:.0f}" for x in astuple(times))
    if result.bandwidth_fraction is not None:
        cells["of memory bandwidth"] = f"{result.bandwidth_fraction:.1%}"
    return cells | {
        "peak memory so far": human_bytes(result.peak_bytes),
        "warm-up, s": f"{result.warm_up.seconds:.1f}",
        "  compiling, s": f"{result.warm_up.compile_seconds:.1f}",
        "  programs": str(result.warm_up.programs),
        "compiled meanwhile": str(result.programs_while_measured),
    }


def _spread(figure: "Spread", digits: int) -> str:
    return f"{figure.median:.{digits}f} ({figure.low:.{digits}f}-{figure.high:.{digits}f})"
