"""A collection that keeps its rules breaks no law of the database, and each broken law is told in words."""

import random
import shutil
import sqlite3
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import select

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, KnownModel, ShownComparison
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.invariants import broken_laws
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import ReplyRanking, Tree
from palm_rlhf.feedback.store.withdrawals import withdraw
from palm_rlhf.feedback.trees.submissions import submit_labels, submit_ranking, submit_text
from palm_rlhf.feedback.trees.tasks import hand_out, skip

SETTINGS = CollectionSettings(
    max_open_trees=1, max_tree_size=6, max_children=2, num_reviews=2, num_rankings=2, num_model_replies=0,
    task_timeout=timedelta(minutes=10), languages=("en",),
)  # fmt: skip
NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)


def collect(store, names=("ann", "bob", "eve", "max", "zoe")):
    """A tree that is complete, by the rules; return when."""
    now, rng = NOON, random.Random(0)
    with store.writing() as session:
        people = [Participant(id=name, name=name, role="contributor") for name in names]
        session.add_all(people)
        session.flush()
        while "ready_for_export" not in session.scalars(select(Tree.state)).all():
            now += timedelta(minutes=1)
            person = rng.choice(people)
            task = hand_out(session, person, SETTINGS, language="en", now=now, rng=rng)
            assert now < NOON + timedelta(days=1)
            if task is None:
                continue
            if rng.random() < 0.1:
                skip(session, task.id, person, now)
            elif task.kind == "rank_replies":
                submit_ranking(session, task.id, person, task.shown, SETTINGS, now)
            elif task.kind.startswith("label"):
                submit_labels(session, task.id, person, {"spam": 0, "lang_mismatch": 0}, SETTINGS, now)
            else:
                submit_text(session, task.id, person, f"text {now}", SETTINGS, now)
        compare(session)
    return now


def compare(session):
    prompt = [{"role": "user", "content": "Why?"}]
    key = prompt_key_of(prompt)
    session.add(KnownModel(id="model", name="model"))
    session.flush()
    fields = {"prompt_key": key, "prompt": prompt, "model_id": "model", "sampling": {}, "purpose": "training"}
    session.add_all([Answer(id=name, text=name, **fields) for name in ("left", "right")])
    session.flush()
    shown = {"left_id": "left", "right_id": "right", "person_id": "ann", "chosen_by": "random", "purpose": "training"}
    session.add(ShownComparison(id="shown", prompt_key=key, **shown))
    session.flush()
    session.add(ComparisonVote(id="vote", comparison_id="shown", person_id="ann", verdict="left"))
    session.flush()


def test_a_collection_by_the_rules_breaks_no_law(any_store):
    now = collect(any_store)
    with any_store.writing() as session:
        ranking = session.scalars(select(ReplyRanking)).first()
        withdraw(session, ranking, ranking.person_id, now=now)
    with any_store.reading() as session:
        assert broken_laws(session, SETTINGS, now) == []


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    path = tmp_path_factory.mktemp("collection") / "feedback.db"
    with Store(path) as store:
        collect(store)
    return path


