"""The contents of a database as records that the data side reads: trees, rankings, preferences and conversations."""

import os
from collections import Counter
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Literal

from beartype import beartype
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from palm_rlhf.data.curation.filters import keep_languages
from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import write_records
from palm_rlhf.data.preferences.ranking_files import pairs_of
from palm_rlhf.feedback.exchange.tree_records import People, shown_people, tree_record
from palm_rlhf.feedback.store.answer_tables import Answer, Correction
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.kept_trees import RANKED_STATES, KeptMessage, kept_trees
from palm_rlhf.feedback.store.preferences_view import iter_preferences
from palm_rlhf.feedback.store.thumbs import answers_with_thumbs
from palm_rlhf.feedback.store.tree_tables import Tree
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.feedback.trees.states import mark_exported

Target = Literal["trees", "rankings", "preferences", "messages"]
State = Literal["initial_prompt_review", "growing", "ranking", "ready_for_export", "exported"]


@beartype
def export_records(
    store: Store,
    out: str | os.PathLike[str],
    to: Target,
    *,
    now: datetime,
    languages: Collection[str] = (),
    states: Collection[str] = RANKED_STATES,
    people: People = "pseudonyms",
) -> Counter[str]:
    """Write the contents of a database, as one moment saw them, to a file; return how much there is of each thing.

    The file appears when it is whole. Trees that are complete are then in the state `exported` if `to` is `trees`.

    Args:
        store: The database.
        out: The file; see `write_records`.
        to: The records to write, see `exported_records`.
        now: The current time.
        languages: The languages to write; none for all.
        states: The states of the trees to write.
        people: How people appear, see `shown_people`.
    """
    counts: Counter[str] = Counter()
    trees: list[str] = []
    with store.reading() as session:
        records = exported_records(session, to, languages=languages, states=states, people=people, trees=trees)
        write_records(out, _counted(records, to, counts))
    if to == "trees":
        with store.writing() as session:
            mark_exported(session, trees, now)
    return counts


@beartype
def exported_records(
    session: Session,
    to: Target,
    *,
    languages: Collection[str] = (),
    states: Collection[str] = RANKED_STATES,
    people: People = "pseudonyms",
    trees: list[str] | None = None,
) -> Iterator[Record]:
    """Yield the contents of a database as records; nothing that was withdrawn or not accepted is among them.

    `trees` are in the form of Open-Assistant. `rankings` are `{"prompt", "responses"}`, best first, of all that
    `iter_preferences` yields, and `preferences` their pairs, `{"prompt", "chosen", "rejected"}`. `messages` are
    conversations to fine-tune on: the threads of trees, corrections, and answers that more people liked than disliked.

    Args:
        session: A session of the store.
        to: The records to yield.
        languages: The languages to yield, such as en, or pt for pt-BR too; the language of a text outside the trees is
            detected.
        states: The states of trees to read.
        people: How people appear, see `shown_people`.
        trees: Is filled with the ids of the trees that were read.
    """
    names = shown_people(session, people)
    if to == "trees":
        for tree, root in kept_trees(session, states=states):
            if _speaks(tree.language, languages):
                if trees is not None:
                    trees.append(tree.id)
                yield tree_record(session, tree, root, names)
    elif to == "messages":
        yield from _conversations(session, languages, states)
    else:
        rankings = _rankings(session, languages, states, names)
        yield from rankings if to == "rankings" else _pairs(rankings)


@beartype
def num_trees_by_state(session: Session) -> dict[str, int]:
    """Return how many trees there are in each state."""
    return dict(row.tuple() for row in session.execute(select(Tree.state, func.count()).group_by(Tree.state)))


def _rankings(
    session: Session, languages: Collection[str], states: Collection[str], people: dict[str, str]
) -> Iterator[Record]:
    for preference in iter_preferences(session, states=states):
        written = [response for response in preference.responses if response.strip()]
        if len(written) < 2:  # readers of preferences take no blank replies
            continue
        record: Record = {"prompt": preference.prompt, "responses": written}
        record |= {"kind": preference.kind, "origin": preference.origin}
        if preference.person_id in people:
            record["annotator"] = people[preference.person_id]
        yield from _in_languages(record, preference.language, languages)


def _pairs(rankings: Iterator[Record]) -> Iterator[Record]:
    for ranking in rankings:
        more = {name: value for name, value in ranking.items() if name not in ("prompt", "responses")}
        for pair in pairs_of(ranking):
            yield {**pair, **more}


def _conversations(session: Session, languages: Collection[str], states: Collection[str]) -> Iterator[Record]:
    for tree, root in kept_trees(session, states=states):
        if _speaks(tree.language, languages):
            for message in root.walk():
                if message.row.role == "assistant" and not _is_answered_below(message):
                    yield {"messages": message.conversation(), "kind": "tree"}
    for answer, text, kind in _liked_answers(session):
        messages = [*answer.prompt, {"role": "assistant", "content": text}]
        yield from _in_languages({"messages": messages, "kind": kind}, None, languages)


def _is_answered_below(message: KeptMessage) -> bool:
    return any(reply.replies for reply in message.replies)


def _liked_answers(session: Session) -> Iterator[tuple[Answer, str, str]]:
    """Yield answers with the text that people want: a correction, or the answer's own under a thumb that is up."""
    corrections = (
        select(Correction, Answer)
        .join(Answer, Answer.id == Correction.answer_id)
        .where(not_withdrawn(Correction), not_withdrawn(Answer), Answer.text != "")
        .order_by(Correction.created_at, Correction.id)
    )
    newest = {(row.answer_id, row.person_id): (row, answer) for row, answer in session.execute(corrections)}
    for row, answer in newest.values():
        yield answer, row.text, "correction"
    for answer, thumbs, _ in answers_with_thumbs(session):
        if thumbs > 0:
            yield answer, answer.text, "reactions"


def _in_languages(record: Record, language: str | None, languages: Collection[str]) -> Iterator[Record]:
    if language is not None or not languages:
        if _speaks(language or "", languages):
            yield record
    else:
        yield from keep_languages([record], [_primary(wanted) for wanted in languages])


def _speaks(language: str, languages: Collection[str]) -> bool:
    spoken = (language.lower(), _primary(language))
    return not languages or any(wanted.lower() in spoken for wanted in languages)


def _primary(language: str) -> str:
    return language.lower().partition("-")[0]


def _counted(records: Iterator[Record], to: Target, counts: Counter[str]) -> Iterator[Record]:
    counts["conversations" if to == "messages" else to] = 0
    for record in records:
        if to == "trees":
            counts["messages"] += _num_messages(record["prompt"])
        counts["conversations" if to == "messages" else to] += 1
        yield record


def _num_messages(message: Record) -> int:
    ahead, number = [message], 0
    while ahead:
        number += 1
        ahead += ahead.pop()["replies"]
    return number
