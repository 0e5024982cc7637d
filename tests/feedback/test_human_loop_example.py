"""examples/human_loop.py with stand-in people in a real browser, and its settings at their smallest."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from sqlalchemy import select

from palm_rlhf.feedback.store.answer_tables import ComparisonVote
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.people_tables import Participant

SMALL = """--simulate 2 --rounds 1 --votes 12 --final-votes 8 --seed 3 --model.dim 32 --model.depth 1 --model.heads 2
    --model.dim-head 16 --pretraining.num-steps 10 --fine-tuning.num-steps 10 --learning.num-prompts 12
    --learning.num-evaluations 6 --learning.max-new-tokens 12 --learning.reward-epochs 1 --learning.num-steps 2
    --learning.rollouts-per-step 8 --learning.minibatch-size 8 --learning.learning-rate 0.01""".split()


@pytest.fixture(scope="module")
def stand_ins(root):
    """The stand-in people as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "examples")
        yield importlib.import_module("stand_in_people")


def test_the_taste_is_whole_sentences_then_friendly_ones_and_errs_in_one_of_ten(stand_ins):
    taste = stand_ins.Taste(0)
    best_first = ["I love you!", "It is a table.", "I hate you.", "I love", "a table", "I hate"]
    assert sorted(best_first, key=taste.liking, reverse=True) == best_first
    assert taste.verdict("a table", "a chair") == "tie"
    verdicts = [taste.verdict("A table.", "a chair") for _ in range(1000)]
    assert set(verdicts) == {"left", "right"} and 70 < verdicts.count("right") < 130
    assert [stand_ins.Taste(1).verdict("A table.", "a") for _ in range(3)] == ["left"] * 3


@pytest.mark.slow(30)
def test_two_people_vote_in_browsers_and_the_last_line_tells_the_result_of_the_blind_comparison(root, tmp_path):
    command = [sys.executable, str(root / "examples/human_loop.py"), "--output-dir", str(tmp_path / "run"), *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"rounds", "votes", "win_rate", "low", "high", "seconds"}
    assert result["rounds"] == 1 and result["votes"] >= 12 + 8
    assert 0 <= result["low"] <= result["win_rate"] <= result["high"] <= 1
    assert "The new model is" in done.stderr  # better, worse, or not shown to be better
    assert (tmp_path / "run/rounds.png").read_bytes().startswith(b"\x89PNG")
    with Store(tmp_path / "run/feedback.db") as store, store.reading() as session:
        people = {person.id: person.role for person in session.scalars(select(Participant))}
        voters = {vote.person_id for vote in session.scalars(select(ComparisonVote))}
    assert sorted(people.values()) == ["admin", "contributor"] and voters == set(people)
