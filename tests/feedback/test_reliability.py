"""The reliability of people, estimated from the pairs that several of them judged."""

import numpy as np
import pytest
from scipy.optimize import minimize

from palm_rlhf.feedback.measures.reliability import (
    PRIOR_RIGHT,
    PRIOR_WRONG,
    Judgement,
    estimate_reliability,
    judgements_of,
)
from palm_rlhf.feedback.store.tree_tables import ReplyRanking
from tests.feedback.comparing import NOW, add_answers, add_comparison, add_models, add_person, add_round, add_vote
from tests.feedback.test_agreement import message_of, tree_of


def judged(planted, num_pairs, share=1.0, seed=0):
    """Judgements of people that are right with the planted probabilities, each of a share of the pairs."""
    rng, found = np.random.default_rng(seed), []
    for pair in range(num_pairs):
        truth = bool(rng.integers(2))
        for person, chance in planted.items():
            if rng.random() < share:
                found.append(Judgement(person, (f"{pair}a", f"{pair}b"), truth == (rng.random() < chance)))
    return found


def test_planted_reliabilities_are_recovered():
    planted = {"Ann": 0.95, "Bob": 0.85, "Cem": 0.75, "Dan": 0.5, "Eve": 0.15}  # Eve mostly names the worse one
    inside = 0
    for seed in range(5):
        found = {each.person_id: each for each in estimate_reliability(judged(planted, 400, 0.7, seed))}
        assert [found[person].reliability for person in planted] == pytest.approx(list(planted.values()), abs=0.09)
        inside += sum(found[person].low <= chance <= found[person].high for person, chance in planted.items())
    assert inside >= 21  # of 25 intervals of 95%


def test_the_estimate_is_the_mode_of_the_posterior():
    judgements = judged({"Ann": 0.9, "Bob": 0.7, "Cem": 0.8}, 30, 0.8, seed=3)
    by_pair = {}
    for person, pair, first in judgements:
        by_pair.setdefault(pair, {})[person] = first
    names = ["Ann", "Bob", "Cem"]

    def minus_log_posterior(logits):
        right = dict(zip(names, 1 / (1 + np.exp(-logits))))
        total = sum(PRIOR_RIGHT * np.log(chance) + PRIOR_WRONG * np.log(1 - chance) for chance in right.values())
        for words in by_pair.values():
            if len(words) > 1:
                chances = [
                    np.prod([right[name] if word == truth else 1 - right[name] for name, word in words.items()])
                    for truth in (True, False)
                ]
                total += np.log(sum(chances) / 2)
        return -total

    best = minimize(minus_log_posterior, np.ones(3), tol=1e-12)
    found = {each.person_id: each.reliability for each in estimate_reliability(judgements)}
    assert [found[name] for name in names] == pytest.approx(1 / (1 + np.exp(-best.x)), abs=1e-4)


def test_two_people_have_one_reliability_and_little_proves_little():
    judgements = [
        Judgement(person, (f"{n}", f"{n}x"), n > 0 or person == "Ann") for n in range(10) for person in ("Ann", "Bob")
    ]
    ann, bob = estimate_reliability(judgements)
    assert ann.reliability == pytest.approx(bob.reliability) and ann.agreement == bob.agreement == pytest.approx(0.9)
    assert ann.num_shared == 10
    one = estimate_reliability([*judged({"Ann": 1.0, "Bob": 1.0}, 1), Judgement("Cem", ("x", "y"), True)])
    assert [each.person_id for each in one] == ["Ann", "Bob"]  # Cem judged nothing that another person judged
    assert one[0].low < 0.4 and 0.6 < one[0].reliability < 0.9
    assert estimate_reliability([]) == []


def test_agreement_is_the_share_of_other_peoples_words():
    words = {"Ann": (True, True), "Bob": (True, False), "Cem": (False, None)}
    judgements = [
        Judgement(person, (f"{n}", f"{n}x"), word)
        for person, given in words.items()
        for n, word in enumerate(given)
        if word is not None
    ]
    found = {each.person_id: each.agreement for each in estimate_reliability(judgements)}
    assert found == {"Ann": pytest.approx(1 / 3), "Bob": pytest.approx(1 / 3), "Cem": 0.0}


def test_votes_and_rankings_are_judgements(store):
    with store.writing() as session:
        add_models(session)
        round_, ann = add_round(session, 1), add_person(session, "Ann")
        a, b, c = sorted(add_answers(session, round_, "Why?", ["a", "b", "c"]))
        for left, right, verdict in ((b, a, "left"), (b, c, "left"), (a, c, "tie")):
            add_vote(session, add_comparison(session, ann, left, right), verdict)
        parent = message_of(session, tree_of(session), "x")
        session.add(ReplyRanking(parent_id=parent.id, person_id=ann.id, shown=[], best_first=["3", "1", "2"]))
        session.add(ReplyRanking(parent_id=parent.id, person_id=None, shown=[], best_first=["1", "2"], created_at=NOW))
        session.flush()
        found = {judgement[1:] for judgement in judgements_of(session)}
    assert found == {((a, b), False), ((b, c), True), (("1", "3"), False), (("2", "3"), False), (("1", "2"), True)}
