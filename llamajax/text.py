"""Text that comes from outside: from bytes, and to a terminal. Knows no model and no tokenizer."""

import re

from llamajax.errors import RequestError

# What a terminal obeys: C0 and C1 controls, DEL, and the marks that change the direction of what follows.
_CONTROLS = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = {
    code: f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}" for code in _CONTROLS if chr(code) not in "\n\t"
}


def printable(text: str) -> str:
    """The text with each control character other than newline and tab as a visible escape, "\\x1b".

    A name in a file or a model's answer then cannot move a terminal's cursor or change its title. JSON stays
    JSON, with the same value: `json.dumps` has escaped those below 0x20 itself.
    """
    return text.translate(_VISIBLE)


def well_formed(text: str) -> str:
    """The text with each lone surrogate replaced by U+FFFD, so that it can be written as UTF-8."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def one_line(message: object, longest: int = 300) -> str:
    """A message from outside, such as a library's, fit to be part of one of ours."""
    return printable(" ".join(well_formed(str(message)).split()))[:longest]


def from_utf8(data: bytes, source: str) -> str:
    """The text, without a byte order mark.

    Raises RequestError, naming the source, for UTF-16, UTF-32 and other bytes that are not UTF-8 text.
    """
    expected = "expected UTF-8: convert it with iconv -t UTF-8"
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise RequestError(f"{source} is {encoding} text, {expected} -f {encoding}")
    if b"\0" in data:
        raise RequestError(f"{source} has NUL bytes, as UTF-16 text without a byte order mark has, {expected}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise RequestError(f"{source} is not UTF-8 text: byte {e.object[e.start]:#04x} at offset {e.start}") from None


# The longer first: UTF-32's begins with UTF-16's.
_OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
