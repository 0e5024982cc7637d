"""Deleting a person, with and without the contributions; and what a database holds about one."""

import json
from datetime import datetime, timezone

import pytest
from sqlalchemy import select

from palm_rlhf.feedback.people.accounts import add_person, live_session, open_session
from palm_rlhf.feedback.people.deletion import delete_person
from palm_rlhf.feedback.people.invitations import invite
from palm_rlhf.feedback.people.personal_data import personal_data, refers_to_people
from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import (
    Answer,
    AnswerScore,
    ComparisonVote,
    Correction,
    KnownModel,
    Reaction,
    ShownComparison,
)
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.kept_trees import kept_trees
from palm_rlhf.feedback.store.learning_tables import Round, Withdrawal
from palm_rlhf.feedback.store.people_tables import Invitation, Participant
from palm_rlhf.feedback.store.preferences_view import iter_preferences
from palm_rlhf.feedback.store.table_base import Base
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, Tree, TreeMessage

NOW = datetime(2026, 5, 1, 12, tzinfo=timezone.utc)
SETTINGS = CollectionSettings(num_model_replies=0)
CODE = "xyzzy"  # in every text of Alice


class Collection:
    """A scored tree of Alice's and Bob's, a chat of Alice's, and an answer of a round to Alice's prompt."""

    def __init__(self, session):
        self.session = session
        self.alice, self.bob, self.root = (
            add_person(session, name, role, NOW)
            for name, role in (("Alice", "contributor"), ("Bob", "contributor"), ("Root", "admin"))
        )
        self.alice.password_hash, self.root.password_hash, self.alice.language = "hash", "hash", "en"
        self.login = open_session(session, self.alice, NOW)
        session.add(KnownModel(id="m" * 64, name="tiny"))
        self.trees = [Tree(language="en", state="ready_for_export") for _ in range(2)]
        session.add_all(self.trees)
        session.flush()
        self.prompt = self.message(0, None, "prompter", f"{CODE} prompt?", self.alice)
        self.replies = [self.message(0, self.prompt, "assistant", text, self.bob) for text in ("good", "bad")]
        self.bobs = self.message(1, None, "prompter", "Bob's prompt", self.bob)
        self.mixed = [
            self.message(1, self.bobs, "assistant", text, person)
            for text, person in ((f"{CODE} reply", self.alice), ("one", self.bob), ("two", self.root))
        ]
        self.mixed[0].rank, self.mixed[1].rank, self.mixed[2].rank = 0, 1, 2
        ids = [message.id for message in self.mixed]
        self.ranking(self.alice, ids)
        self.ranking(self.root, [ids[2], ids[0], ids[1]])
        session.add(MessageReview(message_id=self.mixed[1].id, person_id=self.alice.id, labels={"spam": 0.0}))
        task = {"kind": "rank_replies", "person_id": self.alice.id, "message_id": self.prompt.id, "language": "en"}
        self.task = Task(**task, expires_at=NOW)
        session.add(self.task)
        self.chat = [self.answer(f"{CODE} chat", text, "chat", self.alice) for text in ("left", "right")]
        self.pool = [self.answer(f"{CODE} prompt?", text, "training", None) for text in ("first", "second")]
        self.other = [self.answer("of a file", text, "training", None) for text in ("third", "fourth")]
        round_ = Round(number=1, base_model_id="m" * 64, settings={})
        session.add(round_)
        session.flush()
        session.add(AnswerScore(answer_id=self.chat[0].id, round_id=round_.id, score=1.0))
        session.add(Reaction(answer_id=self.chat[0].id, person_id=self.alice.id, value=1))
        correction = Correction(answer_id=self.chat[0].id, person_id=self.alice.id, text=f"{CODE} better")
        session.add(correction)
        session.flush()
        session.add(Withdrawal(table="corrections", row_id=correction.id, person_id=self.alice.id))
        self.vote(self.alice, self.chat)
        self.vote(self.alice, self.other)
        self.vote(self.bob, self.pool)
        self.vote(self.bob, self.other)
        invite(session, "contributor", NOW, created_by=self.alice)
        session.flush()

    def message(self, tree, parent, role, text, person):
        depth = 0 if parent is None else parent.depth + 1
        fields = {"parent_id": parent and parent.id, "role": role, "text": text, "depth": depth, "accepted": True}
        row = TreeMessage(tree_id=self.trees[tree].id, language="en", person_id=person.id, **fields)
        self.session.add(row)
        self.session.flush()
        return row

    def ranking(self, person, ids):
        fields = {"parent_id": self.bobs.id, "shown": sorted(ids), "best_first": ids}
        self.session.add(ReplyRanking(person_id=person.id, **fields))

    def answer(self, prompt, text, purpose, person):
        messages = [{"role": "user", "content": prompt}]
        row = Answer(
            prompt_key=prompt_key_of(messages),
            prompt=messages,
            text=text,
            model_id="m" * 64,
            sampling={},
            purpose=purpose,
            person_id=person and person.id,
        )
        self.session.add(row)
        self.session.flush()
        return row

    def vote(self, person, answers):
        left, right = answers
        shown = ShownComparison(
            prompt_key=left.prompt_key,
            left_id=left.id,
            right_id=right.id,
            person_id=person.id,
            chosen_by="random",
            purpose="training",
        )
        self.session.add(shown)
        self.session.flush()
        self.session.add(ComparisonVote(comparison_id=shown.id, person_id=person.id, verdict="left"))


