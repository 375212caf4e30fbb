"""The commands with a model of each family beside the Llamas: tiny, random, with a token for each byte."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from llamajax.tokenizers.hf import byte_alphabet

from ..parity.tiny import CASES, state_dict, write_hf
from .command import Terminal, run

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}{{ mode }}"


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


@pytest.mark.parametrize("model", ["qwen3"], indirect=True)
def test_what_the_chat_template_reads_beside_the_messages(model: str, tmp_path: Path) -> None:
    limits = ("-m", model, "-n", "4", "--max-seq-len", "64", "--temperature", "0")
    mode = ("--chat-template-kwargs", '{"mode": "Shortly"}')  # seven tokens

    def prompt_tokens(*options: str) -> int:
        return json.loads(run("chat", "-p", "Hi", "--json", *limits, *options).stdout)["usage"]["prompt_tokens"]

    alone = prompt_tokens()
    assert prompt_tokens(*mode) == alone + 7

    lines = [{"prompt": "Hi"}, {"prompt": "Hi", "chat_template_kwargs": {"mode": "No"}}]
    lines.append({"url": "/v1/completions", "body": {"prompt": "Hi"}})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("batch", str(prompts), "--keep-order", *limits, *mode)
    assert done.code == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    bodies = [*answers[:2], answers[2]["response"]["body"]]
    assert [body["usage"]["prompt_tokens"] for body in bodies] == [alone + 7, alone + 2, 2]

    with Terminal(*limits, *mode) as terminal:
        assert int(terminal.ask("Hi").stats["prompt"] or 0) == alone + 7
        assert terminal.ask("/stats").notes[0].startswith("2 messages, ")
