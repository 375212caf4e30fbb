"""Ids computed with the publishers' own tokenizers, and what must hold at the edges."""

from pathlib import Path

import numpy as np
import pytest

from llamajax.tokenizers.base import Tokenizer, split_special, stop_ids
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.sentencepiece import load_sentencepiece
from llamajax.tokenizers.tiktoken import load_tiktoken
from llamajax.weights.gguf import read_gguf


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_model: Path) -> Tokenizer:
    return load_tiktoken(llama3_tokenizer_model)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return from_gguf(read_gguf(smollm2_gguf).metadata)


@pytest.fixture(scope="module")
def spm(spm_model: Path) -> Tokenizer:
    return load_sentencepiece(spm_model)


@pytest.fixture(params=["llama3", "smollm2", "spm"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    value: Tokenizer = request.getfixturevalue(request.param)
    return value


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("1234567", [4513, 10961, 22]),
        ("I'LL we'Re", [40, 6, 4178, 584, 50527]),
        ("  hello   world\n\n\nx", [220, 24748, 256, 1917, 1432, 87]),
        ("a\r\nb", [64, 319, 65]),
        ("🦙🔥", [9468, 99, 247, 9468, 242, 98]),
        ("<|eot_id|>", [27, 91, 68, 354, 851, 91, 29]),
        ("", []),
    ],
)
def test_llama3(llama3: Tokenizer, text: str, ids: list[int]) -> None:
    assert llama3.encode(text) == ids
    assert llama3.decode(ids) == text


def test_llama3_special_ids(llama3: Tokenizer) -> None:
    for literal, token_id in {
        "<|begin_of_text|>": 128000,
        "<|end_of_text|>": 128001,
        "<|reserved_special_token_1|>": 128003,
        "<|finetune_right_pad_id|>": 128004,
        "<|step_id|>": 128005,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eom_id|>": 128008,
        "<|eot_id|>": 128009,
        "<|python_tag|>": 128010,
        "<|image|>": 128011,
        "<|reserved_special_token_2|>": 128012,
        "<|reserved_special_token_245|>": 128255,
    }.items():
        assert llama3.special_tokens[literal] == token_id
        assert llama3.encode_template(literal) == [token_id]
        assert llama3.token_bytes(token_id) == b""
    assert len(llama3.special_tokens) == 256
    assert llama3.stop_ids == {128001, 128008, 128009}
    assert not llama3.strips_leading_space


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("2024", [34, 32, 34, 36]),
        ("a  2", [81, 256, 34]),
        ("    1. item", [289, 33, 30, 5033]),
        ("x =   42\n\n   7", [104, 446, 333, 36, 34, 1004, 39]),
    ],
)
def test_smollm2(smollm2: Tokenizer, text: str, ids: list[int]) -> None:
    assert smollm2.encode(text) == ids
    assert smollm2.decode(ids) == text


def test_smollm2_special_ids(smollm2: Tokenizer) -> None:
    assert smollm2.encode_template("<|im_start|>user\nHi<|im_end|>\n") == [1, 4093, 198, 26843, 2, 198]
    assert smollm2.decode([1, 4093, 198, 26843, 2, 198]) == "user\nHi\n"
    assert smollm2.bos_id is None
    assert smollm2.stop_ids == {0, 2}
    assert smollm2.vocab_size == 49152


def test_sentencepiece_hides_its_leading_space(spm: Tokenizer) -> None:
    ids = spm.encode("Hello world")
    assert spm.strips_leading_space
    assert spm.token_bytes(ids[0]) == b" Hello"
    assert spm.decode(ids) == "Hello world"
    assert spm.decode(spm.encode("  two spaces")) == "  two spaces"
    assert spm.encode("\n") == [28705, 13]  # "▁", "<0x0A>"
    assert spm.encode_template("a</s>\n") == [*spm.encode("a"), 2, *spm.encode("\n")]


def test_no_text_contains_a_special_token(tokenizer: Tokenizer) -> None:
    special_ids = set(tokenizer.special_tokens.values())
    for literal in tokenizer.special_tokens:
        for text in (literal, f"a{literal}b", f" {literal}\n", literal * 2, f"{literal[:3]}{literal}"):
            assert not special_ids & set(tokenizer.encode(text))
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_templates_write_special_tokens(tokenizer: Tokenizer) -> None:
    for literal, token_id in tokenizer.special_tokens.items():
        ids = tokenizer.encode_template(f"one{literal}{literal} two")
        assert ids == [*tokenizer.encode("one"), token_id, token_id, *tokenizer.encode(" two")]


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    text = b"caf\xe9 \xff!".decode("utf-8", "surrogateescape")
    assert tokenizer.encode(text) == tokenizer.encode("caf\ufffd \ufffd!")
    assert tokenizer.decode(tokenizer.encode("\ud83d")) == "\ufffd"


def test_invalid_bytes_are_replaced(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦙")
    assert tokenizer.decode(ids[:-1]) == "\ufffd"


def test_ids_outside_the_vocabulary_decode_to_nothing(tokenizer: Tokenizer) -> None:
    """Embeddings may have more rows than the tokenizer has tokens, and one of these may be drawn."""
    assert isinstance(tokenizer.token_bytes(tokenizer.vocab_size - 1), bytes)
    for token_id in (-1, tokenizer.vocab_size, 2**40):
        assert tokenizer.token_bytes(token_id) == b""
        assert tokenizer.decode([*tokenizer.encode("a llama"), token_id]) == "a llama"


def test_numpy_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(np.array(tokenizer.encode("numpy ids"), np.int32)) == "numpy ids"


def test_split_special_takes_the_longest_literal() -> None:
    special = {"<a>": 1, "<a><b>": 2, "x": 3}
    assert list(split_special("x<a><b><a>y", special)) == ["x", 2, 1, "y"]
    assert list(split_special("", special)) == []
    assert list(split_special("text", {})) == ["text"]
    assert list(split_special("a  <a>  <a>b", special, lstrip=["<a>"])) == ["a", 1, 1, "b"]
    assert list(split_special("a  <a>  b", special, rstrip=["<a>"])) == ["a  ", 1, "b"]


def test_stop_ids_are_declared_or_known() -> None:
    assert stop_ids({"<|eot_id|>": 7, "<|user|>": 8}, 3, None) == {3, 7}
