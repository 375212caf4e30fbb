"""`llamajax batch`: files in, files out, and nothing lost or repeated however it ends."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pexpect
import pytest
from gguf import GGUFValueType, GGUFWriter

from llamajax.weights.gguf import read_gguf

from .command import COMMAND, Finished, environment, notes, run, start

SUMMARY = re.compile(
    r"\[(?P<answered>\d+) answered, (?P<bad>\d+) bad( \(see (?P<see>.*)\))?, \d+ generated tokens, \d+\.\d tokens/s\]"
)


@pytest.fixture(scope="module")
def tiny_model(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The default model's tokenizer and template on one tiny layer of noise."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    whole = read_gguf(smollm2_gguf).metadata
    hidden, ffn = 32, 32
    shape = {
        "llama.block_count": 1,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": hidden // 4,
    }
    writer = GGUFWriter(path, "llama")
    for key, value in (whole | shape).items():
        if key != "general.architecture":
            value = value.tolist() if isinstance(value, np.ndarray) else value
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    rng = np.random.default_rng(0)
    for name, *size in (
        ("token_embd", len(whole["tokenizer.ggml.tokens"]), hidden),
        ("blk.0.attn_q", hidden, hidden),
        ("blk.0.attn_k", hidden // 2, hidden),
        ("blk.0.attn_v", hidden // 2, hidden),
        ("blk.0.attn_output", hidden, hidden),
        ("blk.0.ffn_gate", ffn, hidden),
        ("blk.0.ffn_up", ffn, hidden),
        ("blk.0.ffn_down", hidden, ffn),
        ("blk.0.attn_norm", hidden),
        ("blk.0.ffn_norm", hidden),
        ("output_norm", hidden),
    ):
        writer.add_tensor(f"{name}.weight", rng.standard_normal(size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def batch(*arguments: str | Path, **options: Any) -> Finished:
    return run("batch", *map(str, arguments), **options)


def results(done: Finished) -> list[dict[str, Any]]:
    return parsed(done.stdout)


def parsed(text: str) -> list[dict[str, Any]]:
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def summary(done: Finished) -> tuple[int, int]:
    """How many lines were answered, and how many were bad."""
    told = SUMMARY.fullmatch(done.notes[-1])
    assert told, done.stderr
    return int(told["answered"]), int(told["bad"])


def write(path: Path, lines: Iterable[Any]) -> Path:
    """Lines of text, or of JSON."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def told(line: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: line[name] for name in names}


# What comes in and what goes out.


