"""`llamajax models`, `info` and help: facts about models, without loading any."""

import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

import llamajax
from llamajax import CONFIGS
from llamajax.hub import ALIASES, DEFAULT

from .command import environment, run, start


def rows(text: str) -> dict[str, str]:
    """`name  value` lines."""
    pairs = (line.split("  ", 1) for line in text.splitlines())
    return {name: value.strip() for name, value in pairs}


def test_help_names_the_commands() -> None:
    for flag in ("--help", "-h"):
        done = run(flag)
        assert (done.code, done.stderr) == (0, "")
        for command in ("chat", "models", "info"):
            assert command in done.stdout


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("chat", ["--prompt", "--max-new-tokens", "--system", "--stop", "--raw", "--json", "--no-stats", "--debug"]),
        ("models", []),
        ("info", ["--model", "--dtype", "--device"]),
    ],
)
def test_each_command_has_help(command: str, options: list[str]) -> None:
    done = run(command, "--help", COLUMNS="120")
    assert (done.code, done.stderr) == (0, "")
    assert all(option in done.stdout for option in options)


@pytest.mark.parametrize("columns", ["60", "80"])
def test_help_cuts_no_name_and_no_sentence(columns: str) -> None:
    for command in ([], ["chat"], ["batch"], ["models"], ["info"], ["bench"], ["perplexity"]):
        narrow, wide = (run(*command, "--help", COLUMNS=width).stdout for width in (columns, "200"))
        assert "…" not in narrow and not re.search(r"[a-z]\.\.\.$", narrow, re.MULTILINE)
        assert re.findall(r"--[a-z-]+", narrow) == re.findall(r"--[a-z-]+", wide)


def test_version() -> None:
    done = run("--version")
    assert (done.code, done.stdout, done.stderr) == (0, f"llamajax {importlib.metadata.version('llamajax')}\n", "")


@pytest.mark.parametrize(
    ("begun", "completed"),
    [
        ("ch", {"chat"}),
        ("chat --max", {"--max-new-tokens", "--max-seq-len"}),
        ("info -m llama3.2-1", {"llama3.2-1b", "llama3.2-1b-instruct"}),
    ],
)
def test_a_shell_completes_commands_options_and_names(begun: str, completed: set[str]) -> None:
    words = f"llamajax {begun}"
    number = str(len(begun.split()))
    done = run(_LLAMAJAX_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number)
    assert (done.code, set(done.stdout.split()), done.stderr) == (0, completed, "")


def test_threads_are_as_many_as_wanted(shallow_model: str) -> None:
    def threads(*options: str, **env: str) -> int:
        with start("chat", "-m", shallow_model, "-p", "Hi", "-n", "2000", *options, env=environment(**env)) as process:
            assert process.stdout
            process.stdout.read(1)
            names = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/comm")]
            process.kill()
        return names.count("tf_XLAEigen\n")

    assert threads("--threads", "3") == threads(LLAMAJAX_THREADS="3") == 3
    assert threads("--threads", "1", LLAMAJAX_THREADS="3") == 1


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5", "100000"])
def test_threads_must_be_a_number(shallow_model: str, number: str) -> None:
    assert "'--threads'" in run("chat", "-p", "Hi", "--threads", number).error
    error = run("chat", "-m", shallow_model, "-p", "Hi", LLAMAJAX_THREADS=number).error
    assert error == f"LLAMAJAX_THREADS must be a number from 1 to 1024, not '{number}'"


def test_no_command_is_wrong_usage_and_shows_the_help() -> None:
    done = run()
    assert done.code == 2
    assert done.stdout.split() == run("--help").stdout.split()
    assert done.stderr == ""


def test_an_unknown_command_is_one_line_and_code_2() -> None:
    for arguments in (["speak"], ["--colour"], ["models", "--colour"], ["info", "Hi"]):
        done = run(*arguments)
        assert done.code == 2
        assert "--help')" in done.error


def test_models_lists_every_name(default_model: None) -> None:
    done = run("models")
    assert (done.code, done.stderr) == (0, "")
    table, _, explanation = done.stdout.partition("\n\n")
    heading, *lines = table.splitlines()
    assert heading.split()[:3] == ["NAME", "PARAMETERS", "CONTEXT"]
    assert [line.split()[0] for line in lines] == list(ALIASES)
    [default] = [line for line in lines if " * " in line]
    for fact in (DEFAULT, "135 M", "8192", "98.4 MB", "Apache-2.0"):
        assert fact in default
    assert default.endswith("yes")
    assert "1.24 B" in lines[2] and "131072" in lines[2] and "Llama 3.2 Community" in lines[2]
    assert explanation.startswith("* the default.")


def test_models_of_an_empty_home(tmp_path: Path) -> None:
    done = run("models", LLAMAJAX_HOME=str(tmp_path), HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path))
    table, _, _ = done.stdout.partition("\n\n")
    assert all(line.endswith(" no") for line in table.splitlines()[1:])
    assert not any(tmp_path.iterdir())


def test_info_of_the_default_model(default_model: None, smollm2_gguf: Path) -> None:
    done = run("info", "--device", "cpu")
    assert (done.code, done.stderr) == (0, "")
    told = rows(done.stdout)
    assert told["model"] == DEFAULT
    assert Path(told["path"]).samefile(smollm2_gguf)
    # 49152 embeddings and 30 layers of width 576, feed-forward 1536, 9 heads and 3 for keys and values of size 64.
    layer = 2 * 576 + 576 * (9 + 3 + 3) * 64 + 9 * 64 * 576 + 3 * 576 * 1536
    assert told["parameters"] == f"{49152 * 576 + 30 * layer + 576:,} (135 M)"
    assert told["layers"] == "30"
    assert told["attention heads"] == "9, 3 for keys and values"
    assert told["context"] == "8192 tokens"
    assert told["RoPE"] == "theta 100000"
    assert told["embeddings"] == "tied"
    assert told["tensors"] == "210 q4_1, 61 f32, 1 q8_0"
    dtype, size = ("float16", 2) if told["computed by"].startswith("native") else ("float32", 4)
    kv_bytes = 2 * 30 * 3 * 64 * size  # keys and values
    whole = f"{kv_bytes * 8192 / 1e6:.3g} MB for the whole context"
    assert told["KV cache"] == f"{kv_bytes / 1e3:.3g} kB a token ({dtype}), {whole}"
    assert "(cpu)" in told["device"]