def dump(session) -> str:
    """All rows of all tables."""
    tables = list(Base.metadata.sorted_tables)
    return json.dumps([[list(map(str, row)) for row in session.execute(select(table))] for table in tables])


def delete(session, collection, **options):
    return delete_person(session, collection.alice.id, NOW, SETTINGS, by=collection.root, **options)


def of_alice(session, collection, table):
    return session.scalars(select(table).where(table.person_id == collection.alice.id)).all()


def test_a_deleted_person_s_contributions_are_kept_without_the_name(any_store):
    with any_store.writing() as session:
        collection = Collection(session)
        before = [(each.kind, each.responses) for each in iter_preferences(session)]
        delete(session, collection, keeps_contributions=True)
    with any_store.reading() as session:
        gone = session.get(Participant, collection.alice.id)
        assert (gone.name, gone.name_key, gone.password_hash, gone.language) == ("", None, None, None)
        assert (gone.role, gone.deleted_at) == ("contributor", NOW)
        assert "Alice" not in dump(session) and CODE in dump(session)
        assert live_session(session, collection.login.id, NOW) is None
        assert session.get(Task, collection.task.id).outcome == "cancelled"
        assert session.scalars(select(Invitation.expires_at)).one() == NOW
        assert [(each.kind, each.responses) for each in iter_preferences(session)] == before
        assert len(before) == 5  # one ranking, Alice's two votes and Bob's two
    with any_store.writing() as session:
        add_person(session, "alice", "contributor", NOW)  # the name is free again
        with pytest.raises(FeedbackError, match="no such person"):
            delete(session, collection, keeps_contributions=True)


def test_a_deleted_person_s_contributions_are_removed(any_store):
    with any_store.writing() as session:
        collection = Collection(session)
        delete(session, collection, keeps_contributions=False)
    with any_store.reading() as session:
        found = dump(session)
        assert CODE not in found and "Alice" not in found  # not in any column of any table
        for table in (ComparisonVote, Reaction, Correction, MessageReview, ReplyRanking, Answer, ShownComparison):
            assert of_alice(session, collection, table) == [], table
        [tree] = [root for _, root in kept_trees(session)]  # Alice's prompt took its tree along
        assert [message.row.text for message in tree.walk()] == ["Bob's prompt", "two", "one"]
        ranks = {
            row.text: row.rank
            for row in session.scalars(select(TreeMessage).where(TreeMessage.parent_id == tree.row.id))
        }
        assert ranks["two"] < ranks["one"]  # by Root's ranking, the only one left
        left = [(each.kind, each.responses) for each in iter_preferences(session)]
        assert left == [("tree", ("two", "one")), ("comparison", ("third", "fourth"))]
        assert session.get(Tree, collection.trees[0].id).state == "halted_by_moderator"
        gone = set(session.scalars(select(Withdrawal.row_id)))
        assert {collection.prompt.id, collection.mixed[0].id} | {answer.id for answer in collection.pool} == gone


def test_a_person_reads_everything_that_is_kept(any_store):
    with any_store.writing() as session:
        collection = Collection(session)
    with any_store.reading() as session:
        alice = session.get_one(Participant, collection.alice.id)
        found = personal_data(session, alice)
        assert {name: len(rows) for name, rows in found.items()} == {
            "people": 1,
            "answers": 2,
            "comparisons": 2,
            "corrections": 1,
            "invitations (created_by)": 1,
            "messages": 2,
            "rankings": 1,
            "reactions": 1,
            "reviews": 1,
            "sessions": 1,
            "tasks": 1,
            "votes": 2,
            "withdrawals": 1,
        }
        text = json.dumps(found)
        assert "hash" not in text.replace("prompt_key", "") and collection.login.id not in text
        assert f"{CODE} better" in text and "Bob" not in text


def test_every_column_that_refers_to_a_person_is_thought_of():
    """A new one has to be dealt with in `delete_person`, and then named here."""
    columns = {
        f"{table.name}.{column.name}"
        for table in Base.metadata.sorted_tables
        for column in table.columns
        if refers_to_people(column)
    }
    removed = {"answers", "comparisons", "corrections", "messages", "rankings", "reactions", "reviews", "votes"}
    kept = {"invitations.created_by", "invitations.used_by", "sessions.person_id", "tasks.person_id"}
    moderators = {"tree_events.person_id", "withdrawals.person_id"}
    assert columns == {f"{table}.person_id" for table in removed} | kept | moderators
