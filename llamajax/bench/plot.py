"""Draws throughput, and of strategies latency, by the number of requests."""

from collections.abc import Sequence
from html import escape
from io import StringIO
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from llamajax.bench.metrics import Alone, Percentiles, Result, Served


def write_plot(path: Path, results: Sequence[Result], title: str) -> None:
    """Writes a picture, or a page (.html) with the picture and a table of all figures."""
    served = [x for x in results if isinstance(x, Served)]
    names = list(dict.fromkeys(x.name for x in results))
    figure = Figure(figsize=(14 if served else 5 * len(names), 4.5), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 3 if served else len(names), squeeze=False)[0]
    for label in dict.fromkeys(map(_label, results)):
        rows = [x for x in results if _label(x) == label]
        # Prefill is so much faster than decode that each has a panel.
        axes = panels[0] if served else panels[names.index(rows[0].name)]
        _throughput(axes, rows)
        axes.set(title="throughput, lowest to highest", ylabel="tokens/s")
        if served:
            latencies = [x for x in served if _label(x) == label]
            _latency(panels[1], [(x.requests, x.time_to_first_token) for x in latencies])
            _latency(panels[2], [(x.requests, x.time_per_output_token) for x in latencies])
            panels[1].set(title="time to first token, p50 and p95 (dashed)", ylabel="ms", yscale="log")
            panels[2].set(title="time per output token, p50 and p95 (dashed)", ylabel="ms")
        else:
            axes.legend(loc="best", fontsize="small")
    if served:  # all panels have the same lines
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.xaxis.set(major_locator=FixedLocator(sorted({x.requests for x in results})), minor_locator=NullLocator())
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("requests")
        if axes.get_yscale() == "linear":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if path.suffix != ".html":
        figure.savefig(path, dpi=150)
        return
    picture = StringIO()
    figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    path.write_text(_page(title, svg[svg.index("<svg") :], results), encoding="utf-8")


def _label(result: Result) -> str:
    depth = f"depth {result.depth}" if isinstance(result, Alone) else None
    return ", ".join(filter(None, (result.name, depth, result.sampling)))


def _throughput(axes: Axes, results: Sequence[Result]) -> None:
    speeds = [result.tokens_per_second for result in results]
    bars = [[s.median - s.low for s in speeds], [s.high - s.median for s in speeds]]
    requests = [result.requests for result in results]
    axes.errorbar(requests, [s.median for s in speeds], bars, marker="o", capsize=3, label=_label(results[0]))


def _latency(axes: Axes, results: Sequence[tuple[int, Percentiles | None]]) -> None:
    known = [(requests, times) for requests, times in results if times is not None]
    requests = [requests for requests, _ in known]
    [line] = axes.plot(requests, [1e3 * times.p50 for _, times in known], marker="o")
    axes.plot(requests, [1e3 * times.p95 for _, times in known], "--", marker=".", color=line.get_color())


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<title>{title}</title>
<style>
body {{ font-family: sans-serif }}
svg {{ max-width: 100%; height: auto }}
th {{ text-align: left }}
td {{ text-align: right; padding-left: 1em }}
</style>
</head>
<body>
{svg}
<table>
{rows}
</table>
</body>
</html>
"""


def _page(title: str, svg: str, results: Sequence[Result]) -> str:
    rows = [x.flat() for x in results]
    # Transposed: there are more figures than results.
    lines = [
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{escape(_cell(row.get(name)))}</td>" for row in rows) + "</tr>"
        for name in dict.fromkeys(name for row in rows for name in row)
    ]
    return _PAGE.format(title=escape(title), svg=svg, rows="\n".join(lines))


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
