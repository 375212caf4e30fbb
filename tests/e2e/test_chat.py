"""`llamajax chat` with a prompt: what it writes, where, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from .command import COMMAND, STATS, Finished, environment, notes, run, start

STORY = "Write a story about a llama."


def answer(*arguments: str, **options: Any) -> dict[str, Any]:
    """What --json says, which is all of stdout; stderr is empty."""
    done = run("chat", "--json", "--no-stats", *arguments, **options)
    assert (done.code, done.notes) == (0, [])
    assert done.stdout.endswith("}\n")
    return json.loads(done.stdout)


# The default model's answers, asked for in each of the ways there are.


@pytest.fixture(scope="module")
def story(default_model: None) -> Finished:
    return run("chat", "-p", STORY, "-n", "20")


@pytest.fixture(scope="module")
def greedy_story(default_model: None) -> dict[str, Any]:
    return answer("-p", "-", "-n", "20", "--temperature", "0", stdin=STORY)


def test_the_answer_goes_to_stdout_and_the_stats_to_stderr(story: Finished) -> None:
    assert story.code == 0
    assert len(story.stdout.split()) > 5
    assert story.stdout.endswith("\n") and not story.stdout.endswith("\n\n")
    cut, line = story.notes
    assert cut == "(cut off: -n 20)"
    stats = STATS.fullmatch(line)
    assert stats
    assert (stats["generated"], stats["reason"], stats["cached"]) == ("20", "length", None)


def test_json_is_the_same_answer_with_the_documented_defaults(story: Finished, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(STORY)
    defaults = ("--seed", "42", "--temperature", "0.6", "--top-p", "0.9")
    told = answer(f"@{file}", "-n", "20", *defaults)
    assert set(told) == {"model", "seed", "text", "token_ids", "finish_reason", "usage", "timings"}
    assert told["model"] == "smollm2-135m-instruct"
    assert told["text"] == story.stdout.removesuffix("\n")
    assert told["finish_reason"] == "length"
    assert len(told["token_ids"]) == 20
    *_, line = story.notes
    stats = STATS.fullmatch(line)
    assert stats
    prompt_tokens = int(stats["prompt"])
    assert told["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 20,
        "total_tokens": prompt_tokens + 20,
    }
    assert set(told["timings"]) == {"time_to_first_token", "decode_time", "tokens_per_second"}
    assert all(value > 0 for value in told["timings"].values())


def test_another_seed_gives_another_answer(story: Finished) -> None:
    other = run("chat", "-p", STORY, "-n", "20", "--seed", "7", "--no-stats")
    assert (other.code, other.notes) == (0, [])
    assert other.stdout != story.stdout


def test_a_drawn_seed_is_printed_and_draws_the_answer_again(shallow_model: str) -> None:
    options = ("-m", shallow_model, "Hi", "-n", "20", "--json")
    first, second = (run("chat", *options, "--seed", "random") for _ in range(2))
    seed, other = (json.loads(done.stdout)["seed"] for done in (first, second))
    assert first.notes[0] == f"(seed {seed})" and seed != other
    assert answer(*options[:-1], "--seed", str(seed))["token_ids"] == json.loads(first.stdout)["token_ids"]


@pytest.mark.parametrize(
    ("dtype", "word"), [("float32", "a quarter"), ("bfloat16", "half"), ("q8_0", None), ("auto", None)]
)
def test_a_large_dense_model_says_what_bounds_its_speed(shallow_model: str, dtype: str, word: str | None) -> None:
    """One of more than half a gigabyte takes long to make: here, of more than a megabyte."""
    code = "import sys; from llamajax_cli import loading, main; loading.LARGE_BYTES = 10**6; main.main()"
    options = ("chat", "-m", shallow_model, "Hi", "-n", "2", "--no-stats", "--dtype", dtype, "--device", "cpu")
    done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=120)
    lines = notes(done.stderr)
    if word is None or "(slower than it could be" in done.stderr:
        assert lines == []
    else:
        [line] = lines
        said = (
            rf"reads [\d.]+ MB of dense weights: at most \d\S* tokens/s .*--quantize q8_0 makes it {word}, [\d.]+ MB,"
        )
        assert re.search(said, line)


def test_greedy_needs_no_seed_and_a_stop_text_cuts_before_it(greedy_story: dict[str, Any]) -> None:
    text = greedy_story["text"]
    stop = text[len(text) // 2 :][:7]  # begins and ends somewhere in a token
    options = ("--temperature", "0", "--seed", "7", "--stop", "never said", "--stop", stop)
    cut = answer("-n", "20", *options, stdin=STORY)
    assert cut["text"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"
    assert cut["token_ids"] == greedy_story["token_ids"][: len(cut["token_ids"])]


def test_a_system_message_changes_the_answer(greedy_story: dict[str, Any]) -> None:
    french = answer("-p", STORY, "-n", "20", "--temperature", "0", "--system", "Always answer in French.")
    assert french["text"] != greedy_story["text"]
    assert french["usage"]["prompt_tokens"] != greedy_story["usage"]["prompt_tokens"]


def test_what_is_piped_into_stdin_comes_before_the_prompt(greedy_story: dict[str, Any]) -> None:
    first, _, rest = STORY.partition(" ")
    assert answer(rest, "-n", "20", "--temperature", "0", stdin=first)["text"] == greedy_story["text"]


# Everything else can be seen on a model that babbles.


def test_raw_takes_the_text_as_it_stands_and_ascii_output_loses_no_json(shallow_model: str) -> None:
    text = "“Yes” “Yes” “"
    options = ("--raw", "-m", shallow_model, "-p", text, "-n", "10", "--temperature", "0")
    told = answer(*options, PYTHONIOENCODING="ascii")
    assert told["usage"]["prompt_tokens"] <= len(text.encode())
    assert "“" in told["text"]
    written = run("chat", *options, "--no-stats", PYTHONIOENCODING="ascii")
    assert (written.code, written.notes) == (0, [])
    assert written.stdout == "".join(c if c.isascii() else "?" for c in told["text"]) + "\n"


def test_a_prompt_that_exceeds_the_context_is_refused(shallow_model: str) -> None:
    done = run("chat", "-m", shallow_model, "-p", "word " * 100, "--max-seq-len", "64")
    assert done.code == 1
    assert "context length is 64 tokens" in done.error and done.error.endswith("raise max_seq_len: the model has 8192")


def test_a_closed_pipe_ends_the_command_quietly(shallow_model: str) -> None:
    with start("chat", "-m", shallow_model, "-p", "Hi", "-n", "500", "--temperature", "0") as process:
        assert process.stdout and process.stderr
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(60) == 141
        assert notes(process.stderr.read()) == []


def test_a_full_disk_gives_one_line(shallow_model: str) -> None:
    with open("/dev/full", "wb") as full, start("chat", "-m", shallow_model, "-p", "Hi", stdout=full) as process:  # noqa: PTH123
        assert process.stderr
        assert process.wait(60) == 1
        assert notes(process.stderr.read()) == ["llamajax: No space left on device"]


def test_closed_standard_streams_are_no_error(shallow_model: str) -> None:
    command = f"{COMMAND} chat -m '{shallow_model}' -p Hi -n 3"
    done = subprocess.run(["sh", "-c", f"{command} <&- >&-"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    assert "internal" not in done.stderr
    done = subprocess.run(["sh", "-c", f"{command} 2>&-"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip()


def test_ctrl_c_ends_a_long_answer_and_its_line(shallow_model: str) -> None:
    with start("chat", "-m", shallow_model, "-p", "Hi", "-n", "5000", "--temperature", "0") as process:
        assert process.stdout
        begun = process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (begun + stdout).endswith(b"\n")
    assert notes(stderr) == []


def test_without_a_home_the_model_cannot_be_fetched(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = str(tmp_path / "file" / "home")
    done = run("chat", "-p", "Hi", LLAMAJAX_HOME=home)
    assert done.code == 1
    assert done.error.startswith(f"cannot write to {home}")
    assert done.error.endswith("set LLAMAJAX_HOME to a writable folder")


def test_without_a_home_a_file_still_answers_and_nothing_is_said_of_it(shallow_model: str) -> None:
    done = run("chat", "-m", shallow_model, "-p", "Hi", "-n", "3", LLAMAJAX_HOME="/proc/nope")
    assert done.code == 0
    assert done.stdout.endswith("\n")
    *_, line = done.notes
    assert STATS.fullmatch(line)


def test_no_color_leaves_a_terminal_without_styles(shallow_model: str) -> None:
    written, code = pexpect.run(
        f"{COMMAND} chat -m {shallow_model} -p Hi -n 5",
        env=environment(NO_COLOR="1"),
        withexitstatus=True,
        timeout=120,
        encoding="utf-8",
    )
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*m", written)
    assert STATS.fullmatch(written.splitlines()[-1])


# What is wrong with a request is said in one line, before a model is loaded.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--colour"], "No such option: --colour"),
        (["Hi", "there"], "Got unexpected extra argument(s) (there)"),
        (["Hi", "-p", "there"], "give the prompt once: as an argument or with -p"),
        (["-p"], "Option '-p' requires an argument"),
        (["-n", "0"], "'-n' / '--max-new-tokens': Input should be greater than or equal to 1"),
        (["-n", "many"], "'-n' / '--max-new-tokens'"),
        (["--max-seq-len", "0"], "'--max-seq-len'"),
        (["--temperature", "-1"], "temperature must be in [0, 1000000], not -1.0"),
        (["--temperature", "nan"], "temperature must be in [0, 1000000], not nan"),
        (["--top-p", "0"], "top_p must be in (0, 1], not 0.0"),
        (["--seed", "1.5"], "'--seed': expected an integer or 'random', not '1.5'"),
        (["--seed", str(2**63)], f"seed must be an integer in [-2**63, 2**63), not {2**63}"),
        (["--dtype", "int3"], "'--dtype'"),
        (["--device", "abacus"], "'--device'"),
        (["--stop", ""], "a stop text must not be empty"),
        (["--raw", "--system", "Be brief."], "leave out --raw, or --system"),
        (["--raw", "--chat-template-kwargs", "{}"], "leave out --raw, or --system"),
        (["--chat-template-kwargs", "{a: 1}"], "--chat-template-kwargs must be a JSON object, not '{a: 1}'"),
        (["--chat-template-kwargs", "[1]"], "chat_template_kwargs must be an object, not [1]"),
        (["--chat-template-kwargs", '{"tools": []}'], "chat_template_kwargs cannot have tools"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_and_code_2(arguments: list[str], says: str) -> None:
    done = run("chat", *arguments, stdin="Hi")
    assert done.code == 2
    assert says in done.error
    assert "--help')" in done.error


def test_no_prompt_is_said_so() -> None:
    for done in (run("chat"), run("chat", "-p", " \n"), run("chat", "-p", "-", stdin="\n")):
        assert done.code == 1
        assert done.error.startswith("the prompt is empty")


def test_a_prompt_that_is_not_text_is_refused(tmp_path: Path) -> None:
    data = "Grüße".encode("latin-1")
    file = tmp_path / "latin1.txt"
    file.write_bytes(data)
    fault = "is not UTF-8 text: byte 0xfc at offset 2"
    assert run("chat", "-p", f"@{file}")[:2] == (1, "")
    assert run("chat", "-p", f"@{file}").error == f"{file} {fault}"
    assert run("chat", stdin=data).error == f"stdin {fault}"
    assert run("chat", "-p", os.fsdecode(data)).error == f"the prompt {fault}"


def test_a_missing_prompt_file_is_named(tmp_path: Path) -> None:
    done = run("chat", "-p", f"@{tmp_path}/none")
    assert done.code == 1
    assert done.error == f"cannot read the prompt from {tmp_path}/none: No such file or directory"


def test_a_system_message_may_be_a_file(shallow_model: str, tmp_path: Path) -> None:
    file = tmp_path / "system.txt"
    file.write_bytes("\ufeffBe brief.".encode())
    options = ("-m", shallow_model, "Hi", "-n", "3", "--temperature", "0")
    assert answer(*options, "-s", f"@{file}")["usage"] == answer(*options, "-s", "Be brief.")["usage"]
    assert run("chat", *options, "-s", "@none").error.startswith("cannot read the system message from none: ")


def test_an_answer_that_the_context_ends_says_so(shallow_model: str) -> None:
    done = run("chat", "-m", shallow_model, "Hi", "-n", "500", "--max-seq-len", "64", "--temperature", "0")
    assert done.notes[0] == "(cut off: the context is full)"


@pytest.fixture(scope="module")
def no_models(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are no models."""
    folder = tmp_path_factory.mktemp("no models")
    (folder / "empty").mkdir()
    with smollm2_gguf.open("rb") as whole:
        (folder / "truncated.gguf").write_bytes(whole.read(5_000_000))
    (folder / "text.gguf").write_text("Once upon a time there was a llama.")
    (folder / "text.txt").write_text("Once upon a time there was a llama.")
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "expected config.json (Hugging Face) or params.json (Meta), found neither"),
        ("truncated.gguf", "truncated or corrupt"),
        ("text.gguf", "not a GGUF file"),
        ("text.txt", "expected a .gguf file or a directory"),
        ("missing.gguf", "no such file or directory"),
    ],
)
def test_what_is_not_a_model_is_one_line_and_code_1(no_models: Path, name: str, says: str) -> None:
    done = run("chat", "-p", "Hi", "-m", str(no_models / name))
    assert done.code == 1
    assert str(no_models / name) in done.error
    assert says in done.error


