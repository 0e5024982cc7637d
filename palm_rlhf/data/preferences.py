"""Human preferences in the forms of the ecosystem, all read as rankings of two or more responses to a prompt."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import combinations, takewhile
from typing import Any

from beartype import beartype

from palm_rlhf.data.ranked_pairs import ranked_pairs
from palm_rlhf.data.records import MAX_RECORD_BYTES, Record, read_records
from palm_rlhf.training.rankings import Ranking, cut_to

Turns = list[dict[str, str]]
TURN = re.compile(r"(?:^|\n\n)\s*(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
ORDERS = ("ranking", "rankings", "ranks", "scores")


@beartype
def is_preference(record: Record) -> bool:
    """Whether a record has the keys of a preference: ``chosen`` and ``rejected``, or ``responses``."""
    return {"chosen", "rejected"} <= record.keys() or "responses" in record


@beartype
def is_transcript(text: object) -> bool:
    """Whether it is a dialogue as Anthropic writes them: a text that starts with ``Human:`` or ``Assistant:``."""
    return isinstance(text, str) and re.match(r"\s*(Human|Assistant):", text) is not None


@beartype
def read_rankings(
    path: str | os.PathLike[str],
    *,
    skip_broken: bool = False,
    rejected: Counter[str] | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Record]:
    """The preferences of a file as ``{"prompt": [...], "responses": [best first]}``; a pair is a ranking of two.

    The forms are those of ``parse_ranking``. A record that has none of them, or that nothing can be learnt from, is
    counted in ``rejected`` by its reason. ``skip_broken`` and errors are those of ``read_records``; ``ValueError``
    also if the first record has not the keys of a preference.
    """
    rejected = Counter() if rejected is None else rejected
    options = {"skip_broken": skip_broken, "rejected": rejected, "max_record_bytes": max_record_bytes}
    first = True
    for line, record in read_records(path, **options):
        if first and not is_preference(record):
            raise ValueError(
                f"{path}, line {line}: got a record with the keys {sorted(record)[:8]}, expected a preference: prompt, "
                "chosen and rejected, or prompt and responses"
            )
        first = False
        try:
            yield parse_ranking(record, rejected)
        except ValueError as error:
            rejected[str(error)] += 1


@beartype
def pairs_of(ranking: Record) -> Iterator[Record]:
    """The K(K-1)/2 preferences in a ranking of K responses, ``{"prompt": [...], "chosen": str, "rejected": str}``."""
    for chosen, rejected in combinations(ranking["responses"], 2):
        yield {"prompt": ranking["prompt"], "chosen": chosen, "rejected": rejected}


@beartype
def parse_ranking(record: Record, rejected: Counter[str] | None = None) -> Record:
    """A preference as ``{"prompt": [...], "responses": [best first]}``; ``ValueError`` says why it is none.

    ``chosen`` and ``rejected`` are texts, messages, or whole dialogues as Anthropic writes them (``Human:``,
    ``Assistant:``). With or without a ``prompt`` (a text, messages or a dialogue), what both start with belongs to it,
    and one reply of the assistant is to follow in each.

    ``responses`` are texts, or messages of the assistant, best first; or in the order that one more key tells:
    ``ranking``, their places in the list, best first; ``rankings``, those of several people, merged by ranked pairs;
    ``ranks``, one for each, the lowest is best; ``scores``, the highest is best. Replies that are blank, tied with an
    earlier one or equal to a better one are left out and counted in ``rejected``.
    """
    left_out: Counter[str] = Counter()
    if "responses" in record:
        prompt, responses = _prompt(record), _ordered(record, left_out)
    elif {"chosen", "rejected"} <= record.keys():
        prompt, responses = _compared(record)
    else:
        raise ValueError("no preference")
    _check_prompt(prompt)
    written = [response for response in responses if response.strip()]
    different = list(dict.fromkeys(written))
    if len(different) < 2:
        raise ValueError("no two different replies")
    if rejected is not None:
        left_out["blank replies"] += len(responses) - len(written)
        left_out["equal replies"] += len(written) - len(different)
        rejected.update(+left_out)
    return {"prompt": prompt, "responses": different}


def _prompt(record: Record) -> Turns:
    prompt = _turns(record.get("prompt"), "user", is_transcript(record.get("prompt")))
    if prompt and prompt[-1] == {"role": "assistant", "content": ""}:
        del prompt[-1]  # a dialogue that ends on "Assistant:", for the reply to go on
    return prompt


def _compared(record: Record) -> tuple[Turns, list[str]]:
    texts, given = (record["chosen"], record["rejected"]), record.get("prompt")
    is_dialogue = is_transcript(given) or (given is None and all(map(is_transcript, texts)))
    if given is None and not is_dialogue and all(isinstance(text, str) for text in texts):
        # Without turns the reply is what follows the last blank that both share, so that no word is cut.
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts)))
        shared = re.match(r"(?s).*\s|", texts[0][:same]).end()
        return _turns(texts[0][:shared].strip(), "user"), [text[shared:].strip() for text in texts]
    prompt = _prompt(record)
    better, worse = (_turns(text, "assistant", is_dialogue) for text in texts)
    better, worse = (turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns for turns in (better, worse))
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    if not len(better) == len(worse) == shared + 1:
        raise ValueError("replies differ in more than one turn")
    return prompt + better[:shared], [_reply(better[shared:]), _reply(worse[shared:])]


def _ordered(record: Record, left_out: Counter[str]) -> list[str]:
    responses, orders = record["responses"], [key for key in ORDERS if record.get(key) is not None]
    if not isinstance(responses, list) or len(orders) > 1:
        raise ValueError("malformed preference")
    replies = [_reply(_turns([entry] if isinstance(entry, dict) else entry, "assistant")) for entry in responses]
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


def _turns(content: Any, role: str, is_dialogue: bool = False) -> Turns:
    """Messages from messages, or from a text: one message of ``role``, or what is said in a dialogue."""
    if content is None:
        return []
    if isinstance(content, str):
        return _spoken(content, role) if is_dialogue else [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise ValueError("malformed preference")
    for message in content:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError("malformed preference")
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError("unknown role")
    return [{"role": message["role"], "content": message["content"]} for message in content]


def _spoken(text: str, role: str) -> Turns:
    """The turns of a dialogue, or what ``role`` adds to it."""
    if not is_transcript(text):
        return [{"role": role, "content": text.strip()}]
    _, *parts = TURN.split(text)
    return [{"role": SPEAKERS[speaker], "content": said.strip()} for speaker, said in zip(parts[::2], parts[1::2])]


def _reply(turns: Turns) -> str:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise ValueError("no reply of the assistant")
    return turns[0]["content"]


def _check_prompt(prompt: Turns) -> None:
    if not prompt or not all(turn["content"].strip() for turn in prompt):
        raise ValueError("no prompt")
    roles = [turn["role"] for turn in prompt]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise ValueError("roles do not alternate")


@beartype
def fit_rankings(
    rankings: Iterable[Ranking],
    max_seq_len: int,
    *,
    max_response_len: int | None = None,
    rejected: Counter[str] | None = None,
) -> Iterator[Ranking]:
    """Rankings within ``max_seq_len`` tokens: the start of the responses, then the end of the prompt that fits before.

    ``max_response_len`` keeps room for the prompt. Of responses that the cut makes equal the best stays; the pairs
    that go with the others are counted in ``rejected`` as "equal after truncation", and no ranking is left of one.
    """
    if max_seq_len < 2 or (max_response_len is not None and max_response_len < 1):
        raise ValueError(
            f"got max_seq_len={max_seq_len} and max_response_len={max_response_len}, expected at least 2 and 1: "
            "a token of the prompt and one of the response"
        )
    rejected = Counter() if rejected is None else rejected
    for ranking in rankings:
        prompt, responses = cut_to(
            max_seq_len, ranking.prompt, [response[:max_response_len] for response in ranking.responses]
        )
        places: dict[tuple[int, ...], int] = {}
        for place, response in enumerate(responses):
            places.setdefault(tuple(response.tolist()), place)
        kept = list(places.values())
        rejected["equal after truncation"] += math.comb(len(responses), 2) - math.comb(len(kept), 2)
        if len(kept) > 1:
            margins = dict(zip(combinations(range(len(responses)), 2), ranking.pair_margins))
            kept_margins = [margins[pair] for pair in combinations(kept, 2)]
            yield Ranking(prompt, [responses[place] for place in kept], kept_margins)
