"""Messages of errors."""

import pytest

from llamajax import CheckpointError, LlamaJaxError


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("a tensor \x1b[31m is missing", "a tensor \\x1b[31m is missing"),
        ("array([1,\n       2])\r\n", "array([1, 2]) "),
        ("my  model\t🦙: caf\u00e9", "my  model\t🦙: caf\u00e9"),
        ("\ud800\udcff\u202e", "\ufffd\ufffd\\u202e"),
        ("", ""),
    ],
)
def test_a_message_is_one_printable_line(message: str, shown: str) -> None:
    assert str(CheckpointError(message)) == shown


def test_a_message_has_an_end() -> None:
    assert len(str(LlamaJaxError("x" * 10**6))) == 4000
