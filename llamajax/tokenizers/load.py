"""Finds the tokenizer of a checkpoint directory, in Hugging Face's layout or Meta's.

Knows which files there may be and how to tell them apart. Does not know their formats.
"""

import re
from pathlib import Path

from llamajax.errors import TokenizerError
from llamajax.tokenizers.base import Tokenizer
from llamajax.tokenizers.config import TokenizerConfig, read_config


def load_directory(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: from tokenizer.json, else from tokenizer.model, there or in original/.

    Raises:
      TokenizerError: there is none, or its file is broken.
    """
    config = read_config(path)
    if (path / "tokenizer.json").is_file():
        from llamajax.tokenizers.hf import load_hf

        return load_hf(path / "tokenizer.json", config)
    for model in (path / "tokenizer.model", path / "original" / "tokenizer.model"):
        if model.is_file():
            return _load_model(model, config)
    raise TokenizerError(f"{path}: expected tokenizer.json or tokenizer.model there or in original/, found neither")


def _load_model(path: Path, config: TokenizerConfig) -> Tokenizer:
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from error
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", start):  # "IQ== 0"
        from llamajax.tokenizers.tiktoken import load_tiktoken

        return load_tiktoken(path, config)
    from llamajax.tokenizers.sentencepiece import load_sentencepiece

    return load_sentencepiece(path, config)
