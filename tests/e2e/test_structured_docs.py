"""The examples of docs/structured.md, in their order, as a reader would run them in one program beside a server."""

import re
import subprocess
import sys
from pathlib import Path

from .command import environment
from .serving import serving

PAGE = (Path(__file__).parents[2] / "docs" / "structured.md").read_text()


def test_the_examples_run(shallow_model: str) -> None:
    library, tools = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    with serving(shallow_model) as (_, client):
        [name] = [it["id"] for it in client.get("/v1/models").json()["data"]]
        library = library.replace("smollm2-135m-instruct", shallow_model)
        tools = tools.replace("smollm2-135m-instruct", name).replace("http://127.0.0.1:8000", str(client.base_url))
        assert name in tools and "8000" not in tools
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"{library}\nimport openai\n{tools}"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    *_, code, sum_, calls = done.stdout.splitlines()
    assert re.fullmatch("[A-Z]{3}-[0-9]{4}", code)
    assert re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3})*", sum_) or sum_.endswith("+")
    # This model's text may be too long for a call to end.
    assert calls == "None" or "name='weather'" in calls
