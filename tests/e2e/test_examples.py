"""The examples, run as a reader would."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sequential.py", ("[cancelled after ",)),
        (
            "concurrent_requests.py",
            ("Name three colours.\n", "first words: [", "sixteen under stress: {", "'cancelled': 4"),
        ),
        ("batched.py", ("(11 is there: 20 tokens)", "there were 11 llamas' -> ")),
    ],
)
def test_an_example_runs(default_model: None, name: str, says: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for text in says:
        assert text in done.stdout


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"sequential.py", "concurrent_requests.py", "batched.py"}
