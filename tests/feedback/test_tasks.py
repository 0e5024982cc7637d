"""Tasks: for whom there are some, when they are taken, and when they come back."""

from collections import Counter
from datetime import timedelta

import pytest

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.withdrawals import withdraw
from palm_rlhf.feedback.trees.tasks import waiting_for_others
from tests.feedback.collection import SPAM, Collection

NOTHING = dict.fromkeys(
    ("write_prompt", "label_prompt", "reply_as_user", "reply_as_assistant", "label_reply", "rank_replies"), 0
)


@pytest.fixture
def three(store):
    """A collection of three people, with a prompt of the first."""
    collection = Collection(store, "ann", "bob", "cy", "dee", num_reviews=2, max_open_trees=1, max_children=2)
    collection.tree = collection.prompt("ann").tree_id
    return collection


def accepted(collection, name="ann"):
    """A prompt that two others have accepted."""
    prompt = collection.messages()[0]
    collection.review(prompt, "bob", "cy")
    return prompt


def test_prompts_are_asked_for_up_to_the_most_open_trees_of_each_language(store):
    collection = Collection(store, "ann", "bob", "cy", max_open_trees=2)
    assert collection.available("ann") == {**NOTHING, "write_prompt": 2}
    first, second = collection.take("ann", "write_prompt"), collection.take("bob", "write_prompt")
    assert (first.message_id, second.message_id, first.tree_id) == (None, None, None)
    assert collection.take("cy", "write_prompt") is None
    assert collection.take("cy", "write_prompt", "zh") is not None
    collection.write("ann", first)
    assert collection.take("cy", "write_prompt") is None
    collection.wait(hours=2)  # bob's task expires
    assert collection.take("cy", "write_prompt").id != second.id
    assert collection.take("bob", "write_prompt") is None


def test_a_prompt_is_labelled_by_others_each_once_and_by_no_more_than_are_needed(three):
    assert three.available("ann") == NOTHING
    assert three.available("bob") == {**NOTHING, "label_prompt": 1}
    bob, cy = three.take("bob"), three.take("cy", "label_prompt")
    assert (bob.kind, bob.tree_id) == ("label_prompt", three.tree)
    assert three.take("dee") is None and three.available("dee") == NOTHING
    three.label("bob", bob)
    assert three.take("bob") is None and three.take("dee") is None
    three.label("cy", cy)
    assert three.state(three.tree) == "growing"


def test_whoever_holds_a_task_gets_it_again(three):
    task = three.take("bob")
    three.wait(minutes=30)
    assert three.take("bob").id == three.take("bob", "label_prompt").id == task.id
    assert three.available("bob") == {**NOTHING, "label_prompt": 1}
    assert three.take("bob", "write_prompt") is None


def test_an_expired_task_goes_to_others_first(three):
    late = three.take("bob")
    three.label("cy", three.take("cy"))
    assert three.take("dee") is None
    three.wait(hours=2, seconds=-1)
    assert three.take("dee") is None
    three.wait(seconds=1)
    assert three.take("bob") is None and three.available("bob") == NOTHING
    assert three.task(late.id).outcome == "expired"
    assert three.task(late.id).closed_at == late.expires_at
    task = three.take("dee")
    assert task.message_id == late.message_id
    three.skip("dee", task)
    three.wait(hours=2, seconds=-1)
    assert three.available("bob") == NOTHING and three.take("dee") is None
    three.wait(seconds=1)
    assert three.available("bob")["label_prompt"] == three.available("dee")["label_prompt"] == 1


def test_what_an_expired_task_of_somebody_holds_is_free_before_anybody_closes_it(three):
    three.take("bob"), three.take("cy")
    three.wait(hours=2)
    assert three.available("dee") == {**NOTHING, "label_prompt": 1}


def test_a_late_form_counts_while_its_place_is_free_and_is_refused_afterwards(three):
    late, cy = three.take("bob"), three.take("cy")
    three.wait(hours=3)
    three.take("dee")  # closes the expired ones, and takes one of both places
    three.label("bob", late)
    assert three.task(late.id).outcome == "done"
    with pytest.raises(FeedbackError, match="no longer needed") as refused:
        three.label("cy", cy)
    assert refused.value.status == 409
    three.check()


def test_a_late_form_does_not_count_beside_the_same_task_of_the_same_person(three):
    late = three.take("bob")
    three.wait(hours=4)
    again = three.take("bob")
    assert again.id != late.id
    with pytest.raises(FeedbackError, match="no longer needed"):
        three.label("bob", late)
    three.label("bob", again)
    with pytest.raises(FeedbackError, match="no longer needed"):
        three.label("bob", late)
    three.check()


