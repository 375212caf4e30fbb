"""Words wrap at the terminal's width."""

import re

import pytest

from llamajax_cli.terminal import WordWrap


def screen(written: str) -> list[str]:
    """The lines that a terminal shows, where a word may be taken back."""
    lines = [""]
    for part in re.findall(r"\r\x1b\[\d+C\x1b\[K|\n|[^\r\n\x1b]+", written):
        if part.startswith("\r"):
            lines[-1] = lines[-1][: int(part[3:].split("C")[0])]
        elif part == "\n":
            lines.append("")
        else:
            lines[-1] += part
    return lines


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three four", ["one two ", "three four"]),
        ("one two th", ["one two th"]),
        ("one two thr\nx", ["one two ", "thr", "x"]),
        ("0123456789abc de", ["0123456789", "abc de"]),
        ("a 0123456789abc", ["a ", "0123456789", "abc"]),
        ("0123456789 next", ["0123456789", "next"]),
        ("0123456789\nnext", ["0123456789", "next"]),
        ("0123456789 \nnext", ["0123456789", "next"]),
        ("日本語の文章です", ["日本語の文", "章です"]),
        ("a🦙🦙🦙🦙🦙", ["a🦙🦙🦙🦙", "🦙"]),
        ("e\u0301" * 10, ["e\u0301" * 10]),
        ("```\na = 'one two three'\n```\none two three", ["```", "a = 'one two three'", "```", "one two ", "three"]),
        ("\x1b[2J red", ["\\x1b[2J red"[:8], "red"]),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_lines(monkeypatch: pytest.MonkeyPatch, text: str, lines: list[str], size: int) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    wrap = WordWrap()
    assert screen("".join(wrap.push(text[i : i + size]) for i in range(0, len(text), size))) == lines
