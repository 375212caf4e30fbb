"""The examples of docs/serve.md, as a reader would run them, where their client is installed."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from .command import environment
from .serving import serving

PROJECT = Path(__file__).parents[2]
NODE_CLIENTS = PROJECT / "scripts" / "clients"
DOCS = (PROJECT / "docs" / "serve.md").read_text()
# Language and text of each example of a client; lm-eval's fetches a data set.
EXAMPLES = [
    (language, text)
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", DOCS, re.DOTALL | re.MULTILINE)
    if language in ("python", "js") or text.startswith(("curl", "cat"))
]


@pytest.fixture(scope="module")
def url(shallow_model: str) -> Iterator[str]:
    with serving(shallow_model, "--alias", "smollm2-135m-instruct") as (_, client):
        yield str(client.base_url)


def command(language: str, text: str) -> list[str]:
    """What runs an example. Skips the test if its client is not installed."""
    if language == "python":
        for name in re.findall(r"^from (\w+) import", text, re.MULTILINE):
            if not find_spec(name):
                pytest.skip(f"{name} is not installed")
        return [sys.executable, "-c", text]
    if language == "js":
        if not (shutil.which("node") and (NODE_CLIENTS / "node_modules").exists()):
            pytest.skip("openai-node is not installed: npm install --prefix scripts/clients")
        return ["node", "--input-type=module", "--eval", text]
    if not shutil.which(client := text.splitlines()[-1].split()[0] if text.startswith("cat") else text.split()[0]):
        pytest.skip(f"{client} is not installed")
    return ["bash", "-euo", "pipefail", "-c", text]


@pytest.mark.parametrize(("language", "text"), EXAMPLES, ids=[text.split("\n", 1)[0][:40] for _, text in EXAMPLES])
def test_an_example_runs(url: str, tmp_path: Path, language: str, text: str) -> None:
    run = command(language, text.replace("http://127.0.0.1:8000", url))
    env = environment(LLM_USER_PATH=str(tmp_path), OPENAI_API_KEY="none")
    done = subprocess.run(run, cwd=NODE_CLIENTS, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and '"error"' not in done.stdout, done.stdout


def test_the_examples_are_found() -> None:
    assert [language for language, _ in EXAMPLES] == ["sh"] * 3 + ["python", "js", "sh", "python"]
