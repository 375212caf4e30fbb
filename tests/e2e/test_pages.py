"""What pages show without a server: their programs, which run in one process, and figures that can be checked."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llamajax.formats import PACKED_FORMATS
from llamajax.ops import native

from .command import environment, run

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_the_programs_run(shallow_model: str) -> None:
    pages = {"quickstart.md": 1, "sequential.md": 3, "concurrent.md": 2, "batched.md": 2, "kernels.md": 1}
    examples = {page: blocks(page, "python") for page in pages}
    assert {page: len(found) for page, found in examples.items()} == pages
    # Each page loads the model, of which one is enough.
    once = "import functools, llamajax\nllamajax.load = functools.cache(llamajax.load)"
    program = "\n".join([once, *map("\n".join, examples.values())]).replace("smollm2-135m-instruct", shallow_model)
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "error:" not in done.stdout
    assert done.stdout.count("\n") > 25


@pytest.mark.skipif(not native.available(), reason="no native kernels here")
def test_the_memory_of_slots_is_what_info_prints(default_model: None) -> None:
    [shown] = re.findall(r"^16 rows of 8192 .*$", (DOCS / "strategies.md").read_text(), re.MULTILINE)
    assert shown in run("info", "--rows", "16", "--length", "8192").stdout.splitlines()


def test_the_sizes_of_packed_blocks_are_true() -> None:
    page = (DOCS / "kernels.md").read_text()
    rows = re.findall(r"^\|[^|]+\| ([a-z][\w, ]*) \|.*\| ([\d, ]+) \|$", page, re.MULTILINE)
    sizes: dict[str, int] = {}
    for names, blocks in ((row[0].split(", "), row[1].split(", ")) for row in rows):
        sizes |= zip(names, map(int, blocks if len(blocks) > 1 else blocks * len(names)), strict=True)
    assert sizes == {name: format.block_bytes for name, format in PACKED_FORMATS.items()}


def test_a_batch_file_gives_the_results_that_are_shown(shallow_model: str, tmp_path: Path) -> None:
    prompts, results = blocks("batch.md", "json")
    file, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    file.write_text(prompts)
    assert run("batch", str(file), "-o", str(output), "-m", shallow_model, "--max-seq-len", "512").code == 1
    written = output.read_text() + Path(f"{output}.errors.jsonl").read_text()
    given = {line["line"]: line for line in map(json.loads, written.splitlines())}
    for line in map(json.loads, results.splitlines()):
        answer = given[line["line"]]
        assert line.keys() == answer.keys()
        assert line.get("error") == answer.get("error")
        assert line.get("usage", {}).get("prompt_tokens") == answer.get("usage", {}).get("prompt_tokens")
