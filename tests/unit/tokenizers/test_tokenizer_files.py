"""Which files of a checkpoint are read, what they decide, and how broken ones are reported."""

import itertools
import json
import math
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llamajax.errors import TokenizerError
from llamajax.tokenizers.base import refused
from llamajax.tokenizers.chat import find_template
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.hf import HFTokenizer, byte_alphabet
from llamajax.tokenizers.load import load_directory
from llamajax.tokenizers.stream import StreamDecoder


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
def test_tokenizer_model_is_recognised(
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


def test_added_tokens_that_only_tokenizer_config_json_has(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    added: dict[str, Any] = {
        "256": {"content": "<s>", "special": True},
        "258": {"content": "<think>", "special": False},
        "259": {"content": "[INST]", "special": True, "lstrip": True},
        "260": {"content": "<|role|>", "special": False},
    }
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": added})
    tokenizer = load_directory(tmp_path)
    assert tokenizer.special_tokens == {"<s>": 256, "</s>": 257, "[INST]": 259, "<|role|>": 260}
    assert tokenizer.encode("a<think>") == [97, 258]
    assert tokenizer.encode_template("a [INST]<|role|>") == [97, 259, 260]
    assert tokenizer.decode([97, 258, 259, 260]) == "a<think>"
    write_json(tmp_path / "added_tokens.json", {"<old>": 7})  # of use to a SentencePiece model only
    assert "<old>" not in load_directory(tmp_path).decode(range(261))
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": "<think>"}}})
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .* lacks '<think>', whose id is 300"):
        load_directory(tmp_path)


def test_added_tokens_decoder_beside_a_sentencepiece_model(tmp_path: Path, spm_model: Path) -> None:
    shutil.copy(spm_model, tmp_path / "tokenizer.model")
    write_json(tmp_path / "added_tokens.json", {"<think>": 32_001, "[INST]": 32_005})
    added = {"2": {"content": "</s>"}, "32000": {"content": "[END]", "special": True}, "32005": {"content": "[INST]"}}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": added, "eos_token": "[END]"})
    tokenizer = load_directory(tmp_path)
    assert tokenizer.special_tokens["[END]"] == 32_000
    assert tokenizer.stop_ids == {2, 32_000}
    assert tokenizer.vocab_size == 32_006
    x = tokenizer.encode("x")
    assert tokenizer.encode("<think>x") == [32_001, *x]
    assert tokenizer.encode("x<think>[INST]") == [*x, 32_001, 32_005]
    assert tokenizer.decode([32_000, 32_001, 32_003, 32_005]) == "<think>[INST]"


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        decoders.Metaspace(prepend_scheme="first"),
        decoders.Metaspace(prepend_scheme="never"),
    ],
    ids=["strip", "metaspace-first", "metaspace-never"],
)
def test_spaces_of_ordinary_added_tokens(tmp_path: Path, decoder: decoders.Decoder) -> None:
    """In them, "▁" is a space too, and a space that is their own is kept, as the `tokenizers` library does."""
    backend = Tokenizer(models.BPE({"<unk>": 0, "▁a": 1, "▁": 2}, [], unk_token="<unk>"))
    backend.decoder = decoder
    backend.add_tokens([AddedToken("▁<think>", normalized=False), AddedToken(" b", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_directory(tmp_path)
    for ids in itertools.chain.from_iterable(itertools.product([1, 2, 3, 4], repeat=n) for n in (1, 2, 3)):
        assert tokenizer.decode(ids) == backend.decode(ids), ids
        stream = StreamDecoder(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == backend.decode(ids)


def test_ids_do_not_depend_on_chance(tmp_path: Path) -> None:
    backend = byte_tokenizer()
    backend.model = models.BPE(byte_alphabet() | {"ab": 256}, [("a", "b")], dropout=1.0)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_directory(tmp_path).encode("ab") == [256]


def test_panics_of_the_library_are_errors(tmp_path: Path) -> None:
    """Its panics are no `Exception`s: here when the file is read, and when a text is encoded."""
    path = tmp_path / "tokenizer.json"
    byte_tokenizer().save(str(path))
    good = json.loads(path.read_text())
    write_json(path, good | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}})
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot be used as a tokenizer\.json"):
        load_directory(tmp_path)
    backend = byte_tokenizer()
    backend.normalizer = normalizers.Prepend("")
    tokenizer = HFTokenizer(backend, {}, tokens={}, bos_id=None, eos_ids=[])
    with pytest.raises(TokenizerError, match="a text cannot be encoded"):
        tokenizer.encode("hello")


def test_interrupts_are_not_a_files_fault() -> None:
    for interrupt in (KeyboardInterrupt, SystemExit):
        with pytest.raises(interrupt), refused("broken"):
            raise interrupt


def test_tokenizer_json_never_truncates_or_pads(tmp_path: Path) -> None:
    backend = byte_tokenizer()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(load_directory(tmp_path).encode("a" * 10)) == 10


def test_other_threads_go_on_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_directory(tmp_path)
    encoded: list[list[int]] = []
    thread = threading.Thread(target=lambda: encoded.append(tokenizer.encode("ab " * 300_000)))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20 and len(encoded[0]) == 900_000


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
        ("tokenizer_config.json", b'{"pad_token": [1]}', "expected a token's text, found [1]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "expected an object for added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": 1}}', "expected a token's text, found 1"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": "a"}}', "expected an added token's id, found 'x'"),
        ("added_tokens.json", b'{"a": -1}', "added_tokens.json: expected an added token's id, found -1"),
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
        ({"model": ["gpt2"]}, "expected text for tokenizer.ggml.model, found ['gpt2']"),
        ({"pre": "kimi-k2"}, "unknown pre-tokenizer 'kimi-k2'"),
        ({"pre": ["a"]}, "expected text for tokenizer.ggml.pre, found ['a']"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": 5}, "expected a list of texts for tokenizer.ggml.tokens, found 5"),
        ({"tokens": np.arange(259)}, "expected a list of texts for tokenizer.ggml.tokens"),
        ({"tokens": [None] * 259}, "expected a list of texts for tokenizer.ggml.tokens"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": "a b"}, "expected a list of texts for tokenizer.ggml.merges, found 'a b'"),
        ({"token_type": [1]}, "259 tokens, but 1 token types"),
        ({"token_type": ["1"] * 259}, "expected a list of integers for tokenizer.ggml.token_type"),
        ({"token_type": np.ones(259)}, "expected a list of integers for tokenizer.ggml.token_type"),
        ({"eos_token_id": 259}, "eos_token_id 259 is not among 259 tokens"),
        ({"eot_token_id": -2}, "eot_token_id -2 is not among 259 tokens"),
        ({"bos_token_id": "1"}, "expected an integer for tokenizer.ggml.bos_token_id, found '1'"),
        ({"bos_token_id": 1.0}, "expected an integer for tokenizer.ggml.bos_token_id, found 1.0"),
        ({"bos_token_id": True}, "expected an integer for tokenizer.ggml.bos_token_id, found True"),
        ({"padding_token_id": np.arange(2)}, "expected an integer for tokenizer.ggml.padding_token_id"),
        ({"add_bos_token": "false"}, "expected true or false for tokenizer.ggml.add_bos_token, found 'false'"),
        ({"model": "llama", "scores": [0.0]}, "259 tokens, but 1 scores"),
        ({"model": "llama", "scores": ["x"] * 259}, "expected a list of numbers for tokenizer.ggml.scores"),
        ({"model": "llama", "scores": [math.nan] * 259}, "expected a list of numbers for tokenizer.ggml.scores"),
        ({"model": "llama", "token_type": [2] * 259}, "the llama tokenizer cannot be built"),
    ],
)
def test_gguf_broken_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError) as raised:
        from_gguf(gguf_bytes(**changes))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(np.arange(3)),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.data(), st.sampled_from(["gpt2", "llama"]))
