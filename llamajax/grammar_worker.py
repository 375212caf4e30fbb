"""Tries grammars in a process of its own. Imports nothing of llamajax: constraints.py says what a request is."""

from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper


class _Bytes:
    """A vocabulary of bytes: most of the work on a grammar is the same for any."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [*(bytes([i]) for i in range(256)), b""]  # noqa: RUF012 - declared so in llguidance

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


_TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))


def answer(source: str, limits: dict[str, Any]) -> str:
    """Why a grammar cannot be compiled; "" if it can."""
    state = LLMatcher(_TOKENIZER, source, log_level=0, limits=LLParserLimits(**limits))
    state.compute_bitmask()
    return state.get_error()
