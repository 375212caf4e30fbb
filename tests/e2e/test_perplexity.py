"""`llamajax perplexity`, as a user runs it: figures, files of logits, and what is said when there are none."""

import json
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pexpect
import pytest

from .command import COMMAND, Finished, environment, run, start

TEXT = Path(__file__).parents[1] / "parity" / "data" / "text.txt"
SHORT = ["--context", "64", "--chunks", "3", "--device", "cpu"]
LOGITS = 3 * 31 * 49152  # what SHORT saves
FIGURE = re.compile(r"(\d+\.\d+) ± (\d+\.\d+)")


def perplexity(*arguments: str | Path, **options: Any) -> Finished:
    return run("perplexity", *map(str, arguments), **options)


def told(done: Finished) -> dict[str, Any]:
    """A run's JSON."""
    assert done.code == 0, done.stderr
    return json.loads(done.stdout)


def rows(done: Finished) -> dict[str, str]:
    """`name  value` lines."""
    assert done.code == 0, done.stderr
    pairs = (line.split("  ", 1) for line in done.stdout.splitlines())
    return {name: value.strip() for name, value in pairs}


def figure(text: str) -> tuple[float, float]:
    match = FIGURE.fullmatch(text)
    assert match, text
    return float(match[1]), float(match[2])


