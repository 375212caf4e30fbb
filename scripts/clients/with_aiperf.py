"""The load generator `aiperf`, unchanged, against a server; README.md says how to start both.

    pip install aiperf
    python scripts/clients/with_aiperf.py http://127.0.0.1:8123

Each run must end without an error. The tokenizer that makes its prompts is one of bytes, made here: no hub is asked.
Tokens are counted by the server's usage.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checks
import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

url, key = (*sys.argv[1:], "secret")[:2]
name = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).json()["data"][0]["id"]
REQUESTS = 64
COMMAND = str(Path(sys.executable).with_name("aiperf"))
OPTIONS = f"""
    --concurrency 8 --request-count {REQUESTS} --random-seed 1 --ui none --no-gpu-telemetry
    --prompt-input-tokens-mean 200 --prompt-output-tokens-mean 20 --extra-inputs ignore_eos:true
""".split()


def byte_tokenizer(folder: Path) -> Path:
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def profile(*options: str) -> dict[str, Any]:
    """Runs aiperf; returns its report of a run without errors."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        named = ["--tokenizer", str(byte_tokenizer(folder)), "--output-artifact-dir", str(folder / "results")]
        given = ["--url", url, "--api-key", key, "--model", name, "--use-server-token-count"]
        subprocess.run([COMMAND, "profile", *given, *named, *OPTIONS, *options], check=True, cwd=folder)
        [report] = (folder / "results").rglob("profile_export_aiperf.json")
        found = json.loads(report.read_text())
    assert found["request_count"]["avg"] == REQUESTS, found
    assert not found.get("error_summary"), found["error_summary"]
    return found


def chat() -> None:
    assert profile("--endpoint-type", "chat")["output_sequence_length"]["avg"] == 20


def chat_streams() -> None:
    assert profile("--endpoint-type", "chat", "--streaming")["output_sequence_length"]["avg"] == 20


def completion_streams() -> None:
    options = ("--endpoint-type", "completions", "--streaming", "--use-legacy-max-tokens")
    assert profile(*options)["output_sequence_length"]["avg"] == 20


def responses_streams() -> None:
    # aiperf reads the usage of answers that were completed only, and these are cut off.
    profile("--endpoint-type", "responses", "--streaming")


checks.run(chat, chat_streams, completion_streams, responses_streams)
