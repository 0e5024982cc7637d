"""The bodies and addresses of requests, checked before anything reads them."""

import json
from typing import Any
from urllib.parse import unquote_to_bytes

from palm_rlhf.feedback.refusals import FeedbackError

FORM, JSON = "application/x-www-form-urlencoded", "application/json"
MOST_FIELDS = 200  # of a form, or of an address
MOST_VALUES, DEEPEST = 5000, 20  # of a value of JSON
LARGEST_NUMBER = 2**53  # above it numbers of JSON are not exact


def check_body(content_type: str, body: bytes) -> None:
    """Check that a body is a form or JSON whose texts a database can keep.

    Raises FeedbackError with status 415 for any other type, 413 for too many fields, and 400 for characters that are
    none. A part of a form that is a file is of no use here, so multipart/form-data is not taken.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == FORM:
        check_encoded(body, "the form")
    elif kind == JSON:
        _check_values(_parsed(body))
    elif body or kind:
        message = "got the content type {kind!a:.80}, expected {form} or {json}"
        raise FeedbackError(message, 415, kind=kind, form=FORM, json=JSON)


def check_encoded(text: bytes, name: str) -> None:
    """Check the fields of a form or of an address, in percent encoding."""
    if text.count(b"&") >= MOST_FIELDS:
        raise FeedbackError("{name} has more than {most} fields", 413, name=name, most=MOST_FIELDS)
    try:
        text.decode("ascii")
        check_text(unquote_to_bytes(text).decode("utf-8"), name)
    except UnicodeDecodeError as error:
        raise FeedbackError("{name} is not UTF-8 in percent encoding", name=name) from error


def check_text(text: str, name: str) -> None:
    """Check that a text has no NUL, which PostgreSQL cannot keep, and no half of a surrogate pair."""
    if "\0" in text:
        raise FeedbackError("{name} holds the character NUL, which is not text: take it out", name=name)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise FeedbackError("{name} holds half of a surrogate pair, which is not text: take it out", name=name)


def _parsed(body: bytes) -> Any:
    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is not JSON")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FeedbackError(f"the body is not JSON: {error!s:.200}") from error


def _check_values(value: Any) -> None:
    waiting, seen = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > DEEPEST or seen > MOST_VALUES:
            message = "the JSON has more than {most} values, or is deeper than {deepest}"
            raise FeedbackError(message, 413, most=MOST_VALUES, deepest=DEEPEST)
        if isinstance(value, str):
            check_text(value, "the JSON")
        elif isinstance(value, dict):
            waiting += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            waiting += [(part, depth + 1) for part in value]
        elif isinstance(value, (int, float)) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
            raise FeedbackError("the JSON has a number that cannot be kept")
