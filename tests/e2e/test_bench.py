"""`llamajax bench`, as a user runs it. How fast it is, is nobody's business here."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from llamajax.ops import native

from .command import run

STRATEGIES = ["sequential", "concurrent", "batched"]
FEW = ["--requests", "3", "-n", "4", "--prompt-len", "5", "--max-seq-len", "64", "--repeat", "1", "--device", "cpu"]
DEFAULT = "temperature 0.6, top-p 0.9 (default)"


def check(result: dict[str, Any], requests: int, new_tokens: int) -> None:
    """A result's figures agree with each other; of one run, since medians of ratios are not ratios of medians."""
    assert result["requests"] == requests
    assert result["tokens"] == requests * new_tokens
    speed = result["tokens_per_second"]
    assert (
        speed["low"] == speed["median"] == speed["high"] == pytest.approx(result["tokens"] / result["seconds"]["low"])
    )
    assert result["requests_per_second"]["median"] == pytest.approx(requests / result["seconds"]["low"])
    for name in ("time_to_first_token", "latency", "time_per_output_token", "inter_token_latency", "gaps"):
        times = result[name]
        assert 0 < times["p50"] <= times["p95"] <= times["p99"] <= result["seconds"]["high"]
    assert result["time_to_first_token"]["p50"] < result["latency"]["p50"]
    assert 0 < result["bandwidth_fraction"] <= 1 and result["decode_bandwidth"] > 0 and result["read_bandwidth"] > 0
    assert result["peak_bytes"] > 10**8
    assert result["warm_up"]["seconds"] > result["warm_up"]["compile_seconds"] >= 0
    assert result["programs_while_measured"] == 0


def test_the_tables(shallow_model: str) -> None:
    done = run("bench", "-m", shallow_model, *FEW[:-4], "--repeat", "2", "--device", "cpu")
    assert done.code == 0, done.stderr
    about, *tables = done.stdout.strip().split("\n\n")
    assert (
        about.startswith(shallow_model)
        and ("q4_1" if native.available() else "bfloat16") in about
        and "medians of 2" in about
    )
    assert [table.splitlines()[0] for table in tables] == ["3 requests, greedy", f"3 requests, {DEFAULT}"]
    for table in tables:
        _, heading, *rows = table.splitlines()
        assert heading.split() == STRATEGIES
        labels = [row.partition("  ")[0] for row in rows]
        assert labels[:4] == ["time, s", "requests/s", "tokens/s", "over sequential"]
        assert labels[4:9] == [f"{name} p50/95/99, ms" for name in ("TTFT", "E2E", "TPOT", "ITL", "gaps")]
        assert rows[3].split()[2] == "1.00"
        assert rows[-1].split()[-3:] == ["0", "0", "0"]
    assert all(name in done.stderr for name in STRATEGIES)


def test_json_csv_and_a_plot(shallow_model: str, tmp_path: Path) -> None:
    files = tmp_path / "results.csv", tmp_path / "plot.png"
    done = run("bench", "-m", shallow_model, *FEW, "--json", "--csv", str(files[0]), "--plot", str(files[1]))
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["model"] == shallow_model
    results = told["results"]
    assert [(x["name"], x["requests"], x["sampling"]) for x in results] == [
        (name, n, sampling) for name in STRATEGIES for n in (1, 2, 3) for sampling in ("greedy", DEFAULT)
    ]
    assert told["read_bandwidth"] == max(max(x["read_bandwidth"], x["decode_bandwidth"]) for x in results)
    for result in results:
        check(result, result["requests"], 4)
        alone = next(x for x in results if all(x[key] == result[key] for key in ("requests", "sampling")))
        ratio = result["tokens_per_second"]["median"] / alone["tokens_per_second"]["median"]
        assert result["speed_up"] == pytest.approx(ratio)
        assert result["bandwidth_fraction"] == pytest.approx(result["decode_bandwidth"] / told["read_bandwidth"])
    with files[0].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [x["name"] for x in results]
    for name, part in (("seconds", "median"), ("latency", "p95"), ("time_per_output_token", "p99")):
        assert [float(row[f"{name}.{part}"]) for row in rows] == [x[name][part] for x in results]
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_one_strategy_as_requests_of_mixed_lengths_arrive(shallow_model: str) -> None:
    options = ["--mode", "sequential", "--arrival", "poisson:50", "--temperature", "1", "--top-k", "40", "--csv", "-"]
    done = run("bench", "-m", shallow_model, *FEW, *options, "--prompt-len", "3:60", "--requests", "6")
    assert done.code == 0, done.stderr
    [row] = csv.DictReader(done.stdout.splitlines())
    assert (row["name"], row["tokens"], row["speed_up"]) == ("sequential", "24", "1.0")
    assert row["sampling"] == "temperature 1, top-p 0.9, top-k 40"
    assert row["programs_while_measured"] == "0"


