"""How a conversation's answers are drawn, as `/set` shows and changes it."""

import shlex
from dataclasses import dataclass, fields, replace
from typing import Any

from llamajax.errors import RequestError
from llamajax.types import SamplingParams

_SAMPLING = tuple(field.name for field in fields(SamplingParams) if field.name not in ("logprobs", "logit_bias"))
NAMES = (*_SAMPLING, "n", "stop")


@dataclass(frozen=True)
class Settings:
    """What each answer is asked for."""

    sampling: SamplingParams
    max_new_tokens: int
    stop: list[str]

    def show(self, name: str) -> str:
        """One setting, as `changed` takes it."""
        if name == "n":
            return f"n {self.max_new_tokens}"
        if name == "stop":
            return f"stop {shlex.join(self.stop) or 'off'}"
        return f"{name} {getattr(self.sampling, name)}"

    def changed(self, name: str, value: str) -> "Settings":
        """Another value for one of `NAMES`. Raises RequestError for one out of range."""
        if name == "stop":
            return replace(self, stop=[] if value == "off" else _texts(value))
        if name == "n":
            number = _number(name, value, int)
            if number < 1:
                raise RequestError(f"n must be an integer of at least 1, not {value}")
            return replace(self, max_new_tokens=number)
        kind = type(getattr(SamplingParams(), name))
        return replace(self, sampling=replace(self.sampling, **{name: _number(name, value, kind)}))


def name_of(text: str) -> str:
    """The setting that a user means: --top-p is top_p. Raises RequestError if there is none."""
    name = text.lstrip("-").replace("-", "_").lower()
    name = "n" if name in ("max_new_tokens", "max_tokens") else name
    if name not in NAMES:
        raise RequestError(f"no such setting: {text} (there are {', '.join(NAMES)})")
    return name


def _number(name: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise RequestError(f"{name} must be {'an integer' if kind is int else 'a number'}, not {value}") from None


def _texts(value: str) -> list[str]:
    try:
        texts = shlex.split(value)
    except ValueError:
        raise RequestError(f"stop must be texts, in quotes where they have spaces, not {value}") from None
    if not all(texts):
        raise RequestError("a stop text must not be empty: /set stop off stops at none")
    return texts
