"""Checks the type and range of what callers give (numbers, flags, names of options), and returns plain values.

JSON has one kind of number, so a float without a fraction is an integer here. Booleans are not numbers.
"""

from collections.abc import Collection, Iterable
from difflib import get_close_matches
from math import inf
from numbers import Real
from typing import Any

from llamajax.errors import RequestError
from llamajax.text import one_line


def number(name: str, value: Any, low: float, high: float, expected: str) -> float:
    """A real number from `low` to `high`. Raises RequestError, which says what is `expected`."""
    if not _is_number(value):
        raise RequestError(f"{name} must be a number, not {shown(value)}")
    if not low <= value <= high:
        raise RequestError(f"{name} must be {expected}, not {shown(value)}")
    return float(value)


def integer(name: str, value: Any, low: int, high: int | None = None, expected: str = "") -> int:
    """A whole number from `low` to `high`, as an int. Raises RequestError, which says what is `expected`."""
    if not is_whole(value) or not low <= value <= (inf if high is None else high):
        expected = expected or f"an integer {f'of at least {low}' if high is None else f'from {low} to {high}'}"
        raise RequestError(f"{name} must be {expected}, not {shown(value)}")
    return int(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a number without a fraction."""
    return _is_number(value) and value % 1 == 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def flag(name: str, value: object) -> bool:
    """A boolean. Raises RequestError for anything else: Python takes the string "false" for true."""
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, not {shown(value)}")
    return value


def known_options(names: Iterable[str], known: Collection[str]) -> None:
    """Raises RequestError, with the nearest known name, for a name that is not known."""
    for name in names:
        if name not in known:
            near = get_close_matches(name[:80], known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise RequestError(f"unknown option {name!r:.80}: {hint}")


def shown(value: object) -> str:
    """A value as an error's message shows it, in at most 80 characters."""
    try:
        return one_line(repr(value), 80)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return f"a {type(value).__name__} too long to print"
