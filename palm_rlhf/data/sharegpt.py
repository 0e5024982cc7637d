"""Conversations as ShareGPT exports them, in JSON or web pages, and in the form of the ecosystem."""

import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from beartype import beartype

from palm_rlhf.data.chatgpt_export import is_chatgpt, parse_chatgpt
from palm_rlhf.data.extra_packages import missing
from palm_rlhf.data.fields import check_fields, unknown_field
from palm_rlhf.data.instructions import ANSWERS, is_instruction, is_prompt, parse_answer, without_place
from palm_rlhf.data.openings import FIELDS, parse_opening
from palm_rlhf.data.records import MAX_RECORD_BYTES, STANDARD, Record, read_records

NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
KEPT = ("id", "model", "condition")
TOOLS = ("tools", "functions")
KNOWN = {*FIELDS, *ANSWERS, *TOOLS, *KEPT}

PAGE_DATA = re.compile(r'<script\b[^>]*\bid="__NEXT_DATA__"[^>]*>(.*?)</script>', re.DOTALL)
SPEAKER = "data-message-author-role"

log = logging.getLogger(__name__)


@beartype
def is_sharegpt(record: Record) -> bool:
    """Whether a record has turns as ShareGPT names them, ``conversations`` (or ``items``)."""
    return any(isinstance(record.get(key), list) for key in ("conversations", "items"))


@beartype
def is_messages(record: Record) -> bool:
    """Whether a record has turns as the ecosystem names them, ``messages`` (or ``conversation``)."""
    return any(isinstance(record.get(key), list) for key in ("messages", "conversation"))


@beartype
def is_conversation(record: Record) -> bool:
    """Whether a record is a conversation in one of the forms of ``parse_conversation``."""
    return any(is_form(record) for is_form in (is_sharegpt, is_messages, is_chatgpt, is_instruction))


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
    mended: Counter[str] | None = None,
    ignored: Collection[str] = (),
    prompts: bool = False,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Record]:
    """The conversations of a file, ``{"messages": [...]}``, with the ``id`` and ``model`` that they name.

    The file holds records of ``parse_conversation``, or is one web page (``parse_page``). What is no conversation is
    counted in ``rejected`` by its reason; nothing is left out or mended otherwise but what ``check_fields`` allows.
    ``skip_broken`` and errors are those of ``read_records``; ``ValueError`` also if the file starts with something
    else. A page without a conversation is broken. ``prompts`` is that of ``parse_conversation``.
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
        if first and not (is_conversation(record) or (prompts and is_prompt(record))):
            raise ValueError(
                f"{path}, line {line}: got a record with the keys {sorted(record)[:8]}, expected a conversation: "
                '{"conversations": [{"from", "value"}]}, {"messages": [{"role", "content"}]}, {"instruction", '
                '"output"} or an export of ChatGPT'
            )
        first = False
        try:
            yield parse_conversation(record, ignored=ignored, prompts=prompts, mended=mended)
        except ValueError as error:
            rejected[str(error)] += 1


@beartype
def parse_conversation(
    record: Record, *, ignored: Collection[str] = (), prompts: bool = False, mended: Counter[str] | None = None
) -> Record:
    """A conversation ``{"messages": [...]}`` from any of the forms; ``ValueError`` says why it is none.

    Its messages, those of ``parse_turn``, are in ``conversations``, ``items``, ``messages`` or ``conversation``, with
    a system prompt in them or beside them; or it is a question with its answer (``parse_opening``, ``parse_answer``),
    or a conversation of ChatGPT's export (``parse_chatgpt``). ``id``, ``model``, OpenChat's ``condition`` and the
    ``tools`` of a conversation are kept; other fields are those of ``check_fields``. With ``prompts`` a question may
    lack its answer.
    """
    if is_chatgpt(record):
        return parse_chatgpt(record, mended=mended)
    if not (is_conversation(record) or (prompts and is_prompt(record))):
        raise ValueError("no conversation")
    options = {"ignored": ignored, "mended": mended}
    opening = parse_opening(record, **options)
    answer = parse_answer(record, opening, **options)
    has_turns = is_sharegpt(record) or is_messages(record)
    if not answer and not has_turns and not opening.turns:
        raise ValueError("no question")
    if not answer and not prompts and (opening.goes_on or not has_turns):
        raise ValueError(unknown_field(opening.goes_on) if opening.goes_on else "no answer")
    conversation: Record = {"messages": [*opening.turns, *answer]}
    known = KNOWN | {"title"} if has_turns else KNOWN  # of a question it could be a part
    check_fields(record, known, [turn["content"] for turn in conversation["messages"]], **options)
    for key in KEPT:
        if isinstance(record.get(key), (str, int)):
            conversation[key] = record[key]
    if tools := _tools(record):
        conversation["tools"] = tools
    return conversation


def _tools(record: Record) -> list[Any]:
    """The tools beside a conversation, described as OpenAI does; some files hold them as JSON in a text."""
    found = next((record[key] for key in TOOLS if record.get(key)), [])
    try:
        tools = json.loads(found) if isinstance(found, str) else found
    except (ValueError, RecursionError) as error:
        raise ValueError("malformed tools") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("malformed tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


@beartype
def to_sharegpt(conversations: Iterable[Record], *, rejected: Counter[str] | None = None) -> Iterator[Record]:
    """Conversations as ``{"conversations": [{"from", "value"}]}``, with the same ``id``, ``model`` and ``condition``.

    Calls of tools, for which there is no one form, are counted in ``rejected``, and so are weights.
    """
    rejected = Counter() if rejected is None else rejected
    for conversation in conversations:
        if reason := without_place(conversation):
            rejected[reason] += 1
            continue
        turns = [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in conversation["messages"]]
        yield {**{key: conversation[key] for key in KEPT if key in conversation}, "conversations": turns}


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
