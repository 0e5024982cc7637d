"""Web pages of a chat that people saved: from ShareGPT, with the conversation as JSON, or from the chat itself."""

import json
import os
import re
import sys
from typing import Any

from beartype import beartype

from palm_rlhf.data.extra_packages import missing_extra
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import STANDARD
from palm_rlhf.data.formats.conversation_records import parse_conversation

PAGE_DATA = re.compile(r'<script\b[^>]*\bid="__NEXT_DATA__"[^>]*>(.*?)</script>', re.DOTALL)
SPEAKER = "data-message-author-role"


@beartype
def is_page(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is a web page, by its first character; `-` is standard input, which stays unread."""
    if os.fspath(path) == STANDARD:
        stream: Any = sys.stdin.buffer
        return _starts_page(stream.peek(1024))
    with open(path, "rb") as file:
        return _starts_page(file.read(1024))


def _starts_page(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


@beartype
def read_page(path: str | os.PathLike[str], limit: int) -> str:
    """Return the HTML of a page; ValueError if it has more than `limit` bytes or is not UTF-8."""
    if os.fspath(path) == STANDARD:
        data = sys.stdin.buffer.read(limit + 1)
    else:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"got a web page of more than {limit:,} bytes, expected one conversation: save it alone")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"got a web page whose byte {error.start + 1:,} is not UTF-8, expected UTF-8: convert it"
        ) from error


@beartype
def parse_page(html: str) -> Record:
    """Return the conversation of a saved page; its replies are still HTML.

    A page of ShareGPT holds its data as JSON. A page of a chat marks messages by the attribute
    `data-message-author-role`. Raises ValueError if the page has no conversation.
    """
    if found := PAGE_DATA.search(html):
        try:
            conversation = parse_conversation(json.loads(found[1])["props"]["pageProps"]["content"])
            json.dumps(conversation, ensure_ascii=False).encode()  # half of a surrogate pair is not text
            return conversation
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(
                f"the data of the page (__NEXT_DATA__) holds no conversation ({error}): save the page again"
            ) from error
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise missing_extra("A web page", error) from error
    turns = BeautifulSoup(html, "html.parser").select(f"[{SPEAKER}]") if SPEAKER in html else []
    if not turns:
        raise ValueError(
            "got a web page without a conversation, expected one saved from ShareGPT (with __NEXT_DATA__) or from a "
            f"chat (with {SPEAKER})"
        )
    conversation = parse_conversation(
        {"messages": [{"role": turn[SPEAKER], "content": _content(turn)} for turn in turns]}
    )
    if model := next(filter(None, (turn.get("data-message-model-slug") for turn in turns)), None):
        conversation["model"] = model
    return conversation


def _content(turn: Any) -> str:
    if turn[SPEAKER] != "assistant":
        return turn.get_text().strip()
    return str(turn.select_one(".markdown") or turn)