def test_a_cache_of_int8_takes_half_or_is_refused(default_model: None) -> None:
    done = run("info", "--device", "cpu", "--cache-dtype", "int8", LLAMAJAX_CPU="portable")
    if not done.code:
        assert rows(done.stdout)["KV cache"].startswith("11.9 kB a token (int8)")
    refused = run("info", "--device", "cpu", "--cache-dtype", "int8", LLAMAJAX_CPU="xla")
    assert refused.code == 1
    assert "KV cache in int8 needs a CPU with native kernels" in refused.error


def test_info_as_json(default_model: None, smollm2_gguf: Path) -> None:
    done = run("info", "--json", "--device", "cpu")
    assert (done.code, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert Path(told["path"]).samefile(smollm2_gguf)
    assert told["parameters"] == 134_515_008
    assert told["config"]["num_hidden_layers"] == 30
    assert told["tensors"] == {"q4_1": 210, "f32": 61, "q8_0": 1}
    assert told["platform"] == "cpu"


def test_info_says_what_fits_a_chip_that_is_not_here(default_model: None) -> None:
    arguments = "info", "--device", "h100", "--length", "4000"
    told = json.loads(run(*arguments, "--rows", "30", "--json").stdout)
    capacity, cache = told["capacity"], 32 * 4096 * 2 * 30 * 3 * 64 * 2
    assert (told["platform"], told["cache_dtype"]) == ("gpu", "bfloat16")
    assert (capacity["num_rows"], capacity["length"]) == (32, 4096)
    assert cache < capacity["rows"] < 1.01 * cache
    most, free = capacity["most_rows"], told["device_bytes"] - told["bytes_in_memory"]
    assert most * capacity["prompt"] < free < 1.5 * (most + 1) * capacity["prompt"]
    done = run(*arguments, "--rows", "30")
    assert (done.code, done.stderr) == (0, "")
    assert rows(done.stdout)["rows that fit"] == str(most)
    assert rows(done.stdout)["32 rows of 4096"].startswith("3.51 GB: weights 269 MB, rows 3.03 GB,")


def test_info_of_rows_beyond_the_context_is_refused(default_model: None) -> None:
    done = run("info", "--device", "cpu", "--length", "8193")
    assert (done.code, done.error) == (1, "--length must be at most the model's context, 8192")


def test_info_does_not_load_the_weights(tmp_path: Path) -> None:
    """The file has a hole where 16 GB of weights would be, for which there is no memory."""
    config = CONFIGS["llama3.1-8b"]
    path = tmp_path / "hole.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    D, F, KV = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (config.vocab_size, D), "output": (config.vocab_size, D)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"blk.{i}.attn_{name}": (rows, D) for name, rows in (("q", D), ("k", KV), ("v", KV), ("output", D))}
        shapes |= {f"blk.{i}.ffn_gate": (F, D), f"blk.{i}.ffn_up": (F, D), f"blk.{i}.ffn_down": (D, F)}
        shapes |= {f"blk.{i}.attn_norm": (D,), f"blk.{i}.ffn_norm": (D,)}
    shapes["output_norm"] = (D,)
    size = 0
    for name, shape in shapes.items():
        num_bytes = 2 * int(np.prod(shape))
        size += num_bytes
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float16), num_bytes, GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + size + writer.data_alignment)

    limit = (4 << 30, 4 << 30)
    limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_DATA, limit)}
    with start("info", "-m", str(path), "--device", "cpu", **limited) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, b"")
    told = rows(stdout.decode())
    assert told["parameters"] == "8,030,261,248 (8.03 B)"
    assert told["on disk"] == "16.1 GB"


@pytest.mark.parametrize(("content", "says"), [(b"Once upon a time", "not a GGUF file"), (b"", "the file is empty")])
def test_info_of_what_is_not_a_model_is_one_line_and_code_1(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "text.gguf"
    path.write_bytes(content)
    done = run("info", "-m", str(path))
    assert done.code == 1
    assert says in done.error


def test_a_closed_pipe_ends_a_table_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with start("models", stdout=writing) as process:
        os.close(writing)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (141, b"")


def test_a_clone_without_kernels_says_so(shallow_model: str, tmp_path: Path) -> None:
    """Python prefers the sources in its own folder to what is installed."""
    sources = tmp_path / "clone" / "llamajax"
    shutil.copytree(Path(llamajax.__file__).parent, sources, ignore=shutil.ignore_patterns("_cpu.*", "__pycache__"))
    (sources.parent / "pyproject.toml").touch()
    command = [sys.executable, "-c", f"import llamajax; llamajax.load({shallow_model!r}); print(llamajax.__file__)"]

    def load_in(folder: Path, **variables: str) -> tuple[bool, str]:
        done = subprocess.run(command, cwd=folder, env=environment(**variables), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.startswith(str(sources)), done.stderr

    is_clone, said = load_in(sources.parent)
    assert is_clone and f"{sources} is a clone's; run Python in another folder" in said
    assert load_in(sources.parent, LLAMAJAX_CPU="xla") == (True, "")
    assert load_in(tmp_path) == (False, "")
