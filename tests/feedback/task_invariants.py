"""What is true of trees and tasks at every moment, checked row by row without the queries of the rules."""

import math
from collections import Counter, defaultdict

from sqlalchemy import select

from palm_rlhf.feedback.store.learning_tables import Withdrawal
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Task, Tree, TreeEvent, TreeMessage

REPLIES = {"reply_as_user": "prompter", "reply_as_assistant": "assistant"}
STATES = {
    None: ("initial_prompt_review",),
    "initial_prompt_review": ("growing", "aborted_low_grade", "halted_by_moderator"),
    "growing": ("ranking", "halted_by_moderator"),
    "ranking": ("ready_for_export", "halted_by_moderator"),
    "ready_for_export": ("exported", "halted_by_moderator"),
    "exported": ("halted_by_moderator",),
    "halted_by_moderator": ("initial_prompt_review", "growing", "ranking", "ready_for_export"),  # opened again
}


class Rows:
    """All rows that the rules of tasks are about; rows of imported files are left out."""

    def __init__(self, session):
        gone = {(row.table, row.row_id) for row in session.scalars(select(Withdrawal))}
        self.trees = {tree.id: tree for tree in session.scalars(select(Tree)) if tree.source == "people"}
        self.messages = {row.id: row for row in session.scalars(select(TreeMessage)) if row.tree_id in self.trees}
        self.reviews = [row for row in session.scalars(select(MessageReview)) if row.message_id in self.messages]
        self.rankings = [row for row in session.scalars(select(ReplyRanking)) if row.parent_id in self.messages]
        self.tasks = {row.id: row for row in session.scalars(select(Task))}
        self.events = defaultdict(list)
        for event in session.scalars(select(TreeEvent)):
            self.events[event.tree_id].append(event)
        self.gone = {row_id for _, row_id in gone}

    def is_dead(self, message):
        """Whether a message, or one above it, was withdrawn or refused."""
        while message is not None:
            if message.id in self.gone or message.accepted is False:
                return True
            message = self.messages.get(message.parent_id)
        return False

    def replies(self, message):
        return [row for row in self.messages.values() if row.parent_id == message.id]


def violations(session, settings, now):
    """Every invariant that is broken, in words."""
    rows = Rows(session)
    return [
        *_slots(rows, settings, now),
        *_own_and_twice(rows, settings),
        *_contributions(rows),
        *_verdicts(rows, settings),
        *_trees(rows, settings, now),
    ]


def _open(rows, now, kind, message_id):
    return sum(
        task.kind == kind and task.message_id == message_id and task.outcome is None and task.expires_at > now
        for task in rows.tasks.values()
    )


def _slots(rows, settings, now):
    """No message has more reviews, rankings or replies, together with open tasks for some, than it needs."""
    reviews = Counter(row.message_id for row in rows.reviews if row.id not in rows.gone)
    rankings = Counter(row.parent_id for row in rows.rankings if row.id not in rows.gone)
    for key, message in rows.messages.items():
        kind = "label_prompt" if message.parent_id is None else "label_reply"
        if (number := reviews[key] + _open(rows, now, kind, key)) > settings.num_reviews:
            yield f"{key} has {number} reviews, open ones included"
        if (number := rankings[key] + _open(rows, now, "rank_replies", key)) > settings.num_rankings:
            yield f"{key} has {number} rankings, open ones included"
        of_people = [row for row in rows.replies(message) if row.model_id is None and not rows.is_dead(row)]
        of_models = [row for row in rows.replies(message) if row.model_id is not None and not rows.is_dead(row)]
        kind, most = ("reply_as_assistant", settings.max_children)
        if message.role == "assistant":
            kind, most = ("reply_as_user", settings.max_user_replies)
        if (number := len(of_people) + _open(rows, now, kind, key)) > most:
            yield f"{key} has {number} replies of people, open ones included"
        if len(of_models) > (settings.num_model_replies if message.role == "prompter" else 0):
            yield f"{key} has {len(of_models)} replies of the model"
        if message.depth > settings.max_depth:
            yield f"{key} is {message.depth} deep"
    for tree in rows.trees.values():
        size = sum(row.tree_id == tree.id and not rows.is_dead(row) for row in rows.messages.values())
        size += sum(_open(rows, now, kind, key) for kind in REPLIES for key in _messages_of(rows, tree))
        if size > settings.max_tree_size:
            yield f"the tree {tree.id} has {size} messages, open tasks included"


def _messages_of(rows, tree):
    return [key for key, row in rows.messages.items() if row.tree_id == tree.id]


def _own_and_twice(rows, settings):
    """Nobody reviews, answers or ranks their own messages, or does anything twice."""
    pairs = Counter()
    for review in rows.reviews:
        pairs["review", review.message_id, review.person_id] += 1
        if rows.messages[review.message_id].person_id == review.person_id and not settings.allow_own:
            yield f"{review.person_id} reviewed their own message"
    for ranking in rows.rankings:
        pairs["ranking", ranking.parent_id, ranking.person_id] += 1
        authors = {rows.messages[reply].person_id for reply in ranking.shown}
        if ranking.person_id in authors and not settings.allow_own:
            yield f"{ranking.person_id} ranked their own reply"
        if sorted(ranking.shown) != sorted(ranking.best_first) or len(set(ranking.shown)) < len(ranking.shown):
            yield f"the ranking {ranking.id} is not an order of the replies that were shown"
    for message in rows.messages.values():
        if message.parent_id is not None and message.person_id is not None:
            pairs["reply", message.parent_id, message.person_id] += 1
            if rows.messages[message.parent_id].person_id == message.person_id and not settings.allow_own:
                yield f"{message.person_id} answered their own message"
    yield from (f"{pair} was done {number} times" for pair, number in pairs.items() if number > 1)
    open_kinds = Counter(
        (task.kind, task.person_id, task.language, task.message_id)
        for task in rows.tasks.values()
        if task.outcome is None
    )
    yield from (f"{key} is open {number} times" for key, number in open_kinds.items() if number > 1)