A_REVIEW = "(SELECT id FROM reviews ORDER BY id LIMIT 1)"
A_RANKING = "(SELECT id FROM rankings ORDER BY id LIMIT 1)"
A_REPLY = "(SELECT id FROM messages WHERE depth = 1 ORDER BY id LIMIT 1)"
A_TASK = "(SELECT id FROM tasks WHERE outcome = 'done' AND kind = 'label_reply' ORDER BY id LIMIT 1)"
BROKEN = {
    "a task is handed out beyond its need": (
        "INSERT INTO tasks SELECT 'more', kind, 'zoe', tree_id, message_id, language, shown, handed_at, "
        f"'2030-01-01 00:00:00.000000', NULL, NULL FROM tasks WHERE id = {A_TASK}",
        "3 tasks label_reply done or open, above 2",
    ),
    "a person holds two tasks of a kind": (
        "INSERT INTO tasks SELECT id || 'x', 'write_prompt', 'zoe', NULL, NULL, 'en', NULL, handed_at, "
        "'2030-01-01 00:00:00.000000', NULL, NULL FROM tasks LIMIT 2",
        "the person zoe holds 2 open tasks write_prompt",
    ),
    "a task is done twice": (
        "INSERT INTO tasks SELECT 'more', kind, person_id, tree_id, message_id, language, shown, handed_at, "
        f"expires_at, closed_at, outcome FROM tasks WHERE id = {A_TASK}",
        "did the task label_reply 2 times",
    ),
    "an outcome is unknown": (f"UPDATE tasks SET outcome = 'lost' WHERE id = {A_TASK}", "has the outcome lost"),
    "a rating is lost": (f"DELETE FROM reviews WHERE id = {A_REVIEW}", "is done, but its work is not there"),
    "a rating has somebody else's task": (
        f"UPDATE reviews SET person_id = 'nobody' WHERE id = {A_REVIEW}",
        "missing, not done, or another's",
    ),
    "people label their own": (
        f"UPDATE messages SET person_id = (SELECT person_id FROM reviews WHERE message_id = {A_REPLY}) "
        f"WHERE id = {A_REPLY}",
        "labelled their own",
    ),
    "people rank their own": (
        "UPDATE messages SET person_id = (SELECT person_id FROM rankings ORDER BY id LIMIT 1) WHERE parent_id = "
        "(SELECT parent_id FROM rankings ORDER BY id LIMIT 1)",
        "ranked a reply of their own",
    ),
    "people answer their own": ("UPDATE messages SET person_id = 'ann'", "answered their own"),
    "a ranking has a stranger": (
        f"""UPDATE rankings SET best_first = '["x"]' WHERE id = {A_RANKING}""",
        "does not order the replies that were shown",
    ),
    "a ranking is of another message": (
        f"UPDATE rankings SET parent_id = {A_REPLY} WHERE id = {A_RANKING}",
        "is of replies to another message",
    ),
    "a label is too large": (
        f"""UPDATE reviews SET labels = '{{"spam": 2}}' WHERE id = {A_REVIEW}""",
        "has a label outside 0 to 1",
    ),
    "a tree has no root": ("UPDATE messages SET tree_id = 'x' WHERE depth = 0", "has 0 prompts, expected one"),
    "a role does not alternate": (f"UPDATE messages SET role = 'prompter' WHERE id = {A_REPLY}", "depth or role"),
    "a state has no event": ("UPDATE trees SET state = 'growing'", "is in the state growing without its event"),
    "a comparison is of one answer": ("UPDATE comparisons SET left_id = 'right'", "not of two answers"),
    "a vote is another person's": ("UPDATE votes SET person_id = 'bob'", "that its person was shown"),
    "a vote has no comparison": ("DELETE FROM comparisons", "the vote vote is on no comparison"),
    "an answer has another key": ("UPDATE answers SET prompt_key = '0' WHERE id = 'left'", "the key of another prompt"),
    "a withdrawal is of nothing": (
        "INSERT INTO withdrawals VALUES ('w', 'votes', 'gone', 'ann', NULL, '2026-01-01 00:00:00.000000')",
        "a row that votes does not have",
    ),
    "a withdrawal names no table": (
        "INSERT INTO withdrawals VALUES ('w', 'songs', 'gone', 'ann', NULL, '2026-01-01 00:00:00.000000')",
        "the table songs, which does not exist",
    ),
    "a reference leads nowhere": ("DELETE FROM models", "the row left of answers has a model_id that models does not"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_broken_law_is_told(collection, tmp_path, case):
    statement, sentence = BROKEN[case]
    path = shutil.copy(collection, tmp_path)
    with sqlite3.connect(path) as connection:  # which checks no references
        assert connection.execute(statement).rowcount > 0
    connection.close()
    with Store(path) as store, store.reading() as session:
        found = broken_laws(session, SETTINGS, NOON + timedelta(days=1))
        assert any(sentence in law for law in found), found
