"""Grammars to masks of tokens, with vocabularies of bytes and of SentencePiece; hostile grammars."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamajax import RequestError, load
from llamajax.constraints import CompiledGrammar, GrammarCompiler, GrammarMatcher
from llamajax.options import Options, read_grammar
from llamajax.tokenizers.base import Tokenizer
from llamajax.tokenizers.gguf import from_gguf
from llamajax.tokenizers.load import load_directory
from llamajax.types import Grammar, Matcher, mask_len
from llamajax.weights.gguf import read_gguf
from scripts.structured import REGEXES

END = 256


class Bytes(Tokenizer):
    """Token i is byte i; the last one ends a text."""

    vocab_size = 257
    bos_id = None
    stop_ids = frozenset({END})
    special_tokens: Mapping[str, int] = {"<end>": END}
    strips_leading_space = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < END else b""


BYTES = GrammarCompiler(Bytes(), 257, frozenset({END}))


def compiled(options: Options, **others: Any) -> CompiledGrammar:
    grammar = read_grammar(options)
    assert grammar
    stops: Any = {"stop_ids": frozenset({END}), "min_tokens": 0, "ignores_end": False, **others}
    return BYTES.compile(grammar, **stops)


def allowed(matcher: Matcher, vocab_size: int = 257) -> set[int]:
    mask = np.frombuffer(matcher.mask(), np.uint8)
    assert mask.size == 4 * mask_len(vocab_size)
    return set(np.flatnonzero(np.unpackbits(mask, bitorder="little")[:vocab_size]).tolist())


def fits(options: Options, text: str) -> bool:
    """Whether an answer may be this text, and end after it."""
    matcher = compiled(options).matcher()
    for byte in text.encode():
        if byte not in allowed(matcher):
            return False
        matcher.advance(byte)
    return END in allowed(matcher)


def drawn(matcher: Matcher, rng: np.random.Generator, longest: int = 300) -> bytes | None:
    """A text of tokens drawn among those allowed; None if it does not end."""
    text = b""
    for _ in range(longest):
        token = int(rng.choice(sorted(allowed(matcher))))
        if token == END:
            return text
        text += bytes([token])
        matcher.advance(token)
        if matcher.ended:
            return text
    return None


def test_a_schema_allows_what_is_valid() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 12}, "b": {"enum": ["x", None]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for text in ('{"a":12}', '{\n  "a": -3,\n  "b": null\n}', '{"a": 0, "b": "x"}'):
        assert fits({"json_schema": schema}, text)
        assert fits({"json_schema": json.dumps(schema)}, text)
    for text in ('{"a":13}', '{"b":"x"}', '{"a":1,"c":2}', '{"a":1', ' {"a":1}', '{"a":1}\n', '{"a":    1}'):
        assert not fits({"json_schema": schema}, text)


def test_a_pydantic_model_is_its_schema() -> None:
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int
        label: str | None = None

    assert fits({"json_schema": Point}, '{"x": 3, "label": null}')
    assert not fits({"json_schema": Point}, '{"label": null}')


def test_a_format_that_json_schema_does_not_define_says_nothing() -> None:
    from pydantic import BaseModel, SecretStr

    class File(BaseModel):
        path: Path
        key: SecretStr

    assert fits({"json_schema": File}, '{"path": "/a", "key": "b"}')
    assert fits({"json_schema": {"properties": {"format": {"format": "int32"}}}}, '{"format": 3}')
    assert fits({"json_schema": {"const": {"format": "path"}}}, '{"format":"path"}')
    assert not fits({"json_schema": {"type": "string", "format": "date"}}, '"today"')
    with pytest.raises(RequestError, match="Unknown format: iri"):
        compiled({"json_schema": {"type": "string", "format": "iri"}})


def test_a_reference_to_a_uri() -> None:
    form = {"type": ["string", "null"], "format": "uri-reference", "maxLength": 30}
    for text in ("http://a.b/c?d#e", "", "a/b:c", "/a%20b", "/", "#x", "?a/b", "//u:p@h:80/", "../a", None):
        assert fits({"json_schema": form}, json.dumps(text))
    for text in ("a b", "1:b", "//h:x/", "//a@b@c", "#a#b", "a%2", "/[", "a" * 31, 3):
        assert not fits({"json_schema": form}, json.dumps(text))
    assert not fits({"json_schema": form | {"allOf": [{"pattern": "^/"}]}}, '"a"')


def test_a_grammar_in_lark() -> None:
    arithmetic = """
        start: sum
        sum: product (("+" | "-") product)*
        product: atom (("*" | "/") atom)*
        atom: NUMBER | "(" sum ")"
        NUMBER: /[0-9]+/
    """
    assert fits({"grammar": arithmetic}, "(1+22)*3-4/5")
    assert not fits({"grammar": arithmetic}, "(1+22")
    assert not fits({"grammar": arithmetic}, "1++2")


@given(REGEXES, st.integers(0, 99))
def test_what_is_drawn_under_a_regex_matches_it(regex: str, seed: int) -> None:
    text = drawn(compiled({"regex": regex}).matcher(), np.random.default_rng(seed))
    assert text is None or re.fullmatch(regex, text.decode(), re.DOTALL)


def test_the_end_may_come_where_the_text_fits() -> None:
    matcher = compiled({"regex": "ab?"}).matcher()
    assert allowed(matcher) == {ord("a")}
    matcher.advance(ord("a"))
    assert (allowed(matcher), matcher.ended) == ({ord("b"), END}, False)
    matcher.advance(ord("b"))
    assert (allowed(matcher), matcher.ended) == ({END}, True)


def test_without_its_end_an_answer_goes_on_as_long_as_it_can() -> None:
    for others in ({"ignores_end": True}, {"min_tokens": 2}):
        matcher = compiled({"regex": "ab?"}, **others).matcher()
        matcher.advance(ord("a"))
        assert allowed(matcher) == {ord("b")}
        assert allowed(compiled({"regex": ""}, **others).matcher()) == {END}
    matcher = compiled({"regex": "[ab]*"}, stop_ids=frozenset({END, ord("b")}), min_tokens=1).matcher()
    assert allowed(matcher) == {ord("a")}
    matcher.advance(ord("a"))
    assert allowed(matcher) == {ord("a"), ord("b"), END}


def test_a_model_without_a_token_for_the_end() -> None:
    compiler = GrammarCompiler(Bytes(), 256, frozenset())
    matcher = compiler.compile(Grammar("regex", "ab?"), frozenset(), min_tokens=0, ignores_end=False).matcher()
    matcher.advance(ord("a"))
    assert (allowed(matcher, 256), matcher.ended) == ({ord("b")}, False)
    matcher.advance(ord("b"))
    assert matcher.ended


def test_answers_of_one_grammar_do_not_share_their_state() -> None:
    grammar = compiled({"regex": "ab"})
    one, other = grammar.matcher(), grammar.matcher()
    one.advance(ord("a"))
    assert (allowed(one), allowed(other)) == ({ord("b")}, {ord("a")})


def test_sentencepiece_writes_no_space_inside_of_a_text(spm_model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(spm_model.read_bytes())
    tokenizer = load_directory(tmp_path)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    schema = {"type": "object", "properties": {"international": {"const": "zoology"}}, "required": ["international"]}
    grammar = Grammar("json_schema", json.dumps(schema | {"additionalProperties": False}))
    matcher = compiler.compile(grammar, tokenizer.stop_ids, min_tokens=0, ignores_end=False).matcher()
    rng, text = np.random.default_rng(0), b""
    while not matcher.ended:
        token = int(rng.choice(sorted(allowed(matcher, tokenizer.vocab_size) - tokenizer.stop_ids)))
        text += tokenizer.token_bytes(token)
        matcher.advance(token)
    assert json.loads(text) == {"international": "zoology"}
    assert text.startswith(b"{")


def test_a_space_at_the_start_is_a_token_of_its_own(smollm2_gguf: Path) -> None:
    """Not one that a newline before it would swallow, as this tokenizer has it before a digit."""
    tokenizer = from_gguf(read_gguf(smollm2_gguf).metadata)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    grammar = Grammar("regex", " 1")
    matcher = compiler.compile(grammar, tokenizer.stop_ids, min_tokens=0, ignores_end=False).matcher()
    assert {tokenizer.token_bytes(i) for i in allowed(matcher, tokenizer.vocab_size)} == {b" "}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"json_schema": {"type": "objekt"}}, "json_schema cannot be used: .*objekt"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "cannot be used: Unimplemented keys: .*uniqueItems"),
        ({"json_schema": {"not": {}, "x-guidance": {"lenient": True}}}, 'Unimplemented keys: ."not"'),
        ({"json_schema": {"$ref": "#"}}, "no text fits this json_schema"),
        ({"json_schema": '{"items":' * 200 + "{}" + "}" * 200}, "json_schema cannot be used: recursion limit exceeded"),
        ({"json_schema": "{"}, "json_schema must be an object that JSON can express: Expecting property name"),
        ({"json_schema": [1]}, r"json_schema must be an object, its text or a pydantic model, not \[1\]"),
        ({"json_schema": {"const": float("nan")}}, "json_schema must be an object that JSON can express"),
        ({"regex": "(?=a)b"}, "regex cannot be used: .*invalid regex"),
        ({"regex": 3}, "regex must be a string, not 3"),
        ({"grammar": "start: <|im_start|>"}, "grammar cannot be used"),
        ({"grammar": "start"}, "grammar cannot be used"),
        ({"regex": "a", "grammar": 'start: "a"'}, "give only one of regex, grammar"),
    ],
)
def test_what_is_refused(options: Options, problem: str) -> None:
    with pytest.raises(RequestError, match=problem):
        compiled(options)


def hostile() -> dict[str, Options]:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    both = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"type": "object"}]} for i in range(3000)}
    return {
        "deep schema": {"json_schema": deep},
        "deep text": {"json_schema": '{"items":' * 10**5},
        "10 MB": {"json_schema": {"enum": [f"{i:050}" for i in range(180_000)]}},
        "many properties": {"json_schema": {"properties": {f"p{i}": {} for i in range(20_000)}}},
        "references": {"json_schema": {"$defs": both, "$ref": "#/$defs/d0"}},
        "parentheses": {"regex": "(" * 10**5 + ")" * 10**5},
        "intersections": {"grammar": "start: T\nT: " + " & ".join(f"/.*a.{{{i}}}b.*/" for i in range(1, 30))},
        "many rules": {"grammar": "start: " + "\n".join(f"r{i}\nr{i}: " for i in range(50_000)) + '"a"'},
        "doubling": {"grammar": 'start: R30\nR0: "a"\n' + "\n".join(f"R{i}: R{i - 1} R{i - 1}" for i in range(1, 31))},
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_grammars(name: str) -> None:
    with pytest.raises(RequestError) as refused:
        compiled(hostile()[name])
    assert len(str(refused.value)) < 500
    assert fits({"regex": "a"}, "a")


@pytest.mark.parametrize("last", ["", "del llm", "raise SystemExit"])
def test_a_program_ends_while_its_model_asks_for_masks(smollm2_gguf: Path, last: str) -> None:
    program = f"""
import llamajax
llm = llamajax.load({str(smollm2_gguf)!r})
streams = [llm.stream("List", max_new_tokens=200, regex="(?s:.*)") for _ in range(3)]
print([next(stream) != "" for stream in streams])
{last}
"""
    run = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "[True, True, True]\n", "")


def test_an_error_of_a_grammar_comes_after_the_tokens_before_it(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = load(smollm2_gguf)
    stream = llama.stream("List", max_new_tokens=40, regex="(?s:.*)", seed=1)
    expected = llama.generate("List", max_new_tokens=20, seed=1, regex="(?s:.*)").token_ids
    mask = GrammarMatcher.mask

    def failing(self: GrammarMatcher) -> bytes:
        if self._num_tokens == 20:
            raise RequestError("too complex")
        return mask(self)

    monkeypatch.setattr(GrammarMatcher, "mask", failing)
    with pytest.raises(RequestError, match="too complex"):
        for _ in stream:
            pass
    assert stream.completion.token_ids == expected
