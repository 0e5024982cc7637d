"""Replies to one prompt in the forms that files have, in the order in which people ranked them."""

import math
from collections import Counter
from collections.abc import Collection
from typing import Any

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.messages import Turn, content_text, one_system, parse_turn
from palm_rlhf.data.formats.record_fields import check_fields
from palm_rlhf.data.formats.transcripts import parse_transcript
from palm_rlhf.data.preferences.ranked_pairs_voting import ranked_pairs

ORDERS = ("ranking", "rankings", "ranks", "scores")
REPLY_TEXTS = ("answer", "response", "completion", "text", "content", "output")
REPLY_SCORES = ("overall_score", "pm_score", "score", "rating")  # the highest is best; the lowest rank is best


def ordered_responses(record: Record, left_out: Counter[str]) -> list[str]:
    """Return the texts of `responses`, best first; ties are counted in `left_out`."""
    responses, orders = record["responses"], [key for key in ORDERS if record.get(key) is not None]
    if not isinstance(responses, list) or len(orders) > 1:
        raise ValueError("malformed preference")
    replies = [only_reply(reply_turns(entry, "assistant")) for entry in responses]
    if not orders:
        return replies
    order = record[orders[0]]
    if orders[0] in ("ranks", "scores"):
        places = _by_number(order, len(replies), best_last=orders[0] == "scores")
        left_out["tied replies"] += len(replies) - len(places)
        return [replies[place] for place in places]
    ballots = order if orders[0] == "rankings" else [order]
    if not isinstance(ballots, list):
        raise ValueError("malformed preference")
    return [replies[place] for place in ranked_pairs([_places(ballot, len(replies)) for ballot in ballots])]


def _places(ballot: Any, num_replies: int) -> list[int]:
    """Return the places of the responses in their list; they may be counted from 1 if all are named."""
    if not isinstance(ballot, list) or not all(type(place) is int for place in ballot):
        raise ValueError("malformed preference")
    if sorted(ballot) == list(range(1, num_replies + 1)):
        ballot = [place - 1 for place in ballot]
    if len(set(ballot)) < len(ballot) or not all(0 <= place < num_replies for place in ballot):
        raise ValueError("malformed preference")
    return ballot


def _by_number(numbers: Any, num_replies: int, best_last: bool) -> list[int]:
    """Return the places of the replies in the order of their numbers, one reply for each number."""
    if (
        not isinstance(numbers, list)
        or len(numbers) != num_replies
        or not all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
    ):
        raise ValueError("malformed preference")
    places: dict[float, int] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number, place)
    return [places[number] for number in sorted(places, reverse=best_last)]


def ranked_replies(
    entries: list[Record],
    left_out: Counter[str],
    *,
    ignored: Collection[str] = (),
    mended: Counter[str] | None = None,
) -> list[str]:
    """Return the texts of answers that each have a rank or a score, best first; ties are counted in `left_out`."""
    replies, numbers = [], []
    orders = [key for key in ("rank", *REPLY_SCORES) if all(entry.get(key) is not None for entry in entries)]
    if not orders:
        raise ValueError("answers without ranks")
    for entry in entries:
        name = next((key for key in REPLY_TEXTS if entry.get(key) is not None), None)
        if name is None:
            raise ValueError("malformed preference")
        replies.append(content_text(entry[name]))
        numbers.append(entry[orders[0]])
        check_fields(entry, {name, orders[0]}, replies[-1:], ignored=ignored, mended=mended)
    places = _by_number(numbers, len(replies), best_last=orders[0] != "rank")
    left_out["tied replies"] += len(replies) - len(places)
    return [replies[place] for place in places]


def reply_turns(
    content: Any,
    role: str,
    *,
    is_dialogue: bool = False,
    ignored: Collection[str] = (),
    mended: Counter[str] | None = None,
) -> list[Turn]:
    """Return the messages of a reply: messages, one text of `role`, or the messages of a dialogue in one text."""
    if content is None:
        return []
    if isinstance(content, str):
        return parse_transcript(content, role) if is_dialogue else [{"role": role, "content": content}]
    if not isinstance(content, list | dict):
        raise ValueError("malformed preference")
    messages = content if isinstance(content, list) else [content]
    return one_system(plain_turns([parse_turn(message, ignored=ignored, mended=mended) for message in messages]))


def plain_turns(turns: list[Turn]) -> list[Turn]:
    """Return the messages without weights; ValueError for calls of tools, with which replies are not compared."""
    if any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
        raise ValueError("calls of tools")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def only_reply(turns: list[Turn]) -> str:
    """Return the text of messages that are one reply of the assistant; ValueError if they are not."""
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise ValueError("no reply of the assistant")
    return turns[0]["content"]