def test_an_unknown_model_suggests_the_nearest() -> None:
    done = run("chat", "-p", "Hi", "-m", "smolm2-135m")
    assert done.code == 1
    assert "did you mean 'smollm2-135m-instruct'?" in done.error


def test_debug_shows_where_an_error_came_from(no_models: Path) -> None:
    done = run("chat", "-p", "Hi", "-m", str(no_models / "text.txt"), "--debug")
    assert (done.code, done.stdout) == (1, "")
    first, *_, last = done.notes
    assert first == "Traceback (most recent call last):"
    assert last.startswith("llamajax.errors.RequestError: ")


def test_an_answer_that_must_fit(default_model: None, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}')
    said = answer("-p", "Hi", "--json-schema", str(schema), "-n", "60", "--temperature", "1")
    assert said["finish_reason"] == "length" or json.loads(said["text"])["n"] in (1, 2)
    assert re.fullmatch("[0-9]{3}-x", answer("-p", "Hi", "--regex", "[0-9]{3}-x")["text"])
    done = run("chat", "-p", "Hi", "--grammar", "start")
    assert (done.code, done.stdout) == (1, "")
    assert done.notes[-1].startswith("llamajax: grammar cannot be used")
    assert run("chat", "-p", "Hi", "--regex", "a", "--grammar", "b").code == 2
