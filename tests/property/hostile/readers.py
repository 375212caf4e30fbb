"""Reads what may be broken as llamajax does: an answer, checked as far as it can be, or LlamaJaxError."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import sentencepiece
import tokenizers

import llamajax
from llamajax import LLM, LlamaJaxError
from llamajax.bench.saved_logits import SavedLogits
from llamajax.config import LlamaConfig
from llamajax.engine.runner import Runner
from llamajax.loading import place
from llamajax.serve import batch_file, json_object
from llamajax.serve.input_file import Input
from llamajax.serve.result_file import SETTINGS_SUFFIX, ResultFile, Settings
from llamajax.text import printable, well_formed
from llamajax.tokenizers.base import Tokenizer
from llamajax.tokenizers.chat import ChatTemplate, builtin_template, encode_chat, find_template
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.load import load_directory
from llamajax.weights.checkpoint import Checkpoint, open_checkpoint
from llamajax.weights.gguf import read_gguf
from llamajax.weights.load import load_weights
from llamajax.weights.safetensors import read_safetensors

from .subjects import MESSAGES, SAVED_IDS, SAVED_TEXT, TEXTS, directory

BASE_CONFIGS: dict[str, LlamaConfig] = {}


def read_all(*steps: Callable[[], Any]) -> None:
    """Takes each step whatever came of the others; then raises the first error that llamajax raised."""
    errors = []
    for step in steps:
        try:
            step()
        except LlamaJaxError as error:
            check_message(error)
            errors.append(error)
    if errors:
        raise errors[0]


def check_message(error: LlamaJaxError) -> None:
    message = str(error)
    assert message == printable(well_formed(message)) and 0 < len(message) < 20_000 and "\n" not in message, message[
        :500
    ]


def read_gguf_model(path: Path, load: bool) -> None:
    content = path.read_bytes()
    file = read_gguf(path)
    for tensor in file.tensors.values():
        assert tensor.data.tobytes() in content
    if load:
        _compare({name: tensor.data.tobytes() for name, tensor in file.tensors.items()}, lambda: _other_gguf(path))

    def tokenize() -> None:
        tokenizer = from_gguf(file.metadata)
        check_tokenizer(tokenizer)
        check_chat(tokenizer, find_template(file.metadata) or builtin_template(tokenizer, [2], "x"))

    read_all(tokenize, lambda: find_template(file.metadata), lambda: check_checkpoint(path, load))


def read_directory(path: Path, load: bool) -> None:
    def tokenize() -> None:
        tokenizer = load_directory(path)
        check_tokenizer(tokenizer)
        text = "Hi  a b"
        if not any(literal in text for literal in _added_tokens(path)):
            _compare(tokenizer.encode(text), lambda: _other_ids(path, text))
        check_chat(tokenizer, find_template(path) or builtin_template(tokenizer, [2], "x"))

    def read() -> None:
        check_checkpoint(path, load)
        tensors = read_safetensors(path)
        _compare({name: tensor.data.tobytes() for name, tensor in tensors.items()}, lambda: _other_tensors(path))

    read_all(tokenize, lambda: find_template(path), read)


def _compare(ours: Any, other: Callable[[], Any]) -> None:
    """With what another reader makes of it; we may read what that one refuses."""
    try:
        theirs = other()
    except BaseException as error:  # also a panic in Rust
        if isinstance(error, KeyboardInterrupt):
            raise
        return
    assert ours == theirs, (ours, theirs)


def _other_gguf(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


def _other_tensors(path: Path) -> dict[str, bytes]:
    return {name: x.tobytes() for name, x in safetensors.numpy.load_file(path / "model.safetensors").items()}


def _other_ids(path: Path, text: str) -> list[int]:
    if (path / "tokenizer.json").is_file():
        other = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        return other.encode(text, add_special_tokens=False).ids
    return sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model")).EncodeAsIds(text)


def _added_tokens(path: Path) -> list[str]:
    if (path / "tokenizer.json").is_file():
        tokens = json.loads((path / "tokenizer.json").read_bytes()).get("added_tokens") or []
        return [token["content"] for token in tokens]
    return list(json.loads((path / "added_tokens.json").read_bytes())) if (path / "added_tokens.json").is_file() else []


def check_checkpoint(path: Path, load: bool) -> None:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    assert all(isinstance(i, int) for i in checkpoint.stop_ids)
    assert config.num_parameters > 0
    for tensor in checkpoint.tensors.values():
        assert tensor.data.tobytes() is not None
    if load:
        _answer(checkpoint, runs=config == BASE_CONFIGS.setdefault(config_key(config), config))


def config_key(config: LlamaConfig) -> str:
    """Models of one width share compiled programs, if nothing else in their configurations differs."""
    return f"{config.hidden_size} {config.vocab_size}"


def _answer(checkpoint: Checkpoint, runs: bool) -> None:
    config = checkpoint.config
    placement = place(config, "auto", "auto", None)
    weights = load_weights(config, checkpoint.tensors, placement)
    if runs:
        llm = LLM(Runner(config, weights, placement, 64), tiny_llm().tokenizer, None, checkpoint.stop_ids)
        answer = llm.stream([1, 2, 3], max_new_tokens=2, temperature=0.0).finish()
        assert all(0 <= i < checkpoint.config.vocab_size for i in answer.token_ids)
        assert np.isfinite(llm.logits([1, 2, 3])).all()


def check_tokenizer(tokenizer: Tokenizer) -> None:
    drawn = set()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids), (text, ids, tokenizer.vocab_size)
        drawn |= set(ids)
        assert isinstance(tokenizer.decode(ids), str)
    assert len(drawn.intersection(tokenizer.special_tokens.values())) <= 1, drawn  # <unk>
    for i in {*range(min(tokenizer.vocab_size, 600)), tokenizer.vocab_size - 1}:
        assert isinstance(tokenizer.token_bytes(i), bytes)
    for i in {*tokenizer.stop_ids, *([] if tokenizer.bos_id is None else [tokenizer.bos_id])}:
        assert type(i) is int and 0 <= i < tokenizer.vocab_size, i


def check_chat(tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
    if template is not None:
        ids = encode_chat(tokenizer, template, MESSAGES)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@cache
def tiny_llm() -> LLM:
    with TemporaryDirectory() as folder:
        for name, data in directory().items():
            Path(folder, name).write_bytes(data)
        return llamajax.load(folder, device="cpu")


def read_line(path: Path, load: bool) -> None:
    llm = tiny_llm()
    fields = json_object.read_object(path.read_bytes())
    batch_file.read_source(1, "", fields)
    prompt, choices, _ = batch_file.read_request(1, fields, batch_file.Defaults({"max_new_tokens": 2}))
    requests = [llm.prepare(prompt, **options)[0] for options in choices]
    assert all(0 <= i < llm.config.vocab_size for request in requests for i in request.token_ids)
    if load and sum(request.max_new_tokens for request in requests) < 10:
        for _, result in llm.stream_batch((prompt, options) for options in choices):
            if isinstance(result, LlamaJaxError):
                raise result


def read_input(path: Path) -> None:
    """A batch's input of any format, and an error or a request for each of its lines."""
    with path.open("rb") as file:
        lines = list(Input(file, path.name, None).lines())
    for line in lines:
        assert line is not None
        source = batch_file.Source(line.number, "")
        try:
            fields = line.fields()
            source = batch_file.read_source(line.number, "", fields)
            batch_file.read_request(line.number, fields, batch_file.Defaults({}))
        except LlamaJaxError as error:
            assert batch_file.as_line(source.error(error)).count(b"\n") == 1


def read_results(path: Path) -> None:
    """What a run left, to be continued."""
    Settings({"seed": 42, "temperature": 0.5}).check(path.with_name(path.name + SETTINGS_SUFFIX))
    done = ResultFile(path, resume=True).done
    assert all(type(number) is int and isinstance(digest, str) for number, digest in done.items())


def read_template(path: Path, rng: Random) -> None:
    template = ChatTemplate(path.read_bytes().decode("utf-8", "surrogatepass"), "<|im_start|>", "<|im_end|>")
    text = template.render(MESSAGES, add_generation_prompt=rng.random() < 0.5)
    assert isinstance(text, str)
    assert all(i in range(tiny_llm().config.vocab_size) for i in encode_chat(tiny_llm().tokenizer, template, MESSAGES))


def read_saved_logits(path: Path) -> None:
    saved = SavedLogits(path)
    saved.check(SAVED_TEXT, SAVED_IDS, 3, 16)
    for window in range(len(SAVED_IDS)):
        assert saved[window].shape == (3, 16)
        assert saved[window].dtype == np.float16
