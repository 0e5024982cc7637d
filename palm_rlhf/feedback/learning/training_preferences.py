"""The preferences that a round learns from: waited for, and kept in a file as they were then.

A preference is two or more texts, best first. Ties, and verdicts that both answers are bad, order nothing: they are no
preferences, though they count as contributions that a round waits for. Thumbs are a preference where two answers to a
prompt have thumbs of different sign. Votes of the blind comparison of two models measure, and are not learnt.
"""

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from beartype import beartype
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.learning.round_context import RoundContext
from palm_rlhf.feedback.learning.round_rows import all_rounds, events_of
from palm_rlhf.feedback.pairs.held_out_prompts import is_held_out
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import ComparisonVote, Correction, ShownComparison
from palm_rlhf.feedback.store.preferences_view import iter_preferences
from palm_rlhf.feedback.store.tree_tables import ReplyRanking
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.model.files import write_text

PREFERENCES_FILE = "preferences.jsonl"
SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class LearntPreference:
    """An order of texts after a prompt, best first.

    Args:
        prompt: The messages before.
        responses: The texts.
        origin: people, imported or ai: whose it is.
        kind: tree, comparison, correction, file or reactions.
        at_random: Whether it is a vote on a pair that was chosen at random.
        held_out: Whether the prompt is held out.
    """

    prompt: list[dict[str, Any]]
    responses: list[str]
    origin: str
    kind: str
    at_random: bool
    held_out: bool


@beartype
def keep_preferences(context: RoundContext, num_votes: int, poll_seconds: float) -> dict[str, Any]:
    """Wait for new contributions of people, write all preferences to the round's folder, and return the figures.

    Raises ValueError if `num_votes` is 0 and there is no preference to learn from.

    Args:
        context: The round.
        num_votes: New contributions since the round before; 0 waits for none.
        poll_seconds: Seconds between looks at the database.
    """
    said_at = -SECONDS_BETWEEN_LINES
    while True:
        with context.store.reading() as session:
            figures = _figures(context, session)
            is_time = figures["new"] >= num_votes
            preferences = all_preferences(session, context.settings.held_out) if is_time else []
        weights = context.settings.weights
        if any(not each.held_out and weights[each.origin] > 0 for each in preferences):
            break
        if not num_votes:
            raise ValueError(
                "got no preference to learn from, expected one on a prompt that is not held out, with a weight above "
                "0: collect votes (palm-rlhf collect), or import preferences (palm-rlhf import)"
            )
        if time.monotonic() - said_at >= SECONDS_BETWEEN_LINES:
            said_at = time.monotonic()
            context.say(_wanted(num_votes - figures["new"]))
        time.sleep(poll_seconds)
    write_text(context.folder / PREFERENCES_FILE, "".join(json.dumps(asdict(each)) + "\n" for each in preferences))
    return figures


def _wanted(missing: int) -> str:
    if missing < 1:
        return "waiting for a vote that prefers one answer, on a prompt that is not held out"
    return (
        f"waiting for {missing} more votes: they are given at /compare of palm-rlhf collect, or of palm-rlhf serve "
        "--feedback"
    )


@beartype
def all_preferences(session: Session, held_out: float | int) -> list[LearntPreference]:
    """Return all preferences in the database, of which the share `held_out` of the prompts is held out."""
    collection = CollectionSettings(held_out=held_out)
    return [
        LearntPreference(
            each.prompt,
            list(each.responses),
            each.origin,
            each.kind,
            at_random=each.chosen_by == "random",
            held_out=is_held_out(each.prompt_key, collection),
        )
        for each in iter_preferences(session)
        if each.purpose != "evaluation"
    ]


@beartype
def count_contributions(session: Session) -> dict[str, int]:
    """Return how many comparisons for training, rankings and corrections of people count."""
    compared = (
        select(func.count(ComparisonVote.comparison_id.distinct()))
        .join(ShownComparison, ShownComparison.id == ComparisonVote.comparison_id)
        .where(ShownComparison.purpose == "training", not_withdrawn(ComparisonVote), not_withdrawn(ShownComparison))
    )
    counts = {"comparisons": session.scalar(compared) or 0}
    for name, table in (("rankings", ReplyRanking), ("corrections", Correction)):
        counts[name] = session.scalar(select(func.count()).select_from(table).where(not_withdrawn(table))) or 0
    return counts


def _figures(context: RoundContext, session: Session) -> dict[str, Any]:
    counts = count_contributions(session)
    earlier = [events_of(session, row.id).get("votes") for row in all_rounds(session) if row.number < context.number]
    before = next((figures for figures in reversed(earlier) if figures), dict.fromkeys(counts, 0))
    return {**counts, "new": sum(counts.values()) - sum(before[name] for name in counts)}


@beartype
def read_preferences(context: RoundContext) -> list[LearntPreference]:
    """Return the preferences that `keep_preferences` wrote."""
    lines = (context.folder / PREFERENCES_FILE).read_text(encoding="utf-8").splitlines()
    return [LearntPreference(**json.loads(line)) for line in lines]
