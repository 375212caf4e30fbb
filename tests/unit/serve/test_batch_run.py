"""A batch from lines to results, with the default model: pipes, choices, and inputs that changed since a run before."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import llamajax
from llamajax import LLM, LlamaJaxError, RequestError
from llamajax.serve.batch_file import Defaults, Source
from llamajax.serve.batch_run import BatchRun
from llamajax.serve.input_file import Input
from llamajax.serve.result_file import ResultFile, Settings

LINES = [json.dumps({"prompt": f"Hi {i}", "max_tokens": 2 + i % 3}) for i in range(6)]


@pytest.fixture(scope="module")
def llama(default_model: None) -> LLM:
    return llamajax.load("smollm2-135m-instruct", max_seq_len=256)


@dataclass
class Outcome:
    """What a run wrote, as it wrote it."""

    results: list[Mapping[str, Any]] = field(default_factory=list)
    faults: list[tuple[int, LlamaJaxError]] = field(default_factory=list)
    on_result: Callable[[], None] = lambda: None

    def write(self, value: Mapping[str, Any]) -> None:
        self.results.append(value)
        self.on_result()

    def report(self, source: Source, error: LlamaJaxError) -> None:
        self.faults.append((source.number, error))

    def run(self, path: int | Path, *files: ResultFile, temperature: float = 0.6) -> BatchRun:
        options = {"temperature": temperature, "seed": 42}
        source = open(path, "rb")  # noqa: PTH123, SIM115 (a descriptor, or closed with the run)
        lines = Input(source, "in.jsonl", None)
        return BatchRun(
            lines, Defaults(options), Settings(options), "m", files, self.write, self.report, on_token=lambda: None
        )


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def whole(llama: LLM, tmp_path_factory: pytest.TempPathFactory) -> list[Mapping[str, Any]]:
    """The results of LINES, in order."""
    outcome = Outcome()
    outcome.run(written(tmp_path_factory.mktemp("lines") / "in.jsonl", LINES)).run(llama, slots=2, keep_order=True)
    return outcome.results


def test_a_pipe_is_answered_line_by_line_whoever_waits_for_whom(llama: LLM, whole: list[Mapping[str, Any]]) -> None:
    """The partner writes a line when it has the last one's answer."""
    reading, writing = os.pipe()
    left = [f"{line}\n".encode() for line in LINES]

    def ask() -> None:
        if left:
            os.write(writing, left.pop(0))
        else:
            os.close(writing)

    outcome = Outcome(on_result=ask)
    run = outcome.run(reading)
    ask()
    thread = Thread(target=lambda: run.run(llama, slots=2, keep_order=False), daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive()
    assert outcome.results == whole


def test_what_runs_is_not_held_up_by_a_line_that_has_not_come(llama: LLM) -> None:
    reading, writing = os.pipe()
    lines = [{"prompt": "Hi", "max_tokens": 50, "ignore_eos": True}, {"prompt": 7}, {"prompt": "Hi", "max_tokens": 2}]
    os.write(writing, "\n".join([*map(json.dumps, lines), '{"pro']).encode())
    outcome = Outcome(on_result=lambda: os.close(writing) if len(outcome.results) == 2 else None)
    outcome.run(reading).run(llama, slots=2, keep_order=False)
    assert [result["line"] for result in outcome.results] == [3, 1]
    assert [number for number, _ in outcome.faults] == [2, 4]


def test_all_that_is_wrong_with_a_line_is_its_own_error(llama: LLM, tmp_path: Path) -> None:
    bad = ['{"prompt": "Hi", "n": 3, "temperature": -1}', json.dumps({"prompt": "word " * 300, "n": 2}), "{"]
    outcome = Outcome()
    run = outcome.run(written(tmp_path / "in.jsonl", [LINES[0], *bad, LINES[1]]))
    run.check()
    run.run(llama, slots=2, keep_order=True)
    assert sorted(number for number, _ in outcome.faults) == [2, 3, 4]
    assert [result["line"] for result in outcome.results] == [1, 5]
    assert (run.finished, run.total, run.answered, run.bad) == (5, 5, 2, 3)
    assert run.work_left == 0
    assert run.work.tokens == sum(result["usage"]["completion_tokens"] for result in outcome.results)


def test_choices_are_what_their_seeds_give_alone(llama: LLM, tmp_path: Path) -> None:
    line = {"prompt": "Tell me a story.", "max_tokens": 9, "seed": 5, "temperature": 1}
    outcome = Outcome()
    run = outcome.run(written(tmp_path / "in.jsonl", [json.dumps({**line, "n": 3})]))
    run.run(llama, slots=2, keep_order=False)
    [result] = outcome.results
    assert [choice["index"] for choice in result["choices"]] == [0, 1, 2]
    texts = [choice["text"] for choice in result["choices"]]
    alone = [llama.chat("Tell me a story.", max_new_tokens=9, seed=5 + i, temperature=1).text for i in range(3)]
    assert texts == alone and len(set(texts)) == 3
    assert result["usage"]["completion_tokens"] == 27


@pytest.mark.parametrize("change", ["insert", "remove", "edit", "swap", "blank", "cut", "temperature"])
def test_what_changed_since_the_run_before_is_said_before_anything_is_written(
    change: str, llama: LLM, whole: list[Mapping[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("".join(json.dumps(result) + "\n" for result in whole[:4]))
    before = out.read_bytes()
    lines, temperature, says = list(LINES), 0.6, "line 1 of the input is not the one that"
    match change:
        case "insert":
            lines.insert(0, '{"prompt": "first"}')
        case "remove":
            del lines[0]
        case "edit":
            lines[2] = lines[2].replace("Hi 2", "Ho 2")
            says = "line 3 of the input is not the one that"
        case "swap":
            lines[0], lines[1] = lines[1], lines[0]
        case "blank":
            lines[0] = ""
        case "cut":
            lines, says = lines[:2], "is not of this input: it has line 4, the input 2"
        case "temperature":
            temperature = 0.9
    path = written(tmp_path / "in.jsonl", lines)
    files = [ResultFile(out, resume=True)]
    with pytest.raises(RequestError, match=says):
        Outcome().run(path, *files, temperature=temperature).check()
    reading, writing = os.pipe()
    os.write(writing, path.read_bytes())
    os.close(writing)
    streamed = Outcome()
    with pytest.raises(RequestError, match=says):
        streamed.run(reading, *files, temperature=temperature).run(llama, slots=2, keep_order=False)
    assert streamed.results == []
    assert out.read_bytes() == before
    rest = Outcome()
    run = rest.run(written(path, LINES), *files)
    run.check()
    assert (run.finished, run.total) == (4, 6)
    run.run(llama, slots=2, keep_order=True)
    assert rest.results == whole[4:]
