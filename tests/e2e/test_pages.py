"""What README, CONTRIBUTING and docs/ show is run: commands, programs, and the output and figures beside them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from llamajax.formats import PACKED_FORMATS
from llamajax.ops import native

from .command import environment, run
from .pages import BLOCKS, FENCE, PAGES, PROJECT, Block, blocks, commands, without_variables
from .serving import answering

NODE_CLIENTS = PROJECT / "scripts" / "clients"
# Programs of the interpreter that runs the tests come first.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

_HUB = "fetches from a hub"
_INSTALLED = "llamajax is installed where the tests run"
_ROOT = "changes the machine"
_LONG = "takes minutes and gigabytes"
_WHEELS = "needs an environment of its own: tests/programs has the report in small"
# Commands, and first lines of programs, that no test runs. test_docs.py parses these commands, too.
NOT_RUN = {
    "git clone https://github.com/llamajax/llamajax": _HUB,
    "pip install git+https://github.com/llamajax/llamajax": _HUB,
    "cd llamajax": _INSTALLED,
    "pip install .": _INSTALLED,
    "pip install '.[dev]'": _INSTALLED,
    "pytest": "runs these tests",
    "pip install -e '.[dev,docs]'": _INSTALLED,
    "python3 -m venv .venv": _INSTALLED,
    "source .venv/bin/activate": _INSTALLED,
    "scripts/check.sh": "runs these tests",
    "useradd --system llamajax": _ROOT,
    "python3 -m venv /opt/llamajax": _ROOT,
    "/opt/llamajax/bin/pip install .": _ROOT,
    "install -m 600 /dev/null /etc/llamajax.env": _ROOT,
    'echo "LLAMAJAX_API_KEY=$KEY" > /etc/llamajax.env': _ROOT,
    "llamajax chat": "needs a terminal: test_repl.py has one",
    "llamajax info -m llama3.2-1b-instruct": _HUB,
    "llamajax info -m llama3.1-8b --device h100 --rows 32 --length 4096": _HUB,
    "llamajax info -m llama3.1-8b --device h100 --rows 96 --length 4096": _HUB,
    "llamajax info -m tinyllama-1.1b-chat": _HUB,
    "llamajax models pull tinyllama-1.1b-chat": _HUB,
    "llamajax models rm tinyllama-1.1b-chat": _HUB,
    "llamajax serve -m org/private-model --alias my-model": _HUB,
    "pip install --no-deps jax-cuda12-plugin==$JAX jax-cuda12-pjrt==$JAX": _WHEELS,
    'pip install "jax[tpu]==$JAX"': _WHEELS,
    "python -m scripts.program_report llama3.2-1b --rows 1 8 32 --length 2048 --dtype int8 --target v5e": _WHEELS,
    "llamajax bench --batch 1,8,32 --depth 0,1024,4096": _LONG,
    "llamajax bench --random-weights llama3.2-1b --dtype bfloat16": _LONG,
    "llamajax bench --random-weights qwen3-0.6b --dtype q8_0 --max-seq-len 512 --batch 1,32 --pp 128 --tg 12 "
    "--repeat 2 --temperature 0": _LONG,
    "python -m scripts.pad_gguf padded.gguf": _LONG,
    "llamajax perplexity tests/parity/data/text.txt -m padded.gguf --dtype q4_k --compare float32.logits": _LONG,
    "lm_eval run --model local-completions --tasks arc_easy --batch_size 8 --model_args "
    "base_url=http://127.0.0.1:8000/v1/completions,model=smollm2-135m-instruct,max_length=4096": _HUB,
    "QWEN2 = Family(": "leaves out a configuration",
}
# What docs/benchmarks.md says to add for a quick look.
QUICK = "--requests 4 -n 8 --repeat 1"


@pytest.fixture(scope="module")
def url(default_model: None) -> Iterator[str]:
    """Of `llamajax serve`, which pages say is at port 8000."""
    with answering(started("llamajax serve", PROJECT, environment(PATH=PATH))) as client:
        yield str(client.base_url)


def started(command: str, folder: Path, env: dict[str, str]) -> "subprocess.Popen[bytes]":
    """A server's command, on a free port."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(["sh", "-c", f"exec {command} --port 0"], cwd=folder, env=env, **pipes)


