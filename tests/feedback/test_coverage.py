"""Coverage, languages, contributions by day, and the leaderboard."""

from datetime import date, timedelta

import pytest

from palm_rlhf.feedback.measures.coverage import Coverage, contributions_by_day, coverage, messages_by_language
from palm_rlhf.feedback.measures.leaderboard import leaderboard
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Correction
from palm_rlhf.feedback.store.learning_tables import Withdrawal
from palm_rlhf.feedback.store.tree_tables import MessageReview, ReplyRanking, Tree, TreeMessage
from tests.feedback.comparing import (
    NEW,
    NOW,
    OLD,
    add_answers,
    add_comparison,
    add_models,
    add_person,
    add_round,
    add_vote,
)

SETTINGS = CollectionSettings(num_reviews=2, num_rankings=2, num_votes=2)


def add_tree(session, state, replies=(), source="people", language="en", at=NOW, author=None):
    """A tree of a prompt and the assistant's replies, which are accepted or not; its messages."""
    tree = Tree(language=language, state=state, source=source, created_at=at)
    session.add(tree)
    session.flush()

    def add(parent, role, accepted):
        row = TreeMessage(
            tree_id=tree.id,
            parent_id=parent,
            role=role,
            text=role,
            language=language,
            depth=0 if parent is None else 1,
            person_id=author.id if author else None,
            accepted=accepted,
            created_at=at,
        )
        session.add(row)
        session.flush()
        return row

    prompt = add(None, "prompter", True if replies else None)
    return [prompt, *(add(prompt.id, "assistant", accepted) for accepted in replies)]


def add_review(session, message, person, at=NOW, **labels):
    values = {"spam": 0, "lang_mismatch": 0, **labels}
    row = MessageReview(message_id=message.id, person_id=person.id, labels=values, created_at=at)
    session.add(row)
    session.flush()
    return row


def add_ranking(session, parent, person, at=NOW):
    row = ReplyRanking(parent_id=parent.id, person_id=person.id, shown=[], best_first=[], created_at=at)
    session.add(row)
    session.flush()
    return row


def withdraw(session, row):
    session.add(Withdrawal(table=row.__tablename__, row_id=row.id))
    session.flush()


def test_coverage_counts_what_is_needed_and_no_more(store):
    with store.writing() as session:
        add_models(session)
        ann, bob, cem = (add_person(session, name) for name in ("Ann", "Bob", "Cem"))
        (fresh,) = add_tree(session, "initial_prompt_review")
        add_review(session, fresh, ann)
        withdraw(session, add_review(session, fresh, bob))
        add_tree(session, "halted_by_moderator")
        add_tree(session, "ready_for_export", [True, True], source="a file")
        ranked = add_tree(session, "ranking", [True, True, False])  # each with its verdict
        add_ranking(session, ranked[0], ann)
        scored = add_tree(session, "ready_for_export", [True, True])
        for person in (ann, bob, cem):
            add_ranking(session, scored[0], person)
        round_ = add_round(session, 1)
        pairs = [add_answers(session, round_, f"Why {n}?", ["a", "b"], "evaluation", [OLD, NEW]) for n in range(3)]
        for person in (ann, bob, cem):
            add_vote(session, add_comparison(session, person, *pairs[0], "evaluation", round_))
        add_vote(session, add_comparison(session, ann, *pairs[1], "evaluation", round_), "tie")
        add_comparison(session, bob, *pairs[1], "evaluation", round_)  # shown, not answered
        found = coverage(session, SETTINGS, NOW)
    assert found == {"reviews": Coverage(15, 16), "rankings": Coverage(3, 4), "blind votes": Coverage(3, 6)}
    assert found["rankings"].share == 0.75


def test_nothing_is_needed_at_the_start(store):
    with store.reading() as session:
        assert {each.share for each in coverage(session, SETTINGS, NOW).values()} == {None}
        assert messages_by_language(session) == {} and leaderboard(session, "all", NOW) == []
        assert set(contributions_by_day(session, 7, NOW).values()) == {0}


def test_languages_and_days(store):
    with store.writing() as session:
        ann = add_person(session, "Ann")
        add_tree(session, "growing", [True, True], language="zh", author=ann, at=NOW - timedelta(days=2))
        (message,) = add_tree(session, "initial_prompt_review", author=ann)
        add_tree(session, "growing", source="a file")  # of nobody here
        add_review(session, message, ann)
        withdraw(session, add_tree(session, "initial_prompt_review", language="de", author=ann)[0])
        add_ranking(session, message, ann, at=NOW - timedelta(days=3))
        assert messages_by_language(session) == {"zh": 3, "en": 2}
        found = contributions_by_day(session, 3, NOW)
    assert list(found.items()) == [(date(2026, 2, 27), 3), (date(2026, 2, 28), 0), (date(2026, 3, 1), 2)]


def test_the_leaderboard_counts_everything_within_its_window(store):
    long_ago = NOW - timedelta(days=3)
    with store.writing() as session:
        add_models(session)
        ann, bob, cem, dan = (add_person(session, name) for name in ("Ann", "Bob", "Cem", "Dan"))
        prompt, reply, _ = add_tree(session, "growing", [True, True], author=ann)
        add_review(session, prompt, bob, at=long_ago)
        add_ranking(session, prompt, bob, at=long_ago)
        round_ = add_round(session, 1)
        first, second = add_answers(session, round_, "Why?", ["a", "b"])
        comparison = add_comparison(session, bob, first, second)
        add_vote(session, comparison, "left")
        add_vote(session, comparison, "right")  # changed: one comparison
        withdraw(session, add_vote(session, add_comparison(session, cem, first, second)))
        session.add(Correction(answer_id=first, person_id=bob.id, text="better", created_at=NOW))
        add_review(session, reply, dan)
        dan.deleted_at = NOW
        session.flush()
        boards = {window: leaderboard(session, window, NOW) for window in ("day", "week", "all")}
    week = [(row.place, row.name, row.total) for row in boards["week"]]
    assert week == [(1, "Bob", 4), (2, "Ann", 3)] and boards["week"] == boards["all"]
    row = boards["week"][0]
    assert (row.reviews, row.rankings, row.comparisons, row.corrections) == (1, 1, 1, 1)
    assert [(row.name, row.total, row.prompts, row.replies) for row in boards["day"]] == [
        ("Ann", 3, 1, 2),
        ("Bob", 2, 0, 0),
    ]


def test_people_with_equally_many_contributions_share_a_place(store):
    with store.writing() as session:
        for name in ("Ann", "Bob", "Cem"):
            person = add_person(session, name)
            add_tree(session, "growing", author=person)
            if name == "Cem":
                add_tree(session, "growing", author=person)
        board = leaderboard(session, "all", NOW)
    assert [(row.place, row.name) for row in board] == [(1, "Cem"), (2, "Ann"), (2, "Bob")]
    with pytest.raises(KeyError), store.reading() as session:
        leaderboard(session, "month", NOW)