def test_reading_and_generating_alone(shallow_model: str, tmp_path: Path) -> None:
    page = tmp_path / "plot.html"
    options = ["--pp", "16", "--tg", "3", "--batch", "1,2", "--repeat", "1", "--max-seq-len", "64", "--device", "cpu"]
    done = run("bench", "-m", shallow_model, *options, "--depth", "0,40", "--json", "--plot", str(page))
    assert done.code == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(x["depth"], x["requests"], x["name"], x["sampling"]) for x in results] == [
        (depth, size, *work)
        for depth in (0, 40)
        for size in (1, 2)
        for work in (("pp16", None), ("tg3", "greedy"), ("tg3", DEFAULT))
    ]
    for result in results:
        assert result["tokens_per_second"]["median"] > 0
        assert (result["decode_bandwidth"] is None) == result["name"].startswith("pp")
        assert result["programs_while_measured"] == 0
    assert "tg3, depth 40, greedy" in page.read_text(encoding="utf-8")


def test_the_table_of_depths(shallow_model: str) -> None:
    options = ["--tg", "3", "--depth", "0,40", "--top-p", "0.5", "--repeat", "1", "--max-seq-len", "64"]
    done = run("bench", "-m", shallow_model, *options, "--device", "cpu")
    assert done.code == 0, done.stderr
    heading, *rows = done.stdout.splitlines()[2:]
    assert heading.split()[:2] == ["alone", "depth"]
    assert [row.split()[:3] for row in rows] == [["tg3", "0", "1"], ["tg3", "40", "1"]]
    assert all(row.rstrip().endswith("temperature 0.6, top-p 0.5") for row in rows)


def test_random_weights() -> None:
    options = ["--mode", "sequential", "--dtype", "int8", "--json"]
    done = run("bench", "--random-weights", "smollm2-135m-instruct", *FEW, *options)
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["dtype"] == "int8" and "random" in told["model"]
    assert len(told["results"]) == 2
    for result in told["results"]:
        check(result, requests=3, new_tokens=4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mode", "parallel"], "--mode"),
        (["--requests", "0"], "--requests"),
        (["-n", "0"], "-n"),
        (["--arrival", "poisson"], "--arrival"),
        (["--arrival", "poisson:0"], "poisson:RATE"),
        (["--arrival", "poisson:1e-300"], "poisson:RATE"),
        (["--arrival", "uniform:3"], "--arrival"),
        (["--batch", "1,x"], "--batch"),
        (["--batch", "0"], "--batch"),
        (["--batch", ""], "--batch"),
        (["--depth", "0,-1"], "--depth"),
        (["--depth", "1k"], "--depth"),
        (["--depth", ""], "--depth"),
        (["--prompt-len", "0"], "--prompt-len"),
        (["--prompt-len", "16,x"], "--prompt-len"),
        (["--prompt-len", "16:"], "--prompt-len"),
        (["--prompt-len", "512:16"], "from the fewest to the most"),
        (["--prompt-len", "16:32:64"], "--prompt-len"),
        (["--prompt-len", "9" * 20], "--prompt-len"),
        (["--pp", "8", "--mode", "batched"], "leave out --mode"),
        (["--depth", "8", "--mode", "batched"], "leave out --mode"),
        (["--pp", "8", "-n", "9"], "leave out -n"),
        (["--tg", "8", "--slots", "4"], "leave out --slots"),
        (["--csv", "none/results.csv"], "--csv"),
        (["--plot", "none/plot.png"], "--plot"),
        (["--json", "--csv", "-"], "stdout"),
        (["--plot", "plot.gif"], "--plot"),
        (["-m", "llama3.2-1b", "--random-weights", "llama3.2-1b"], "--random-weights"),
        (["--temperature", "-1"], "temperature must be in [0, 1000000]"),
        (["--top-p", "0"], "top_p must be in (0, 1]"),
        (["--top-k", "-3"], "top_k"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str) -> None:
    done = run("bench", *arguments)
    assert done.code == 2
    assert says in done.error and "see 'llamajax bench --help'" in done.error


def test_an_unknown_configuration_is_named(shallow_model: str) -> None:
    done = run("bench", "--random-weights", "llama9")
    assert done.code == 1 and "llama3.2-1b" in done.error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt-len", "3,10", "-n", "7"], "--prompt-len and -n: 10 tokens and 7 more are beyond the context of 16"),
        (["--depth", "0,12", "--pp", "5"], "--depth and --pp: 12 tokens and 5 more are beyond the context of 16"),
        (["--depth", "0", "--tg", "16"], "--depth and --tg: 1 tokens and 16 more are beyond the context of 16"),
    ],
)
def test_what_does_not_fit_the_context_is_wrong_usage(shallow_model: str, arguments: list[str], says: str) -> None:
    done = run("bench", "-m", shallow_model, "--max-seq-len", "16", *arguments)
    assert done.code == 2
    assert says in done.error


def test_help_defines_the_figures() -> None:
    done = run("bench", "--help", COLUMNS="120")
    assert (done.code, done.stderr) == (0, "")
    for word in (*STRATEGIES, "--arrival", "--random-weights", "--batch", "--depth", "--url"):
        assert word in done.stdout
    for figure in (
        "tokens/s, requests/s:",
        "TTFT:",
        "E2E:",
        "TPOT:",
        "ITL:",
        "gaps:",
        "of fastest read:",
        "client busy:",
    ):
        assert figure in done.stdout