@pytest.fixture
def folder(tmp_path: Path, smollm2_gguf: Path) -> Path:
    """A git repository with a change, and with the files that pages name."""
    text = (PROJECT / "tests" / "parity" / "data" / "text.txt").read_text()
    [prompts, _] = blocks("json", "batch.md")
    files = {
        "prompts.txt": "Name three colours.\nThe capital of France is\n",
        "prompts.jsonl": "".join(prompts.text.splitlines(keepends=True)[:2]),  # the third is a bad one
        "question.txt": "What is a llama?\n",
        "llama.schema.json": '{"type": "object", "properties": {"name": {"type": "string"}}}',
        "text.txt": text,
        "tests/parity/data/text.txt": text[:3000],  # docs/quality.md shows what comes of the whole
    }
    models = ["model.gguf", "fine-tune.gguf", "path/to/fine-tune/model.gguf"]
    for name in (*files, *models):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    for name in models:
        (tmp_path / name).symlink_to(smollm2_gguf)
    (tmp_path / "scripts").symlink_to(PROJECT / "scripts")
    git = "git init -q && git add question.txt && git -c user.name=A -c user.email=a@b.c commit -qm Ask"
    subprocess.run(git, shell=True, cwd=tmp_path, check=True)
    (tmp_path / "question.txt").write_text("What are two llamas?\n")
    return tmp_path


def quick(bench: str) -> str:
    """What makes a command's measurement short."""
    return "--repeat 1" if re.search(r" --(pp|tg|batch|depth) ", bench) else QUICK


def missing(command: str) -> str | None:
    """A program of the command that is not installed."""
    programs = [part.split()[0] for part in without_variables(command.splitlines()[0]).split(" | ")]
    return next((program for program in programs if not shutil.which(program, path=PATH)), None)


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_run(block: Block, folder: Path, url: str) -> None:
    asked = [command for command in commands(block.text) if command not in NOT_RUN]
    absent = {command: program for command in asked if (program := missing(command))}
    servers = [command for command in asked if command.startswith("llamajax serve")]
    lines = [command for command in asked if command not in (*absent, *servers)]
    script = "\n".join(f"{line} {quick(line)}" if line.startswith("llamajax bench") else line for line in lines)
    env = environment(PATH=PATH, KEY="key", OPENAI_API_KEY="none", LLM_USER_PATH=str(folder))
    done = subprocess.run(
        ["sh", "-exc", re.sub(r"http://(127\.0\.0\.1|localhost):8000", url, script)],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert '"error"' not in done.stdout
    # README's answer is of AVX2: other instruction sets round in another order, and draw another one.
    is_same = block.page != "README.md" or "avx2" in native.implementation()
    if lines and native.available() and is_same:
        assert_shown(block.output, done.stdout)
    for server in servers:
        if server != "llamajax serve":  # is there already
            with answering(process := started(server, folder, env)):
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
    if absent:
        pytest.skip(f"not installed: {', '.join(absent.values())}")


def assert_shown(output: str, printed: str) -> None:
    """However lines are broken; a figure, such as 15.28 ± 0.97, may differ by its error on another processor."""
    figure = r"[\d.]+ ± [\d.]+"
    output, printed = (" ".join(text.split()) for text in (output, printed))
    found = re.search(figure.join(map(re.escape, re.split(figure, output))), printed)
    assert found, printed
    for here, there in zip(*(re.findall(figure, text) for text in (output, found[0])), strict=True):
        value, error = map(float, here.split(" ± "))
        assert abs(float(there.split(" ± ")[0]) - value) <= error


# The model is loaded once, though each page loads it.
_RUN = """
import functools, sys
import llamajax
llamajax.load = functools.cache(llamajax.load)
for page, text in zip(sys.argv[1::2], sys.argv[2::2]):
    print("\\0", end="")
    exec(compile(text, page, "exec"), {"__name__": "__main__"})
"""


def needs(block: Block) -> str | None:
    """A module that the program imports, and that is not installed."""
    names = re.findall(r"^(?:from|import) (\w+)", block.text, re.MULTILINE)
    return next((name for name in names if not find_spec(name)), None)


PROGRAMS = [block for block in blocks("python") if block.text.splitlines()[0] not in NOT_RUN]


@pytest.fixture(scope="module")
def printed(url: str) -> dict[str, str]:
    """What each page's programs print, in one program a page, for later ones use what earlier ones define."""
    pages: dict[str, str] = {}
    for block in PROGRAMS:
        text = "" if needs(block) else block.text.replace("http://127.0.0.1:8000", url)
        pages[block.page] = pages.get(block.page, "") + text
    arguments = [argument for page in pages.items() for argument in page]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _RUN, *arguments], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(pages, done.stdout.split("\0")[1:], strict=True))


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_programs_run(block: Block, printed: dict[str, str]) -> None:
    if name := needs(block):
        pytest.skip(f"{name} is not installed")
    assert "error:" not in printed[block.page]
    assert printed[block.page].count("\n") >= block.text.count("\nprint(")