def test_replies_are_asked_of_others_each_once_up_to_the_most_children(three):
    prompt = accepted(three)
    assert three.available("ann") == NOTHING  # it is her own prompt
    three.reply("bob", prompt)
    assert three.available("bob") == NOTHING
    assert three.available("cy") == {**NOTHING, "reply_as_assistant": 1, "label_reply": 1}
    three.reply("cy", prompt)
    assert three.available("dee") == {**NOTHING, "label_reply": 2}
    assert three.available("ann") == {**NOTHING, "label_reply": 2}


def test_an_open_reply_holds_its_place(three):
    prompt = accepted(three)
    three.take("bob", "reply_as_assistant"), three.reply("cy", prompt)
    assert three.take("dee", "reply_as_assistant") is None
    three.wait(hours=2)
    assert three.take("dee", "reply_as_assistant") is not None


def test_a_refused_reply_is_not_answered_and_its_place_is_free(three):
    prompt = accepted(three)
    bad, good = three.reply("bob", prompt), three.reply("cy", prompt)
    three.review(bad, "ann", "cy", labels=SPAM)
    three.review(good, "ann", "bob")
    assert three.message(bad.id).accepted is False
    assert three.available("dee") == {**NOTHING, "reply_as_assistant": 1, "reply_as_user": 1}
    assert three.available("bob") == {**NOTHING, "reply_as_user": 1}
    assert three.take("bob").message_id == good.id


def test_a_tree_has_no_more_messages_than_its_size(store):
    collection = Collection(store, "ann", "bob", "cy", "dee", num_reviews=1, max_tree_size=2, max_open_trees=1)
    prompt = collection.prompt("ann")
    collection.review(prompt, "bob")
    collection.take("bob", "reply_as_assistant")
    assert collection.available("cy") == NOTHING
    collection.wait(hours=2)
    collection.reply("cy", prompt)
    assert collection.available("dee") == {**NOTHING, "label_reply": 1}


def test_messages_at_the_greatest_depth_are_not_answered(store):
    collection = Collection(store, "ann", "bob", "cy", num_reviews=1, max_depth=1, max_open_trees=1)
    prompt = collection.prompt("ann")
    collection.review(prompt, "bob")
    collection.review(collection.reply("bob", prompt), "ann")
    assert collection.available("cy") == {**NOTHING, "reply_as_assistant": 1}


def test_nobody_ranks_their_own_reply_and_the_order_is_shuffled_and_kept(store):
    names = ["ann", "bob", "cy", "dee", *"123456789"]
    collection = Collection(store, *names, num_reviews=1, max_depth=1, num_rankings=9, max_open_trees=1, max_children=3)
    prompt = collection.prompt("ann")
    collection.review(prompt, "bob")
    replies = [collection.reply(name, prompt) for name in ("bob", "cy", "dee")]
    for reply in replies:
        collection.review(reply, "ann")
    assert collection.state(prompt.tree_id) == "ranking"
    assert all(collection.take(name, "rank_replies") is None for name in ("bob", "cy", "dee"))
    tasks = [collection.take(name, "rank_replies") for name in ("ann", *"12345678")]  # the prompt may be her own
    assert collection.take("9", "rank_replies") is None  # the open ones are all that are needed
    assert all(sorted(task.shown) == sorted(reply.id for reply in replies) for task in tasks)
    assert len({tuple(task.shown) for task in tasks}) > 3
    assert collection.task(tasks[0].id).shown == tasks[0].shown


def test_one_person_goes_all_the_way_with_their_own_messages(store):
    collection = Collection(
        store, "ann", num_reviews=1, num_rankings=1, max_children=1, allow_own=True, max_open_trees=1, max_tree_size=4
    )
    kinds = Counter()
    for _ in range(20):
        task = collection.take("ann")
        if task is None or (task.kind == "write_prompt" and kinds["write_prompt"]):
            break
        kinds[task.kind] += 1
        collection.write("ann", task) if "label" not in task.kind else collection.label("ann", task)
    assert kinds == {
        "write_prompt": 1,
        "label_prompt": 1,
        "reply_as_assistant": 2,
        "reply_as_user": 1,
        "label_reply": 3,
    }
    collection.check()


def test_what_waits_for_others_is_said(three):
    def waiting(name):
        with three.store.reading() as session:
            return waiting_for_others(session, three.people[name], three.settings, language="en", now=three.now)

    assert waiting("ann") == {**NOTHING, "label_prompt": 1}
    assert waiting("bob") == NOTHING
    three.take("bob"), three.take("cy")
    assert waiting("ann") == NOTHING


