"""What people hand in: verdicts, ranks and states that follow from it, and what is refused."""

import pytest

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.store.tree_tables import ReplyRanking
from palm_rlhf.feedback.store.withdrawals import withdraw
from palm_rlhf.feedback.trees.labels import FLAGS, SCALES, acceptance, labels_of
from palm_rlhf.feedback.trees.states import mark_exported
from palm_rlhf.feedback.trees.taking_back import settle_withdrawal
from palm_rlhf.feedback.trees.task_view import task_view
from tests.feedback.collection import FINE, SPAM, Collection

FOREIGN = {"spam": 0, "lang_mismatch": 1}
BOTH = {"spam": 1, "lang_mismatch": 1}


def ranked(store, *ballots, names=("bob", "cy", "dee"), **settings):
    """A collection in which people have ranked the replies of `names` by their numbers, and the replies."""
    settings = {"num_reviews": 1, "max_depth": 1, "max_open_trees": 1, "num_rankings": len(ballots), **settings}
    collection = Collection(store, "ann", *names, "eve", "fay", "gil", **settings)
    prompt = collection.prompt("ann")
    collection.review(prompt, "eve")
    replies = [collection.reply(name, prompt) for name in names]
    for reply in replies:
        collection.review(reply, "eve")
    for name, ballot in zip(("eve", "fay", "gil"), ballots):
        task = collection.take(name, "rank_replies")
        collection.rank(name, task, [replies[number].id for number in ballot])
    return collection, replies


def refusal(call, *args, **options):
    with pytest.raises(FeedbackError) as refused:
        call(*args, **options)
    return refused.value.status, str(refused.value)


@pytest.mark.parametrize(
    "reviews, expected",
    [
        ([FINE, FINE, FINE], 1),
        ([SPAM, FINE, FINE], 1 - 1 / 3),
        ([SPAM, FOREIGN, FINE], 1 - 2 / 3),
        ([BOTH, FINE, FINE], 1 - 2 / 3),
        ([BOTH, BOTH], -1),
    ],
)
def test_acceptance_is_one_minus_the_means(reviews, expected):
    assert acceptance(reviews) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "reviews, threshold, verdict",
    [
        ([FINE, FINE, SPAM], 0.6, True),
        ([FINE, SPAM, FOREIGN], 0.6, False),
        ([FINE, FINE, BOTH], 0.6, False),
        ([FINE, FINE, FINE], 1.0, False),  # above the threshold, not at it
        ([SPAM, FINE], 0.5, False),
        ([SPAM, FINE], 0.4, True),
    ],
)
def test_a_prompt_is_accepted_above_the_threshold_after_all_reviews(store, reviews, threshold, verdict):
    names = ("bob", "cy", "dee")[: len(reviews)]
    collection = Collection(store, "ann", *names, num_reviews=len(reviews), min_acceptance=threshold)
    prompt = collection.prompt("ann")
    for name, labels in zip(names, reviews):
        assert collection.message(prompt.id).accepted is None
        assert collection.state(prompt.tree_id) == "initial_prompt_review"
        collection.review(prompt, name, labels=labels)
    assert collection.message(prompt.id).accepted is verdict
    assert collection.state(prompt.tree_id) == ("growing" if verdict else "aborted_low_grade")
    collection.check()


def test_the_labels_are_kept_by_name(store):
    collection = Collection(store, "ann", "bob")
    prompt = collection.prompt("ann")
    given = {**dict.fromkeys(FLAGS, 0), "pii": True, "quality": 0.25, "humor": 1}
    review = collection.label("bob", collection.take("bob", "label_prompt"), given)
    assert review.labels == {**dict.fromkeys(FLAGS, 0.0), "pii": 1.0, "quality": 0.25, "humor": 1.0}
    assert (review.message_id, review.person_id) == (prompt.id, collection.people["bob"].id)
    assert set(labels_of("assistant")) - set(labels_of("prompter")) == {"helpfulness"}
    assert set(labels_of("assistant")) == {*FLAGS, *SCALES}


