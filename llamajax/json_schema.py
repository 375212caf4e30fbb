"""JSON schemas as llguidance takes them, which refuses what it does not know."""

import json
from typing import Any

from llamajax.errors import RequestError
from llamajax.text import one_line

# llguidance's options, which no schema may change. Between two tokens of JSON: nothing, a space, or an indented line.
# Without a limit, small models write spaces until the answer's length ends them.
JSON_OPTIONS: Any = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": r" |\n( {0,20}|\t{0,10})",
}

# JSON Schema 2020-12, Validation, 7.3.
_FORMATS = """
date-time date time duration email idn-email hostname idn-hostname ipv4 ipv6 uri uri-reference iri iri-reference uuid
uri-template json-pointer relative-json-pointer regex
"""

# RFC 3986, 4.2: a relative reference, whose host is a name or an IPv4 address.
_PLAIN = r"[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}"
_SEGMENTS = rf"(?:/(?:{_PLAIN}|[:@])*)*"
_AUTHORITY = rf"(?:(?:{_PLAIN}|:)*@)?(?:{_PLAIN})*(?::[0-9]*)?"
_PATH = rf"/(?:(?:{_PLAIN}|[:@])+{_SEGMENTS})?|(?:{_PLAIN}|@)+{_SEGMENTS}|"
_RELATIVE = rf"^(?://{_AUTHORITY}{_SEGMENTS}|{_PATH})(?:\?(?:{_PLAIN}|[:@/?])*)?(?:#(?:{_PLAIN}|[:@/?])*)?$"
_URI_REFERENCE = {"anyOf": [{"format": "uri"}, {"pattern": _RELATIVE}]}


def schema_text(schema: Any, name: str) -> str:
    """A schema as JSON, with formats that llguidance may know.

    Raises RequestError, in which the schema has this name, if JSON cannot express it.
    """
    try:
        return json.dumps(_with_known_formats(schema), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{name} must be an object that JSON can express: {one_line(error)}") from None


def _with_known_formats(schema: Any) -> Any:
    """A format that JSON Schema does not define says nothing, as it says: pydantic's "path", OpenAPI's "int32"."""
    if isinstance(schema, list):
        return [_with_known_formats(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    known = {
        name: value if name in ("const", "enum") else _with_known_formats(value)
        for name, value in schema.items()
        if name != "format" or not isinstance(value, str) or value in _FORMATS.split()
    }
    others = known.get("allOf", [])
    if known.get("format") == "uri-reference" and isinstance(others, list):
        del known["format"]
        known["allOf"] = [*others, _URI_REFERENCE]
    return known
