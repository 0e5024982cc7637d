"""Several people, a moderator and a model grow trees in any order: what must hold is checked after every step."""

import random
import shutil
import uuid
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import select

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.answer_tables import KnownModel
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Tree, TreeMessage
from palm_rlhf.feedback.store.withdrawals import withdraw
from palm_rlhf.feedback.trees.model_replies import add_model_reply, messages_wanting_model_replies
from palm_rlhf.feedback.trees.states import OPEN_STATES
from palm_rlhf.feedback.trees.taking_back import settle_withdrawal
from palm_rlhf.feedback.trees.tasks import KINDS
from tests.feedback.collection import Collection

PEOPLE = ("ann", "bob", "cy", "dee")
TABLES = (TreeMessage, MessageReview, ReplyRanking)


class Trees(RuleBasedStateMachine):
    """A small collection; forms are sent once, twice, late, by others, and in disorder."""

    empty: Path
    folder: Path

    def __init__(self):
        super().__init__()
        self.store = Store(shutil.copy(self.empty, self.folder / f"{uuid.uuid4()}.db"))
        numbers = random.Random(0)  # the ids order what is drawn from: an example has to have the same ones each time
        self.ids = mock.patch("uuid.uuid4", lambda: uuid.UUID(int=numbers.getrandbits(128)))
        self.ids.start()

    @initialize(
        num_reviews=st.integers(1, 2),
        num_rankings=st.integers(1, 2),
        max_tree_size=st.integers(2, 6),
        max_children=st.integers(1, 3),
        max_depth=st.integers(1, 3),
        num_model_replies=st.integers(0, 1),
        allow_own=st.booleans(),
    )
    def begin(self, **chosen):
        self.collection = Collection(
            self.store, *PEOPLE, **chosen, max_open_trees=2, task_timeout=timedelta(minutes=30), languages=("en",)
        )
        self.collection.join("mo", "moderator")
        with self.store.writing() as session:
            session.add(KnownModel(id="m", name="model"))
        self.handed = []

    def teardown(self):
        self.ids.stop()
        self.store.close()

    @rule(name=st.sampled_from(PEOPLE), kind=st.sampled_from([None, *KINDS]), seed=st.integers(0, 9))
    def take(self, name, kind, seed):
        self.collection.rng = random.Random(seed)
        number = self.collection.available(name)
        task = self.collection.take(name, kind)
        assert (task is not None) == ((sum(number.values()) if kind is None else number[kind]) > 0)
        if task is not None:
            self.handed.append((name, task))

    @rule(
        name=st.sampled_from(PEOPLE),
        spam=st.sampled_from([0, 0, 0, 1]),
        backwards=st.booleans(),
        number=st.integers(1, 8),
    )
    def work(self, name, spam, backwards, number):
        """Let one person do what there is for them, task by task."""
        for _ in range(number):
            task = self.collection.take(name)
            if task is None:
                break
            self.handed.append((name, task))
            self._send(name, task, spam, backwards)

    @rule(data=st.data(), spam=st.sampled_from([0, 0, 0, 1]), backwards=st.booleans(), sender=st.sampled_from(PEOPLE))
    def hand_in(self, data, spam, backwards, sender):
        """Send a form of any task that was handed out, open or not, now and then as somebody else."""
        if self.handed:
            name, task = data.draw(st.sampled_from(self.handed))
            if data.draw(st.integers(0, 4)) == 0:
                name = sender
            before = self._rows()
            try:
                self._send(name, task, spam, backwards)
            except FeedbackError as error:
                assert error.status in (403, 409)
                assert self._rows() == before

    def _send(self, name, task, spam, backwards):
        if "label" in task.kind:
            self.collection.label(name, task, {"spam": spam, "lang_mismatch": 0})
        elif task.kind == "rank_replies":
            self.collection.rank(name, task, task.shown[::-1] if backwards else task.shown)
        else:
            self.collection.write(name, task)

    def _rows(self):
        with self.store.reading() as session:
            return [len(session.scalars(select(table)).all()) for table in TABLES]

    @rule(data=st.data())
    def skip(self, data):
        if self.handed:
            name, task = data.draw(st.sampled_from(self.handed))
            still_open = self.collection.task(task.id).outcome is None
            try:
                self.collection.skip(name, task)
                assert still_open
            except FeedbackError:
                assert not still_open

    @rule(minutes=st.sampled_from([1, 10, 29, 31, 61]))
    def wait(self, minutes):
        self.collection.wait(minutes=minutes)

    @rule(data=st.data())
    def halt(self, data):
        with self.store.reading() as session:
            trees = list(session.scalars(select(Tree.id).where(Tree.state.in_(OPEN_STATES)).order_by(Tree.created_at)))
        if len(trees) == 2:
            self.collection.halt("mo", data.draw(st.sampled_from(trees)))

    @rule(same=st.booleans())
    def reply_of_the_model(self, same):
        collection = self.collection
        with self.store.writing() as session:
            wanted = messages_wanting_model_replies(session, collection.settings, now=collection.now)
            for each in wanted[:1]:
                collection.texts += 1
                text = "the same" if same else f"text {collection.texts}"
                reply = add_model_reply(
                    session,
                    each.message_id,
                    text,
                    model_id="m",
                    sampling={},
                    settings=collection.settings,
                    now=collection.now,
                )
                assert reply is not None

    @rule(data=st.data(), table=st.sampled_from(TABLES))
    def take_back(self, data, table):
        with self.store.writing() as session:
            rows = list(session.scalars(select(table).order_by(table.created_at, table.id)))
            if len(rows) > 3:
                row = data.draw(st.sampled_from(rows))
                try:
                    withdraw(session, row, self.collection.people["mo"].id, now=self.collection.now)
                except FeedbackError:
                    return
                settle_withdrawal(session, row, self.collection.settings, self.collection.now)

    @invariant()
    def holds(self):
        if hasattr(self, "collection"):
            self.collection.check()


Trees.TestCase.settings = settings(  # to shrink a failure takes minutes
    max_examples=10, stateful_step_count=30, phases=(Phase.generate,)
)
TestTrees = Trees.TestCase


@pytest.fixture(autouse=True)
def files(migrated_file, tmp_path):
    Trees.empty, Trees.folder = migrated_file, tmp_path
