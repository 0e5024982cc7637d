"""Web pages of a chat that people saved: of ShareGPT, with the data as JSON, or of the chat itself."""

import json
import os
import re
import sys
from typing import Any

from beartype import beartype

from palm_rlhf.data.extra_packages import missing
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import STANDARD
from palm_rlhf.data.formats.conversation_records import parse_conversation

PAGE_DATA = re.compile(r'<script\b[^>]*\bid="__NEXT_DATA__"[^>]*>(.*?)</script>', re.DOTALL)
SPEAKER = "data-message-author-role"


@beartype
def is_page(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a web page, by its first character; `-` is standard input, which nothing is taken from."""
    if os.fspath(path) == STANDARD:
        return _starts_page(sys.stdin.buffer.peek(1024))
    with open(path, "rb") as file:
        return _starts_page(file.read(1024))


def _starts_page(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


@beartype
def read_page(path: str | os.PathLike[str], limit: int) -> str:
    """The HTML of a page of at most `limit` bytes; `-` is standard input."""
    if os.fspath(path) == STANDARD:
        data = sys.stdin.buffer.read(limit + 1)
    else:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"got a web page of more than {limit:,} bytes, expected one conversation")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"got a web page that is no UTF-8 from byte {error.start + 1:,} on") from error


@beartype
def parse_page(html: str) -> Record:
    """The conversation of a saved page; its replies are HTML still. `ValueError` if it has none.

    A page of ShareGPT holds its data as JSON. One of a chat itself marks its messages by the attribute
    `data-message-author-role`.
    """
    if found := PAGE_DATA.search(html):
        try:
            conversation = parse_conversation(json.loads(found[1])["props"]["pageProps"]["content"])
            json.dumps(conversation, ensure_ascii=False).encode()  # half a surrogate pair is no text
            return conversation
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(f"the data of the page (__NEXT_DATA__) holds no conversation: {error}") from error
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise missing("A web page", error) from error
    turns = BeautifulSoup(html, "html.parser").select(f"[{SPEAKER}]") if SPEAKER in html else []
    if not turns:
        raise ValueError(
            "got a web page without a conversation, expected one saved from ShareGPT (with __NEXT_DATA__) or from a "
            f"chat (with {SPEAKER})"
        )
    conversation = parse_conversation({"messages": [{"role": turn[SPEAKER], "content": _said(turn)} for turn in turns]})
    if model := next(filter(None, (turn.get("data-message-model-slug") for turn in turns)), None):
        conversation["model"] = model
    return conversation


def _said(turn: Any) -> str:
    if turn[SPEAKER] != "assistant":
        return turn.get_text().strip()
    return str(turn.select_one(".markdown") or turn)
