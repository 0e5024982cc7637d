"""Human preferences in the forms of the ecosystem, all read as rankings of two or more responses to a prompt."""

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import combinations, takewhile
from typing import Any

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import MAX_RECORD_BYTES, read_records
from palm_rlhf.data.formats.messages import Turn
from palm_rlhf.data.formats.prompt_fields import FIELDS, Opening, could_hold_prompt, parse_opening
from palm_rlhf.data.formats.record_fields import check_fields, is_label, is_metadata, texts_in, unknown_field
from palm_rlhf.data.formats.transcripts import is_transcript
from palm_rlhf.data.preferences.candidate_replies import (
    ORDERS,
    only_reply,
    ordered_responses,
    plain_turns,
    ranked_replies,
    reply_turns,
)
from palm_rlhf.training.ranked_data import Ranking, cut_to

PAIRS = (("chosen", "rejected"), ("response_j", "response_k"))  # the second are those of Stack Exchange
LISTS = ("answers", "completions")


@beartype
def is_preference(record: Record) -> bool:
    """Whether a record has what compares replies: `chosen` and `rejected`, `responses`, or ranked `answers`."""
    return _pair(record) is not None or "responses" in record or _list(record) is not None


@beartype
def read_rankings(
    path: str | os.PathLike[str],
    *,
    skip_broken: bool = False,
    rejected: Counter[str] | None = None,
    mended: Counter[str] | None = None,
    ignored: Collection[str] = (),
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Record]:
    """The preferences of a file as `{"prompt": [...], "responses": [best first]}`; a pair is a ranking of two.

    The forms are those of `parse_ranking`. A record that has none of them, or that nothing can be learnt from, is
    counted in `rejected` by its reason. `skip_broken` and errors are those of `read_records`; `ValueError`
    also if the first record has not the keys of a preference.
    """
    rejected = Counter() if rejected is None else rejected
    options = {"skip_broken": skip_broken, "rejected": rejected, "max_record_bytes": max_record_bytes}
    first = True
    for line, record in read_records(path, **options):
        if first and not is_preference(record):
            raise ValueError(
                f"{path}, line {line}: got a record with the keys {sorted(record)[:8]}, expected a preference: prompt, "
                "chosen and rejected, prompt and responses, or prompt and ranked answers"
            )
        first = False
        try:
            yield parse_ranking(record, rejected, mended=mended, ignored=ignored)
        except ValueError as error:
            rejected[str(error)] += 1


@beartype
def pairs_of(ranking: Record) -> Iterator[Record]:
    """The K(K-1)/2 preferences in a ranking of K responses, `{"prompt": [...], "chosen": str, "rejected": str}`."""
    for chosen, rejected in combinations(ranking["responses"], 2):
        yield {"prompt": ranking["prompt"], "chosen": chosen, "rejected": rejected}


@beartype
def parse_ranking(
    record: Record,
    rejected: Counter[str] | None = None,
    *,
    mended: Counter[str] | None = None,
    ignored: Collection[str] = (),
) -> Record:
    """A preference as `{"prompt": [...], "responses": [best first]}`; `ValueError` says why it is none.

    `chosen` and `rejected` are texts, messages, or whole dialogues as Anthropic writes them (`Human:`,
    `Assistant:`). The prompt is what `parse_opening` finds in the fields (`prompt`, `question`,
    `instruction`, `system`, `messages`, ...), and what both dialogues start with belongs to it; one reply of the
    assistant is to follow in each. Of two texts alone, where no field could hold a prompt, it is the words that both
    start with.

    `responses` are texts, or messages of the assistant, best first; or in the order that one more key tells:
    `ranking`, their places in the list, best first; `rankings`, those of several people, merged by ranked pairs;
    `ranks`, one for each, the lowest is best; `scores`, the highest is best. `answers` or `completions` are
    objects with a text and a `rank` or a score each, as in Nectar. Replies that are blank, tied with an earlier one
    or equal to a better one are left out and counted in `rejected`. Other fields are those of `check_fields`.
    """
    left_out: Counter[str] = Counter()
    options = {"ignored": ignored, "mended": mended}
    if "responses" in record:
        prompt, responses = _prompt(record, options).turns, ordered_responses(record, left_out)
        known: tuple[str, ...] = ("responses", *ORDERS)
    elif (names := _pair(record)) is not None:
        prompt, responses = _compared(record, names, options)
        known = names
    elif (name := _list(record)) is not None:
        prompt, responses = _prompt(record, options).turns, ranked_replies(record[name], left_out, options)
        known = (name,)
    else:
        raise ValueError("no preference")
    check_prompt(prompt)
    written = [response for response in responses if response.strip()]
    different = list(dict.fromkeys(written))
    if len(different) < 2:
        raise ValueError("no two different replies")
    check_fields(record, {*FIELDS, *known}, [turn["content"] for turn in prompt] + different, **options)
    if rejected is not None:
        left_out["blank replies"] += len(responses) - len(written)
        left_out["equal replies"] += len(written) - len(different)
        rejected.update(+left_out)
    return {"prompt": prompt, "responses": different}


