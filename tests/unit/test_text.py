"""Text from outside: its bytes, and what of it reaches a terminal."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamajax.errors import RequestError
from llamajax.text import one_line, printable
from llamajax.utf8 import from_utf8

GREETING = "Grüße, 世界 🦙\n\tund alle"


def obeyed(character: str) -> bool:
    """Whether a terminal takes a character as a command."""
    overrides = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in overrides


@given(st.text(st.characters(categories=["Cc", "Cf", "Ll", "Zs"])))
def test_what_is_printable_commands_no_terminal(text: str) -> None:
    assert not any(map(obeyed, printable(text).replace("\n", "").replace("\t", "")))
    assert one_line(text) == " ".join(one_line(text).split())


def test_each_control_character_is_shown_and_all_else_kept() -> None:
    assert printable(GREETING) == GREETING
    assert printable("\x1b]0;title\x07") == r"\x1b]0;title\x07"
    assert printable("a\rb\x7f\x9b\u202ec\u2066") == r"a\x0db\u007f\u009b\u202ec\u2066"


def test_json_stays_json() -> None:
    text = "".join(map(chr, [*range(0x100), *range(0x2000, 0x2070)]))
    shown = printable(json.dumps(text, ensure_ascii=False))
    assert json.loads(shown) == text
    assert not any(map(obeyed, shown))


def test_a_byte_order_mark_is_not_part_of_the_text() -> None:
    assert from_utf8(GREETING.encode("utf-8-sig"), "it") == from_utf8(GREETING.encode(), "it") == GREETING


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("order", ["LE", "BE"])
def test_other_encodings_are_named(encoding: str, order: str) -> None:
    data = ("\ufeff" + GREETING).encode(encoding + order)
    with pytest.raises(RequestError, match=f"^it is {encoding} text, expected UTF-8.* -f {encoding}$"):
        from_utf8(data, "it")
    with pytest.raises(RequestError, match=r"^it has NUL bytes, as UTF-16 text without a byte order mark has"):
        from_utf8(GREETING.encode(encoding + order), "it")


def test_the_first_byte_that_is_not_utf8_is_named() -> None:
    with pytest.raises(RequestError, match=r"^it is not UTF-8 text: byte 0xfc at offset 2$"):
        from_utf8(GREETING.encode("latin-1", "ignore"), "it")
    with pytest.raises(RequestError, match=r"^it is not UTF-8 text: byte 0xed at offset 0$"):
        from_utf8("\ud800".encode(errors="surrogatepass"), "it")