def test_tasks_are_drawn_by_open_assistants_weights(store):
    collection = Collection(store, "ann", "bob", "cy", "dee", num_reviews=1, max_tree_size=9, max_open_trees=3)
    grown, growing = collection.prompt("ann"), collection.prompt("ann")
    for prompt in (grown, growing):
        collection.review(prompt, "bob")
    collection.reply("bob", growing)
    drawn = Counter(task.kind for task in collection.draws(300, "dee"))
    # of 5 + 2 + 0.01: a label, a reply, a prompt
    assert {"label_reply", "reply_as_assistant"} <= set(drawn) <= {"label_reply", "reply_as_assistant", "write_prompt"}
    assert drawn["write_prompt"] < 10
    assert drawn["label_reply"] / 300 == pytest.approx(5 / 7.01, abs=0.07)
    assert drawn["reply_as_assistant"] / 300 == pytest.approx(2 / 7.01, abs=0.07)


def test_a_message_with_one_reply_is_answered_before_others(store):
    collection = Collection(store, "ann", "bob", "cy", "dee", num_reviews=1, max_open_trees=3)
    lonely, *others = [collection.prompt("ann") for _ in range(3)]
    for prompt in (lonely, *others):
        collection.review(prompt, "bob")
    collection.review(collection.reply("bob", lonely), "ann")
    drawn = Counter(task.message_id for task in collection.draws(200, "dee", "reply_as_assistant"))
    assert drawn[lonely.id] / 200 == pytest.approx(0.75 + 0.25 / 3, abs=0.07)
    assert len(drawn) == 3


def test_a_person_is_handed_so_many_tasks_in_an_hour(store):
    collection = Collection(store, "ann", "bob", max_tasks_per_hour=3, max_open_trees=10)
    for _ in range(3):
        collection.prompt("ann")
        collection.wait(minutes=10)
    with pytest.raises(FeedbackError, match="3 tasks in an hour") as refused:
        collection.take("ann")
    assert refused.value.status == 429
    assert collection.take("bob") is not None
    collection.wait(minutes=31)
    assert collection.take("ann") is not None


@pytest.mark.parametrize("words", [{"kind": "dance"}, {"language": "tlh"}])
def test_unknown_kinds_and_languages_are_refused(three, words):
    with pytest.raises(FeedbackError, match="expected one of"):
        three.take("bob", **words)


def test_skipping_is_for_the_holder_of_an_open_task(three):
    task = three.take("bob")
    with pytest.raises(FeedbackError, match="somebody else") as refused:
        three.skip("cy", task)
    assert refused.value.status == 403
    three.skip("bob", task)
    with pytest.raises(FeedbackError, match="closed already: skipped") as refused:
        three.skip("bob", task)
    assert refused.value.status == 409
    task.id = "none"
    with pytest.raises(FeedbackError, match="'none', expected the id of a task") as refused:
        three.skip("bob", task)
    assert refused.value.status == 404


def test_a_moderator_halts_a_tree_and_its_open_tasks(three):
    three.join("mo", "moderator")
    task = three.take("bob")
    with pytest.raises(FeedbackError, match="expected a moderator"):
        three.halt("cy", three.tree)
    with pytest.raises(FeedbackError, match="no reason"):
        three.halt("mo", three.tree, " ")
    three.halt("mo", three.tree)
    assert three.state(three.tree) == "halted_by_moderator"
    assert three.available("cy") == {**NOTHING, "write_prompt": 1}
    with pytest.raises(FeedbackError, match="was stopped, or went on") as refused:
        three.label("bob", task)
    assert refused.value.status == 409
    with pytest.raises(FeedbackError, match="ended already"):
        three.halt("mo", three.tree)
    three.check()


def test_a_withdrawn_review_is_asked_for_again(three):
    review = three.label("bob", three.take("bob"))
    three.take("cy")
    assert three.available("dee") == NOTHING
    with three.store.writing() as session:
        withdraw(session, review, three.people["bob"].id, now=three.now)
    assert three.available("dee") == {**NOTHING, "label_prompt": 1}
    assert three.available("bob") == NOTHING


def test_the_time_of_a_task_is_a_setting(store):
    collection = Collection(store, "ann", task_timeout=timedelta(minutes=7))
    task = collection.take("ann")
    assert task.expires_at - task.handed_at == timedelta(minutes=7)
    assert task.handed_at == collection.now
