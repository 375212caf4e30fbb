"""What a checkpoint directory says of its tokenizer beside the tokenizer's own file.

Knows tokenizer_config.json and the older special_tokens_map.json, added_tokens.json, chat_template.jinja and
chat_template.json. Does not know what a template or a literal means.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamajax.errors import TokenizerError


@dataclass(frozen=True)
class TokenizerConfig:
    """None and empty where the files say nothing.

    Attributes:
      bos_token, eos_token: literals.
      add_bos: whether a raw completion gets a BOS.
      added_tokens: literal -> id of tokens beyond a SentencePiece model's own.
      chat_template: a Jinja template.
    """

    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool | None = None
    added_tokens: Mapping[str, int] = field(default_factory=dict)
    chat_template: str | None = None


def read_config(directory: Path) -> TokenizerConfig:
    """Reads the files that are there.

    Raises:
      TokenizerError: a file is broken.
    """
    config = _read_json(directory / "tokenizer_config.json")
    literals = _read_json(directory / "special_tokens_map.json") | config
    add_bos = config.get("add_bos_token")
    return TokenizerConfig(
        bos_token=_literal(directory, literals.get("bos_token")),
        eos_token=_literal(directory, literals.get("eos_token")),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        added_tokens=_read_json(directory / "added_tokens.json"),
        chat_template=_chat_template(directory, config),
    )


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The template of the newest of the three places that Hugging Face has kept it in."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template") or _read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = [
            entry.get("template") for entry in template if isinstance(entry, dict) and entry.get("name") == "default"
        ]
        template = named[-1] if named else None
    return template if isinstance(template, str) else None


def _literal(directory: Path, value: Any) -> str | None:
    literal = value.get("content") if isinstance(value, dict) else value
    if not isinstance(literal, str | None):
        raise TokenizerError(f"{directory / 'tokenizer_config.json'}: expected a token's text, found {literal!r}")
    return literal


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read as text: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value
