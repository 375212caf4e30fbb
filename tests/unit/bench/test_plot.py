"""Each kind of plot is written, and holds what it should."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from llamajax.bench.metrics import Alone, Percentiles, Result, Served, Spread, WarmUp
from llamajax.bench.plot import write_plot

LATENCIES = Percentiles(0.1, 0.2, 0.3)
COMMON = {
    "decode_bandwidth": None,
    "read_bandwidth": 1.0,
    "peak_bytes": 1,
    "warm_up": WarmUp(1, 2, 0.5),
    "programs_while_measured": 0,
}


def results(latencies: Percentiles | None = LATENCIES) -> list[Result]:
    return [
        Served(
            name=strategy,
            sampling=sampling,
            requests=requests,
            requests_per_second=Spread(1, 1, 1),
            tokens_per_second=Spread(2.0 * requests, requests, 3 * requests),
            tokens=10,
            seconds=Spread(1, 1, 1),
            time_to_first_token=LATENCIES,
            latency=LATENCIES,
            time_per_output_token=latencies,
            inter_token_latency=latencies,
            gaps=latencies,
            **COMMON,
        )
        for strategy in ("sequential", "batched")
        for sampling in ("greedy", "temperature 1")
        for requests in (1, 2, 3)
    ]


def alone() -> list[Result]:
    return [
        Alone(name=name, sampling=sampling, depth=depth, requests=n, tokens_per_second=Spread(2, 1, 3), **COMMON)
        for name, sampling in (("pp", None), ("tg", "greedy"))
        for depth in (0, 64)
        for n in (1, 8)
    ]


@pytest.mark.parametrize("measured", [results(), results(None), results()[:1], alone()])
@pytest.mark.parametrize("kind", ["png", "svg", "html"])
def test_plots(kind: str, measured: list[Result], tmp_path: Path) -> None:
    path = tmp_path / f"plot.{kind}"
    write_plot(path, measured, "a <model> & more")
    if kind == "png":
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        return
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    svg = "{http://www.w3.org/2000/svg}"
    if kind == "svg":
        assert root.tag == f"{svg}svg"
    else:
        assert root.find(f".//{svg}svg") is not None
        assert root.findtext("head/title") == "a <model> & more"
        table = {row.findtext("th"): [cell.text for cell in row.iter("td")] for row in root.iter("tr")}
        assert table["name"] == [x.name for x in measured]
        assert table["tokens_per_second.low"] == [f"{x.tokens_per_second.low:.4g}" for x in measured]
