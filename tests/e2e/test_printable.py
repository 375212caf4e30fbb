"""What comes from outside cannot steer a terminal: names in files, arguments, a template's text, a model's answer."""

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pexpect
import pytest
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from llamajax.weights.gguf import read_gguf

from .command import Finished, run

HOSTILE = "\x1b]0;title\x07\x9b31m\u202e"


def gguf(source: str, path: Path, metadata: Mapping[str, str], tensor: str | None = None) -> str:
    """A copy of a model with other metadata, and one tensor more."""
    whole = read_gguf(Path(source))
    writer = GGUFWriter(path, whole.metadata["general.architecture"])
    for key, value in (whole.metadata | dict(metadata)).items():
        if key != "general.architecture":
            value = value.tolist() if isinstance(value, np.ndarray) else value
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for name, stored in whole.tensors.items():
        writer.add_tensor(name, stored.data, raw_dtype=GGMLQuantizationType[stored.format.upper()])
    if tensor:
        writer.add_tensor(tensor, np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def check(done: Finished) -> None:
    """`run` has seen that there is no escape."""
    assert done.code in (1, 2)
    assert not any(character in done.stdout + done.stderr for character in HOSTILE if not character.isprintable())
    assert done.stderr.count("\n") == 1 or "Traceback" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {}, "tensor": HOSTILE},
        {"metadata": {"tokenizer.ggml.model": HOSTILE}},
        {"metadata": {"tokenizer.chat_template": "{{ raise_exception(messages[0].content) }}"}},
    ],
    ids=["tensor's name", "tokenizer's kind", "template's refusal"],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "debug"])
def test_errors_of_a_file(shallow_model: str, tmp_path: Path, change: dict[str, Any], debug: list[str]) -> None:
    done = run("chat", HOSTILE, "-m", gguf(shallow_model, tmp_path / "hostile.gguf", **change), *debug)
    check(done)
    assert "title" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["-p", f"@{HOSTILE}"],
        ["Hi", "-m", HOSTILE],
        ["Hi", "-m", f"./{HOSTILE}.gguf"],
        ["Hi", HOSTILE],
    ],
    ids=["prompt's file", "model", "model's file", "argument"],
)
def test_errors_of_an_argument(arguments: list[str]) -> None:
    check(run("chat", *arguments))


def test_a_note_and_a_table_name_a_file_as_it_can_be_printed(shallow_model: str, tmp_path: Path) -> None:
    path = tmp_path / f"{HOSTILE}.gguf"
    path.symlink_to(shallow_model)
    for done in (run("info", "-m", str(path)), run("info", "--json", "-m", str(path))):
        assert done.code == 0
        assert "\x9b" not in done.stdout and "title" in done.stdout


def test_an_answer_is_exact_in_a_pipe_and_printable_on_a_terminal() -> None:
    code = r"from llamajax_cli.render import write_stream; write_stream(['a\x1b', '[1mb\n\tc\x9b'])"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert piped.decode() == "a\x1b[1mb\n\tc\x9b\n"
    assert pexpect.run(shlex.join([sys.executable, "-c", code])).decode() == "a\\x1b[1mb\r\n\tc\\u009b\r\n"
