"""Text from outside, fit for a terminal or for one line of a message. Knows no model and no tokenizer."""

import re

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