@pytest.fixture(scope="module")
def saved(shallow_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A run in float32, and what it saved."""
    path = tmp_path_factory.mktemp("saved") / "float32.logits"
    done = perplexity(TEXT, *SHORT, "-m", shallow_model, "--dtype", "float32", "--save-logits", path, "--json")
    assert list(path.parent.iterdir()) == [path]
    return told(done), path


def test_lines_say_what_json_says(shallow_model: str, saved: tuple[dict[str, Any], Path]) -> None:
    run_saved, path = saved
    assert (run_saved["model"], run_saved["dtype"], run_saved["comparison"]) == (shallow_model, "float32", None)
    assert (run_saved["context"], run_saved["windows"], run_saved["tokens"]) == (64, 3, 3 * 31)
    assert run_saved["tokens_per_second"] > 0

    command = [TEXT, *SHORT, "-m", shallow_model, "--dtype", "int8", "--compare", path]
    as_json, as_lines = told(perplexity(*command, "--json")), perplexity(*command)
    comparison = as_json["comparison"]
    assert comparison["saved_perplexity"] == pytest.approx(run_saved["perplexity"], rel=1e-3)
    ratio = as_json["perplexity"]["value"] / comparison["saved_perplexity"]["value"]
    assert comparison["perplexity_ratio"]["value"] == pytest.approx(ratio)
    assert 0 < comparison["kl_divergence"]["error"] < comparison["kl_divergence"]["value"]
    assert 0.5 < comparison["same_top"]["value"] <= 1

    lines = rows(as_lines)
    assert lines.pop("tokens scored") == "93" and lines.pop("windows") == "3 of 64 tokens"
    for name, estimate, unit in (
        ("perplexity", as_json["perplexity"], 1),
        ("saved perplexity", comparison["saved_perplexity"], 1),
        ("ratio", comparison["perplexity_ratio"], 1),
        ("KL divergence", comparison["kl_divergence"], 1),
        ("same top token, %", comparison["same_top"], 100),
    ):
        expected = estimate["value"] * unit, estimate["error"] * unit
        assert figure(lines.pop(name)) == pytest.approx(expected, abs=0.006, rel=1e-3)
    assert lines == {}
    assert re.fullmatch(r"\[int8, \d+\.\d tokens/s\]", as_lines.notes[-1])


def test_a_run_is_like_itself(shallow_model: str, saved: tuple[dict[str, Any], Path]) -> None:
    again = perplexity(TEXT, *SHORT, "-m", shallow_model, "--dtype", "float32", "--compare", saved[1])
    lines = rows(again)
    assert lines["KL divergence"] == "0.000000 ± 0.000000"
    assert lines["same top token, %"] == "100.00 ± 0.00"
    assert figure(lines["ratio"])[0] == pytest.approx(1, abs=1e-3)


def test_stdin_is_a_text_and_a_short_one_is_one_window(shallow_model: str) -> None:
    text = TEXT.read_text(encoding="utf-8")[:400]
    done = perplexity("-", "-m", shallow_model, stdin=text)
    lines = rows(done)
    match = re.fullmatch(r"1 of (\d+) tokens", lines["windows"])
    assert match
    length = int(match[1])
    assert 50 < length < 400 and int(lines["tokens scored"]) == length - 1 - length // 2


# Files of logits.


def test_a_file_of_another_run_is_refused(
    shallow_model: str, saved: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    path = saved[1]
    other = tmp_path / "other.txt"
    other.write_text(TEXT.read_text(encoding="utf-8").replace("lighthouse", "house"), encoding="utf-8")
    truncated = tmp_path / "truncated"
    truncated.write_bytes(path.read_bytes()[:100_000])
    for text, options, says in (
        (other, ["--compare", path], f"{path} is of another text"),
        (TEXT, ["--compare", path, "--context", "32"], f"{path} is of windows of 64 tokens, not 32"),
        (TEXT, ["--compare", path, "--chunks", "4"], f"{path} is of 3 windows, not 4: choose as many"),
        (TEXT, ["--compare", truncated], f"{truncated} is truncated, or not a file of saved logits"),
        (TEXT, ["--compare", other], f"{other} is truncated, or not a file of saved logits"),
        (TEXT, ["--compare", tmp_path / "none"], f"{tmp_path / 'none'}: No such file or directory"),
    ):
        done = perplexity(text, *SHORT, "-m", shallow_model, *options)
        assert done.code == 1
        assert done.error.startswith(says)


def test_a_full_disk_leaves_no_file(shallow_model: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.logits"
    # The limit counts for the cache's files, too, but those are smaller.
    limit = LOGITS
    command = ["perplexity", str(TEXT), *SHORT, "-m", shallow_model, "--save-logits", str(path)]
    with start(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (1, b"")
    assert stderr.decode().splitlines()[-1] == f"llamajax: cannot write {path}: File too large"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_no_file(shallow_model: str, tmp_path: Path) -> None:
    path = tmp_path / "saved.logits"
    unfinished = tmp_path / "saved.logits.part"
    with start("perplexity", str(TEXT), "--context", "64", "-m", shallow_model, "--save-logits", str(path)) as process:
        while not (unfinished.exists() and unfinished.stat().st_size > LOGITS / 3):
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, b"")
    assert list(tmp_path.iterdir()) == []


def test_a_bar_is_for_terminals_only(shallow_model: str) -> None:
    written, code = pexpect.run(
        f"{COMMAND} perplexity {TEXT} {' '.join(SHORT)} -m {shallow_model}",
        env=environment(),
        withexitstatus=True,
        timeout=120,
        encoding="utf-8",
    )
    assert code == 0
    assert re.search(r"3/3.*windows", written)
    assert re.search(r"perplexity +\d", written)
    away = perplexity(TEXT, *SHORT, "-m", shallow_model)
    assert len(away.notes) == 1


# What is wrong with a command is said in one line, before a model is loaded.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument 'FILE'"),
        (["in.txt", "--context", "4"], "'--context'"),
        (["in.txt", "--chunks", "0"], "'--chunks'"),
        (["in.txt", "--save-logits", "./in.txt"], "must be different files"),
        (["in.txt", "--save-logits", "x", "--compare", "x"], "must be different files"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_code_2(arguments: list[str], says: str) -> None:
    done = perplexity(*arguments)
    assert done.code == 2
    assert says in done.error and "see 'llamajax perplexity --help'" in done.error


def test_what_is_not_a_text_is_named(tmp_path: Path) -> None:
    empty, latin1 = tmp_path / "empty.txt", tmp_path / "latin1.txt"
    empty.touch()
    latin1.write_bytes("Grüße".encode("latin-1"))
    for file, says in (
        (tmp_path / "none", f"{tmp_path / 'none'}: No such file or directory"),
        (tmp_path, f"{tmp_path}: Is a directory"),
        (empty, f"{empty} is empty: expected a text"),
        (latin1, f"{latin1} is not UTF-8 text: byte 0xfc at offset 2"),
        (Path("-"), "stdin is empty: expected a text"),
    ):
        done = perplexity(file)
        assert (done.code, done.error) == (1, says)


def test_what_cannot_be_scored_is_named(shallow_model: str, tmp_path: Path) -> None:
    short = perplexity("-", "-m", shallow_model, stdin="Hi")
    assert (short.code, short.error) == (1, "a window must have 5 tokens: the context has 512, the text 1")
    long = perplexity(TEXT, "-m", shallow_model, "--context", "8193")
    assert (long.code, long.error) == (1, "windows of 8193 tokens are more than the context, 8192")
    nowhere = perplexity(TEXT, *SHORT, "-m", shallow_model, "--save-logits", tmp_path)
    assert (nowhere.code, nowhere.error) == (1, f"cannot write {tmp_path}: it is not a file")


def test_help_says_what_is_scored() -> None:
    done = perplexity("--help", COLUMNS="120")
    assert (done.code, done.stderr) == (0, "")
    for word in ("second half", "BOS", "KL divergence", "standard error", "--save-logits", "--compare", "--chunks"):
        assert word in done.stdout
