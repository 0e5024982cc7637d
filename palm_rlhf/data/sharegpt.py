"""Conversations as ShareGPT exports them, in JSON or web pages, and in the form of the ecosystem."""

import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from beartype import beartype

from palm_rlhf.data.extras import missing
from palm_rlhf.data.records import MAX_RECORD_BYTES, STANDARD, Record, read_records

ROLES = {
    "system": ("system",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bard", "bing", "claude", "bot", "model"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
TURNS = ("conversations", "items", "messages")

PAGE_DATA = re.compile(r'<script\b[^>]*\bid="__NEXT_DATA__"[^>]*>(.*?)</script>', re.DOTALL)
SPEAKER = "data-message-author-role"

log = logging.getLogger(__name__)


@beartype
def is_sharegpt(record: Record) -> bool:
    """Whether a record has turns as ShareGPT names them, ``conversations`` (or ``items``)."""
    return any(isinstance(record.get(key), list) for key in ("conversations", "items"))


@beartype
def is_messages(record: Record) -> bool:
    """Whether a record has turns as the ecosystem names them, ``messages``."""
    return isinstance(record.get("messages"), list)


@beartype
def is_page(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a web page, by its first character; ``-`` is standard input, which nothing is taken from."""
    if os.fspath(path) == STANDARD:
        return _starts_page(sys.stdin.buffer.peek(1024))
    with open(path, "rb") as file:
        return _starts_page(file.read(1024))


def _starts_page(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<")


@beartype
def read_conversations(
    path: str | os.PathLike[str],
    *,
    skip_broken: bool = False,
    rejected: Counter[str] | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Record]:
    """The conversations of a file, ``{"messages": [...]}``, with the ``id`` and ``model`` that they name.

    The file holds records of ``parse_conversation``, or is one web page (``parse_page``). What is no conversation is
    counted in ``rejected`` by its reason; nothing is left out or mended otherwise. ``skip_broken`` and errors are
    those of ``read_records``; ``ValueError`` also if the file starts with something else. A page without a
    conversation is broken.
    """
    rejected = Counter() if rejected is None else rejected
    if is_page(path):
        try:
            page = parse_page(_read_page(path, max_record_bytes))
        except ValueError as error:
            if not skip_broken:
                raise ValueError(f"{path}: {error}") from error
            log.warning("%s left out: %s", path, error)
            rejected["page without a conversation"] += 1
        else:
            yield page
        return
    options = {"skip_broken": skip_broken, "rejected": rejected, "max_record_bytes": max_record_bytes}
    first = True
    for line, record in read_records(path, **options):
        if first and not (is_sharegpt(record) or is_messages(record)):
            raise ValueError(
                f"{path}, line {line}: got a record with the keys {sorted(record)[:8]}, expected a conversation: "
                '{"conversations": [{"from", "value"}]} or {"messages": [{"role", "content"}]}'
            )
        first = False
        try:
            yield parse_conversation(record)
        except ValueError as error:
            rejected[str(error)] += 1


@beartype
def parse_conversation(record: Record) -> Record:
    """A conversation in one form from that of ShareGPT or ours; ``ValueError`` says why it is none.

    A turn says who speaks (``from`` or ``role``: ``human``, ``user``, ``gpt``, ``assistant``, ``system``, ...) and
    what (``value`` or ``content``), and may have a ``weight``.
    """
    turns = next((record[key] for key in TURNS if isinstance(record.get(key), list)), None)
    if turns is None:
        raise ValueError("no conversation")
    conversation: Record = {"messages": [_message(turn) for turn in turns]}
    for key in ("id", "model"):
        if isinstance(record.get(key), (str, int)):
            conversation[key] = record[key]
    return conversation


def _message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise ValueError("malformed message")
    speaker, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = ROLE_OF.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError("unknown role")
    if not isinstance(text, str):
        raise ValueError("malformed message")
    if (weight := turn.get("weight")) is None:
        return {"role": role, "content": text}
    if type(weight) not in (int, float) or not 0 <= weight < float("inf"):
        raise ValueError("malformed message")
    return {"role": role, "content": text, "weight": weight}


def _read_page(path: str | os.PathLike[str], limit: int) -> str:
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
    """The conversation of a saved page; its replies are HTML still. ``ValueError`` if it has none.

    A page of ShareGPT holds its data as JSON. One of a chat itself marks its messages by the attribute
    ``data-message-author-role``.
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
