"""Our tokenizers against Meta's, Hugging Face's and sentencepiece's own, on 10,000 lines of everything."""

import importlib
import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from llamajax.tokenizers.base import BREAK
from llamajax.tokenizers.base import Tokenizer as OurTokenizer
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.hf import byte_alphabet, load_hf
from llamajax.tokenizers.sentencepiece import load_sentencepiece
from llamajax.tokenizers.tiktoken import load_tiktoken
from llamajax.weights.gguf import read_gguf


def assert_same(ours: Iterable[Any], theirs: Iterable[Any], lines: Sequence[str]) -> None:
    wrong = [(line, a, b) for line, a, b in zip(lines, ours, theirs, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(lines)} differ, the first: {wrong[0]}"


def assert_round_trip(tokenizer: OurTokenizer, lines: Sequence[str]) -> None:
    assert_same((tokenizer.decode(tokenizer.encode(line)) for line in lines), lines, lines)


# Llama 3


@pytest.fixture(scope="module")
def meta(llama_models_package: Path, llama3_tokenizer_model: Path) -> Any:
    sys.path.insert(0, str(llama_models_package))
    try:
        module = importlib.import_module("llama_models.llama3.tokenizer")
    finally:
        sys.path.remove(str(llama_models_package))
    return module.Tokenizer(llama3_tokenizer_model)


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_model: Path) -> OurTokenizer:
    return load_tiktoken(llama3_tokenizer_model)


def test_llama3_is_metas(llama3: OurTokenizer, meta: Any, mixed_lines: list[str]) -> None:
    theirs = [meta.encode(line, bos=False, eos=False) for line in mixed_lines]
    assert_same(map(llama3.encode, mixed_lines), theirs, mixed_lines)
    assert_same(map(llama3.decode, theirs), map(meta.decode, theirs), mixed_lines)
    assert_round_trip(llama3, mixed_lines)
    assert llama3.special_tokens == meta.special_tokens
    assert llama3.stop_ids == set(meta.stop_tokens)
    assert llama3.bos_id == meta.bos_id
    assert llama3.vocab_size == meta.n_words


def test_llama3_template_text_is_metas(llama3: OurTokenizer, meta: Any, mixed_lines: list[str]) -> None:
    theirs = (meta.encode(line, bos=False, eos=False, allowed_special="all") for line in mixed_lines)
    assert_same(map(llama3.encode_template, mixed_lines), theirs, mixed_lines)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 60_000,
        " " * 60_000,
        "\n" * 25_001 + "x" * 25_000 + "\t" * 25_001,
        ("word " * 90_000 + "🦙" * 30_000) * 2,
        "x" * 24_999 + " " + "y" * 50_001,
        "",
    ],
    ids=["letters", "spaces", "runs", "sections", "short-and-long", "empty"],
)
def test_llama3_cuts_long_texts_where_meta_does(llama3: OurTokenizer, meta: Any, text: str) -> None:
    assert llama3.encode(text) == meta.encode(text, bos=False, eos=False)
    assert llama3.decode(llama3.encode(text)) == text


def test_llama3_out_of_a_gguf_is_metas(
    llama3_tokenizer_model: Path, llama3: OurTokenizer, meta: Any, mixed_lines: list[str]
) -> None:
    """The conversion that Hugging Face and llama.cpp ship: merges are all splits of a token into two tokens."""
    ranks = {bytes_: rank for rank, bytes_ in enumerate(map(llama3.token_bytes, range(128_000)))}
    letters = {byte: letter for letter, byte in byte_alphabet().items()}

    def written(data: bytes) -> str:
        return "".join(letters[byte] for byte in data)

    merges = [
        f"{written(token[:cut])} {written(token[cut:])}"
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    built = from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.tokens": [*map(written, ranks), *meta.special_tokens],
            "tokenizer.ggml.token_type": np.array([1] * 128_000 + [3] * 256, np.int32),
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 128_000,
            "tokenizer.ggml.eos_token_id": 128_009,
        }
    )
    theirs = (meta.encode(line, bos=False, eos=False) for line in mixed_lines)
    assert_same(map(built.encode, mixed_lines), theirs, mixed_lines)
    assert_same(map(built.encode_template, mixed_lines), map(llama3.encode_template, mixed_lines), mixed_lines)
    assert_round_trip(built, mixed_lines)
    assert (built.bos_id, built.stop_ids, built.vocab_size) == (128_000, llama3.stop_ids, 128_256)


# SmolLM2


@pytest.fixture(scope="module")
def smollm2_metadata(smollm2_gguf: Path) -> dict[str, Any]:
    return read_gguf(smollm2_gguf).metadata


@pytest.fixture(scope="module")
def hf_smollm2(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    """Put together as Hugging Face's tokenizer.json of SmolLM2 is."""
    tokens = smollm2_metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in smollm2_metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:17]])
    return tokenizer


