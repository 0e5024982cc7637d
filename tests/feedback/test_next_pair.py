"""Which pair of answers a person is shown next."""

import random
from collections import Counter
from datetime import timedelta
from itertools import combinations

import pytest
from sqlalchemy import func, select

from palm_rlhf.feedback.pairs.held_out_prompts import is_held_out
from palm_rlhf.feedback.pairs.next_pair import next_comparison
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Answer, AnswerScore, ShownComparison
from palm_rlhf.feedback.store.learning_tables import Withdrawal
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

TRAINED = CollectionSettings(held_out=0.0, random_share=0.0)
HELD_OUT = CollectionSettings(held_out=0.999, num_votes=2)


@pytest.fixture
def session(store):
    with store.writing() as session:
        add_models(session)
        yield session


def ask(session, person, settings=TRAINED, *, now=NOW, seed=0, **options):
    return next_comparison(session, person, settings, rng=random.Random(seed), now=now, **options)


def answered(session, person, settings=TRAINED, *, limit=100, seed=0, **options):
    """The comparisons that a person is shown, each answered, until there are no more."""
    rng, found = random.Random(seed), []
    while len(found) < limit:
        now = NOW + timedelta(seconds=len(found))
        comparison = next_comparison(session, person, settings, rng=rng, now=now, **options)
        if comparison is None:
            break
        add_vote(session, comparison, at=now)
        found.append(comparison)
    return found


def pair_of(comparison):
    return frozenset((comparison.left_id, comparison.right_id))


def test_the_closest_scores_come_first_and_no_pair_comes_twice(session):
    round_, ann = add_round(session, 1), add_person(session, "Ann")
    first = add_answers(session, round_, "Why?", ["a", "b", "c"], scores=[0.0, 0.3, 2.0])
    second = add_answers(session, round_, "How?", ["a", "b"], scores=[-5.0, -4.9])
    names = dict(zip([*first, *second], "abcde"))
    found = answered(session, ann)
    assert ["".join(sorted(map(names.get, pair_of(each)))) for each in found] == ["de", "ab", "bc", "ac"]
    assert {each.chosen_by for each in found} == {"uncertainty"}
    assert {(each.purpose, each.round_id, each.person_id) for each in found} == {("training", round_.id, ann.id)}


def test_ties_and_sides_are_drawn(session):
    round_ = add_round(session, 1)
    ids = add_answers(session, round_, "Why?", ["a", "b", "c"], scores=[1.0, 1.0, 1.0])
    shown = []
    for seed in range(60):
        shown.append(ask(session, add_person(session, f"P{seed}"), seed=seed, now=NOW + timedelta(days=seed)))
    assert {(each.left_id, each.right_id) for each in shown} == {(a, b) for a in ids for b in ids if a != b}


def test_the_newest_pool_and_the_newest_scores_count(session):
    one, two = add_round(session, 1), add_round(session, 2)
    add_answers(session, one, "Why?", ["a", "b"], scores=[0.0, 0.0])
    ids = add_answers(session, two, "Why?", ["a", "b", "c"], scores=[0.0, 0.0, 9.0], scored_in=one)
    assert pair_of(ask(session, add_person(session, "Ann"))) == set(ids[:2])
    session.flush()
    for answer, score in zip(ids, [0.0, 9.0, 9.0]):
        session.add(AnswerScore(answer_id=answer, round_id=two.id, score=score))
    assert pair_of(ask(session, add_person(session, "Bob"), now=NOW + timedelta(days=1))) == set(ids[1:])


def test_a_pair_is_random_without_scores_or_by_wish(session):
    round_ = add_round(session, 1)
    ids = add_answers(session, round_, "Why?", ["a", "b", "c"])
    assert ask(session, add_person(session, "Ann")).chosen_by == "random"
    scored = add_answers(session, add_round(session, 2), "Why?", ["a", "b", "c"], scores=[0.0, 0.1, 5.0])
    shown = []
    for seed in range(40):
        person = add_person(session, f"P{seed}")
        shown.append(ask(session, person, seed=seed, pairs="random", now=NOW + timedelta(days=seed)))
    assert {each.chosen_by for each in shown} == {"random"}
    assert {pair_of(each) for each in shown} == set(map(frozenset, combinations(scored, 2)))
    assert not {each.left_id for each in shown} & set(ids)


def test_a_share_of_the_pairs_is_random(session):
    round_ = add_round(session, 1)
    add_answers(session, round_, "Why?", [f"answer {n}" for n in range(16)], scores=[n * n for n in range(16)])
    settings = CollectionSettings(held_out=0.0, random_share=0.25)
    chosen = Counter(each.chosen_by for each in answered(session, add_person(session, "Ann"), settings, limit=100))
    assert 12 < chosen["random"] < 40 and chosen["uncertainty"] == 100 - chosen["random"]


def test_equal_texts_and_withdrawn_answers_are_not_compared(session):
    round_ = add_round(session, 1)
    ids = add_answers(session, round_, "Why?", ["a", " a\n", "b", "c"])
    session.add(Withdrawal(table="answers", row_id=ids[3]))
    session.flush()
    found = answered(session, add_person(session, "Ann"))
    assert {pair_of(each) for each in found} == {frozenset((ids[0], ids[2])), frozenset((ids[1], ids[2]))}


def test_people_are_spread_over_the_pairs_of_training(session):
    round_ = add_round(session, 1)
    add_answers(session, round_, "Why?", ["a", "b", "c"], scores=[0.0, 1.0, 3.0])
    people = [add_person(session, name) for name in ("Ann", "Bob", "Cem", "Dan")]
    pairs = [pair_of(ask(session, person)) for person in people]
    assert len(set(pairs[:3])) == 3 and pairs[3] == pairs[0]


