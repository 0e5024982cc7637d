"""Replies to one prompt in the shapes that files give them, and in the order that people put them in."""

import math
from collections import Counter
from typing import Any

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.formats.messages import Turn, content_text, one_system, parse_turn
from palm_rlhf.data.formats.record_fields import check_fields
from palm_rlhf.data.formats.transcripts import parse_transcript
from palm_rlhf.data.preferences.ranked_pairs_voting import ranked_pairs

ORDERS = ("ranking", "rankings", "ranks", "scores")
REPLY_TEXTS = ("answer", "response", "completion", "text", "content", "output")
REPLY_SCORES = ("overall_score", "pm_score", "score", "rating")  # the highest is best; of a rank, the lowest


def ordered_responses(record: Record, left_out: Counter[str]) -> list[str]:
    """The texts of `responses`, best first; ties are counted in `left_out`."""
    responses, orders = record["responses"], [key for key in ORDERS if record.get(key) is not None]
    if not isinstance(responses, list) or len(orders) > 1:
        raise ValueError("malformed preference")
    replies = [only_reply(reply_turns(entry, "assistant", {})) for entry in responses]
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
    """Places of the responses in their list, which may be counted from 1 if all are named."""
    if not isinstance(ballot, list) or not all(type(place) is int for place in ballot):
        raise ValueError("malformed preference")
    if sorted(ballot) == list(range(1, num_replies + 1)):
        ballot = [place - 1 for place in ballot]
    if len(set(ballot)) < len(ballot) or not all(0 <= place < num_replies for place in ballot):
        raise ValueError("malformed preference")
    return ballot


def _by_number(numbers: Any, num_replies: int, best_last: bool) -> list[int]:
    """The places of the replies in the order of their numbers, one reply for each number."""
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


def ranked_replies(entries: list[Record], left_out: Counter[str], options: dict[str, Any]) -> list[str]:
    """The texts of answers that each have a rank or a score, best first."""
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
        check_fields(entry, {name, orders[0]}, replies[-1:], **options)
    places = _by_number(numbers, len(replies), best_last=orders[0] != "rank")
    left_out["tied replies"] += len(replies) - len(places)
    return [replies[place] for place in places]


def reply_turns(content: Any, role: str, options: dict[str, Any], is_dialogue: bool = False) -> list[Turn]:
    """Messages from messages, or from a text: one message of `role`, or what is said in a dialogue."""
    if content is None:
        return []
    if isinstance(content, str):
        return parse_transcript(content, role) if is_dialogue else [{"role": role, "content": content}]
    if not isinstance(content, list | dict):
        raise ValueError("malformed preference")
    messages = content if isinstance(content, list) else [content]
    return one_system(plain_turns([parse_turn(message, **options) for message in messages]))


def plain_turns(turns: list[Turn]) -> list[Turn]:
    """The turns without weights; `ValueError` for calls of tools, which replies are not compared with."""
    if any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
        raise ValueError("calls of tools")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def only_reply(turns: list[Turn]) -> str:
    """The text of turns that are one reply of the assistant."""
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise ValueError("no reply of the assistant")
    return turns[0]["content"]
