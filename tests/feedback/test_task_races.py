"""People at the same moment, each by a connection of their own as in several processes: nobody gets a slot too many."""

import threading
from contextlib import ExitStack

import pytest

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.trees.submissions import submit_labels
from palm_rlhf.feedback.trees.tasks import hand_out
from tests.feedback.collection import FINE, Collection

NAMES = tuple(f"person {number}" for number in range(6))


def at_once(store, calls):
    """What each call gives, in a transaction of its own store, all begun together: a value or a refusal."""
    barrier, results = threading.Barrier(len(calls)), [None] * len(calls)

    def run(place, own, call):
        barrier.wait()
        try:
            with own.writing() as session:
                results[place] = call(session)
        except FeedbackError as error:
            results[place] = error

    with ExitStack() as stack:
        stores = [stack.enter_context(Store(store.url)) for _ in calls]
        threads = [
            threading.Thread(target=run, args=(place, own, call))
            for place, (own, call) in enumerate(zip(stores, calls, strict=True))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results


def taking(collection, kind):
    """A call for each person that takes a task of a kind."""

    def call(person):
        return lambda session: hand_out(
            session, person, collection.settings, kind=kind, language="en", now=collection.now, rng=collection.rng
        )

    return [call(collection.people[name]) for name in NAMES]


@pytest.fixture
def collection(any_store):
    return Collection(any_store, "ann", *NAMES, num_reviews=2, max_children=2, max_open_trees=2)


def test_two_reviews_go_to_two_people(collection):
    collection.prompt("ann")
    tasks = at_once(collection.store, taking(collection, "label_prompt"))
    assert sum(task is not None for task in tasks) == 2
    collection.check()


def test_two_replies_and_the_last_prompt_go_to_so_many_people(collection):
    prompt = collection.prompt("ann")
    collection.review(prompt, *NAMES[:2])
    assert sum(task is not None for task in at_once(collection.store, taking(collection, "reply_as_assistant"))) == 2
    assert sum(task is not None for task in at_once(collection.store, taking(collection, "write_prompt"))) == 1
    collection.check()


def test_of_two_late_forms_for_one_place_one_counts(collection):
    prompt = collection.prompt("ann")
    late = [collection.take(name, "label_prompt") for name in NAMES[:2]]
    collection.wait(hours=2)
    collection.review(prompt, NAMES[2])

    def sending(name, task):
        person = collection.people[name]
        return lambda session: submit_labels(session, task.id, person, FINE, collection.settings, collection.now)

    results = at_once(collection.store, [sending(name, task) for name, task in zip(NAMES, late)])
    assert sum(isinstance(result, FeedbackError) for result in results) == 1
    assert collection.message(prompt.id).accepted is True
    collection.check()


def test_one_form_sent_twice_at_once_counts_once(collection):
    prompt = collection.prompt("ann")
    task = collection.take(NAMES[0], "label_prompt")
    person = collection.people[NAMES[0]]
    calls = [lambda session: submit_labels(session, task.id, person, FINE, collection.settings, collection.now)] * 4
    results = at_once(collection.store, calls)
    assert sorted(isinstance(result, FeedbackError) for result in results) == [False, True, True, True]
    assert collection.message(prompt.id).accepted is None
    collection.check()
