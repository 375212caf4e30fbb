"""Streamed text equals whole text, however it is cut."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamajax.tokenizers.base import Tokenizer
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.sentencepiece import load_sentencepiece
from llamajax.tokenizers.stream import StopStrings, StreamDecoder
from llamajax.tokenizers.tiktoken import load_tiktoken
from llamajax.weights.gguf import read_gguf


@pytest.fixture(scope="module")
def tokenizers(llama3_tokenizer_model: Path, smollm2_gguf: Path, spm_model: Path) -> list[Tokenizer]:
    return [
        load_tiktoken(llama3_tokenizer_model),
        from_gguf(read_gguf(smollm2_gguf).metadata),
        load_sentencepiece(spm_model),
    ]


def stream(tokenizer: Tokenizer, ids: Sequence[int], *, continues: bool = False) -> list[str]:
    decoder = StreamDecoder(tokenizer, continues=continues)
    return [*map(decoder.push, ids), decoder.flush()]


# Half of the ids among the first few hundred, where the single bytes and some special tokens are.
random_ids = st.lists(st.one_of(st.integers(0, 400), st.integers(0, 31_999)), max_size=40)


@given(ids=random_ids, which=st.integers(0, 2))
def test_random_ids(tokenizers: list[Tokenizer], ids: list[int], which: int) -> None:
    assert "".join(stream(tokenizers[which], ids)) == tokenizers[which].decode(ids)


@given(text=st.text(), which=st.integers(0, 2))
def test_texts(tokenizers: list[Tokenizer], text: str, which: int) -> None:
    tokenizer = tokenizers[which]
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):  # SmolLM2 lacks some bytes
        assert not any("\ufffd" in piece for piece in pieces)


def test_mixed_lines(tokenizers: list[Tokenizer], mixed_lines: list[str]) -> None:
    llama3 = tokenizers[0]
    for line in mixed_lines[:2000]:
        assert "".join(stream(llama3, llama3.encode(line))) == line


def test_special_tokens_between_the_bytes_of_a_character_change_nothing(tokenizers: list[Tokenizer]) -> None:
    llama3 = tokenizers[0]
    ids = [x for i in llama3.encode("a🦙b") for x in (i, 128_009)]
    assert "".join(stream(llama3, ids)) == llama3.decode(ids) == "a🦙b"


def test_no_half_characters(tokenizers: list[Tokenizer]) -> None:
    llama3 = tokenizers[0]
    ids = llama3.encode("🦙🔥")
    assert stream(llama3, ids) == ["", "", "🦙", "", "", "🔥", ""]
    assert stream(llama3, ids[:2]) == ["", "", "\ufffd"]
    assert stream(llama3, [*ids[:2], 64]) == ["", "", "\ufffda", ""]


def test_the_leading_space(tokenizers: list[Tokenizer]) -> None:
    spm = tokenizers[2]
    ids = spm.encode("Hello world")
    assert stream(spm, ids) == ["Hello", " world", ""]
    assert stream(spm, ids, continues=True) == [" Hello", " world", ""]
    assert stream(spm, [1, *ids]) == ["", "Hello", " world", ""]
    assert stream(spm, spm.encode(" two")) == ["", " two", ""]
    llama3 = tokenizers[0]
    assert "".join(stream(llama3, llama3.encode(" a"))) == " a"


# Stop strings


def cut(text: str, stops: Sequence[str]) -> str:
    """What should come out, the plain way."""
    starts = [text.find(stop) for stop in stops if stop in text]
    return text[: min(starts)] if starts else text


def split(text: str, seed: int) -> list[str]:
    rng = random.Random(seed)
    pieces = []
    while text:
        size = rng.randint(0, 3)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


few_letters = st.text(alphabet="ab🦙", max_size=12)
stop_strings = st.lists(st.text(alphabet="ab🦙", min_size=1, max_size=5), max_size=3)


@given(text=few_letters, stops=stop_strings, seed=st.integers(0, 2**32))
def test_stop_strings_cut_like_find(text: str, stops: list[str], seed: int) -> None:
    matcher = StopStrings(stops)
    emitted, given_so_far = "", ""
    for piece in split(text, seed):
        emitted += matcher.push(piece)
        given_so_far += piece
        held = given_so_far[len(emitted) :]
        if not matcher.matched:  # no more is held back than a stop string may need
            assert not held or any(stop.startswith(held) for stop in stops)
    emitted += matcher.flush()
    assert emitted == cut(text, stops)
    assert matcher.matched == any(stop in text for stop in stops)


@given(text=few_letters, stops=stop_strings, seed=st.integers(0, 2**32), exempt=st.integers(0, 8))
def test_a_stop_string_counts_only_if_it_ends_after_the_pieces_that_may_not_end(
    text: str, stops: list[str], seed: int, exempt: int
) -> None:
    matcher, pieces = StopStrings(stops), split(text, seed)
    found = "".join([matcher.push(piece, may_end=i >= exempt) for i, piece in enumerate(pieces)]) + matcher.flush()
    before = len("".join(pieces[:exempt]))
    starts = [
        start
        for stop in stops
        for start in range(len(text))
        if text.startswith(stop, start) and start + len(stop) > before
    ]
    assert found == text[: min(starts, default=len(text))]
    assert matcher.matched == bool(starts)


def test_stop_strings_by_hand() -> None:
    matcher = StopStrings(["\n\n", "User:"])
    assert matcher.push("Hello\n") == "Hello"
    assert matcher.push("Us") == "\n"
    assert matcher.push("ers") == "Users"
    assert matcher.push(" Use") == " "
    assert not matcher.matched
    assert matcher.push("r: no") == ""
    assert matcher.matched
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_what_is_held_back_comes_out_at_the_end() -> None:
    matcher = StopStrings(["stop"])
    assert matcher.push("a sto") == "a "
    assert matcher.flush() == "sto"
    assert not matcher.matched


def test_a_stop_that_began_first_is_waited_for() -> None:
    matcher = StopStrings(["abcd", "bc"])
    assert matcher.push("xabc") == "x"
    assert not matcher.matched
    assert matcher.flush() == "a"
    assert matcher.matched


def test_a_stop_that_begins_another_is_not_waited_for() -> None:
    matcher = StopStrings(["abc", "ab"])
    assert matcher.push("xab") == "x"
    assert matcher.matched


def test_no_stop_strings() -> None:
    matcher = StopStrings([])
    assert matcher.push("text") == "text"
    assert matcher.flush() == ""
