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


def check(result: dict[str, Any], requests: int, new_tokens: int) -> None:
    """A result's figures agree with each other; of one run, since medians of ratios are not ratios of medians."""
    assert result["requests"] == requests
    assert result["tokens"] == requests * new_tokens
    speed = result["tokens_per_second"]
    assert (
        speed["low"] == speed["median"] == speed["high"] == pytest.approx(result["tokens"] / result["seconds"]["low"])
    )
    for name in ("time_to_first_token", "inter_token_latency"):
        times = result[name]
        assert 0 < times["p50"] <= times["p95"] <= times["p99"] <= result["seconds"]["high"]
    assert result["bandwidth_fraction"] > 0 and result["decode_bandwidth"] > 0
    assert result["peak_bytes"] > 10**8
    assert result["warm_up"]["seconds"] > result["warm_up"]["compile_seconds"] >= 0
    assert result["programs_while_measured"] == 0


def test_the_table(shallow_model: str) -> None:
    done = run("bench", "-m", shallow_model, *FEW[:-4], "--repeat", "2", "--device", "cpu")
    assert done.code == 0, done.stderr
    about, blank, heading, *rows = done.stdout.splitlines()
    assert (
        about.startswith(shallow_model)
        and ("q4_1" if native.available() else "bfloat16") in about
        and "medians of 2" in about
        and blank == ""
    )
    assert heading.split() == ["3", "requests", *STRATEGIES]
    labels = [row.partition("  ")[0] for row in rows]
    assert labels[:5] == ["time, s", "tokens/s", "over sequential", "TTFT p50/95/99, ms", "ITL p50/95/99, ms"]
    assert rows[2].split()[2:][0] == "1.00"
    assert rows[-1].split()[-3:] == ["0", "0", "0"]
    assert all(name in done.stderr for name in STRATEGIES)


def test_json_csv_and_a_plot(shallow_model: str, tmp_path: Path) -> None:
    files = tmp_path / "results.csv", tmp_path / "plot.png"
    done = run("bench", "-m", shallow_model, *FEW, "--json", "--csv", str(files[0]), "--plot", str(files[1]))
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["model"] == shallow_model and told["memory_bandwidth"] > 0
    results = told["results"]
    assert [(x["name"], x["requests"]) for x in results] == [(name, n) for name in STRATEGIES for n in (1, 2, 3)]
    for result in results:
        check(result, result["requests"], 4)
        alone = next(x for x in results if x["requests"] == result["requests"])
        ratio = result["tokens_per_second"]["median"] / alone["tokens_per_second"]["median"]
        assert result["speed_up"] == pytest.approx(ratio)
        assert result["bandwidth_fraction"] == pytest.approx(result["decode_bandwidth"] / told["memory_bandwidth"])
    with files[0].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [x["name"] for x in results]
    assert [float(row["seconds.median"]) for row in rows] == [x["seconds"]["median"] for x in results]
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_one_strategy_as_requests_arrive(shallow_model: str) -> None:
    options = ["--mode", "sequential", "--arrival", "poisson:50", "--temperature", "1", "--csv", "-"]
    done = run("bench", "-m", shallow_model, *FEW, *options)
    assert done.code == 0, done.stderr
    [row] = csv.DictReader(done.stdout.splitlines())
    assert (row["name"], row["tokens"], row["speed_up"]) == ("sequential", "12", "1.0")


def test_reading_and_generating_alone(shallow_model: str, tmp_path: Path) -> None:
    page = tmp_path / "plot.html"
    options = ["--pp", "16", "--tg", "3", "--batch", "1,2", "--repeat", "1", "--max-seq-len", "64", "--device", "cpu"]
    done = run("bench", "-m", shallow_model, *options, "--json", "--plot", str(page))
    assert done.code == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(x["name"], x["requests"]) for x in results] == [("pp16", 1), ("pp16", 2), ("tg3", 1), ("tg3", 2)]
    for result in results:
        assert result["tokens_per_second"]["median"] > 0
        assert (result["decode_bandwidth"] is None) == result["name"].startswith("pp")
        assert result["programs_while_measured"] == 0
    assert "tg3" in page.read_text(encoding="utf-8")


def test_random_weights() -> None:
    options = ["--mode", "sequential", "--dtype", "int8", "--json"]
    done = run("bench", "--random-weights", "smollm2-135m-instruct", *FEW, *options)
    assert done.code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["dtype"] == "int8" and "random" in told["model"]
    [result] = told["results"]
    check(result, requests=3, new_tokens=4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mode", "parallel"], "--mode"),
        (["--requests", "0"], "--requests"),
        (["-n", "0"], "-n"),
        (["--arrival", "poisson"], "--arrival"),
        (["--arrival", "poisson:0"], "poisson:RATE"),
        (["--arrival", "uniform:3"], "--arrival"),
        (["--batch", "1,x"], "--batch"),
        (["--batch", "0"], "--batch"),
        (["--batch", ""], "--batch"),
        (["--pp", "8", "--mode", "batched"], "leave out --mode"),
        (["--json", "--csv", "-"], "stdout"),
        (["--plot", "plot.gif"], "--plot"),
        (["-m", "llama3.2-1b", "--random-weights", "llama3.2-1b"], "--random-weights"),
        (["--temperature", "-1"], "--temperature"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str) -> None:
    done = run("bench", *arguments)
    assert done.code == 2
    assert says in done.error and "see 'llamajax bench --help'" in done.error


def test_an_unknown_configuration_is_told(shallow_model: str) -> None:
    done = run("bench", "--random-weights", "llama9")
    assert done.code == 1 and "llama3.2-1b" in done.error


def test_requests_that_do_not_fit_the_context(shallow_model: str) -> None:
    done = run("bench", "-m", shallow_model, "--max-seq-len", "16", "--prompt-len", "10", "-n", "7")
    assert (done.code, done.stdout) == (1, "")
    assert "llamajax: 10 tokens of a prompt and 7 of its answer" in done.stderr.splitlines()[-1]


def test_help_explains_the_strategies() -> None:
    done = run("bench", "--help", COLUMNS="120")
    assert (done.code, done.stderr) == (0, "")
    for word in (*STRATEGIES, "--arrival", "--random-weights", "--batch", "TTFT", "ITL"):
        assert word in done.stdout
