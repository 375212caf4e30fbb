"""Values of a known kind, out of a mapping that somebody else wrote: parsed JSON or GGUF metadata."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llamajax.errors import ConfigError


def integer(mapping: Mapping[str, Any], key: str, *, default: int | None = None) -> int:
    """An integer of less than 32 bits. Raises ConfigError for anything else."""
    value = mapping.get(key, default)
    # Booleans are integers to Python.
    integral = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integral or abs(value) >= 2**31:
        raise _error("an integer", key, value)
    return int(value)


def number(mapping: Mapping[str, Any], key: str, *, default: float | None = None) -> float:
    """A finite number. Raises ConfigError for anything else."""
    value = mapping.get(key, default)
    # Compared before it is converted: an integer may be too large for a float.
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not abs(value) < 2**63:
        raise _error("a number", key, value)
    return float(value)


def flag(mapping: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """true or false. Raises ConfigError for anything else: the string "false" would be true to Python."""
    value = mapping.get(key, default)
    if not isinstance(value, bool):
        raise _error("true or false", key, value)
    return value


def _error(expected: str, key: str, found: object) -> ConfigError:
    return ConfigError(f"the model's configuration needs {expected} for {key!r}, found {found!r:.80}")
