"""A GGUF file's metadata, read by kind, since a file may hold a value of any kind under any key.

Knows no key's meaning.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llamajax.errors import TokenizerError
from llamajax.text import one_line


class Metadata:
    """Values by key: None where a key is missing, TokenizerError, naming the key, for a value of another kind.

    Args:
      values: keys as in the file; arrays are lists or numpy arrays.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def text(self, key: str) -> str | None:
        value = self._values.get(key)
        return self._checked(key, "text", value, isinstance(value, str))

    def integer(self, key: str) -> int | None:
        value = self._values.get(key)
        return self._checked(key, "an integer", value, type(value) is int)

    def flag(self, key: str) -> bool | None:
        """Some converters write 1 and 0."""
        value = self._values.get(key)
        flag = self._checked(key, "true or false", value, isinstance(value, int) and value in (0, 1))
        return None if flag is None else bool(flag)

    def texts(self, key: str) -> list[str] | None:
        return self._items(key, "texts", {str})

    def integers(self, key: str) -> list[int] | None:
        return self._items(key, "integers", {int})

    def numbers(self, key: str) -> list[float] | None:
        """None of them NaN."""
        values = self._items(key, "numbers", {int, float})
        return self._checked(key, "a list of numbers", values, not any(map(math.isnan, values or [])))

    def _items(self, key: str, kind: str, types: set[type]) -> list[Any] | None:
        value = self._values.get(key)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        return self._checked(key, f"a list of {kind}", value, isinstance(value, list) and {*map(type, value)} <= types)

    def _checked(self, key: str, expected: str, value: Any, fits: bool) -> Any:
        if value is not None and not fits:
            raise TokenizerError(f"GGUF metadata: expected {expected} for {key}, found {one_line(repr(value), 80)}")
        return value
