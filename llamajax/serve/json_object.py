"""A JSON object from bytes, as strict as JSON is. Knows no request."""

import json
from collections import Counter
from typing import Any

from llamajax.errors import RequestError
from llamajax.utf8 import from_utf8


def read_object(data: bytes, name: str = "the line") -> dict[str, Any]:
    """The fields of an object in JSON.

    Args:
      data: UTF-8.
      name: what messages call it.

    Raises RequestError.
    """
    # `from_utf8` drops a byte order mark, which stands where files from Windows begin, wherever they were joined.
    text = from_utf8(data, name).rstrip("\r\n")
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
