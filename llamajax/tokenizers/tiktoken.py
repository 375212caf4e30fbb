"""Llama 3's own tokenizer file: byte pairs with their ranks, in tiktoken's format.

Knows the table of special tokens, which the file lacks. Source: Meta's llama-models, models/llama3/tokenizer.py.
"""

import re
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import tiktoken

from llamajax.errors import TokenizerError
from llamajax.text import well_formed
from llamajax.tokenizers.base import Tokenizer, refused, stop_ids
from llamajax.tokenizers.config import TokenizerConfig
from llamajax.tokenizers.splits import LLAMA3

_NUM_RANKS = 128_000
_NUM_SPECIAL = 256
_NAMED_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)

# tiktoken's Rust core overflows on longer texts and is quadratic in the length of one unsplittable run
# (openai/tiktoken#195). Meta cuts in the same places, which the ids depend on.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000

_NO_CONFIG = TokenizerConfig()


class TiktokenTokenizer(Tokenizer):
    """Llama 3's vocabulary of 128,000 byte pairs and 256 special tokens."""

    strips_leading_space = False

    def __init__(self, ranks: dict[bytes, int], *, add_bos: bool = True) -> None:
        reserved = (f"<|reserved_special_token_{i}|>" for i in range(2, _NUM_SPECIAL - len(_NAMED_SPECIAL) + 2))
        self.special_tokens = {literal: _NUM_RANKS + i for i, literal in enumerate((*_NAMED_SPECIAL, *reserved))}
        self.vocab_size = _NUM_RANKS + _NUM_SPECIAL
        self.bos_id = self.special_tokens["<|begin_of_text|>"] if add_bos else None
        self.stop_ids = stop_ids(self.special_tokens)
        self._bytes = sorted(ranks, key=ranks.__getitem__)
        self._encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        return [i for chunk in _chunks(well_formed(text)) for i in self._encoding.encode_ordinary(chunk)]

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id] if 0 <= token_id < _NUM_RANKS else b""


def load_tiktoken(path: Path, config: TokenizerConfig = _NO_CONFIG) -> TiktokenTokenizer:
    """Reads a tokenizer.model of lines "base64-of-bytes rank".

    Raises:
      TokenizerError: the file is not that, or not Llama 3's.
    """
    with refused(f"{path}: cannot be read as a tiktoken file"):
        pairs = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {b64decode(token, validate=True): int(rank) for token, rank in pairs}
    dense = set(ranks.values()) == set(range(_NUM_RANKS))
    if not dense or len(ranks) != _NUM_RANKS or any(bytes([b]) not in ranks for b in range(256)):
        raise TokenizerError(
            f"{path}: expected Llama 3's {_NUM_RANKS} ranks, found {len(ranks)}: download the file again"
        )
    with refused(f"{path}: cannot be used as a tiktoken file"):
        return TiktokenTokenizer(ranks, add_bos=config.add_bos is not False)


def _chunks(text: str) -> Iterator[str]:
    """Cuts at every 400,000 characters, and after 25,000 within a run of spaces or of other characters."""
    for start in range(0, len(text), _MAX_CHARS):
        section = text[start : start + _MAX_CHARS]
        begin = 0
        for run in re.finditer(r"\s+|\S+", section):
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield section[begin:cut]
                begin = cut
        yield section[begin:]
