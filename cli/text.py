"""Text that a command is given as bytes."""

from llamajax.errors import RequestError


def from_utf8(data: bytes, source: str) -> str:
    """The text; RequestError, naming the source, for bytes that are not UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise RequestError(f"{source} is not UTF-8 text: byte {data[e.start]:#04x} at offset {e.start}") from None
