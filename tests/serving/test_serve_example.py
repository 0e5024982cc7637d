"""examples/serve_and_ask.py as a user runs it."""

import json
import subprocess
import sys

import pytest


@pytest.fixture
def example(root):
    """Runs the example, and gives what it printed."""

    def run(*options):
        command = [sys.executable, str(root / "examples/serve_and_ask.py"), *map(str, options)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, env=None)

    return run


def test_a_model_is_trained_served_and_asked(example):
    done = example("--num-steps", 5, "--max-tokens", 8)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same"]
    assert 1 <= result["tokens"] <= 8


def test_a_checkpoint_is_asked(example, checkpoint, dialogues):
    done = example("--checkpoint", checkpoint, "--ask-for", "Count to ten.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(dialogues["Count to ten."]) == 3  # whole, as a stream, in the JSON
    assert json.loads(done.stdout.splitlines()[-1])["reply"] == dialogues["Count to ten."]
    assert "there is no folder" in example("--checkpoint", checkpoint / "nothing").stderr
