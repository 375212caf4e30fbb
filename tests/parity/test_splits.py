"""Splits of byte-level vocabularies: against llama.cpp's ids, and against the `regex` library."""

import numpy as np
import pytest
import regex
from tokenizers import Regex, pre_tokenizers

from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.splits import SPLITS

from .splits import PATH, lines, vocabulary

GOLDENS = np.load(PATH)
LLAMACPP = [key.removesuffix("/ids") for key in GOLDENS.files if key.endswith("/ids")]

# llama.cpp has no Lu, Ll and so on: of letters beyond ASCII, it does not know the case; and of patterns without classes
# of letters, it does not know spaces or digits beyond ASCII.
SAME_IN_ASCII = ("tekken", "gpt-4o", "deepseek-llm", "deepseek-coder", "superbpe")
# Here it takes any letter for the case that a pattern asks for.
WITHOUT_CASE = ("tiny_aya", "youtu")


@pytest.mark.parametrize("pre", [name for name in LLAMACPP if name not in WITHOUT_CASE])
def test_ids_are_llamacpps(pre: str) -> None:
    merges = GOLDENS["merges"].tolist()
    tokens = vocabulary(merges)
    tokenizer = from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * len(tokens),
            "tokenizer.ggml.merges": merges,
        }
    )
    theirs = np.split(GOLDENS[f"{pre}/ids"], np.cumsum(GOLDENS[f"{pre}/lengths"])[:-1])
    compared = [
        (line, ids.tolist())
        for line, ids in zip(lines(), theirs, strict=True)
        if line.isascii() or pre not in SAME_IN_ASCII
    ]
    assert len(compared) > 40
    assert [(line, tokenizer.encode(line)) for line, _ in compared] == compared


def test_each_split_has_goldens() -> None:
    assert {SPLITS[name] for name in LLAMACPP} == set(SPLITS.values())


@pytest.mark.parametrize("pre", LLAMACPP)
def test_pieces_are_those_of_another_library(pre: str, mixed_lines: list[str]) -> None:
    patterns = SPLITS[pre].patterns
    backend = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns])
    for line in lines() + mixed_lines[:1000]:
        # The libraries differ in which characters are letters or digits that are not a few years old.
        if "\u208f" not in line and (pre != "tiny_aya" or line.isascii()):
            assert [piece for piece, _ in backend.pre_tokenize_str(line)] == split(patterns, line)


def split(patterns: tuple[str, ...], text: str) -> list[str]:
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in _parts(pattern, piece) if part]
    return pieces


def _parts(pattern: str, text: str) -> list[str]:
    """The matches and what is between them."""
    parts, end = [], 0
    for match in regex.finditer(pattern, text):
        parts += [text[end : match.start()], match[0]]
        end = match.end()
    return [*parts, text[end:]]


@pytest.mark.parametrize(
    ("pre", "published"),
    [
        # mistral_common's tekken_240911.json, config.pattern
        (
            "tekken",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        # tiktoken's tiktoken_ext/openai_public.py, o200k_base
        (
            "gpt-4o",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
    ],
)
def test_published_patterns(pre: str, published: str) -> None:
    assert SPLITS[pre].patterns == (published,)
