"""Steps that choose conversations, and count the others by the reason."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from beartype import beartype

from palm_rlhf.data.curation.context_length import num_message_tokens, num_utf8_bytes
from palm_rlhf.data.extra_packages import missing_extra
from palm_rlhf.data.files.json_record import Record

# Beginnings of the error messages that stand in place of a reply, or at its end.
PROVIDER_ERRORS = (
    "an error occurred. either the engine you requested does not exist",
    "an error occurred. if this issue persists please contact us",
    "our servers are experiencing high load",
    "our systems are a bit busy at the moment",
    "our systems have detected unusual activity",
    "oops! our systems are a bit busy",
    "hmm...something seems to have gone wrong. maybe try me again",
    "something went wrong. if this issue persists please contact us",
    "something went wrong, please try reloading the conversation",
    "the message you submitted was too long",
    "the server had an error while processing your request",
    "the server is currently overloaded with other requests",
    "that model is currently overloaded with other requests",
    "there was an error generating a response",
    "this content may violate our content policy",
    "this conversation may violate our content policy",
    "too many requests in 1 hour. try again later",
    "only one message at a time. please allow any other responses",
    "you've reached the current usage cap for",
    "you have sent too many messages to the model",
)
# Error messages that are whole lines.
PROVIDER_ERROR_LINES = (
    "conversation not found",
    "error in body stream",
    "error in input stream",
    "error in message stream",
    "failed to fetch",
    "gateway time-out",
    "internal server error",
    "load failed",
    "network error",
    "network error.",
    "rate limit exceeded",
    "request timed out",
    "the operation was aborted.",
)
MARKS = " \t!*>_`#\"'"

FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
MODEL_PART = re.compile(r"[a-z]+|\d+(?:\.\d+)*[a-z]*")
# A language can be told from far less text than a long conversation has.
SAMPLE = 800  # characters


def _without(
    conversations: Iterable[Record], refusal: Callable[[Record], str | None], rejected: Counter[str] | None
) -> Iterator[Record]:
    """Yield the conversations for which `refusal` returns no reason; count the others."""
    rejected = Counter() if rejected is None else rejected
    for conversation in conversations:
        reason = refusal(conversation)
        if reason is None:
            yield conversation
        else:
            rejected[reason] += 1


@beartype
def keep_model(
    conversations: Iterable[Record], model: str, *, rejected: Counter[str] | None = None
) -> Iterator[Record]:
    """Yield the conversations of one model: `gpt-4` is also "Model: GPT-4" and "gpt-4-0314".

    It is neither "gpt-4o" nor "GPT-3.5": the words and numbers of the name must follow each other in the other name.
    """
    wanted = MODEL_PART.findall(model.lower())
    if not wanted:
        raise ValueError(f"got the model {model!r}, expected a name such as 'gpt-4': name a model")

    def refusal(conversation: Record) -> str | None:
        if not isinstance(conversation.get("model"), str):
            return "model unknown"
        parts = MODEL_PART.findall(conversation["model"].lower())
        starts = range(len(parts) - len(wanted) + 1)
        return None if any(parts[i : i + len(wanted)] == wanted for i in starts) else "another model"

    return _without(conversations, refusal, rejected)


@beartype
def drop_provider_errors(conversations: Iterable[Record], *, rejected: Counter[str] | None = None) -> Iterator[Record]:
    """Yield the conversations without a reply that is, or ends with, an error message of its provider."""

    def refusal(conversation: Record) -> str | None:
        replies = (message["content"] for message in conversation["messages"] if message["role"] == "assistant")
        return "provider error" if any(map(_is_provider_error, replies)) else None

    return _without(conversations, refusal, rejected)


def _is_provider_error(reply: str) -> bool:
    text = reply.strip()
    for line in (text[: text.find("\n")] if "\n" in text else text, text[text.rfind("\n") + 1 :]):
        line = line[:200].strip(MARKS).lower()
        if line.startswith(PROVIDER_ERRORS) or line in PROVIDER_ERROR_LINES:
            return True
    return False


@beartype
def drop_blocked_words(
    conversations: Iterable[Record], words: Sequence[str], *, rejected: Counter[str] | None = None
) -> Iterator[Record]:
    """Yield the conversations without any of the words, in any case, also inside other words."""
    if isinstance(words, str) or not all(word.strip() for word in words):
        raise ValueError(
            f"got the blocked words {words!r}, expected a sequence of words, none of them empty: mend the list"
        )
    blocked = [word.lower() for word in words]

    def refusal(conversation: Record) -> str | None:
        texts = (message["content"].lower() for message in conversation["messages"])
        return "blocked word" if any(word in text for text in texts for word in blocked) else None

    return _without(conversations, refusal, rejected)


@beartype
def drop_repeated_digits(
    conversations: Iterable[Record], repeats: int = 9, *, rejected: Counter[str] | None = None
) -> Iterator[Record]:
    """Yield the conversations without a digit `repeats` times in a row, which broken models write."""
    if repeats < 2:
        raise ValueError(f"got repeats={repeats}, expected at least 2: every digit occurs once in a row")
    repeated = re.compile(rf"([0-9])\1{{{repeats - 1}}}")

    def refusal(conversation: Record) -> str | None:
        found = any(repeated.search(message["content"]) for message in conversation["messages"])
        return "repeated digits" if found else None

    return _without(conversations, refusal, rejected)


@beartype
def drop_short(
    conversations: Iterable[Record],
    min_tokens: int,
    *,
    count_tokens: Callable[[str], int] = num_utf8_bytes,
    rejected: Counter[str] | None = None,
) -> Iterator[Record]:
    """Yield the conversations with at least `min_tokens` in all of their messages together.

    Args:
        conversations: The conversations.
        min_tokens: The fewest tokens.
        count_tokens: Counts the tokens of a text; by default its bytes.
        rejected: Counts the conversations that are left out.
    """

    def refusal(conversation: Record) -> str | None:
        num_tokens = num_message_tokens(conversation["messages"], count_tokens)
        return "too short" if num_tokens < min_tokens else None

    return _without(conversations, refusal, rejected)


@beartype
def keep_languages(
    conversations: Iterable[Record], languages: Sequence[str], *, rejected: Counter[str] | None = None
) -> Iterator[Record]:
    """Yield the conversations, or prompts, in one of the languages, by their codes in ISO 639-1: `en`, `de`, ...

    Code in fences does not count. Conversations whose language cannot be told are left out, too.
    """
    detector, codes = _detector()
    wanted = {language.lower() for language in languages}
    if isinstance(languages, str) or not wanted or not wanted <= codes:
        raise ValueError(f"got the languages {languages!r}, expected some of {' '.join(sorted(codes))}")

    def refusal(conversation: Record) -> str | None:
        messages = conversation["messages"] if "messages" in conversation else conversation["prompt"]
        language = detector.detect_language_of(_prose(messages))
        if language is None:
            return "language unknown"
        return None if language.iso_code_639_1.name.lower() in wanted else "another language"

    return _without(conversations, refusal, rejected)


def _prose(messages: list[dict[str, Any]]) -> str:
    """Return the start of each message, without code."""
    share = SAMPLE // max(1, min(len(messages), 8))
    texts = (FENCED.sub("", message["content"]) for message in messages[:8])
    return "\n".join(text[:share] for text in texts)


@cache
def _detector() -> tuple[Any, set[str]]:
    """Return a detector of all languages, and their codes."""
    try:
        from lingua import Language, LanguageDetectorBuilder
    except ImportError as error:
        raise missing_extra("Telling languages", error) from error
    codes = {language.iso_code_639_1.name.lower() for language in Language.all()}
    # Low accuracy suffices for texts of more than 120 characters; high accuracy takes almost 1 GB of memory.
    return LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build(), codes
