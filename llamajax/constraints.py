"""What an answer must fit -> which tokens may come next. Knows a tokenizer's bytes and llguidance; no model, no jax.

llguidance follows an answer's bytes with a lexer and an Earley parser, and finds the tokens that may come next in a
trie of the vocabulary: 10 to 50 us a token. It refuses what it cannot hold an answer to, with the reason.

A grammar is foreign code. llguidance counts its own work, but some short grammars take it minutes to compile. So each
is compiled in a process with limits first (grammar_worker.py), and only one that keeps them here.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import llguidance

from llamajax.errors import RequestError
from llamajax.json_schema import JSON_OPTIONS
from llamajax.sandbox import Sandbox
from llamajax.text import one_line, well_formed
from llamajax.tokenizers.base import Tokenizer
from llamajax.types import Grammar

MAX_SECONDS = 1.0
MAX_BYTES = 300 * 2**20  # of which the process takes 150 MB by itself
# llguidance's own limits. A lexer's state takes 1 to 2 kB; the answer makes them as it goes.
_LIMITS: dict[str, Any] = {"max_lexer_states": 50_000, "verbose_errors": False}

_REASON_LEN = 150  # characters of a reason's start, and of its end

_sandbox = Sandbox(Path(__file__).with_name("grammar_worker.py"), max_bytes=MAX_BYTES)


@dataclass(frozen=True, eq=False)
class CompiledGrammar:
    """A grammar for a model's tokens: a `Constraint`.

    Attributes:
      start: before the first token of an answer.
      kind: the option that the grammar was given as, for messages.
      vocab_size: the model's.
      end_ids: the tokens that end an answer.
      stop_ids: these, and more that were asked for.
      min_tokens: no token of `stop_ids` may come before so many tokens, if another may.
      ignores_end: no token of `end_ids` may come if another may.
    """

    start: llguidance.LLMatcher
    kind: str
    vocab_size: int
    end_ids: frozenset[int]
    stop_ids: frozenset[int]
    min_tokens: int
    ignores_end: bool

    def matcher(self) -> "GrammarMatcher":
        return GrammarMatcher(self)


class GrammarMatcher:
    """Follows one answer: a `Matcher`."""

    def __init__(self, grammar: CompiledGrammar) -> None:
        self.ended = False
        self._grammar = grammar
        self._state = grammar.start.deep_copy()
        self._num_tokens = 0

    def mask(self) -> bytes:
        grammar, mask = self._grammar, self._state.compute_bitmask()
        _check(self._state, grammar.kind)
        if self._num_tokens < grammar.min_tokens:
            return _without(grammar.stop_ids, mask)
        return _without(grammar.end_ids, mask) if grammar.ignores_end else mask

    def advance(self, token_id: int) -> None:
        self._num_tokens += 1
        self._state.consume_token(token_id)
        _check(self._state, self._grammar.kind)
        self.ended = self._state.is_stopped()


class GrammarCompiler:
    """Compiles grammars for a model's tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: frozenset[int]) -> None:
        """
        Args:
          vocab_size: the model's, which may have more scores than there are tokens.
          end_ids: the tokens that end an answer.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        # A request for several answers compiles its grammar once.
        self._compiled = lru_cache(maxsize=4)(self._compile)

    def compile(
        self, grammar: Grammar, stop_ids: frozenset[int], *, min_tokens: int, ignores_end: bool
    ) -> CompiledGrammar:
        """The constraint of an answer. Arguments as `CompiledGrammar`'s. Any thread may call it.

        Raises RequestError, with llguidance's reason, for a grammar that it cannot use, that takes too much time or
        memory, or that nothing fits.
        """
        start = self._compiled(grammar)
        return CompiledGrammar(start, grammar.kind, self._vocab_size, self._end_ids, stop_ids, min_tokens, ignores_end)

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        source = _source(grammar)
        _try(source, grammar.kind)
        limits = llguidance.LLParserLimits(**_LIMITS)
        start = llguidance.LLMatcher(self._llguidance_tokenizer, source, log_level=0, limits=limits)
        _check(start, grammar.kind)
        start.compute_bitmask()  # builds most of the lexer, which the matchers share
        _check(start, grammar.kind)
        return start

    @cached_property
    def _llguidance_tokenizer(self) -> llguidance.LLTokenizer:
        # One token more than the model has is the end of a model that has no token for it.
        end_ids = sorted(self._end_ids) or [self._vocab_size]
        wrapper = llguidance.TokenizerWrapper(_Tokens(self._tokenizer, self._vocab_size + 1, end_ids[0]))
        return llguidance.LLTokenizer(wrapper, eos_token=end_ids)


class _Tokens:
    """A tokenizer as llguidance asks for one. Special tokens have no bytes, so that no grammar allows them."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(size)]
        self.special_token_ids = sorted(tokenizer.special_tokens.values())

    def __call__(self, text: bytes) -> list[int]:
        """Ids of a text that follows another: after a newline, SentencePiece puts no space before it.

        Others would join a space to that newline.
        """
        before = "\n" if self._tokenizer.strips_leading_space else ""
        ids = self._tokenizer.encode(before + text.decode(errors="replace"))
        return ids[len(self._tokenizer.encode(before)) :]


def _source(grammar: Grammar) -> str:
    """As llguidance takes it. Raises RequestError."""
    text = well_formed(grammar.text)
    match grammar.kind:
        case "json_schema":
            try:
                return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
            except ValueError as error:  # nested too deeply
                raise _refused(grammar.kind, str(error)) from None
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(text)
        case "grammar" | "tools":
            return llguidance.LLMatcher.grammar_from_lark(text)


def _try(source: str, kind: str) -> None:
    """Raises RequestError for what cannot be compiled within the limits."""
    try:
        problem = _sandbox.ask(json.dumps({"source": source, "limits": _LIMITS}), MAX_SECONDS)
    except TimeoutError:
        raise RequestError(f"{kind} takes more than {MAX_SECONDS:g} s to compile: simplify it") from None
    except ChildProcessError:
        raise RequestError(f"{kind} takes more than {MAX_BYTES >> 20} MB to compile: simplify it") from None
    except OSError as error:
        raise RequestError(f"cannot start the process that compiles grammars: {error}") from None
    if problem:
        raise _refused(kind, problem)


def _without(ids: Collection[int], mask: bytes) -> bytes:
    """A mask without these tokens, if it allows others."""
    others = bytearray(mask)
    for i in ids:
        others[i // 8] &= ~(1 << i % 8)
    return bytes(others) if others.strip(b"\0") else mask


def _check(state: llguidance.LLMatcher, kind: str) -> None:
    if state.is_error():
        raise _refused(kind, state.get_error())


def _refused(kind: str, problem: str) -> RequestError:
    if problem.startswith("NoExtension"):
        return RequestError(f"no text fits this {kind}: change it")
    reason = one_line(problem.partition("<backtrace>")[0], len(problem))
    if len(reason) > 2 * _REASON_LEN:  # it repeats what is wrong, and may say why after it
        reason = f"{reason[:_REASON_LEN]} … {reason[-_REASON_LEN:]}"
    return RequestError(f"{kind} cannot be used: {reason}")
