"""A JSON object from bytes, as strict as JSON is. Knows no request."""

import json
import re
from collections import Counter
from typing import Any

from llamajax.errors import RequestError
from llamajax.utf8 import from_utf8

# Most objects, lists, names and fractions of a request, those in the arguments of its messages' calls included. To
# parse a million of them takes seconds.
MAX_PARTS = 250_000
# A string, or the rest of the text if its quote is never closed. It never backtracks: at most 50 ms a megabyte.
_TEXT = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
# Each object, list, name and fraction has one of these; true and false have one, too.
_MARKS = "{[:.eE"


def read_object(data: bytes, name: str = "the line", max_parts: int | None = None) -> dict[str, Any]:
    """The fields of an object in JSON.

    Args:
      data: UTF-8.
      name: what messages call it.
      max_parts: how many objects, lists, names and fractions it may have.

    Raises RequestError.
    """
    # `from_utf8` drops byte order marks: files from Windows begin with one, so joined files have them anywhere.
    text = from_utf8(data, name).rstrip("\r\n")
    if max_parts is not None and num_parts(text, max_parts) > max_parts:
        raise RequestError(f"{name} may have {max_parts:,} objects, lists, names and fractions: send less")
    try:
        found = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=without_repeats
        )
    except json.JSONDecodeError as e:
        raise RequestError(f"not JSON: {e.msg} (column {e.colno})") from None
    except (ValueError, RecursionError) as e:  # a number of too many digits; too deep
        raise RequestError(f"not JSON: {e}") from None
    if not isinstance(found, dict):
        raise RequestError(f'expected a JSON object such as {{"prompt": "Hi"}}, not {text:.80}')
    return found


def num_parts(text: str, enough: int) -> int:
    """How many objects, lists, names and fractions JSON has; a larger number only if it is at most `enough`."""
    most = sum(map(text.count, _MARKS))
    return most if most <= enough else sum(map(_TEXT.sub("", text).count, _MARKS))


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a name that is given twice: one of its values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r:.80} is given twice")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    if (value := float(digits)) in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits:.80} is too large")
    return value
