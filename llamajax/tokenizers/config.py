"""What a checkpoint directory says of its tokenizer beside the tokenizer's own file.

Knows tokenizer_config.json and the older special_tokens_map.json, added_tokens.json, chat_template.jinja and
chat_template.json. Does not know what a template or a literal means.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from llamajax.errors import TokenizerError
from llamajax.text import well_formed
from llamajax.tokenizers.base import looks_special

_OTHER_TOKENS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_ID = 2**31 - 1


class AddedToken(NamedTuple):
    """A token beyond a tokenizer's own file: its id, whether only a template may write it, and what it swallows."""

    id: int
    special: bool
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """None and empty where the files say nothing.

    Attributes:
      bos_token, eos_token: literals.
      add_bos: whether a raw completion gets a BOS.
      added_tokens: by literal, in the order of their ids.
      chat_template: a Jinja template.
      special_tokens: other literals that the template gets, by name: unk_token, pad_token and so on.
    """

    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool | None = None
    added_tokens: Mapping[str, AddedToken] = field(default_factory=dict)
    chat_template: str | None = None
    special_tokens: Mapping[str, str | list[str]] = field(default_factory=dict)


def read_config(directory: Path) -> TokenizerConfig:
    """Reads the files that are there.

    Raises:
      TokenizerError: a file is broken.
    """
    config = _read_json(directory / "tokenizer_config.json")
    literals = _read_json(directory / "special_tokens_map.json") | config
    add_bos = config.get("add_bos_token")
    bos_token, eos_token = (_literal(directory, literals.get(name)) for name in ("bos_token", "eos_token"))
    special_tokens = _special_tokens(directory, literals)
    return TokenizerConfig(
        bos_token=bos_token,
        eos_token=eos_token,
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        added_tokens=_added_tokens(directory, config, {bos_token, eos_token, *_flat(special_tokens)}),
        chat_template=_chat_template(directory, config),
        special_tokens=special_tokens,
    )


def _special_tokens(directory: Path, literals: Mapping[str, Any]) -> dict[str, str | list[str]]:
    """The names and literals that Hugging Face gives to a chat template, beside bos_token and eos_token."""
    extra = literals.get("extra_special_tokens")
    named = {name: literals.get(name) for name in _OTHER_TOKENS} | (extra if isinstance(extra, dict) else {})
    found: dict[str, str | list[str]] = {}
    for name, value in named.items():
        if literal := _literal(directory, value):
            found[name] = literal
    additional = literals.get("additional_special_tokens")
    if isinstance(additional, list):
        found["additional_special_tokens"] = [_literal(directory, value) or "" for value in additional]
    return found


def _flat(special_tokens: Mapping[str, str | list[str]]) -> Iterator[str]:
    for value in special_tokens.values():
        yield from [value] if isinstance(value, str) else value


def _added_tokens(directory: Path, config: Mapping[str, Any], special: Collection[str | None]) -> dict[str, AddedToken]:
    """Those of the older added_tokens.json, and of tokenizer_config.json, which says more of each."""
    path = directory / "added_tokens.json"
    older = {} if (directory / "tokenizer.json").is_file() else _read_json(path)  # tokenizer.json replaces it
    tokens = {
        literal: AddedToken(_id(path, i), literal in special or looks_special(literal)) for literal, i in older.items()
    }
    path = directory / "tokenizer_config.json"
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise TokenizerError(f"{path}: expected an object for added_tokens_decoder, found a {type(decoder).__name__}")
    for i, token in decoder.items():
        literal = _literal(directory, token)
        if literal is None:
            raise TokenizerError(f"{path}: expected a token's text for added_tokens_decoder's {i!r:.80}")
        flags = token if isinstance(token, dict) else {}
        tokens[literal] = AddedToken(
            _id(path, int(i) if re.fullmatch("[0-9]{1,10}", i) else i),
            flags.get("special") is True or looks_special(literal),
            lstrip=flags.get("lstrip") is True,
            rstrip=flags.get("rstrip") is True,
        )
    return dict(sorted(tokens.items(), key=lambda item: item[1].id))


def _id(path: Path, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_ID:
        raise TokenizerError(f"{path}: expected an added token's id, found {value!r:.80}")
    return value


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The template of the newest of the three places that Hugging Face has kept it in."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template") or _read_json(directory / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = (entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default")
        template = next(named, {}).get("template")
    return template if isinstance(template, str) else None


def _literal(directory: Path, value: Any) -> str | None:
    literal = value.get("content") if isinstance(value, dict) else value
    if not isinstance(literal, str | None):
        raise TokenizerError(f"{directory / 'tokenizer_config.json'}: expected a token's text, found {literal!r:.80}")
    return None if literal is None else well_formed(literal)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
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
