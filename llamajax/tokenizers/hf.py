"""Tokenizers of the `tokenizers` library: a checkpoint's tokenizer.json, or one that gguf.py builds.

Knows two ways of writing bytes as tokens: GPT-2's byte-level alphabet (Llama 3, SmolLM2) and SentencePiece's
"▁" with "<0x0A>" for single bytes (TinyLlama). Does not know the other files of a checkpoint.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from llamajax.text import well_formed
from llamajax.tokenizers.base import BYTE, SPACE, Tokenizer, looks_special, refused, split_special, stop_ids
from llamajax.tokenizers.config import AddedToken, TokenizerConfig

_NO_CONFIG = TokenizerConfig()


class HFTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` that takes special tokens from templates only."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special: Mapping[int, tokenizers.AddedToken],
        *,
        tokens: Mapping[int, str],
        bos_id: int | None,
        eos_ids: Iterable[int | None],
    ) -> None:
        """
        Args:
          backend: finds no token of `special` in text.
          special: the special tokens by id.
          tokens: all tokens by id.

        Raises:
          ValueError: the backend writes bytes neither in the byte-level way nor in SentencePiece's.
        """
        self._first, self._after_special = backend, _without_first_prefix(backend)
        self.special_tokens = {token.content: i for i, token in special.items()}
        self._lstrip = [token.content for token in special.values() if token.lstrip]
        self._rstrip = [token.content for token in special.values() if token.rstrip]
        self._tokens = {**tokens, **dict.fromkeys(special, "")}
        self._added = backend.get_added_tokens_decoder().keys()
        self.vocab_size = 1 + max(tokens, default=-1)
        self.bos_id = bos_id
        self.stop_ids = stop_ids(self.special_tokens, *eos_ids)
        decoders = _decoders(backend)
        self._is_byte_level = any(step["type"] == "ByteLevel" for step in decoders)
        self.strips_leading_space = any(_strips_space(step) for step in decoders)
        self._strips_marks_only = any(step["type"] == "Metaspace" for step in decoders)
        if not self._is_byte_level and "▁" not in json.dumps(decoders, ensure_ascii=False):
            raise ValueError("its decoder is neither byte-level nor SentencePiece-like")

    def encode(self, text: str) -> list[int]:
        return _encode(self._first, text)

    def encode_template(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in split_special(text, self.special_tokens, self._lstrip, self._rstrip):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += _encode(self._after_special if ids else self._first, piece)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        token = self._tokens.get(token_id, "")  # "" for a hole in the numbering
        if not self._is_byte_level:
            byte = BYTE.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()
        if token_id in self._added:
            return token.encode()
        return b"".join(_BYTES_OF.get(letter, letter.encode()) for letter in token)

    def first_bytes(self, token_id: int) -> bytes:
        if self._strips_marks_only and self._tokens.get(token_id, "").startswith(" "):
            return self.token_bytes(token_id)
        return super().first_bytes(token_id)


def load_hf(path: Path, config: TokenizerConfig = _NO_CONFIG) -> HFTokenizer:
    """Reads a tokenizer.json. Its post-processor says whether a raw completion gets a BOS, unless `config` does.

    Raises:
      TokenizerError: the file is missing, broken or of a kind that we do not read.
    """
    with refused(f"{path}: cannot be used as a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_file(str(path))
        backend.no_padding()
        backend.no_truncation()
        if isinstance(backend.model, tokenizers.models.BPE):
            backend.model.dropout = None  # of training: a text would have other ids each time
        _add_missing(backend, config.added_tokens)
        special = _hide_special(backend)
        if config.add_bos is None:
            bos_id = _prefixed_id(backend)
        else:
            bos_id = backend.token_to_id(config.bos_token or "") if config.add_bos else None
        return HFTokenizer(
            backend,
            special,
            tokens={i: token for token, i in backend.get_vocab().items()},
            bos_id=bos_id,
            eos_ids=[backend.token_to_id(config.eos_token or "")],
        )


def byte_alphabet() -> dict[str, int]:
    """GPT-2's writing of bytes as printable characters: themselves where visible, else from U+0100 on.

    Source: OpenAI's gpt-2, encoder.py, `bytes_to_unicode`.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTES_OF = {letter: bytes([byte]) for letter, byte in byte_alphabet().items()}


def _encode(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    with refused("the tokenizer's file is broken: a text cannot be encoded"):
        # `encode` would keep Python's lock: other threads would wait for seconds while a long text is encoded.
        [encoding] = backend.encode_batch_fast([well_formed(text)], add_special_tokens=False)
        return encoding.ids


def _add_missing(backend: tokenizers.Tokenizer, tokens: Mapping[str, AddedToken]) -> None:
    """Adds tokens that tokenizer_config.json names and tokenizer.json lacks."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for literal, token in tokens.items():
        if literal in known:
            continue
        content = tokenizers.AddedToken(literal, lstrip=token.lstrip, rstrip=token.rstrip, normalized=False)
        (backend.add_special_tokens if token.special else backend.add_tokens)([content])
        found = backend.token_to_id(literal)
        if found != token.id:
            raise ValueError(f"it lacks {literal!r:.80}, whose id is {token.id}, and tokens before it: found {found}")


def _hide_special(backend: tokenizers.Tokenizer) -> dict[int, tokenizers.AddedToken]:
    """Makes the backend find no special token in text, nor what looks like one; returns them by id."""
    added = backend.get_added_tokens_decoder()
    special = {i: token for i, token in added.items() if token.special or looks_special(token.content)}
    for token in special.values():
        token.special = True
    backend.add_special_tokens(list(special.values()))
    backend.encode_special_tokens = True
    return special


def _without_first_prefix(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for text after a special token, where Metaspace's scheme "first" adds no "▁"."""
    first = '"prepend_scheme":"first"'
    if backend.pre_tokenizer is None or first.encode() not in backend.pre_tokenizer.__getstate__():
        return backend
    other = tokenizers.Tokenizer.from_str(backend.to_str().replace(first, '"prepend_scheme":"never"'))
    other.encode_special_tokens = True
    return other


def _prefixed_id(backend: tokenizers.Tokenizer) -> int | None:
    """The special token that the post-processor puts before a text, if it does."""
    encoding = backend.encode("a")
    return encoding.ids[0] if encoding.special_tokens_mask[:1] == [1] else None


def _decoders(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    state = json.loads(backend.decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _strips_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return step["prepend_scheme"] != "never"
    return step["type"] == "Strip" and step["content"] == " " and step["start"] > 0
