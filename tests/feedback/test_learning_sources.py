"""What a round learns from, and which prompts it asks: trees, chats, votes, better answers and thumbs."""

from datetime import datetime, timedelta, timezone

import pytest

from palm_rlhf.feedback.learning.round_prompts import prompts_of_people
from palm_rlhf.feedback.learning.training_preferences import all_preferences, count_contributions
from palm_rlhf.feedback.store.answer_tables import (
    Answer,
    ComparisonVote,
    Correction,
    KnownModel,
    Reaction,
    ShownComparison,
)
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.learning_tables import Withdrawal
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.tree_tables import ReplyRanking, Tree, TreeMessage

NOW = datetime(2026, 3, 1, tzinfo=timezone.utc)
MODEL = "0" * 64


@pytest.fixture
def session(store):
    with store.writing() as session:
        session.add(KnownModel(id=MODEL, name="model"))
        session.add_all([Participant(id=name, name=name, role="contributor") for name in ("ann", "bob")])
        session.flush()
        yield session


def add(session, row):
    session.add(row)
    session.flush()
    return row


def answer(session, text, prompt="hello?", purpose="chat"):
    messages = [{"role": "user", "content": prompt}]
    key = prompt_key_of(messages)
    row = Answer(prompt_key=key, prompt=messages, text=text, model_id=MODEL, sampling={}, purpose=purpose)
    return add(session, row)


def compare(session, left, right, verdict, *, purpose="training", chosen_by="random", person="ann"):
    shown = ShownComparison(
        prompt_key=left.prompt_key, left_id=left.id, right_id=right.id, person_id=person, chosen_by=chosen_by,
        purpose=purpose,
    )  # fmt: skip
    add(session, shown)
    return add(session, ComparisonVote(comparison_id=shown.id, person_id=person, verdict=verdict))


def take_back(session, row):
    add(session, Withdrawal(table=row.__tablename__, row_id=row.id, person_id="ann"))


def found(session):
    return {(each.kind, each.origin, *each.responses) for each in all_preferences(session, held_out=0.2)}


def test_votes_for_an_answer_are_learnt_and_no_others(session):
    one, two, three = (answer(session, text, purpose="training") for text in ("one", "two", "three"))
    compare(session, one, two, "right")
    compare(session, one, three, "tie")
    compare(session, two, three, "both_bad")
    compare(session, one, three, "left", purpose="evaluation")
    gone = compare(session, two, three, "left")
    assert count_contributions(session) == {"comparisons": 4, "rankings": 0, "corrections": 0}
    take_back(session, gone)
    assert count_contributions(session)["comparisons"] == 3
    assert found(session) == {("comparison", "people", "two", "one")}


def test_only_votes_on_random_pairs_are_marked_so(session):
    one, two, three = (answer(session, text, purpose="training") for text in ("one", "two", "three"))
    for other, chosen_by in ((two, "random"), (three, "uncertainty")):
        compare(session, one, other, "left", chosen_by=chosen_by)
    add(session, Correction(answer_id=one.id, person_id="ann", text="better"))
    marks = {each.responses[1]: each.at_random for each in all_preferences(session, held_out=0.2)}
    assert marks == {"two": True, "three": False, "one": False}


def test_a_better_answer_is_preferred_to_the_one_that_it_stands_in_for(session):
    worse = answer(session, "worse")
    add(session, Correction(answer_id=worse.id, person_id="ann", text="better"))
    assert found(session) == {("correction", "people", "better", "worse")}
    assert count_contributions(session)["corrections"] == 1


def test_thumbs_of_different_sign_on_answers_to_one_prompt_are_a_preference(session):
    liked, disliked, same_text, torn, elsewhere = (
        answer(session, text, prompt)
        for text, prompt in (("good", "?"), ("bad", "?"), ("good", "?"), ("so so", "?"), ("other", "other?"))
    )
    values = [(liked, "ann", 1), (disliked, "ann", -1), (disliked, "bob", -1), (same_text, "ann", -1)]
    for row, person, value in [*values, (torn, "ann", 1), (torn, "bob", -1), (elsewhere, "ann", -1)]:
        add(session, Reaction(answer_id=row.id, person_id=person, value=value))
    assert len(all_preferences(session, 0.2)) == 1
    assert found(session) == {("reactions", "people", "good", "bad")}
    later = NOW + timedelta(days=9999)
    add(session, Reaction(answer_id=disliked.id, person_id="ann", value=1, created_at=later))  # the newest counts
    add(session, Reaction(answer_id=disliked.id, person_id="bob", value=1, created_at=later))
    assert found(session) == {("reactions", "people", "bad", "good")}  # to the other answer of the same text


def message(session, tree, text, role, parent=None, *, accepted=True):
    depth = 0 if parent is None else parent.depth + 1
    row = TreeMessage(
        tree_id=tree.id, parent_id=parent and parent.id, role=role, text=text, language="en", depth=depth,
        accepted=accepted, created_at=NOW,
    )  # fmt: skip
    return add(session, row)


def test_prompts_are_those_of_people(session):
    tree = add(session, Tree(language="en", state="growing", created_at=NOW))
    root = message(session, tree, "root", "prompter")
    reply = message(session, tree, "reply", "assistant", root)
    message(session, tree, "question", "prompter", reply)
    message(session, tree, "rejected", "prompter", reply, accepted=False)
    message(session, tree, "unread", "prompter", reply, accepted=None)
    halted = add(session, Tree(language="en", state="halted_by_moderator", created_at=NOW))
    message(session, halted, "spam", "prompter")
    answer(session, "hi", "asked in a chat?")
    answer(session, "of the pool", "a prompt of a round?", purpose="training")
    take_back(session, answer(session, "hi", "taken back?"))
    found = [[(turn["role"], turn["content"]) for turn in prompt] for prompt in prompts_of_people(session)]
    assert found == [
        [("user", "root")],
        [("user", "root"), ("assistant", "reply"), ("user", "question")],
        [("user", "asked in a chat?")],
    ]


def test_rankings_of_trees_are_learnt(session):
    tree = add(session, Tree(language="en", state="ready_for_export", created_at=NOW))
    root = message(session, tree, "root", "prompter")
    replies = [message(session, tree, text, "assistant", root) for text in ("one", "two", "three")]
    for person, order in (("ann", (2, 0, 1)), ("bob", (2, 1, 0))):
        ids = [replies[place].id for place in order]
        add(session, ReplyRanking(parent_id=root.id, person_id=person, shown=ids, best_first=ids))
    (found,) = all_preferences(session, held_out=0.2)
    assert (found.kind, found.origin, found.responses[0], len(found.responses)) == ("tree", "people", "three", 3)
    assert count_contributions(session)["rankings"] == 2