def test_each_line_of_a_text_file_is_a_question_answered_as_chat_answers_it(
    default_model: None, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("Say hi.\r\n\n  \nWie heißt du?".encode())
    done = batch(path, "-n", "8", "--keep-order", "--temperature", "0", "-s", "Be brief.")
    assert (done.code, summary(done)) == (0, (2, 0))
    first, second = results(done)
    assert (first["line"], second["line"]) == (1, 4)
    for line, prompt in ((first, "Say hi."), (second, "Wie heißt du?")):
        alone = run("chat", "-p", prompt, "-n", "8", "--temperature", "0", "-s", "Be brief.", "--json", "--no-stats")
        assert told(line, "text", "finish_reason", "usage") == told(
            json.loads(alone.stdout), "text", "finish_reason", "usage"
        )


@pytest.fixture(scope="module")
def mixed(shallow_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Results of lines of every kind, and the file of bad ones."""
    chat = {"method": "POST", "url": "/v1/chat/completions"}
    hi = [{"role": "user", "content": "Hi"}]
    folder = tmp_path_factory.mktemp("mixed")
    path = write(
        folder / "mixed.jsonl",
        [
            {"prompt": "Hi", "id": 7, "max_tokens": 3, "seed": 3},
            {"messages": hi, "max_new_tokens": 3, "seed": 3},
            {"custom_id": "é", **chat, "body": {"messages": hi, "max_tokens": 3, "seed": 3, "model": "gpt"}},
            {"custom_id": "é", **chat, "body": {"messages": hi, "max_tokens": 3, "seed": 3, "logprobs": True}},
            {"url": "/v1/completions", "body": {"prompt": "Once upon", "max_tokens": 3, "logprobs": 2.0}},
            '{"broken',
            {"prompt": "Hi", "temperature": "hot"},
            {"custom_id": "there", **chat, "url": "/v1/embeddings", "body": {}},
            {"prompt": "word " * 200},
            {"prompt": "Hi", "max_tokens": "many"},
            {"id": "\ud800", "prompt": "\ud800", "seed": 3, "max_tokens": 3},
        ],
    )
    done = batch(
        path, "-m", shallow_model, "-n", "5", "--keep-order", "--max-seq-len", "128", "-o", folder / "out.jsonl"
    )
    assert (done.code, done.stdout, summary(done)) == (1, "", (6, 5))
    assert str(folder / "out.jsonl.errors.jsonl") in done.notes[-1]
    return parsed((folder / "out.jsonl").read_text(encoding="utf-8")), folder / "out.jsonl.errors.jsonl"


def test_plain_lines_keep_their_number_and_id(mixed: tuple[list[dict[str, Any]], Path]) -> None:
    prompt, messages, *_, last = mixed[0]
    assert set(prompt) == {"line", "digest", "id", "text", "finish_reason", "usage"}
    assert told(prompt, "line", "id", "finish_reason") == {"line": 1, "id": 7, "finish_reason": "length"}
    assert prompt["usage"]["completion_tokens"] == 3
    assert messages == {k: v for k, v in prompt.items() if k != "id"} | {"line": 2, "digest": messages["digest"]}
    assert told(last, "line", "id") == {"line": 11, "id": "\ud800"}


def test_openais_lines_get_openais_answers(mixed: tuple[list[dict[str, Any]], Path]) -> None:
    plain, _, chat, with_logprobs, completion, _ = mixed[0]
    assert told(chat, "id", "custom_id", "error") == {"id": "batch_req_3", "custom_id": "é", "error": None}
    assert told(chat["response"], "status_code", "request_id") == {"status_code": 200, "request_id": "req_3"}
    body = chat["response"]["body"]
    assert set(body) == {"id", "object", "created", "model", "choices", "usage"}
    assert (body["object"], type(body["created"]), body["usage"]) == ("chat.completion", int, plain["usage"])
    message = {"role": "assistant", "content": plain["text"]}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]

    [choice] = with_logprobs["response"]["body"]["choices"]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode(errors="replace") == plain["text"]
    assert all(token["logprob"] <= 0 and token["top_logprobs"] == [] for token in content)

    assert completion["custom_id"] is None
    body = completion["response"]["body"]
    assert body["object"] == "text_completion"
    [choice] = body["choices"]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert len(choice["logprobs"]["token_logprobs"]) == 3


def test_bad_lines_stand_in_their_file_with_their_number(mixed: tuple[list[dict[str, Any]], Path]) -> None:
    written = parsed(mixed[1].read_text())
    faults = {line["line"]: line["error"] for line in written if "line" in line}
    assert sorted(faults) == [6, 7, 9, 10]
    assert faults[6].startswith("not JSON")
    assert "temperature must be a number" in faults[7]
    assert "context length is 128 tokens" in faults[9]
    assert "max_tokens must be an integer" in faults[10]
    [theirs] = [line for line in written if "line" not in line]
    assert told(theirs, "id", "custom_id", "error") == {"id": "batch_req_8", "custom_id": "there", "error": None}
    assert theirs["response"]["status_code"] == 400
    assert "expected POST" in theirs["response"]["body"]["error"]["message"]


def test_a_lines_options_come_before_the_commands(shallow_model: str, tmp_path: Path) -> None:
    lines = [{"prompt": "Hi", "seed": 7}, {"prompt": "Hi", "seed": 8}, {"prompt": "Hi", "seed": 7, "max_tokens": 2}]
    done = batch(write(tmp_path / "in.jsonl", lines), "-m", shallow_model, "--keep-order", "-n", "9", "--seed", "7")
    seven, eight, short = results(done)
    assert seven["text"] != eight["text"]
    assert seven["text"].startswith(short["text"]) and short["usage"]["completion_tokens"] == 2


def test_a_prompt_that_comes_again_is_answered_anew_from_a_seed_that_can_be_computed(
    shallow_model: str, tmp_path: Path
) -> None:
    """The same for text, for JSON and for OpenAI's lines; choices follow each other."""
    text = write(tmp_path / "in.txt", ["Hi"] * 3)
    array = tmp_path / "in.json"
    array.write_text(json.dumps([{"prompt": "Hi"}] * 2 + [{"prompt": "Hi", "n": 2}], indent=1))
    chat = {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}]}}
    lines = write(tmp_path / "in.jsonl", [chat] * 3)
    plain, ours, theirs = (
        results(batch(path, "-m", shallow_model, "-n", "9", "--keep-order", "--seed", "5"))
        for path in (text, array, lines)
    )
    texts = [line["text"] for line in plain]
    assert len(set(texts)) == 3
    assert [line["text"] for line in ours[:2]] == texts[:2]
    assert [line["response"]["body"]["choices"][0]["message"]["content"] for line in theirs] == texts
    first, second = ours[2]["choices"]
    assert (first["text"], ours[2]["usage"]["completion_tokens"]) == (texts[2], 18)
    for seed, answer in ((5 + 2 * 2**32, texts[1]), (5 + 3 * 2**32 + 1, second["text"])):
        options = ("-m", shallow_model, "-n", "9", "--seed", str(seed), "--json", "--no-stats")
        alone = run("chat", "-p", "Hi", *options)
        assert json.loads(alone.stdout)["text"] == answer