def test_smollm2_out_of_its_gguf_is_hugging_faces(
    smollm2_metadata: dict[str, Any], hf_smollm2: Tokenizer, mixed_lines: list[str]
) -> None:
    ours = from_gguf(smollm2_metadata)
    templated = [encoding.ids for encoding in hf_smollm2.encode_batch(mixed_lines)]
    assert_same(map(ours.encode_template, mixed_lines), templated, mixed_lines)
    hf_smollm2.encode_special_tokens = True
    plain = [encoding.ids for encoding in hf_smollm2.encode_batch(mixed_lines)]
    hf_smollm2.encode_special_tokens = False
    assert_same(map(ours.encode, mixed_lines), plain, mixed_lines)
    assert_same(map(ours.decode, templated), hf_smollm2.decode_batch(templated), mixed_lines)
    # the vocabulary lacks a few control characters' bytes: these vanish in every implementation
    known = [line for line in mixed_lines if not set(line) & set("\x04\x06\x13\x14\x16\x1d")]
    assert len(known) > 9_000
    assert_round_trip(ours, known)


def test_smollm2_out_of_tokenizer_json_is_hugging_faces(
    tmp_path: Path, hf_smollm2: Tokenizer, mixed_lines: list[str]
) -> None:
    hf_smollm2.save(str(tmp_path / "tokenizer.json"))
    ours = load_hf(tmp_path / "tokenizer.json")
    templated = [encoding.ids for encoding in hf_smollm2.encode_batch(mixed_lines)]
    assert_same(map(ours.encode_template, mixed_lines), templated, mixed_lines)
    assert_same(map(ours.decode, templated), hf_smollm2.decode_batch(templated), mixed_lines)


# SentencePiece


@pytest.fixture(scope="module")
def spm(spm_model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(spm_model))


@pytest.fixture(scope="module")
def spm_pieces(spm_model: Path) -> list[Any]:
    proto = ModelProto()
    proto.ParseFromString(spm_model.read_bytes())
    return list(proto.pieces)


def spm_metadata(pieces: list[Any]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in pieces],
        "tokenizer.ggml.scores": np.array([piece.score for piece in pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([piece.type for piece in pieces], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize("source", ["model", "gguf"])
def test_sentencepiece_is_itself(
    source: str, spm_model: Path, spm: SentencePieceProcessor, spm_pieces: list[Any], mixed_lines: list[str]
) -> None:
    ours = load_sentencepiece(spm_model) if source == "model" else from_gguf(spm_metadata(spm_pieces))
    theirs = spm.encode(mixed_lines)
    assert_same(map(ours.encode, mixed_lines), theirs, mixed_lines)
    assert_same(map(ours.decode, theirs), spm.decode(theirs), mixed_lines)
    assert ours.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (ours.bos_id, ours.stop_ids, ours.vocab_size) == (1, {2}, 32_000)
    for i in range(3, 259):
        assert ours.token_bytes(i) == bytes([i - 3])


def tinyllama_json(pieces: list[Any], metaspace: bool) -> Tokenizer:
    """A SentencePiece model as Hugging Face converts it: by normalizer, as TinyLlama's, or by pre-tokenizer."""
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    merges = [
        (token[:cut], token[cut:])
        for token in (piece.piece for piece in sorted(pieces[259:], key=attrgetter("score"), reverse=True))
        for cut in sorted(range(1, len(token)), key=lambda cut: (ids.get(token[:cut], -1), ids.get(token[cut:], -1)))
        if token[:cut] in ids and token[cut:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("metaspace", [False, True], ids=["prepend", "metaspace-first"])
def test_sentencepiece_like_json_is_hugging_faces(
    tmp_path: Path, metaspace: bool, spm_pieces: list[Any], spm: SentencePieceProcessor, mixed_lines: list[str]
) -> None:
    theirs = tinyllama_json(spm_pieces, metaspace)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_hf(tmp_path / "tokenizer.json")
    templated = [e.ids for e in theirs.encode_batch(mixed_lines, add_special_tokens=False)]
    assert_same(map(ours.encode_template, mixed_lines), templated, mixed_lines)
    assert_same(map(ours.decode, templated), theirs.decode_batch(templated), mixed_lines)
    theirs.encode_special_tokens = True
    plain = [e.ids for e in theirs.encode_batch(mixed_lines, add_special_tokens=False)]
    assert_same(map(ours.encode, mixed_lines), plain, mixed_lines)
    if not metaspace:  # which adds no space before a space, unlike sentencepiece
        assert_same(plain, spm.encode(mixed_lines), mixed_lines)
    assert ours.encode_template(f"a</s>b<{BREAK}/s>").count(2) == 1
    assert ours.bos_id == 1
    for i in range(3, 259):
        assert ours.token_bytes(i) == bytes([i - 3])