def _contributions(rows):
    """A task that is done has one contribution of its person, and no other task has any."""
    made = Counter()
    for row in (*rows.messages.values(), *rows.reviews, *rows.rankings):
        if row.task_id is None:
            if getattr(row, "model_id", None) is None:
                yield f"the contribution {row.id} comes from no task"
            continue
        task = rows.tasks[row.task_id]
        made[task.id] += 1
        about = row.parent_id if isinstance(row, (TreeMessage, ReplyRanking)) else row.message_id
        if (task.person_id, task.message_id) != (row.person_id, about):
            yield f"the contribution {row.id} is not of its task"
    for task in rows.tasks.values():
        if task.outcome not in (None, "done", "skipped", "expired", "cancelled"):
            yield f"the task {task.id} has the outcome {task.outcome}"
        if made[task.id] != (task.outcome == "done"):
            yield f"the task {task.id} is {task.outcome}, with {made[task.id]} contributions"
        if (task.outcome is None) != (task.closed_at is None):
            yield f"the task {task.id} is {task.outcome}, closed at {task.closed_at}"


def _verdicts(rows, settings):
    """A message of a person is accepted by the mean of its reviews alone, and only once it has them all."""
    for key, message in rows.messages.items():
        if message.model_id is not None or any(row.id in rows.gone for row in rows.reviews):
            continue  # a withdrawn review leaves the verdict as it was
        labels = [row.labels for row in rows.reviews if row.message_id == key]
        above = rows.messages.get(message.parent_id)
        if message.accepted is False and above is not None and rows.is_dead(above):
            continue  # it left the tree with the message above it
        if message.accepted is None:
            if len(labels) >= settings.num_reviews:
                yield f"{key} has its reviews and no verdict"
        elif len(labels) == settings.num_reviews:
            spam = math.fsum(each["spam"] for each in labels) / len(labels)
            strange = math.fsum(each["lang_mismatch"] for each in labels) / len(labels)
            if message.accepted is not (1 - (spam + strange) > settings.min_acceptance):
                yield f"{key} is accepted: {message.accepted}, with spam {spam} and language {strange}"
        else:
            yield f"{key} has the verdict {message.accepted} after {len(labels)} reviews"


def _trees(rows, settings, now):
    """Trees go through their states in order, and are what their state says."""
    for tree in rows.trees.values():
        events = rows.events[tree.id]
        states = [event.state for event in sorted(events, key=lambda event: (event.at, _order(event.state)))]
        for before, after in zip([None, *states], states):
            if after not in STATES.get(before, ()):
                yield f"the tree {tree.id} went from {before} to {after}"
        if states[-1:] != [tree.state]:
            yield f"the tree {tree.id} is {tree.state}, and its last event {states[-1:]}"
        messages = [rows.messages[key] for key in _messages_of(rows, tree)]
        roots = [message for message in messages if message.parent_id is None]
        if len(roots) != 1:
            yield f"the tree {tree.id} has {len(roots)} prompts"
        for message in messages:
            above = rows.messages.get(message.parent_id)
            expected = (0, "prompter") if above is None else (above.depth + 1, _answer(above.role))
            if (message.depth, message.role) != expected:
                yield f"{message.id} is {message.depth, message.role}, expected {expected}"
        if tree.state in ("ready_for_export", "exported"):
            yield from _ranks(rows, settings, messages)
        if tree.state in ("ready_for_export", "exported", "aborted_low_grade", "halted_by_moderator"):
            if any(task.tree_id == tree.id and task.outcome is None for task in rows.tasks.values()):
                yield f"the tree {tree.id} is {tree.state} and has open tasks"
    growing = Counter(
        tree.language for tree in rows.trees.values() if tree.state in ("initial_prompt_review", "growing")
    )
    for task in rows.tasks.values():
        if task.kind == "write_prompt" and task.outcome is None and task.expires_at > now:
            growing[task.language] += 1
    for language, number in growing.items():
        if number > settings.max_open_trees:
            yield f"{number} trees of {language} are open, open tasks included"


def _order(state):
    return [*STATES, "aborted_low_grade"].index(state)


def _answer(role):
    return "assistant" if role == "prompter" else "prompter"


def _ranks(rows, settings, messages):
    for message in messages:
        replies = [row for row in rows.replies(message) if row.role == "assistant" and row.accepted]
        replies = [row for row in replies if not rows.is_dead(row)]
        if len(replies) < settings.min_replies_to_rank:
            continue
        ranks = sorted(reply.rank for reply in replies if reply.rank is not None)
        if ranks != list(range(len(replies))):
            yield f"the replies to {message.id} have the ranks {ranks}"
