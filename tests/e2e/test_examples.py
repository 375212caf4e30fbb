"""The examples, run one after the other in one process, and the table that names them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
EXAMPLES = PROJECT / "scripts" / "examples"

# What each prints, whatever the processor's kernels.
SAYS = {
    "sequential.py": ("[cancelled after ",),
    "concurrent_requests.py": (
        "Name three colours.\n",
        "first words: [",
        "sixteen under stress: {",
        "'cancelled': 4",
    ),
    "batched.py": ("(11 is there: 20 tokens)", "there were 11 llamas' -> ", "same tokens: True"),
    "web_handler.py": ("200 True",),
    "tour.ipynb": ("' Paris'", "helicopter ####", "True"),
    "classify.py": ("good: I loved", "bad: A waste", "good: The food", "bad: It broke", "' cold'"),
    "custom_stop.py": (" [cancelled]",),
}
# A client's question, in the process of the handler.
_ASK = """
from starlette.testclient import TestClient
with TestClient(app) as client:
    answer = client.post("/ask", content="What is a llama?")
print(answer.status_code, len(answer.text) > 20)
"""
# The model is loaded once: to load it and its programs takes longer than most examples.
_RUN = """
import functools, sys
import llamajax
llamajax.load = functools.cache(llamajax.load)
for source in sys.argv[1:]:
    print("\\0", end="")
    exec(source, {"__name__": "example"})
"""


def source(path: Path) -> str:
    if path.suffix != ".ipynb":
        return path.read_text() + (_ASK if path.name == "web_handler.py" else "")
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.fixture(scope="module")
def printed(default_model: None) -> dict[str, str]:
    sources = [source(EXAMPLES / name) for name in SAYS]
    done = subprocess.run([sys.executable, "-c", _RUN, *sources], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(zip(SAYS, done.stdout.split("\0")[1:], strict=True))


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(printed: dict[str, str], name: str) -> None:
    for text in SAYS[name]:
        assert text in printed[name]


def test_every_example_is_run_and_named() -> None:
    table = re.findall(r"^\| `(\S+)` \|", (PROJECT / "docs" / "examples.md").read_text(), re.MULTILINE)
    there = {path.name for path in EXAMPLES.iterdir() if path.is_file()}
    assert there == set(SAYS) == set(table)
