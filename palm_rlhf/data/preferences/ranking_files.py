"""Files of human preferences in the known formats, read as rankings of two or more responses to a prompt."""

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import combinations, takewhile
from typing import Any

from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import MAX_RECORD_BYTES, parsed_records
from palm_rlhf.data.formats.messages import Turn
from palm_rlhf.data.formats.prompt_fields import FIELDS, PromptTurns, could_hold_prompt, parse_prompt_fields
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

PAIRS = (("chosen", "rejected"), ("response_j", "response_k"))  # the second are of Stack Exchange
LISTS = ("answers", "completions")


@beartype
def is_preference(record: Record) -> bool:
    """Return whether a record compares replies: `chosen` and `rejected`, `responses`, or ranked `answers`."""
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
    """Yield the preferences of a file as `{"prompt": [...], "responses": [best first]}`; a pair is a ranking of two.

    The formats are those of `parse_ranking`. A record that has none of them, or from which nothing can be learnt, is
    counted in `rejected` by its reason.

    Raises the errors of `read_records`, and ValueError if the first record is no preference.

    Args:
        path: The file; `-` is standard input.
        skip_broken: See `read_records`.
        rejected: Counts the records and replies that are left out by their reasons.
        mended: Counts the changes by their kinds.
        ignored: Fields to leave out although they may hold text.
        max_record_bytes: The longest record to read.
    """
    counts = Counter() if rejected is None else rejected
    return parsed_records(
        path,
        lambda record: parse_ranking(record, counts, mended=mended, ignored=ignored),
        is_known=is_preference,
        expected="a preference: prompt, chosen and rejected, prompt and responses, or prompt and ranked answers",
        skip_broken=skip_broken,
        rejected=counts,
        max_record_bytes=max_record_bytes,
    )


@beartype
def pairs_of(ranking: Record) -> Iterator[Record]:
    """Yield the K(K-1)/2 pairs of a ranking of K responses as `{"prompt": [...], "chosen": str, "rejected": str}`."""
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
    """Return a preference as `{"prompt": [...], "responses": [best first]}`.

    `chosen` and `rejected` are texts, messages, or whole dialogues as Anthropic writes them (`Human:`, `Assistant:`).
    The prompt consists of the messages that `parse_prompt_fields` finds (`prompt`, `question`, `instruction`, `system`,
    `messages`, ...), and of the messages that both dialogues start with. One reply of the assistant must follow in
    each. If both are texts and no field could hold a prompt, the prompt consists of the words that both start with.

    `responses` are texts, or messages of the assistant, best first, or in the order of one more field: `ranking`, their
    places in the list, best first; `rankings`, those of several people, merged by ranked pairs; `ranks`, one for each,
    the lowest is best; `scores`, the highest is best. `answers` or `completions` are objects with a text and a `rank`
    or a score each, as in Nectar. Replies that are blank, tied with an earlier one or equal to a better one are left
    out and counted in `rejected`. Other fields are subject to `check_fields`.

    Raises ValueError with the reason if it is no preference.
    """
    left_out: Counter[str] = Counter()
    if "responses" in record:
        prompt, responses = _prompt(record, ignored, mended).turns, ordered_responses(record, left_out)
        known: tuple[str, ...] = ("responses", *ORDERS)
    elif (names := _pair(record)) is not None:
        prompt, responses = _compared(record, names, ignored, mended)
        known = names
    elif (name := _list(record)) is not None:
        prompt = _prompt(record, ignored, mended).turns
        responses = ranked_replies(record[name], left_out, ignored=ignored, mended=mended)
        known = (name,)
    else:
        raise ValueError("no preference")
    check_prompt(prompt)
    written = [response for response in responses if response.strip()]
    different = list(dict.fromkeys(written))
    if len(different) < 2:
        raise ValueError("no two different replies")
    texts = [turn["content"] for turn in prompt] + different
    check_fields(record, {*FIELDS, *known}, texts, ignored=ignored, mended=mended)
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


def _prompt(record: Record, ignored: Collection[str], mended: Counter[str] | None) -> PromptTurns:
    prompt = parse_prompt_fields(record, ignored=ignored, mended=mended)
    return prompt._replace(turns=plain_turns(prompt.turns))