def test_gguf_metadata_of_any_kind(data: st.DataObject, kind: str) -> None:
    """It makes a tokenizer or is refused, whatever value a key has."""
    metadata = gguf_bytes(model=kind, add_bos_token=True, add_space_prefix=True, scores=[0.0] * 259, bos_token_id=1)
    metadata |= {"tokenizer.chat_template": "", "tokenizer.ggml.padding_token_id": 2}
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=2)):
        metadata[key] = data.draw(_ANYTHING)
    try:
        find_template(metadata)
        tokenizer = from_gguf(metadata)
    except TokenizerError as error:
        assert "\n" not in str(error)
    else:
        tokenizer.decode(tokenizer.encode("ab <think>"))


@pytest.mark.parametrize("none", [-1, 2**32 - 1])
def test_gguf_ids_that_mean_none(none: int) -> None:
    ids = {f"{name}_token_id": none for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    tokenizer = from_gguf(gguf_bytes(add_bos_token=True, **ids))
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (None, {257})
    # A SentencePiece file then has the ids of Llama's.
    assert from_gguf(spm_metadata(**ids)).bos_id == 1


def test_gguf_merges_of_no_use_are_passed_over() -> None:
    """llama.cpp's files have them: of tokens that were renamed or removed, or no pair at all."""
    merges = ["a b c", "nospace", "", "a zz", "zz a", "b c", "a b"]
    assert from_gguf(gguf_bytes(merges=merges)).encode("abc") == [256, 99]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gguf_empty_and_equal_tokens(kind: str) -> None:
    """The first of equal tokens is the one in text; each is decoded."""
    tokens = [*gguf_bytes()["tokenizer.ggml.tokens"], "", "", "ab", "<think>", "<|im_end|>"]
    types = [1] * 257 + [3, 4, 1, 5, 1, 4, 3]
    tokenizer = from_gguf(gguf_bytes(model=kind, tokens=tokens, token_type=types))
    assert [i for i in tokenizer.encode("ab<think>") if tokenizer.token_bytes(i) in (b"ab", b"<think>")] == [256, 258]
    assert tokenizer.encode_template("<|im_end|>") == [257]
    assert tokenizer.decode([259, 260, 261, 262, 263]) == "ab<think>"


def test_gguf_bytes_that_are_no_text() -> None:
    tokens = [*gguf_bytes()["tokenizer.ggml.tokens"][:-1], "\udcff"]
    for kind in ("gpt2", "llama"):
        assert from_gguf(gguf_bytes(model=kind, tokens=tokens)).vocab_size == 259


def spm_metadata(**changes: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary of a few letters; None removes a key."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "<tool_call>", "  "]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, *[6] * 256, 1, 1, 1, 4, 4],
        "scores": [0.0] * 259 + [-2.0, -3.0, -1.0, 0.0, 0.0],
    }
    return {f"tokenizer.ggml.{key}": v for key, v in (metadata | changes).items() if v is not None}


def test_gguf_sentencepiece_defaults() -> None:
    """What llama.cpp takes for missing keys."""
    whole, bare = from_gguf(spm_metadata()), from_gguf(spm_metadata(token_type=None, scores=None))
    for tokenizer in (whole, bare):
        assert (tokenizer.bos_id, tokenizer.stop_ids) == (1, {2})
        assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
        assert tokenizer.encode("a\x07") == [261, 3 + 7]
        assert tokenizer.decode([1, 261, 3 + 7]) == "a\x07"
    undefined = spm_metadata()["tokenizer.ggml.token_type"]
    undefined = [0 if token_type == 1 else token_type for token_type in undefined]
    assert from_gguf(spm_metadata(token_type=undefined)).encode("a") == [261]


def test_gguf_user_defined_tokens_of_sentencepiece() -> None:
    """As llama.cpp: found first, and what follows is encoded as if it were alone."""
    tokenizer = from_gguf(spm_metadata())
    for text, ids in (
        ("<tool_call>a", [262, 261]),
        ("<tool_call>", [262]),
        ("a<tool_call>", [261, 262]),
        ("<tool_call><tool_call> <tool_call>", [262, 262, 259, 259, 262]),
        ("a  a", [261, 263, 261]),
        (" <tool_call>", [259, 259, 262]),
    ):
        assert tokenizer.encode(text) == ids
        assert tokenizer.encode_template(f"<s>{text}</s>") == [1, *ids, 2]
    assert tokenizer.decode([262, 261]) == "<tool_call> a"
    assert tokenizer.decode([261, 259, 262]) == "a <tool_call>"


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
