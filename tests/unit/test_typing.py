"""What mypy and editors know of the public options, and what it says of a misspelt one."""

import subprocess
import sys
from pathlib import Path

import pytest

import llamajax

pytest.importorskip("mypy")

# The types of other libraries are not needed here, and mypy takes a minute to read them.
_SETTINGS = """
[mypy]
python_version = 3.11
ignore_missing_imports = true
[mypy-jax.*,flax.*,numpy.*,optax.*,tokenizers.*,huggingface_hub.*,jinja2.*,safetensors.*]
follow_imports = skip
"""
_PROGRAM = """
import llamajax
from llamajax import LLM, Completion, Conversation, Message, SamplingParams

def accepted(llm: LLM, messages: list[Message]) -> list[Completion]:
    llm.stream(messages, max_new_tokens=None, stop=["a"], continue_final_message=True)
    llm.generate("Hi", sampling=SamplingParams(seed=-1), stop_token_ids=[2], min_tokens=1)
    llm.chat([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], logit_bias={5: -100.0}, top_k=-1)
    llm.chat([{"role": "system", "content": "Hi"}, {"role": "user", "content": "Hi"}])
    Conversation(llm).ask("Hi", max_new_tokens=5, temperature=0.5)
    with llm.serve_requests() as server:
        server.submit([1, 2], deadline=1.5, ignore_eos=True, logprobs=3)
    return llamajax.generate_batch(llm, ["Hi", [1, 2]], slots=4, raise_errors=True, presence_penalty=1)

def refused(llm: LLM) -> None:
"""
_REFUSED = [
    "llm.generate('Hi', max_new_token=5)",
    "llm.chat('Hi', temprature=0)",
    "llm.stream('Hi', seed='1')",
    "llm.serve_requests().submit('Hi', stop=5)",
    "Conversation(llm).ask('Hi', max_new_tokens=5, top_q=1)",
    "llm.generate_batch(['Hi'], slot=4)",
    "llamajax.generate_batch(llm, ['Hi'], logit_bias=[1])",
    "llm.generate_batch(['Hi'])[0].text",
]


def test_mypy_knows_the_options(tmp_path: Path) -> None:
    (tmp_path / "mypy.ini").write_text(_SETTINGS)
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM + "".join(f"    {line}\n" for line in _REFUSED))
    settings = ["--config-file", tmp_path / "mypy.ini", "--no-error-summary", "--cache-dir", tmp_path / "cache"]
    command = [sys.executable, "-m", "mypy", *settings, program]
    # Where llamajax is installed, mypy must look at nothing else; and it cannot follow an editable installation.
    (tmp_path / "llamajax").symlink_to(Path(llamajax.__file__).parent)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    first = len(_PROGRAM.splitlines()) + 1
    wrong = {
        int(line.split(":")[1])
        for line in done.stdout.splitlines()
        if line.startswith(program.name) and ": error: " in line
    }
    assert wrong == set(range(first, first + len(_REFUSED))), done.stdout + done.stderr