def _compared(
    record: Record, names: tuple[str, str], ignored: Collection[str], mended: Counter[str] | None
) -> tuple[list[Turn], list[str]]:
    """Return the prompt of a pair, and the chosen and the rejected reply."""
    texts = [record[name] for name in names]
    has_field = could_hold_prompt(record, ignored)
    transcripts = all(map(is_transcript, texts))
    if not has_field and not transcripts and all(isinstance(text, str) for text in texts):
        _refuse_fields(record, names, ignored)
        return _shared_beginning(*texts)
    parsed = _prompt(record, ignored, mended)
    head, prompt = _split_system(parsed.turns)
    is_dialogue = parsed.is_transcript or (transcripts and not prompt)
    sides = []
    for text in texts:
        own, turns = _split_system(
            reply_turns(text, "assistant", is_dialogue=is_dialogue, ignored=ignored, mended=mended)
        )
        if own and head and own != head:
            raise ValueError("two system prompts")
        sides.append((head or own, turns))
    (head, better), (other, worse) = sides
    if head != other:
        raise ValueError("two system prompts")
    if prompt and prompt[-1]["role"] == "assistant" and prompt[-1:] == better[-1:]:
        prompt = prompt[:-1]  # the prompt field holds the whole chosen conversation
    better, worse = (turns[len(prompt) :] if _starts(turns, prompt) else turns for turns in (better, worse))
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    if not len(better) == len(worse) == shared + 1:
        raise ValueError("replies differ in more than one turn")
    return head + prompt + better[:shared], [only_reply(better[shared:]), only_reply(worse[shared:])]


def _shared_beginning(chosen: str, rejected: str) -> tuple[list[Turn], list[str]]:
    """Return the beginning that two texts share as the prompt, up to its last blank so that no word is cut."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected)))
    length = 1 + max((place for place, letter in enumerate(chosen[:same]) if letter.isspace()), default=-1)
    return [{"role": "user", "content": chosen[:length].strip()}], [chosen[length:].strip(), rejected[length:].strip()]


def _refuse_fields(record: Record, names: tuple[str, str], ignored: Collection[str]) -> None:
    """Raise ValueError if a field could hold the prompt of a record that has no field known to hold it."""
    for name, value in record.items():
        texts = [] if name in names or name in ignored else list(texts_in(value))
        if texts and not (is_metadata(name) and all(map(is_label, texts))):
            raise ValueError(unknown_field(name))


def _split_system(turns: list[Turn]) -> tuple[list[Turn], list[Turn]]:
    start = 1 if turns and turns[0]["role"] == "system" else 0
    return turns[:start], turns[start:]


def _starts(turns: list[Turn], prompt: list[Turn]) -> bool:
    """Return whether a dialogue begins with the prompt, apart from blanks around messages."""
    first, wanted = (
        [(turn["role"], turn["content"].strip()) for turn in side] for side in (turns[: len(prompt)], prompt)
    )
    return first == wanted


@beartype
def check_prompt(prompt: list[Turn]) -> None:
    """Raise ValueError unless the messages alternate from a first user message to a last one, none of them blank."""
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
    """Yield rankings within `max_seq_len` tokens: the start of the responses, and the end of the prompt before it.

    Of responses that truncation makes equal, the best stays. The pairs of the others are counted in `rejected` as
    "equal after truncation", and a ranking with one response left is dropped.

    Args:
        rankings: The rankings as tokens.
        max_seq_len: The most tokens of a prompt and a response together.
        max_response_len: The most tokens of a response, which leaves room for the prompt.
        rejected: Counts the pairs that are left out.
    """
    if max_seq_len < 2 or (max_response_len is not None and max_response_len < 1):
        raise ValueError(
            f"got max_seq_len={max_seq_len} and max_response_len={max_response_len}, expected at least 2 and 1, for "
            "a token of the prompt and one of the response: raise them"
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
            yield replace(ranking, prompt=prompt, responses=[responses[place] for place in kept], margins=kept_margins)