@pytest.mark.parametrize(
    "labels, reason",
    [
        ({"spam": 0}, "lang_mismatch is missing"),
        ({"lang_mismatch": 0}, "spam is missing"),
        ({**FINE, "beauty": 1}, "'beauty'"),
        ({**FINE, "helpfulness": 1}, "'helpfulness'"),
        ({**FINE, "quality": 1.01}, "from 0 to 1"),
        ({**FINE, "quality": -0.01}, "from 0 to 1"),
        ({**FINE, "quality": float("nan")}, "from 0 to 1"),
        ({**FINE, "quality": "1"}, "from 0 to 1"),
        ({**FINE, "quality": None}, "from 0 to 1"),
        ({**FINE, "pii": 0.5}, "0 (no) or 1 (yes)"),
        ({"spam": 0.5, "lang_mismatch": 0}, "0 (no) or 1 (yes)"),
    ],
)
def test_other_labels_are_refused_and_the_task_stays_open(store, labels, reason):
    collection = Collection(store, "ann", "bob")
    collection.prompt("ann")
    task = collection.take("bob", "label_prompt")
    status, words = refusal(collection.label, "bob", task, labels)
    assert status == 400 and reason in words
    collection.label("bob", task)
    collection.check()


@pytest.mark.parametrize(
    "text, status, reason",
    [
        ("", 400, "blank"),
        (" \n\t\u00a0", 400, "blank"),
        ("x" * 21, 413, "21 characters"),
        ("a\0b", 400, "characters that are none"),
        ("a\ud800b", 400, "characters that are none"),
    ],
)
def test_texts_that_are_none_are_refused(store, text, status, reason):
    collection = Collection(store, "ann", max_message_length=20)
    task = collection.take("ann", "write_prompt")
    refused, words = refusal(collection.write, "ann", task, text)
    assert refused == status and reason in words
    assert collection.write("ann", task, "x" * 20).text == "x" * 20


def test_a_text_is_kept_with_one_kind_of_line_ends_and_nothing_around_it(store):
    collection = Collection(store, "ann")
    assert collection.prompt("ann", "\r\n  two\r\nlines\rthree 🐈\n").text == "two\nlines\nthree 🐈"


def test_a_text_that_is_there_is_refused(store):
    collection = Collection(store, "ann", "bob", "cy", num_reviews=1)
    prompt = collection.prompt("ann", "How are you?")
    assert refusal(collection.prompt, "bob", "How are you? ")[0] == 409
    collection.review(prompt, "bob")
    collection.reply("bob", prompt, "Fine.")
    task = collection.take("cy", "reply_as_assistant")
    assert refusal(collection.write, "cy", task, "Fine.\r\n")[0] == 409
    assert collection.write("cy", task, "How are you?").parent_id == prompt.id  # it is no sibling


def test_a_message_has_its_place_in_the_tree(store):
    collection = Collection(store, "ann", "bob", num_reviews=1)
    prompt = collection.prompt("ann")
    assert (prompt.role, prompt.depth, prompt.parent_id, prompt.language) == ("prompter", 0, None, "en")
    collection.review(prompt, "bob")
    answer = collection.reply("bob", prompt)
    assert (answer.role, answer.depth, answer.parent_id) == ("assistant", 1, prompt.id)
    collection.review(answer, "ann")
    more = collection.reply("ann", answer)
    assert (more.role, more.depth, more.tree_id) == ("prompter", 2, prompt.tree_id)
    assert more.person_id == collection.people["ann"].id and more.created_at == collection.now


def test_three_rankings_merge_by_ranked_pairs(store):
    # 2 before 0 by two to one, 2 before 1 by all, 0 before 1 by two to one
    collection, replies = ranked(store, [2, 0, 1], [0, 2, 1], [2, 1, 0])
    assert [collection.message(reply.id).rank for reply in replies] == [1, 2, 0]
    assert collection.state(replies[0].tree_id) == "ready_for_export"
    collection.check()


