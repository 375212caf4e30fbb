"""What `llamajax bench` measured, in tables."""

import sys
from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from llamajax.text import printable

from .render import human_bytes

if TYPE_CHECKING:
    from llamajax.bench.metrics import Alone, Answered, Remote, Result, Served, Spread


def print_tables(about: dict[str, Any], results: "Sequence[Result]") -> None:
    """Strategies side by side, a table for each number of requests and each sampling; of work alone, a line each.

    Args:
      about: what all results have in common.
    """
    from rich.console import Console
    from rich.table import Table

    from llamajax.bench.metrics import Alone, Answered

    # Away from a terminal, a line is as long as it needs to be.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 1000)
    if "url" in about:
        where = f"at {about['url']}; prompts are {about['prompts']}"
    else:
        memory = human_bytes(round(about["read_bandwidth"]))
        where = f"{about['dtype']}, on {about['device']}, jax {about['jax']}; memory is read at up to {memory}/s"
    console.print(printable(f"{about['model']}, {where}; medians of {about['repeat']}"))
    served = [result for result in results if isinstance(result, Answered)]
    for requests, sampling in dict.fromkeys((result.requests, result.sampling) for result in served):
        group = [result for result in served if (result.requests, result.sampling) == (requests, sampling)]
        table = Table("", box=None, pad_edge=False)
        for result in group:
            table.add_column(result.name, justify="right")
        columns = [_of_requests(result, about["repeat"]) for result in group]
        for label in columns[0]:
            table.add_row(label, *(cells[label] for cells in columns))
        console.print(f"\n{requests} request{'s' * (requests > 1)}, {sampling}")
        console.print(table)
    if alone := [result for result in results if isinstance(result, Alone)]:
        rows = [_of_alone(result) for result in alone]
        table = Table(box=None, pad_edge=False)
        for label in rows[0]:
            table.add_column(label, justify="left" if label in ("alone", "sampling") else "right")
        for row in rows:
            table.add_row(*row.values())
        console.print()
        console.print(table)


def _of_requests(result: "Answered", repeat: int) -> dict[str, str]:
    from llamajax.bench.metrics import Remote, Served

    cells = {
        "time, s": _spread(result.seconds, 2),
        "requests/s": _spread(result.requests_per_second, 2),
        "tokens/s": _spread(result.tokens_per_second, 1),
    }
    if isinstance(result, Served) and result.speed_up is not None:
        cells["over sequential"] = f"{result.speed_up:.2f}"
    for name, times in (
        ("TTFT", result.time_to_first_token),
        ("E2E", result.latency),
        ("TPOT", result.time_per_output_token),
        ("ITL", result.inter_token_latency),
        ("gaps", result.gaps),
    ):
        if times is not None:
            cells[f"{name} p50/95/99, ms"] = "/".join(_milliseconds(x) for x in astuple(times))
    if isinstance(result, Remote):
        cells |= _of_server(result, repeat * result.requests)
    return cells | _of_device(result) if isinstance(result, Served) else cells


def _of_server(result: "Remote", requests: int) -> dict[str, str]:
    cells = {}
    if result.prompt_tokens is not None:
        cells["prompt tokens"] = _spread(result.prompt_tokens, 0)
    if not result.counted:
        cells["tokens counted by"] = "events"
    return cells | {
        "failed": f"{result.failed} of {requests}",
        "ended early": f"{result.ended_early} of {requests}",
        "client busy": f"{result.client_busy:.0%}",
    }


def _of_device(result: "Served") -> dict[str, str]:
    cells = {}
    if result.bandwidth_fraction is not None:
        cells["of fastest read"] = f"{result.bandwidth_fraction:.1%}"
    return cells | {
        "peak memory so far": human_bytes(result.peak_bytes),
        "warm-up, s": f"{result.warm_up.seconds:.1f}",
        "  compiling, s": f"{result.warm_up.compile_seconds:.1f}",
        "  programs": str(result.warm_up.programs),
        "compiled meanwhile": str(result.programs_while_measured),
    }


def _of_alone(result: "Alone") -> dict[str, str]:
    fraction = result.bandwidth_fraction
    return {
        "alone": result.name,
        "depth": str(result.depth),
        "at once": str(result.requests),
        "tokens/s": _spread(result.tokens_per_second, 1),
        "of fastest read": "" if fraction is None else f"{fraction:.1%}",
        "peak memory": human_bytes(result.peak_bytes),
        "warm-up, s": f"{result.warm_up.seconds:.1f}",
        "compiled meanwhile": str(result.programs_while_measured),
        "sampling": result.sampling or "",
    }


def _milliseconds(seconds: float) -> str:
    """Three digits: 2.73, 51.2, 1284."""
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f}"


def _spread(figure: "Spread", digits: int) -> str:
    return f"{figure.median:.{digits}f} ({figure.low:.{digits}f}-{figure.high:.{digits}f})"
