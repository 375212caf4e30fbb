"""The examples of docs/strategies.md, in their order, as a reader would run them in one program."""

import re
import subprocess
import sys
from pathlib import Path

from .command import environment

PAGE = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text()


def test_the_examples_run(shallow_model: str) -> None:
    examples = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(examples) == 6
    program = "\n".join(examples).replace("smollm2-135m-instruct", shallow_model)
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "error:" not in done.stdout
    assert done.stdout.count("\n") > 25
