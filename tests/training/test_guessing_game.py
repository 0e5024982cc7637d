"""examples/guessing_game.py: its rules by hand, and a policy that learns to play it."""

import importlib
import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def example(root):
    """The example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "examples")
        yield importlib.import_module("guessing_game")


def test_the_umpire_and_the_reward_by_hand(example):
    answers = [example.umpire([{"content": "guess"}, {"content": said}], secret=3) for said in ("2", "3", "6", "lower")]
    assert answers == ["higher", None, "lower", None]
    assert example.found(["4 lower 3", "4 lower 2", "lower", "3"], secret=[3, 3, 3, 3]) == [1.0, 0.0, 0.0, 1.0]
    tokenizer = example.Words(7)
    assert tokenizer.decode(tokenizer.encode("4 lower 2 higher 3")) == "4 lower 2 higher 3"
    assert [row["secret"] for row in example.rows_of(3)] == [1, 2, 3]


@pytest.mark.slow(20)
def test_a_policy_learns_to_ask(root):
    """From about a quarter of the games to nearly all."""
    done = subprocess.run(
        [sys.executable, str(root / "examples/guessing_game.py"), "--seed", "0", "--games", "60"],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["won_before"] < 0.45
    assert result["won_after"] > 0.85
    assert "before:" in done.stderr and "100% at best" in done.stderr
