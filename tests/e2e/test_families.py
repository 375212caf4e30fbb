"""The commands with a model of each family beside the Llamas: tiny, random, with a token for each byte."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from llamajax.tokenizers.hf import byte_alphabet

from ..parity.tiny import CASES, state_dict, write_hf
from .command import run

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(params=["qwen2", "qwen3", "smollm3", "mistral-window"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    config = CASES[request.param] | {"vocab_size": 256}
    rows = {"model.embed_tokens.weight", "lm_head.weight"}
    weights = {
        name: array.repeat(3, axis=0)[:256] if name in rows else array
        for name, array in state_dict(request.param).items()
    }
    path = write_hf(tmp_path / request.param, config, weights)
    tokenizer = Tokenizer(models.BPE(byte_alphabet(), []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return str(path)


def test_chat_batch_and_info(model: str, tmp_path: Path) -> None:
    facts = json.loads(run("info", "-m", model, "--json").stdout)
    assert facts["config"]["family"] == Path(model).name.removesuffix("-window")
    described = run("info", "-m", model).stdout
    assert ("to the last 9 tokens" in described) == model.endswith("-window")
    assert ("none in 1 of the layers" in described) == model.endswith("smollm3")

    limits = ("-m", model, "-n", "4", "--max-seq-len", "64", "--temperature", "0")
    chat = json.loads(run("chat", "-p", "Hi", "--json", *limits).stdout)
    assert chat["usage"]["completion_tokens"] == 4
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("Hi\nBye\n")
    done = run("batch", str(prompts), "-o", str(answers), "--quantize", "q8_0", *limits)
    assert done.code == 0, done.stderr
    assert len(answers.read_text().splitlines()) == 2
