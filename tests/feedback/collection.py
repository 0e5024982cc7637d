"""A collection of the tests: a clock that is set by hand, people, and short ways to hand in tasks."""

import random
from datetime import datetime, timedelta, timezone

from sqlalchemy import select

from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import Task, Tree, TreeMessage
from palm_rlhf.feedback.trees.states import halt
from palm_rlhf.feedback.trees.submissions import submit_labels, submit_ranking, submit_text
from palm_rlhf.feedback.trees.tasks import available, hand_out, skip
from tests.feedback.task_invariants import violations

START = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
FINE = {"spam": 0, "lang_mismatch": 0}
SPAM = {"spam": 1, "lang_mismatch": 0}


class Collection:
    """A store with people who work in it; each call is a transaction of its own."""

    def __init__(self, store, *names, **settings):
        self.store, self.now, self.rng = store, START, random.Random(0)
        self.settings = CollectionSettings(**{"num_model_replies": 0, **settings})
        self.people, self.texts = {}, 0
        for name in names:
            self.join(name)

    def join(self, name, role="contributor"):
        with self.store.writing() as session:
            self.people[name] = Participant(name=name, role=role)
            session.add(self.people[name])

    def wait(self, **duration):
        self.now += timedelta(**duration)

    def take(self, name, kind=None, language="en"):
        with self.store.writing() as session:
            person = self.people[name]
            return hand_out(session, person, self.settings, kind=kind, language=language, now=self.now, rng=self.rng)

    def available(self, name, language="en"):
        with self.store.reading() as session:
            return available(session, self.people[name], self.settings, language=language, now=self.now)

    def skip(self, name, task):
        with self.store.writing() as session:
            skip(session, task.id, self.people[name], self.now)

    def halt(self, name, tree_id, reason="off topic"):
        with self.store.writing() as session:
            halt(session, tree_id, self.people[name], reason, self.now)

    def write(self, name, task, text=None):
        self.texts += 1
        text = f"text {self.texts}" if text is None else text
        with self.store.writing() as session:
            return submit_text(session, task.id, self.people[name], text, self.settings, self.now)

    def label(self, name, task, labels=FINE):
        with self.store.writing() as session:
            return submit_labels(session, task.id, self.people[name], labels, self.settings, self.now)

    def rank(self, name, task, best_first=None):
        order = task.shown if best_first is None else best_first
        with self.store.writing() as session:
            return submit_ranking(session, task.id, self.people[name], order, self.settings, self.now)

    def prompt(self, name, text=None):
        """Let a person write a prompt; its message."""
        return self.write(name, self.take(name, "write_prompt"), text)

    def review(self, message, *names, labels=FINE):
        """Let people label one message, which they may be handed only after others: those are given back."""
        kind = "label_prompt" if message.parent_id is None else "label_reply"
        for name in names:
            self.label(name, self.take_on(name, kind, message.id), labels)

    def take_on(self, name, kind, message_id):
        """Hand a person the task of a kind on one message; tasks on others that come first have never been."""
        with self.store.writing() as session:
            for _ in range(1000):
                task = self.draw(session, name, kind)
                if task.message_id == message_id:
                    return task
                session.delete(task)
        raise AssertionError(f"{name} is handed no {kind} on {message_id}")

    def draw(self, session, name, kind=None):
        person = self.people[name]
        return hand_out(session, person, self.settings, kind=kind, language="en", now=self.now, rng=self.rng)

    def draws(self, number, name, kind=None):
        """The tasks that a person could be handed, so many times."""
        with self.store.writing() as session:
            for _ in range(number):
                task = self.draw(session, name, kind)
                session.delete(task)
                session.flush()
                yield task

    def reply(self, name, parent, text=None):
        kind = "reply_as_assistant" if parent.role == "prompter" else "reply_as_user"
        return self.write(name, self.take_on(name, kind, parent.id), text)

    def state(self, tree_id):
        with self.store.reading() as session:
            return session.get_one(Tree, tree_id).state

    def message(self, message_id):
        with self.store.reading() as session:
            return session.get_one(TreeMessage, message_id)

    def messages(self):
        with self.store.reading() as session:
            return list(session.scalars(select(TreeMessage).order_by(TreeMessage.created_at, TreeMessage.id)))

    def task(self, task_id):
        with self.store.reading() as session:
            return session.get_one(Task, task_id)

    def check(self):
        with self.store.reading() as session:
            assert violations(session, self.settings, self.now) == []
