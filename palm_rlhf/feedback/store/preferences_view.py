"""Everything in the database that says which of several replies is better, in one form."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations, permutations
from typing import Any, Literal

from beartype import beartype
from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, Correction, ShownComparison
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.kept_trees import KeptMessage, kept_trees
from palm_rlhf.feedback.store.learning_tables import ImportedRanking
from palm_rlhf.feedback.store.thumbs import answers_with_thumbs
from palm_rlhf.feedback.store.tree_tables import Tree
from palm_rlhf.feedback.store.withdrawals import not_withdrawn

Origin = Literal["people", "imported", "ai"]  # people here, people of a file, or a model of a file
Kind = Literal["tree", "comparison", "correction", "reactions", "file"]


@dataclass(frozen=True)
class RecordedPreference:
    """Replies to one prompt, the best one first, all of different texts.

    `person_id` is None where several people's rankings are merged, and in imports. `chosen_by` and `purpose` are those
    of the comparison, and None of other kinds. `row_id` is the id of the vote, correction or imported ranking, of
    the message that the ranked replies answer, or of the answer that people liked.
    """

    prompt: list[dict[str, Any]]
    responses: tuple[str, ...]
    kind: Kind
    origin: Origin
    row_id: str
    created_at: datetime
    language: str | None = None
    person_id: str | None = None
    chosen_by: str | None = None
    purpose: str | None = None

    @property
    def prompt_key(self) -> str:
        """The key of the prompt, by which prompts are held out."""
        return prompt_key_of(self.prompt)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield the chosen and the rejected reply of each pair."""
        yield from combinations(self.responses, 2)


@beartype
def iter_preferences(session: Session, *, states: Collection[str] | None = None) -> Iterator[RecordedPreference]:
    """Yield the preferences in the database: of trees, comparisons, corrections, reactions and files, by their kinds.

    Nothing that was withdrawn is among them, nor ties, nor answers to prompts that were emptied with their person. Of
    the votes on a comparison, and of a person's corrections of an answer, the newest counts. Reactions prefer an answer
    that more people liked than disliked to one to the same prompt that more people disliked. A model may answer with
    nothing: a preferred answer may be blank, as may the other.

    Args:
        session: A session of the store.
        states: The states of trees to read, see `kept_trees`.
    """
    for tree, root in kept_trees(session, states=states):
        yield from tree_preferences(tree, root)
    yield from _comparisons(session)
    yield from _corrections(session)
    yield from _reactions(session)
    for row in session.scalars(
        select(ImportedRanking)
        .where(not_withdrawn(ImportedRanking))
        .order_by(ImportedRanking.created_at, ImportedRanking.id)
    ):
        origin: Origin = "ai" if row.kind == "ai" else "imported"
        yield RecordedPreference(row.prompt, tuple(row.responses), "file", origin, row.id, row.created_at)


@beartype
def tree_preferences(tree: Tree, root: KeptMessage) -> Iterator[RecordedPreference]:
    """Yield the rankings of the assistant's replies in a tree; of replies with equal texts the best is ranked."""
    origin: Origin = "people" if tree.source == "people" else "ai" if tree.ranked_by == "ai" else "imported"
    for message in root.walk():
        ranked = [reply for reply in message.replies if reply.row.role == "assistant" and reply.rank is not None]
        by_rank = {reply.rank: reply for reply in reversed(ranked)}  # the first of each rank: imported ranks may tie
        texts = tuple(dict.fromkeys(by_rank[rank].row.text for rank in sorted(by_rank, key=lambda rank: rank or 0)))
        if len(texts) > 1:
            times = [reply.ranked_at for reply in ranked if reply.ranked_at is not None]
            yield RecordedPreference(
                message.conversation(), texts, "tree", origin, message.row.id, max(times), message.row.language
            )


def _comparisons(session: Session) -> Iterator[RecordedPreference]:
    left, right = aliased(Answer), aliased(Answer)
    query = (
        select(ComparisonVote, ShownComparison, left, right)
        .join(ShownComparison, ShownComparison.id == ComparisonVote.comparison_id)
        .join(left, left.id == ShownComparison.left_id)
        .join(right, right.id == ShownComparison.right_id)
        .where(*map(not_withdrawn, (ComparisonVote, ShownComparison, left, right)))
        .order_by(ComparisonVote.created_at, ComparisonVote.id)
    )
    newest = {vote.comparison_id: (vote, shown, one, other) for vote, shown, one, other in session.execute(query)}
    for vote, shown, one, other in newest.values():
        if vote.verdict not in ("left", "right") or not one.prompt or not _differ(one.text, other.text):
            continue
        responses = (one.text, other.text) if vote.verdict == "left" else (other.text, one.text)
        yield RecordedPreference(
            one.prompt,
            responses,
            "comparison",
            "people",
            vote.id,
            vote.created_at,
            person_id=vote.person_id,
            chosen_by=shown.chosen_by,
            purpose=shown.purpose,
        )


def _reactions(session: Session) -> Iterator[RecordedPreference]:
    of_prompts: dict[str, list[tuple[Answer, int, datetime]]] = defaultdict(list)
    for answer, thumbs, at in answers_with_thumbs(session):
        of_prompts[answer.prompt_key].append((answer, thumbs, at))
    for answers in of_prompts.values():
        for (better, up, at), (worse, down, other_at) in permutations(answers, 2):
            if up > 0 > down and _differ(better.text, worse.text):
                responses, when = (better.text, worse.text), max(at, other_at)
                yield RecordedPreference(better.prompt, responses, "reactions", "people", better.id, when)


def _corrections(session: Session) -> Iterator[RecordedPreference]:
    query = (
        select(Correction, Answer)
        .join(Answer, Answer.id == Correction.answer_id)
        .where(not_withdrawn(Correction), not_withdrawn(Answer))
        .order_by(Correction.created_at, Correction.id)
    )
    newest = {(row.answer_id, row.person_id): (row, answer) for row, answer in session.execute(query)}
    for row, answer in newest.values():
        if row.text.strip() and answer.prompt and _differ(row.text, answer.text):
            yield RecordedPreference(
                answer.prompt,
                (row.text, answer.text),
                "correction",
                "people",
                row.id,
                row.created_at,
                person_id=row.person_id,
            )


def _differ(text: str, other: str) -> bool:
    """Return whether two texts are different apart from blanks around them."""
    return text.strip() != other.strip()
