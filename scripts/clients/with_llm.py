"""The command `llm`, unchanged, against a server; README.md says how to start both.

    pip install llm
    python scripts/clients/with_llm.py http://127.0.0.1:8123

Its list of models is written to a folder of its own, as docs/serve.md says.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import checks
import httpx

url, key = (*sys.argv[1:], "secret")[:2]
name = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"][0]["id"]
folder = Path(tempfile.mkdtemp())
COMMAND = str(Path(sys.executable).with_name("llm"))
MODELS = """
- model_id: llamajax
  model_name: {name}
  api_base: {url}/v1
  api_key_name: llamajax
- model_id: llamajax-text
  model_name: {name}
  api_base: {url}/v1
  api_key_name: llamajax
  completion: true
"""
(folder / "extra-openai-models.yaml").write_text(MODELS.format(name=name, url=url))


def llm(*arguments: str) -> str:
    env = {**os.environ, "LLM_USER_PATH": str(folder)}
    return subprocess.run([COMMAND, *arguments], env=env, check=True, capture_output=True, text=True).stdout


def ask(*arguments: str) -> str:
    return llm(*arguments, "-o", "max_tokens", "20", "-o", "seed", "7")


def keys() -> None:
    llm("keys", "set", "llamajax", "--value", key)
    assert "llamajax" in llm("models")


def stream_is_the_answer() -> None:
    asked = ("-m", "llamajax", "Tell me a story about a llama.", "-s", "Be brief.")
    assert ask(*asked, "--no-stream") == ask(*asked) != "\n"


def conversation() -> None:
    assert ask("-c", "Go on.").strip()


def usage() -> None:
    assert (
        "output"
        in subprocess.run(
            [COMMAND, "-m", "llamajax", "-u", "Hi", "-o", "max_tokens", "5"],
            env={**os.environ, "LLM_USER_PATH": str(folder)},
            check=True,
            capture_output=True,
            text=True,
        ).stderr
    )


def text_completion() -> None:
    asked = ("-m", "llamajax-text", "Once upon a time")
    assert ask(*asked, "--no-stream") == ask(*asked) != "\n"


checks.run(keys, stream_is_the_answer, conversation, usage, text_completion)