def test_raw_prompts_are_continued(shallow_model: str, tmp_path: Path) -> None:
    done = batch(write(tmp_path / "in.txt", ["Hi"]), "-m", shallow_model, "--raw", "-n", "2")
    assert results(done)[0]["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


def test_stdin_is_what_its_first_line_shows_and_bad_lines_are_told_on_stderr(tiny_model: str) -> None:
    as_json = batch("-", "-m", tiny_model, "-n", "2", stdin='\n{"prompt": "Hi"}\nHi\n')
    assert (as_json.code, [line["line"] for line in results(as_json)], summary(as_json)) == (1, [2], (1, 1))
    assert as_json.notes[0] == "line 3: not JSON: Expecting value (column 1)"
    as_text = batch("-", "-m", tiny_model, "-n", "2", stdin=b'Hi {\n\xff\n{"prompt": "Hi"}\n')
    assert [line["line"] for line in results(as_text)] == [1]
    assert as_text.notes[:2] == [
        "line 2: the line is not UTF-8 text: byte 0xff at offset 0",
        "line 3: looks like JSON among lines of text: say which it is with --format",
    ]
    as_said = batch("-", "-m", tiny_model, "-n", "2", "--format", "text", stdin='{Hi}\n{"prompt": "Hi"}\n')
    assert (as_said.code, summary(as_said)) == (0, (2, 0))
    unsure = batch("-", "-m", tiny_model, stdin='{\n  "prompt": "Hi"\n}\n')
    assert (unsure.code, "say what it is with --format" in unsure.error) == (1, True)
    document = batch("-", "-m", tiny_model, "-n", "2", "--format", "json", stdin='{\n  "prompt": "Hi"\n}\n')
    assert (document.code, summary(document)) == (0, (1, 0))
    nothing = batch("-", "-m", tiny_model)
    assert (nothing.code, nothing.stdout, summary(nothing)) == (0, "", (0, 0))


def test_a_partner_that_waits_for_each_answer_gets_it(tiny_model: str) -> None:
    with start("batch", "-", "-m", tiny_model, "-n", "2", stdin=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        for number, line in enumerate([{"prompt": "Hi"}, {"prompt": "there", "n": 2}, {"prompt": "Hi"}], 1):
            process.stdin.write(json.dumps(line).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["line"] == number
        process.stdin.close()
        assert process.wait(60) == 0


def test_bad_lines_beside_a_device_go_to_stderr(tiny_model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": "Hi"}, {"prompt": 7}])
    done = batch(path, "-m", tiny_model, "-n", "2", "-o", "/dev/stdout")
    assert ([line["line"] for line in results(done)], done.notes[0][:7]) == ([1], "line 2:")
    with (tmp_path / "out").open("wb") as out, start("batch", path, "-m", tiny_model, "-o", "/dev/stdout", stdout=out):
        pass
    assert sorted(it.name for it in tmp_path.iterdir()) == ["in.jsonl", "out"]
    assert not list(Path("/dev").glob("stdout.*"))


def test_a_closed_pipe_ends_it_quietly(tiny_model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in.txt", ["Hi"] * 200)
    with start("batch", str(path), "-m", tiny_model, "-n", "20", "--slots", "4") as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 141
        assert notes(process.stderr.read()) == []


def test_a_terminal_shows_how_far_it_is(tiny_model: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in.txt", ["Hi"] * 20 + ["\n", ""])
    written, code = pexpect.run(
        f"{COMMAND} batch {path} -m {tiny_model} -n 20 -o {tmp_path}/out.jsonl",
        env=environment(COLUMNS="100"),
        withexitstatus=True,
        timeout=120,
        encoding="utf-8",
    )
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    assert re.search(r"\d+/20 lines .* \d+\.\d tokens/s", plain)
    assert SUMMARY.search(plain)


# However it ends, --resume makes it what it would have been.

NUM_LINES = 120


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of both formats and of several lengths, and some bad ones."""
    lines: list[Any] = []
    for i in range(NUM_LINES):
        asked = {"messages": [{"role": "user", "content": f"Hi {i}"}], "max_tokens": 1 + i * 7 % 60, "seed": i}
        lines.append(
            {"custom_id": f"{i}", "url": "/v1/chat/completions", "body": asked} if i % 3 else {"id": i, **asked}
        )
        if i % 40 == 7:
            lines += ['{"broken', "", {"prompt": 7}]
    return write(tmp_path_factory.mktemp("questions") / "in.jsonl", lines)


@pytest.fixture(scope="module")
def uninterrupted(questions: Path, tiny_model: str) -> tuple[bytes, bytes]:
    """Results in order, and bad lines."""
    out = questions.with_name("whole.jsonl")
    done = batch(questions, "-m", tiny_model, "-o", out, "--keep-order", "--slots", "4")
    assert (done.code, summary(done)) == (1, (NUM_LINES, 6))
    return out.read_bytes(), out.with_name("whole.jsonl.errors.jsonl").read_bytes()


@pytest.mark.parametrize(("order", "times"), [(["--keep-order"], 10), ([], 3)], ids=["in order", "as they finish"])
def test_killed_several_times_it_has_each_line_once(
    order: list[str], times: int, questions: Path, tiny_model: str, uninterrupted: tuple[bytes, bytes], tmp_path: Path
) -> None:
    rng = random.Random(0)
    out, faults = tmp_path / "out.jsonl", tmp_path / "out.jsonl.errors.jsonl"
    command = ("batch", str(questions), "-m", tiny_model, "-o", str(out), "--slots", "4", *order)
    sizes = [0]
    for _ in range(times):
        with start(*command, "--resume") as process:
            # Some die while they load, most when they have written something more, some in the middle of a line.
            enough = sizes[-1] + rng.randrange(0, len(uninterrupted[0]) // times)
            while process.poll() is None and not (out.exists() and out.stat().st_size > enough):
                time.sleep(0.001)
            process.kill()
        sizes.append(out.stat().st_size)
        if rng.random() < 0.5:
            os.truncate(out, max(sizes[-1] - rng.randrange(1, 40), 0))
    assert sizes[-1] > 0
    done = run(*command, "--resume")
    assert done.code == 1
    if order:
        assert out.read_bytes() == uninterrupted[0]
    assert sorted(out.read_bytes().splitlines()) == sorted(uninterrupted[0].splitlines())
    assert sorted(faults.read_bytes().splitlines()) == sorted(uninterrupted[1].splitlines())
    again = run(*command, "--resume")
    assert (again.code, summary(again)) == (1, (0, 6))


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(
    questions: Path, tiny_model: str, uninterrupted: tuple[bytes, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    command = ("batch", str(questions), "-m", tiny_model, "-o", str(out), "--slots", "4", "--keep-order")
    with start(*command) as process:
        while not (out.exists() and out.stat().st_size):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.decode().splitlines()[-1] == (
        f"(stopped; {out} has what was answered: the same command with --resume goes on)"
    )
    written = out.read_bytes()
    assert written.endswith(b"\n") and uninterrupted[0].startswith(written)
    run(*command, "--resume")
    assert out.read_bytes() == uninterrupted[0]


def test_a_full_disk_is_said_and_what_was_written_can_be_gone_on_with(
    questions: Path, tiny_model: str, uninterrupted: tuple[bytes, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    command = ("batch", str(questions), "-m", tiny_model, "-o", str(out), "--keep-order")
    # The limit counts for the cache's files, too, but those are there already.
    limit = len(uninterrupted[0]) // 2
    with start(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) as process:
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert stderr.decode().splitlines()[-1] == f"llamajax: cannot write to {out}: File too large"
    assert len(out.read_bytes()) == limit
    run(*command, "--resume")
    assert out.read_bytes() == uninterrupted[0]

    full = batch(questions, "-m", tiny_model, "-o", "/dev/full", "--errors", tmp_path / "faults.jsonl")
    assert (full.code, full.error) == (1, "cannot write to /dev/full: No space left on device")


def half_done(tmp_path: Path, uninterrupted: tuple[bytes, bytes]) -> Path:
    """An output as a run leaves it that was stopped half way."""
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"".join(uninterrupted[0].splitlines(keepends=True)[: NUM_LINES // 2]))
    return out


def test_results_are_never_overwritten(questions: Path, uninterrupted: tuple[bytes, bytes], tmp_path: Path) -> None:
    out = half_done(tmp_path, uninterrupted)
    before = out.read_bytes()
    again = batch(questions, "-o", out)
    assert again.code == 1
    assert again.error == f"{out} has results already: --resume continues it, or choose another file"
    assert out.read_bytes() == before


def test_an_input_that_changed_is_refused_and_nothing_is_lost(
    questions: Path, tiny_model: str, uninterrupted: tuple[bytes, bytes], tmp_path: Path
) -> None:
    out = half_done(tmp_path, uninterrupted)
    before = out.read_bytes()
    changed = write(tmp_path / "in.jsonl", ['{"prompt": "first"}', *questions.read_text().splitlines()])
    options = ("-m", tiny_model, "-o", out, "--keep-order", "--slots", "4", "--resume")
    done = batch(changed, *options)
    assert (done.code, "line 1 of the input is not the one that" in done.error) == (1, True)
    assert out.read_bytes() == before
    batch(questions, *options)
    assert out.read_bytes() == uninterrupted[0]


def test_options_that_changed_are_named(questions: Path, tiny_model: str, tmp_path: Path) -> None:
    path, out = write(tmp_path / "in.txt", ["Hi", "there"]), tmp_path / "out.jsonl"
    batch(path, "-m", tiny_model, "-n", "2", "-o", out)
    before = out.read_bytes()
    for option, says in (
        (["-n", "3"], "max_new_tokens was 2 and is 3"),
        (["-n", "2", "--temperature", "0.9"], "temperature was 0.6 and is 0.9"),
        (["-n", "2", "-s", "Be brief."], 'system was null and is "Be brief."'),
    ):
        done = batch(path, "-m", tiny_model, "-o", out, "--resume", *option)
        assert done.code == 1
        assert (
            done.error == f"{out.name} was made with other options: {says}. Give the same ones, or choose another file"
        )
    done = batch(path, "-m", tiny_model, "-n", "2", "-o", out, "--resume", "--slots", "1", "--keep-order")
    assert (done.code, summary(done), out.read_bytes()) == (0, (0, 0), before)


def test_two_runs_do_not_write_one_output(questions: Path, tiny_model: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with start("batch", str(questions), "-m", tiny_model, "-o", str(out)) as process:
        while not (out.exists() and out.stat().st_size):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        for more in ([], ["--resume"]):
            second = batch(questions, "-m", tiny_model, "-o", out, *more)
            assert second.error == f"another run writes {out}: wait until it ends, or choose another file"
            assert second.code == 1
        process.kill()
    done = batch(questions, "-m", tiny_model, "-o", out, "--resume")
    assert (done.code, len(parsed(out.read_text()))) == (1, NUM_LINES)
    assert sorted(it.name for it in tmp_path.iterdir()) == [
        f"out.jsonl{end}" for end in ("", ".errors.jsonl", ".options.json")
    ]


def test_a_resumed_run_shows_what_is_done_at_once(
    questions: Path, tiny_model: str, uninterrupted: tuple[bytes, bytes], tmp_path: Path
) -> None:
    out = half_done(tmp_path, uninterrupted)
    done = NUM_LINES // 2
    with pexpect.spawn(
        COMMAND,
        ["batch", str(questions), "-m", tiny_model, "-o", str(out), "--resume", "--slots", "1"],
        env=environment(COLUMNS="100"),
        timeout=120,
        encoding="utf-8",
    ) as terminal:
        terminal.expect(r"(\d+)/126")
        assert int(terminal.match[1]) == done
        terminal.expect(r"tokens/s, \d+:\d\d:\d\d left")


@pytest.mark.parametrize("order", [["--keep-order"], []], ids=["in order", "as they finish"])
def test_no_more_is_read_than_is_soon_answered(order: list[str], tiny_model: str) -> None:
    """What is written to it and not answered yet: its own 1024 + 32 lines, and what the two pipes hold."""
    num_lines, in_flight, answered, length = 4000, 0, 0, 1000
    with start(
        "batch", "-", "-m", tiny_model, "-n", "1", "--raw", *order, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        written = 0

        def ask() -> None:
            nonlocal written
            assert process.stdin
            line = (json.dumps({"prompt": "Hi", "user": "x" * length}) + "\n").encode()
            for _ in range(num_lines):
                process.stdin.write(line)
                process.stdin.flush()
                written += 1
            process.stdin.close()

        asking = threading.Thread(target=ask)
        asking.start()
        assert process.stdout
        for _ in process.stdout:
            answered += 1
            in_flight = max(in_flight, written - answered)
        asking.join()
        assert process.wait(60) == 0
    assert answered == num_lines
    assert in_flight < 2 * 1024 + 32 + 2 * 65536 // length + 65536 // 100


# What is wrong with a command is said in one line, before a model is loaded.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Missing argument 'FILE'"),
        (["in.txt", "-n", "0"], "'-n' / '--max-new-tokens'"),
        (["in.txt", "--slots", "0"], "'--slots'"),
        (["in.txt", "--temperature", "-1"], "temperature must be in [0, 1000000], not -1.0"),
        (["in.txt", "--stop", ""], "a stop text must not be empty"),
        (["in.txt", "--raw", "--system", "Be brief."], "leave out --raw, or --system"),
        (["in.txt", "--raw", "--chat-template-kwargs", "{}"], "leave out --raw, or --system"),
        (["in.txt", "--chat-template-kwargs", "no"], "--chat-template-kwargs must be a JSON object, not 'no'"),
        (["in.txt", "--resume"], "--resume needs the output to continue"),
        (["in.txt", "-o", "./in.txt", "--resume"], "must be different files"),
        (["in.txt", "-o", "out", "--errors", "out"], "must be different files"),
        (["in.txt", "-o", "out", "--errors", "out.options.json"], "must be different files"),
        (["in.txt", "--seed", "any"], "--seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_code_2(arguments: list[str], says: str) -> None:
    done = batch(*arguments)
    assert done.code == 2
    assert says in done.error


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "in.txt", ["Hi"])
    for arguments, says in (
        ([tmp_path / "none.txt"], f"{tmp_path}/none.txt: No such file or directory"),
        ([tmp_path], f"{tmp_path}: Is a directory"),
        ([path, "-o", tmp_path], f"{tmp_path}: Is a directory"),
        ([path, "-o", tmp_path / "none" / "out.jsonl"], f"{tmp_path}/none/out.jsonl: No such file or directory"),
    ):
        done = batch(*arguments)
        assert (done.code, done.error) == (1, says)