def test_an_unanswered_comparison_comes_again(session):
    round_, ann = add_round(session, 1), add_person(session, "Ann")
    add_answers(session, round_, "Why?", ["a", "b", "c"])
    first = ask(session, ann)
    assert ask(session, ann, seed=7, now=NOW + timedelta(days=9)).id == first.id
    vote = add_vote(session, first)
    second = ask(session, ann, seed=7)
    assert pair_of(second) != pair_of(first)
    session.add(Withdrawal(table="votes", row_id=vote.id))  # a vote that was taken back is not asked for again
    session.flush()
    assert ask(session, ann).id == second.id
    newer = add_answers(session, add_round(session, 2), "Why?", ["a", "b"])
    assert pair_of(ask(session, ann)) == set(newer)  # the pool of the first round is closed


def test_held_out_prompts_have_random_pairs_for_a_number_of_people(session):
    round_ = add_round(session, 1)
    prompts = [f"Prompt {n}" for n in range(20)]
    for prompt in prompts:
        add_answers(session, round_, prompt, ["a", "b", "c"], scores=[0.0, 1.0, 3.0])
    settings = CollectionSettings(held_out=0.3, random_share=0.0, num_votes=2)
    shown = answered(session, add_person(session, "Ann"), settings, limit=50)
    held_out = [each for each in shown if is_held_out(each.prompt_key, settings)]
    assert 8 < len(held_out) < 25
    assert 0 < sum(each in held_out for each in shown[:15]) < 11  # about 0.3 of them, while there are both kinds
    assert {each.chosen_by for each in held_out} == {"random"}
    assert {each.chosen_by for each in shown if each not in held_out} == {"uncertainty"}
    ranks = dict(map(tuple, session.execute(select(Answer.id, Answer.text))))
    assert {frozenset(map(ranks.get, pair_of(each))) for each in held_out} == set(
        map(frozenset, combinations("abc", 2))
    )


def test_a_held_out_pair_that_is_begun_goes_first_until_it_has_its_votes(session):
    round_ = add_round(session, 1)
    for number in range(9):
        add_answers(session, round_, f"Prompt {number}", ["a", "b"], scores=[0.0, 0.1])
    people = [add_person(session, name) for name in ("Ann", "Bob", "Cem")]
    shown = [answered(session, person, HELD_OUT, limit=4, seed=seed) for seed, person in enumerate(people)]
    pairs = [{pair_of(each) for each in found} for found in shown]
    assert pairs[0] == pairs[1] and not pairs[0] & pairs[2]


def test_an_evaluation_compares_two_models_by_a_number_of_people(any_store):
    with any_store.writing() as session:
        add_models(session)
        check_evaluation(session)


def check_evaluation(session):
    round_ = add_round(session, 1)
    for number in range(3):
        add_answers(session, round_, f"Prompt {number}", ["a", "b", "c"], "evaluation", [OLD, NEW, NEW])
    ann, bob, cem, dan = (add_person(session, name) for name in ("Ann", "Bob", "Cem", "Dan"))
    settings = CollectionSettings(num_votes=2)
    shown = [answered(session, person, settings) for person in (ann, bob, cem)]
    models = dict(map(tuple, session.execute(select(Answer.id, Answer.model_id))))
    for found in shown[:2]:
        assert len(found) == 6 and {each.purpose for each in found} == {"evaluation"}
        assert all({models[each.left_id], models[each.right_id]} == {OLD, NEW} for each in found)
    assert shown[2] == []  # two people have compared every pair
    waiting = add_comparison(session, cem, shown[0][0].left_id, shown[0][0].right_id, "evaluation", round_)
    assert ask(session, cem, settings) is None and ask(session, dan, settings) is None
    session.delete(waiting)


def test_nobody_is_sent_to_the_last_place_of_a_pair_twice_until_it_takes_too_long(session):
    round_ = add_round(session, 1)
    add_answers(session, round_, "Why?", ["a", "b"], "evaluation", [OLD, NEW])
    ann, bob, cem = (add_person(session, name) for name in ("Ann", "Bob", "Cem"))
    settings = CollectionSettings(num_votes=1)
    first = ask(session, ann, settings)
    assert first is not None and ask(session, bob, settings) is None
    later = NOW + settings.task_timeout + timedelta(seconds=1)
    second = ask(session, bob, settings, now=later)
    assert pair_of(second) == pair_of(first)
    vote = add_vote(session, second, at=later)
    assert ask(session, ann, settings, now=later) is None and ask(session, cem, settings, now=later) is None
    session.add(Withdrawal(table="votes", row_id=vote.id))
    session.flush()
    assert ask(session, ann, settings, now=later).id == first.id
    assert session.scalar(select(func.count(ShownComparison.id))) == 2


def test_training_and_evaluation_take_turns(session):
    round_ = add_round(session, 1)
    for number in range(9):
        add_answers(session, round_, f"Prompt {number}", ["a", "b"])
    for number in range(3):
        add_answers(session, round_, f"Prompt {number}", ["a", "b"], "evaluation", [OLD, NEW])
    ann, bob = add_person(session, "Ann"), add_person(session, "Bob")
    purposes = [each.purpose for each in answered(session, ann, limit=8)]
    assert purposes == ["evaluation", "training"] * 3 + ["training", "training"]
    assert {each.purpose for each in answered(session, bob, purpose="training", limit=8)} == {"training"}


def test_nothing_is_shown_before_there_are_answers_or_with_one_answer(session):
    ann = add_person(session, "Ann")
    assert ask(session, ann) is None
    add_answers(session, add_round(session, 1), "Why?", ["a"])
    add_answers(session, add_round(session, 2), "Why?", ["a", "b"], "chat")
    assert ask(session, ann) is None
