"""The JSON objects in a stream of bytes, one at a time: in lines, or in one array."""

import codecs
from collections.abc import Iterator
from typing import Any

from palm_rlhf.data.files.json_array import json_array
from palm_rlhf.data.files.json_lines import json_lines
from palm_rlhf.data.files.json_record import CHUNK, GZIP_ERRORS, BrokenRecord, Record, damaged_gzip
from palm_rlhf.model.files import HOW_TO_CONVERT, is_utf16


def json_objects(stream: Any, limit: int) -> Iterator[tuple[int, Record | BrokenRecord]]:
    """Yield each object of at most `limit` bytes, or why it is broken, with the line on which it starts."""
    try:
        start = stream.peek(CHUNK)
    except GZIP_ERRORS as error:  # here, since a stream that failed looks empty afterwards
        yield 1, damaged_gzip(error)
        return
    if is_utf16(start[:4]):
        yield 1, BrokenRecord("no UTF-8", HOW_TO_CONVERT)
        return
    is_array = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    yield from (json_array if is_array else json_lines)(stream, limit)
