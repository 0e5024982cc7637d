"""The blind win rate of a new model against an old one, its interval, and its sentence."""

from datetime import timedelta

import numpy as np
import pytest
from scipy.stats import binomtest

from palm_rlhf.feedback.learning.round_rows import record_stage
from palm_rlhf.feedback.measures.blind_win_rate import SENTENCES, BlindWinRate, round_win_rate, win_rate_of
from palm_rlhf.feedback.measures.vote_records import VoteRecord
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


def vote(prompt, share, person="Ann", new_is_left=True):
    verdict = {1.0: "left", 0.0: "right", 0.5: "tie"}[share if new_is_left else 1 - share]
    models = (NEW, OLD) if new_is_left else (OLD, NEW)
    return VoteRecord(person, prompt, "x", "y", *models, verdict, "evaluation", None)


def test_the_interval_of_independent_votes_is_that_of_wilson():
    votes = [vote(f"p{n}", float(n < 50), new_is_left=n % 2 == 0) for n in range(80)]
    found = win_rate_of(votes, new=NEW, old=OLD)
    expected = binomtest(50, 80).proportion_ci(method="wilson")
    assert (found.wins, found.losses, found.ties, found.num_prompts) == (50, 30, 0, 80)
    assert found.win_rate == 0.625 and (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.verdict == "better"
    assert found.sentence() == (
        "The new model is better: people preferred it in 62% of 80 blind comparisons (95% interval 52% to 72%)."
    )
    turned = win_rate_of(votes, new=OLD, old=NEW)
    assert turned.verdict == "worse" and turned.win_rate == 0.375
    assert turned.sentence().startswith("The new model is worse: people preferred it in only 38% of 80")


def test_votes_on_one_prompt_that_are_alike_count_once():
    alone = win_rate_of([vote(f"p{n}", float(n < 15)) for n in range(20)], new=NEW, old=OLD)
    votes = [vote(f"p{n}", float(n < 15), person) for n in range(20) for person in ("Ann", "Bob", "Cem")]
    together = win_rate_of(votes, new=NEW, old=OLD)
    assert together.num_people == 3 and together.num_votes == 60
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))


def test_a_tie_is_half_a_win_and_others_are_left_out():
    votes = [vote("p", 1.0), vote("q", 0.5), vote("r", 0.5), vote("s", 0.0)]
    votes += [votes[0]._replace(verdict="both_bad"), votes[0]._replace(left_model="2" * 64)]
    found = win_rate_of(votes, new=NEW, old=OLD)
    assert (found.wins, found.losses, found.ties, found.win_rate) == (1, 1, 3, 0.5)
    assert found.verdict == "unclear" and "not shown to be better" in found.sentence()
    assert "5 so far" in found.sentence()


def test_the_interval_covers_the_truth_with_votes_of_people_on_common_prompts():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(400):
        chances = rng.beta(3, 2, size=40)  # of the new model on each prompt; 0.6 on average
        votes = [vote(f"p{n}", float(rng.random() < chances[n]), str(k)) for n in range(40) for k in range(3)]
        found = win_rate_of(votes, new=NEW, old=OLD)
        inside += found.low <= 0.6 <= found.high
    assert inside / 400 > 0.92  # 95% within the error of 400 trials


def test_no_votes_and_every_sentence():
    nothing = win_rate_of([], new=NEW, old=OLD)
    assert nothing.verdict == "no votes" and nothing.win_rate is None
    assert nothing.sentence() == "Nobody has compared the new model with the old one yet."
    for low, high, verdict in ((0.51, 0.7, "better"), (0.3, 0.49, "worse"), (0.5, 0.7, "unclear")):
        found = BlindWinRate(3, 2, 0, 1, 5, 0.6, low, high)
        assert found.verdict == verdict
        assert found.message % found.shown == found.sentence()
    assert set(SENTENCES) == {"better", "worse", "unclear", "no votes"}


def test_the_votes_of_a_round_are_read_from_the_database(store):
    with store.writing() as session:
        add_models(session)
        round_, other = add_round(session, 1), add_round(session, 2)
        people = [add_person(session, name) for name in ("Ann", "Bob")]
        for number, each in enumerate((round_, round_, round_, other)):
            old, new = add_answers(session, each, f"Why {number}?", ["a", "b"], "evaluation", [OLD, NEW])
            for person in people:
                left, right = (old, new) if person.name == "Ann" else (new, old)
                comparison = add_comparison(session, person, left, right, "evaluation", each)
                add_vote(session, comparison, "right" if left == old else "left")  # for the new one
                if number == 0:
                    add_vote(session, comparison, "tie", NOW + timedelta(seconds=1))  # the newest vote counts
                if number == 1:
                    taken_back = add_vote(session, comparison, "both_bad", NOW + timedelta(seconds=1))
                    session.add(Withdrawal(table="votes", row_id=taken_back.id))
            add_comparison(session, people[0], old, new, "evaluation", each)  # without a vote
        training = add_answers(session, round_, "How?", ["a", "b"], models=[OLD, NEW])
        add_vote(session, add_comparison(session, people[0], *training, round_=round_), "left")
        assert round_win_rate(session, round_.id) is None
        record_stage(session, round_.id, "evaluation", {"prompts": 3, "models": [OLD, NEW]}, NOW)
        session.flush()
        found = round_win_rate(session, round_.id)
    assert (found.wins, found.losses, found.ties) == (4, 0, 2)
    assert (found.num_people, found.num_prompts, found.win_rate) == (2, 3, pytest.approx(5 / 6))