def _pair(record: Record) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if all(record.get(name) is not None for name in pair)), None)


def _list(record: Record) -> str | None:
    def is_list(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)

    return next((name for name in LISTS if is_list(record.get(name))), None)


def _prompt(record: Record, options: dict[str, Any]) -> Opening:
    turns, *rest = parse_opening(record, **options)
    return Opening(plain_turns(turns), *rest)


def _compared(record: Record, names: tuple[str, str], options: dict[str, Any]) -> tuple[list[Turn], list[str]]:
    texts = [record[name] for name in names]
    has_field = could_hold_prompt(record, options["ignored"])
    transcripts = all(map(is_transcript, texts))
    if not has_field and not transcripts and all(isinstance(text, str) for text in texts):
        _refuse_fields(record, names, options["ignored"])
        # Without turns the reply is what follows the last blank that both share, so that no word is cut.
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts)))
        shared = re.match(r"(?s).*\s|", texts[0][:same]).end()
        prompt = [{"role": "user", "content": texts[0][:shared].strip()}]
        return prompt, [text[shared:].strip() for text in texts]
    opening = _prompt(record, options)
    head, prompt = _split_system(opening.turns)
    is_dialogue = opening.is_transcript or (transcripts and not prompt)
    sides = []
    for text in texts:
        own, turns = _split_system(reply_turns(text, "assistant", options, is_dialogue))
        if own and head and own != head:
            raise ValueError("two system prompts")
        sides.append((head or own, turns))
    (head, better), (other, worse) = sides
    if head != other:
        raise ValueError("two system prompts")
    if prompt and prompt[-1]["role"] == "assistant" and prompt[-1:] == better[-1:]:
        prompt = prompt[:-1]  # the conversation that was chosen, beside itself
    better, worse = (turns[len(prompt) :] if _starts(turns, prompt) else turns for turns in (better, worse))
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    if not len(better) == len(worse) == shared + 1:
        raise ValueError("replies differ in more than one turn")
    return head + prompt + better[:shared], [only_reply(better[shared:]), only_reply(worse[shared:])]


def _refuse_fields(record: Record, names: tuple[str, str], ignored: Collection[str]) -> None:
    """`ValueError` for a field that could hold the prompt of a record which has no field that is known to."""
    for name, value in record.items():
        texts = [] if name in names or name in ignored else list(texts_in(value))
        if texts and not (is_metadata(name) and all(map(is_label, texts))):
            raise ValueError(unknown_field(name))


def _split_system(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    start = 1 if turns and turns[0]["role"] == "system" else 0
    return turns[:start], turns[start:]


def _starts(turns: list[Turn], prompt: list[Turn]) -> bool:
    """Whether a dialogue begins with the prompt, but for blanks around what is said."""
    said = [(turn["role"], turn["content"].strip()) for turn in prompt]
    return [(turn["role"], turn["content"].strip()) for turn in turns[: len(prompt)]] == said


@beartype
def check_prompt(prompt: list[Turn]) -> None:
    """`ValueError` for turns that do not lead from a user's to a user's, or of which one is blank."""
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
    """Rankings within `max_seq_len` tokens: the start of the responses, then the end of the prompt that fits before.

    `max_response_len` keeps room for the prompt. Of responses that the cut makes equal the best stays; the pairs
    that go with the others are counted in `rejected` as "equal after truncation", and no ranking is left of one.
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
