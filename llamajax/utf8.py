"""Text from bytes that a user gives: UTF-8, with or without a byte order mark."""

from llamajax.errors import RequestError


def from_utf8(data: bytes, source: str) -> str:
    """The text, without a byte order mark.

    Raises RequestError, naming the source, for UTF-16, UTF-32, gzip and other bytes that are not UTF-8 text.
    """
    if data.startswith(b"\x1f\x8b"):
        raise RequestError(f"{source} is compressed by gzip: unpack it first")
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
