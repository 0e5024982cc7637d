"""Text files: UTF-8 with or without a byte order mark; the errors for other encodings name them."""

import codecs
from pathlib import Path

from beartype import beartype

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32 in little-endian order starts with the first as well
HOW_TO_CONVERT = "it looks like UTF-16 or UTF-32; convert it to UTF-8, as by iconv -f UTF-16 -t UTF-8"


@beartype
def is_utf16(start: bytes) -> bool:
    """Return whether a text starts like UTF-16 or UTF-32: with their byte order mark, or with a zero byte."""
    return start.startswith(UTF16) or b"\0" in start[:4]


@beartype
def read_text(path: Path) -> str:
    """Return the text of a file without its byte order mark; line ends stay. Raises ValueError if it is not UTF-8."""
    content = path.read_bytes()
    if is_utf16(content[:4]):
        raise ValueError(f"{path} is not UTF-8: {HOW_TO_CONVERT}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it first") from error