def test_answers_fit_as_their_page_says(printed: dict[str, str]) -> None:
    *_, code, total, calls = printed["structured.md"].splitlines()
    assert re.fullmatch("[A-Z]{3}-[0-9]{4}", code)
    assert re.fullmatch(r"[0-9]{1,3}(\+[0-9]{1,3})*", total) or total.endswith("+")
    assert "name='weather'" in calls


@pytest.mark.parametrize("block", blocks("js"), ids=str)
def test_node_runs(block: Block, url: str) -> None:
    if not (shutil.which("node") and (NODE_CLIENTS / "node_modules").exists()):
        pytest.skip("openai-node is not installed: npm install --prefix scripts/clients")
    text = block.text.replace("http://127.0.0.1:8000", url)
    done = subprocess.run(
        ["node", "--input-type=module", "--eval", text], cwd=NODE_CLIENTS, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_what_is_not_run_is_there() -> None:
    shown = {command for block in blocks("sh") for command in commands(block.text)}
    assert shown | {block.text.splitlines()[0] for block in blocks("python")} >= NOT_RUN.keys()


def test_no_block_is_overlooked() -> None:
    # cli.md is generated; test_deployment.py reads the files of deployment.md; the rest are files and output.
    known = {"sh", "python", "js", "json", "console", "nginx", "ini", "dockerfile", ""}
    assert {block.language for block in BLOCKS} == known
    assert {block.page for block in blocks("console")} == {"cli.md"}
    assert not [
        block for block in blocks("") if re.search(r"^(\$|llamajax|python|pip|curl) ", block.text, re.MULTILINE)
    ]
    assert QUICK in (PROJECT / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_all_code_is_in_fences(page: Path) -> None:
    text = re.sub(r"^::: .*\n( {4}.*\n)+", "", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    assert not re.findall(r"^(?: {4}|\t).*|.*(?:```|~~~|<pre|<code).*", text, re.MULTILINE)


def test_info_prints_what_the_quickstart_shows() -> None:
    [shown] = [block.text for block in blocks("", "quickstart.md")]
    pattern = re.escape(shown).replace(r"0\.10\.2", r"[\d.]+").replace(r"\(avx2\)", r"\(\w+\)")
    if native.available():
        assert re.search(pattern, run("info", "--device", "cpu").stdout)


def test_the_sizes_of_packed_blocks_are_true() -> None:
    page = (PROJECT / "docs" / "kernels.md").read_text()
    rows = re.findall(r"^\|[^|]+\| ([a-z][\w, ]*) \|.*\| ([\d, ]+) \|$", page, re.MULTILINE)
    sizes: dict[str, int] = {}
    for names, numbers in ((row[0].split(", "), row[1].split(", ")) for row in rows):
        sizes |= zip(names, map(int, numbers if len(numbers) > 1 else numbers * len(names)), strict=True)
    assert sizes == {name: format.block_bytes for name, format in PACKED_FORMATS.items()}


def test_a_batch_file_gives_the_results_that_are_shown(shallow_model: str, tmp_path: Path) -> None:
    prompts, results = (block.text for block in blocks("json", "batch.md"))
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
