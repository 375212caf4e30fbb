"""Which files of a checkpoint are read, what they decide, and how broken ones are reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from llamajax.errors import TokenizerError
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.hf import byte_alphabet
from llamajax.tokenizers.load import load_directory


def byte_tokenizer(added: list[AddedToken] | None = None) -> Tokenizer:
    """Ids 0 to 255 are the bytes, then come the added tokens."""
    tokenizer = Tokenizer(models.BPE(byte_alphabet(), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added or [AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")


# Directories


def test_tokenizer_json_goes_first(tmp_path: Path, spm_model: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    shutil.copy(spm_model, tmp_path / "tokenizer.model")
    tokenizer = load_directory(tmp_path)
    assert tokenizer.encode("hé") == [104, 0xC3, 0xA9]
    assert tokenizer.vocab_size == 258
    assert tokenizer.stop_ids == {257}
    assert tokenizer.bos_id is None


@pytest.mark.parametrize("folder", ["", "original"])
def test_tokenizer_model_is_told_apart(
    tmp_path: Path, folder: str, llama3_tokenizer_model: Path, spm_model: Path
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    shutil.copy(llama3_tokenizer_model, tmp_path / folder / "tokenizer.model")
    assert load_directory(tmp_path).encode("1234567") == [4513, 10961, 22]
    shutil.copy(spm_model, tmp_path / folder / "tokenizer.model")
    assert load_directory(tmp_path).vocab_size == 32_000


@pytest.mark.parametrize(
    ("config", "post_processor", "bos_id"),
    [
        ({}, False, None),
        ({}, True, 256),
        ({"add_bos_token": False, "bos_token": "<s>"}, True, None),
        ({"add_bos_token": True, "bos_token": "<s>"}, False, 256),
        ({"add_bos_token": True, "bos_token": {"content": "<s>", "special": True}}, False, 256),
        ({"add_bos_token": None, "bos_token": "<s>"}, True, 256),
    ],
)
def test_who_asks_for_bos(tmp_path: Path, config: dict[str, Any], post_processor: bool, bos_id: int | None) -> None:
    backend = byte_tokenizer()
    if post_processor:
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(), template])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", config)
    assert load_directory(tmp_path).bos_id == bos_id


def test_add_bos_of_models(tmp_path: Path, spm_model: Path, llama3_tokenizer_model: Path) -> None:
    for model, bos_id in ((spm_model, 1), (llama3_tokenizer_model, 128_000)):
        shutil.copy(model, tmp_path / "tokenizer.model")
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        assert load_directory(tmp_path).bos_id == bos_id
        write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
        assert load_directory(tmp_path).bos_id is None


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_declared_eos_is_a_stop(tmp_path: Path, file: str) -> None:
    byte_tokenizer([AddedToken("[END]", special=True)]).save(str(tmp_path / "tokenizer.json"))
    assert load_directory(tmp_path).stop_ids == frozenset()
    write_json(tmp_path / file, {"eos_token": {"content": "[END]"}})
    assert load_directory(tmp_path).stop_ids == {256}


def test_added_tokens_beside_a_sentencepiece_model(tmp_path: Path, spm_model: Path) -> None:
    shutil.copy(spm_model, tmp_path / "tokenizer.model")
    write_json(tmp_path / "added_tokens.json", {"<think>": 32_001, "<|im_end|>": 32_000, "</s>": 2})
    tokenizer = load_directory(tmp_path)
    assert tokenizer.special_tokens["<|im_end|>"] == 32_000
    assert 32_000 in tokenizer.stop_ids
    assert 32_000 not in tokenizer.encode("<|im_end|>")
    assert 32_001 in tokenizer.encode("a<think>b")
    assert tokenizer.token_bytes(32_001) == b"<think>"


def test_ordinary_added_tokens_are_found_in_text_but_not_role_markers(tmp_path: Path) -> None:
    added = [AddedToken("<think>", normalized=False), AddedToken("<｜User｜>", normalized=False)]
    byte_tokenizer(added).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_directory(tmp_path)
    assert tokenizer.special_tokens == {"<｜User｜>": 257}
    assert tokenizer.encode("a<think>") == [97, 256]
    assert tokenizer.decode([256]) == "<think>"
    assert tokenizer.decode(tokenizer.encode("<｜User｜>")) == "<｜User｜>"
    assert tokenizer.encode_template("<｜User｜>a") == [257, 97]


@pytest.mark.parametrize("lstrip", [False, True])
@pytest.mark.parametrize("rstrip", [False, True])
def test_special_tokens_take_the_whitespace_they_ask_for(tmp_path: Path, lstrip: bool, rstrip: bool) -> None:
    backend = byte_tokenizer(
        [
            AddedToken("<|end|>", special=True, lstrip=lstrip, rstrip=rstrip, normalized=False),
            AddedToken("</s>", special=True, normalized=False),
        ]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_directory(tmp_path)
    for text in ("a <|end|> b", "a \n<|end|>\t\n <|end|> </s> b", "<|end|>", "  <|end|>  "):
        assert tokenizer.encode_template(text) == backend.encode(text).ids


def test_tokenizer_json_never_truncates_or_pads(tmp_path: Path) -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_directory(tmp_path).encode("a" * 10)) == 10


def test_holes_in_the_numbering_decode_to_nothing(tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 5}, []))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_directory(tmp_path)
    assert tokenizer.vocab_size == 6
    assert tokenizer.decode([0, 3, 5]) == "ab"


def truncated(path: Path, size: int) -> bytes:
    return path.read_bytes()[:size]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("tokenizer.json", b"", "tokenizer.json"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a"', "tokenizer.json"),
        ("tokenizer.json", b"[]", "tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json"),
        ("tokenizer.model", b"", "tokenizer.model"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "tokenizer.model"),
        ("tokenizer.model", b"\x00" * 100, "tokenizer.model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "expected Llama 3's 128000 ranks, found 2"),
        ("tokenizer.model", b"IQ== 0\nIg 1\n", "cannot be read as a tiktoken file"),
        ("tokenizer.model", b"IQ== 0\nIg==\n", "cannot be read as a tiktoken file"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not valid JSON"),
        ("tokenizer_config.json", b"[1]", "expected a JSON object, found a list"),
        ("tokenizer_config.json", b'{"bos_token": 7}', "expected a token's text, found 7"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json: not valid JSON"),
        ("special_tokens_map.json", b"\xff", "special_tokens_map.json: cannot be read as text"),
        ("unrelated.txt", b"", "expected tokenizer.json or tokenizer.model"),
    ],
)
def test_broken_files_are_named_in_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(TokenizerError) as raised:
        load_directory(tmp_path)
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_truncated_models(tmp_path: Path, spm_model: Path, llama3_tokenizer_model: Path) -> None:
    for model in (spm_model, llama3_tokenizer_model):
        for size in (100, 12_345, 300_000):
            (tmp_path / "tokenizer.model").write_bytes(truncated(model, size))
            with pytest.raises(TokenizerError, match=r"tokenizer\.model: .*expected|cannot be read"):
                load_directory(tmp_path)


def test_word_piece_is_refused(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="neither byte-level nor SentencePiece-like"):
        load_directory(tmp_path)


# GGUF metadata


def gguf_bytes(**changes: Any) -> dict[str, Any]:
    """A byte tokenizer with one control and one user-defined token; None removes a key."""
    letters = sorted(byte_alphabet(), key=byte_alphabet().__getitem__)
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [*letters, "ab", "<|im_end|>", "<think>"],
        "token_type": [1] * 257 + [3, 4],
        "merges": ["a b"],
        "eos_token_id": 257,
    }
    return {f"tokenizer.ggml.{key}": v for key, v in (metadata | changes).items() if v is not None}


def test_gguf_byte_level() -> None:
    tokenizer = from_gguf(gguf_bytes())
    assert tokenizer.encode("abc<think><|im_end|>")[:3] == [256, 99, 258]
    assert tokenizer.special_tokens == {"<|im_end|>": 257}
    assert tokenizer.encode_template("<|im_end|>ab") == [257, 256]
    assert tokenizer.decode([256, 257, 258]) == "ab<think>"
    assert (tokenizer.vocab_size, tokenizer.stop_ids, tokenizer.bos_id) == (259, {257}, None)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["I", "'LL", " see", " ", "123", "4", ",", "\n\n", "x"]),
        ("llama3", ["I", "'LL", " see", " ", "123", "4", ",", "\n\n", "x"]),
        ("smaug-bpe", ["I", "'LL", " see", " ", "123", "4", ",", "\n\n", "x"]),
        ("smollm", ["I", "'", "LL", " see", " ", "1", "2", "3", "4", ",", "\n", "\n", "x"]),
        ("gpt-2", ["I", "'", "LL", " see", " 1234", ",", "\n", "\n", "x"]),
    ],
)
def test_gguf_split_patterns(pre: str, pieces: list[str]) -> None:
    """Every piece of this text is a token, and so is every pair of pieces that must not merge."""
    words = sorted({piece for piece in pieces if len(piece) > 1} | {" 1234", "1234", "'LL", " 123", "LL", " see"})
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    metadata = gguf_bytes(pre=pre)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges: list[str] = []
    for word in words:
        written = "".join(letters[byte] for byte in word.encode())
        for end in range(2, len(written) + 1):
            if written[:end] not in tokens:
                tokens.append(written[:end])
                merges.append(f"{written[: end - 1]} {written[end - 1]}")
    metadata["tokenizer.ggml.merges"] = merges
    metadata["tokenizer.ggml.token_type"] = [1] * 257 + [3, 4] + [1] * (len(tokens) - 259)
    tokenizer = from_gguf(metadata)
    text = "I'LL see 1234,\n\nx"
    assert [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text)] == pieces


def test_gguf_llama3_takes_whole_words_as_they_are() -> None:
    """ "abc" is in the vocabulary, but no merge makes it."""
    tokens = [*gguf_bytes()["tokenizer.ggml.tokens"], "abc"]
    changes = {"tokens": tokens, "token_type": [1] * 257 + [3, 4, 1]}
    assert from_gguf(gguf_bytes(pre="llama-bpe", **changes)).encode("abc") == [259]
    assert from_gguf(gguf_bytes(pre="gpt-2", **changes)).encode("abc") == [256, 99]


def test_gguf_old_conversions() -> None:
    """Without a named pattern or token types: Llama 3's first files had no `pre`."""
    assert from_gguf(gguf_bytes(pre=None, token_type=None)).special_tokens == {"<|im_end|>": 257}
    assert from_gguf(gguf_bytes(pre="default")).bos_id is None
    tokens = [*gguf_bytes()["tokenizer.ggml.tokens"], "<|begin_of_text|>"]
    llama3 = from_gguf(gguf_bytes(pre=None, token_type=None, tokens=tokens, bos_token_id=259))
    assert llama3.bos_id == 259


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "expected a tokenizer of kind gpt2 or llama, found None"),
        ({"model": "bert"}, "found 'bert'"),
        ({"pre": "qwen2"}, "unknown pre-tokenizer 'qwen2'"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"token_type": [1]}, "259 tokens, but 1 token types"),
        ({"eos_token_id": 259}, "eos_token_id 259 is not among 259 tokens"),
        ({"bos_token_id": -1, "add_bos_token": True}, "bos_token_id -1 is not among"),
        ({"merges": ["a b c"]}, "the gpt2 tokenizer cannot be built"),
        ({"merges": ["a zz"]}, "the gpt2 tokenizer cannot be built"),
        ({"tokens": 5}, "the gpt2 tokenizer cannot be built"),
        ({"tokens": [None] * 259}, "the gpt2 tokenizer cannot be built"),
        ({"pre": ["a"]}, "the gpt2 tokenizer cannot be built"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.0]}, "the llama tokenizer cannot be built"),
        ({"model": "llama", "scores": ["x"] * 259}, "the llama tokenizer cannot be built"),
        ({"model": "llama", "scores": [0.0] * 259, "token_type": [2] * 259}, "the llama tokenizer cannot be built"),
        ({"model": "llama", "scores": [0.0] * 259, "tokens": ["a"] * 259}, "the llama tokenizer cannot be built"),
    ],
)
def test_gguf_broken_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError) as raised:
        from_gguf(gguf_bytes(**changes))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_gguf_sentencepiece_flags(spm_model: Path) -> None:
    proto = ModelProto()
    proto.ParseFromString(spm_model.read_bytes())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces] + ["<|im_end|>"],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces] + [0.0],
        # neither <unk> as unknown nor <|im_end|> as control: what some converters write
        "tokenizer.ggml.token_type": [3] + [piece.type for piece in proto.pieces[1:]] + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 32_000,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = from_gguf(metadata)
    assert tokenizer.bos_id is None
    assert tokenizer.stop_ids == {2, 32_000}
    assert not tokenizer.strips_leading_space
    assert tokenizer.token_bytes(tokenizer.encode("Hello")[0]) == b"Hello"
    assert tokenizer.decode(tokenizer.encode(" Hello")) == " Hello"
    assert 32_000 not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode_template("<|im_end|>") == [32_000]