def test_a_cycle_of_majorities_is_broken_at_the_narrowest(store):
    ballots = [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    collection, replies = ranked(store, *ballots)
    order = sorted(replies, key=lambda reply: collection.message(reply.id).rank)
    # all three majorities are 2 to 1: those with the smaller winner are kept, and the last would close the cycle
    first, second, third = sorted((reply.id, number) for number, reply in enumerate(replies))
    beats = {(number, (number + 1) % 3) for number in range(3)}
    kept = [(first, second), (second, third)] if (first[1], second[1]) in beats else [(first, third), (second, first)]
    position = {reply.id: place for place, reply in enumerate(order)}
    assert all(position[winner[0]] < position[loser[0]] for winner, loser in kept)


def test_replies_have_no_rank_before_all_rankings_are_there(store):
    collection, replies = ranked(store, [2, 1, 0], num_rankings=2)
    assert [collection.message(reply.id).rank for reply in replies] == [None] * 3
    assert collection.state(replies[0].tree_id) == "ranking"
    task = collection.take("fay", "rank_replies")
    collection.rank("fay", task, [reply.id for reply in reversed(replies)])
    assert [collection.message(reply.id).rank for reply in replies] == [2, 1, 0]


@pytest.mark.parametrize("order", [[], [0, 1], [0, 1, 1], [0, 1, 2, 2], [0, 1, "x"]])
def test_an_order_of_other_replies_is_refused(store, order):
    collection, replies = ranked(store, num_rankings=1)
    task = collection.take("eve", "rank_replies")
    ids = [number if number == "x" else replies[number].id for number in order]
    status, words = refusal(collection.rank, "eve", task, ids)
    assert status == 400 and "rank all of them" in words
    collection.rank("eve", task)


def test_a_tree_without_replies_to_rank_is_scored_when_it_is_grown(store):
    collection, replies = ranked(store, names=("bob",), max_children=1, num_rankings=3)
    assert collection.state(replies[0].tree_id) == "ready_for_export"
    with collection.store.writing() as session:
        mark_exported(session, [replies[0].tree_id, replies[0].tree_id], collection.now)
    assert collection.state(replies[0].tree_id) == "exported"
    collection.check()


@pytest.mark.parametrize("kind", ["write", "label", "rank"])
def test_forms_that_are_not_for_the_sender_or_not_open_are_refused(store, kind):
    collection, _ = ranked(store, num_rankings=2)
    kinds = {"write": "write_prompt", "label": "label_prompt", "rank": "rank_replies"}
    if kind == "label":
        collection.prompt("bob")
    task, send = collection.take("eve", kinds[kind]), getattr(collection, kind)
    status, words = refusal(send, "gil", task)
    assert status == 403 and "somebody else" in words
    for other in {"write", "label", "rank"} - {kind}:
        task.shown = task.shown or []
        status, words = refusal(getattr(collection, other), "eve", task)
        assert status == 400 and f"expected one for {task.kind}" in words
    send("eve", task)
    status, words = refusal(send, "eve", task)  # the same form again
    assert status == 409 and "closed already: done" in words
    task.id = "'; DROP TABLE tasks; --"
    assert refusal(send, "eve", task)[0] == 404
    collection.check()


def test_a_page_of_a_task_shows_the_conversation_and_not_who_wrote_it(store):
    collection = Collection(store, "ann", "bob", "cy", "dee", num_reviews=1, max_children=2, max_tree_size=3)

    def view(task):
        with store.reading() as session:
            return task_view(session, task)

    task = collection.take("ann", "write_prompt")
    shown = view(task)
    assert (shown.kind, shown.thread, shown.message, shown.replies, shown.labels) == ("write_prompt", (), None, (), ())
    assert shown.expires_at == task.expires_at and shown.task_id == task.id
    prompt = collection.write("ann", task, "How?")
    task = collection.take("bob", "label_prompt")
    shown = view(task)
    assert (shown.thread, shown.message.text) == ((), "How?")
    assert "helpfulness" not in shown.labels and shown.required_labels == ("spam", "lang_mismatch")
    collection.label("bob", task)
    task = collection.take("bob", "reply_as_assistant")
    assert [message.text for message in view(task).thread] == ["How?"]
    replies = [collection.write("bob", task, "So."), collection.reply("cy", prompt, "Thus.")]
    task = collection.take("ann", "label_reply")
    shown = view(task)
    assert [message.text for message in shown.thread] == ["How?"]
    assert shown.message.text in ("So.", "Thus.") and "helpfulness" in shown.labels
    collection.label("ann", task)
    collection.label("ann", collection.take("ann", "label_reply"))
    task = collection.take("dee", "rank_replies")
    shown = view(task)
    assert [message.id for message in shown.replies] == task.shown
    assert {message.text for message in shown.replies} == {"So.", "Thus."}
    assert set(vars(shown.replies[0])) == {"id", "role", "text", "language"}
    assert {reply.id for reply in replies} == set(task.shown)


def take_back(collection, row):
    with collection.store.writing() as session:
        row = session.get_one(type(row), row.id)
        withdraw(session, row, row.person_id, now=collection.now)
        settle_withdrawal(session, row, collection.settings, collection.now)


def test_a_withdrawn_prompt_ends_its_tree(store):
    collection = Collection(store, "ann", "bob", "cy", num_reviews=1)
    prompt = collection.prompt("ann")
    collection.review(prompt, "bob")
    task = collection.take("cy", "reply_as_assistant")
    take_back(collection, prompt)
    assert collection.state(prompt.tree_id) == "halted_by_moderator"
    assert refusal(collection.write, "cy", task)[0] == 409
    assert collection.available("cy")["reply_as_assistant"] == 0
    collection.check()


def test_a_withdrawn_reply_takes_the_messages_below_with_it_and_frees_their_places(store):
    collection = Collection(
        store, "ann", "bob", "cy", "dee", num_reviews=1, max_children=1, max_open_trees=1, max_tree_size=4
    )
    prompt = collection.prompt("ann")
    collection.review(prompt, "bob")
    reply = collection.reply("bob", prompt)
    collection.review(reply, "ann")
    below = collection.reply("ann", reply)
    task = collection.take("cy", "label_reply")
    take_back(collection, reply)
    assert collection.message(below.id).accepted is False
    assert refusal(collection.label, "cy", task)[0] == 409
    assert collection.available("cy") == {**dict.fromkeys(collection.available("cy"), 0), "reply_as_assistant": 1}
    assert collection.available("bob")["reply_as_assistant"] == 0  # he has answered it once
    collection.check()


def test_a_withdrawn_ranking_is_asked_for_again_or_leaves_the_ranks(store):
    collection, replies = ranked(store, [0, 1, 2], [2, 1, 0], [2, 1, 0], num_rankings=3)
    ranks = [collection.message(reply.id).rank for reply in replies]
    assert ranks == [2, 1, 0]
    with store.reading() as session:
        rankings = {row.person_id: row for row in session.query(ReplyRanking)}
    take_back(collection, rankings[collection.people["fay"].id])
    take_back(collection, rankings[collection.people["gil"].id])
    assert [collection.message(reply.id).rank for reply in replies] == [0, 1, 2]
    take_back(collection, replies[0])
    assert [collection.message(reply.id).rank for reply in replies[1:]] == [0, 1]


def test_a_ranking_withdrawn_in_time_is_asked_for_again(store):
    collection, replies = ranked(store, [0, 1, 2], num_rankings=2)
    with store.reading() as session:
        (ranking,) = session.query(ReplyRanking)
    take_back(collection, ranking)
    assert collection.available("eve")["rank_replies"] == 0
    for name in ("fay", "gil"):
        assert collection.state(replies[0].tree_id) == "ranking"
        collection.rank(name, collection.take(name, "rank_replies"))
    assert collection.state(replies[0].tree_id) == "ready_for_export"


def test_a_reply_withdrawn_while_it_is_ranked_lets_the_tree_go_on(store):
    collection, replies = ranked(store, names=("bob", "cy"), max_children=2, num_rankings=1)
    task = collection.take("eve", "rank_replies")
    take_back(collection, replies[0])
    assert collection.state(replies[0].tree_id) == "ready_for_export"
    assert collection.task(task.id).outcome == "cancelled"
    collection.check()
