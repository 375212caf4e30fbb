"""What a tokenizer is to the rest of llamajax, and the rules all of them share.

Knows which literals are special, how a template's text is split at them and how bytes become text. Does not
know any file format, model or library.
"""

import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Protocol

from llamajax.errors import TokenizerError
from llamajax.text import one_line

# Put inside a literal, it keeps the literal from being read as a special token, and is itself dropped. A lone
# surrogate, because no well-formed text contains one.
BREAK = "\ud800"

# How SentencePiece writes a space, and a byte that is not a piece.
SPACE = "▁"
BYTE = re.compile("<0x([0-9A-F]{2})>")

_END_TOKENS = ("</s>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>")


class Tokenizer(Protocol):
    """Text to token ids and back.

    Subclasses give the attributes, `encode` and `token_bytes`; the rest follows from them.

    Attributes:
      vocab_size: ids are in [0, vocab_size).
      bos_id: the id a raw completion is prefixed with; None where the tokenizer asks for none. No method adds it.
      stop_ids: the special tokens that end a text, a message or a turn.
      special_tokens: literal -> id of the tokens that only a template may write. (What a publisher calls an
        added but ordinary token, "<think>" say, is not among them, unless it has a control token's form,
        "<|...|>": it is found in any text, and decoded.)
      strips_leading_space: the tokenizer writes the start of a text as if a space were before it
        (SentencePiece's dummy prefix), so one space at the start of decoded bytes is not part of the text.
        `token_bytes` keeps it, `first_bytes` and `decode` remove it; text that continues other text must keep it.
    """

    vocab_size: int
    bos_id: int | None
    stop_ids: frozenset[int]
    special_tokens: Mapping[str, int]
    strips_leading_space: bool

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text, without BOS. The literal of a special token is encoded as the plain text it is.

        Lone surrogates (Python's stand-ins for invalid UTF-8 in arguments and on stdin) become U+FFFD.
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for, maybe a part of a character; b"" for a special token.

        Also b"" for an id outside the vocabulary: embeddings may have more rows than there are tokens, and such a
        row may be drawn.
        """

    def first_bytes(self, token_id: int) -> bytes:
        """As `token_bytes`, of the first token of a text that has any: without the dummy prefix."""
        data = self.token_bytes(token_id)
        return data.removeprefix(b" ") if self.strips_leading_space else data

    def encode_template(self, text: str) -> list[int]:
        """Ids of a rendered template: literals of special tokens become their ids, the rest is as in `encode`.

        No BOS is added: a template writes its own. `BREAK` inside a literal keeps it plain text.
        """
        ids: list[int] = []
        for piece in split_special(text, self.special_tokens):
            ids += [piece] if isinstance(piece, int) else self.encode(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD, special tokens nothing."""
        ids = list(ids)
        tokens = list(map(self.token_bytes, ids))
        first = next((i for i, data in enumerate(tokens) if data), None)
        if first is not None:
            tokens[first] = self.first_bytes(ids[first])
        return b"".join(tokens).decode("utf-8", errors="replace")


@contextmanager
def refused(problem: str) -> Iterator[None]:
    """Whatever a library raises while it uses a file becomes a TokenizerError: `problem` and the library's words."""
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is not an Exception
        raise TokenizerError(f"{problem}: {one_line(error)}") from error


def looks_special(literal: str) -> bool:
    """Whether a literal has a control token's form, "<|...|>" or DeepSeek's "<｜...｜>".

    Publishers sometimes mark role markers as ordinary added tokens; llama.cpp's converter uses the same test.
    """
    return re.fullmatch(r"<\|.+\|>|<｜.+｜>", literal) is not None


def stop_ids(special_tokens: Mapping[str, int], *eos_ids: int | None) -> frozenset[int]:
    """The declared end-of-text ids and every special token known to end something."""
    known = (special_tokens.get(literal) for literal in _END_TOKENS)
    return frozenset(i for i in (*eos_ids, *known) if i is not None)


@lru_cache(maxsize=16)
def special_pattern(
    literals: tuple[str, ...], lstrip: frozenset[str] = frozenset(), rstrip: frozenset[str] = frozenset()
) -> re.Pattern[str]:
    """Matches any of the literals, the longest first, with the whitespace that it strips around it.

    A literal of one character cannot be distinguished from text and is never matched.
    """
    space = r"\s*"
    alternatives = [
        f"{space * (literal in lstrip)}{re.escape(literal)}{space * (literal in rstrip)}"
        for literal in sorted(literals, key=len, reverse=True)
        if len(literal) > 1
    ]
    return re.compile("|".join(alternatives) or r"(?!)")


def split_special(
    text: str,
    special_tokens: Mapping[str, int],
    lstrip: Collection[str] = (),
    rstrip: Collection[str] = (),
) -> Iterator[str | int]:
    """Yields the ids of special tokens and the ordinary text between them, freed of `BREAK`."""
    pattern = special_pattern(tuple(special_tokens), frozenset(lstrip), frozenset(rstrip))
    end = 0
    for match in pattern.finditer(text):
        if ordinary := text[end : match.start()].replace(BREAK, ""):
            yield ordinary
        yield special_tokens[match[0] if match[0] in special_tokens else match[0].strip()]
        end = match.end()
    if ordinary := text[end:].replace(BREAK, ""):
        yield ordinary
