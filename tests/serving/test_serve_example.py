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
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900, env=None)

    return run


@pytest.mark.slow(10)
def test_a_model_is_trained_served_and_asked(example):
    done = example("--num-steps", 5, "--max-tokens", 8)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["same"]
    assert 1 <= result["tokens"] <= 8


@pytest.mark.slow(6)
@pytest.mark.parametrize("package", ["openai", "fastapi"])
def test_a_package_that_is_missing_is_told_before_training(root, package):
    """In a process that cannot import it; the steps of training would take hours."""
    script = root / "examples/serve_and_ask.py"
    code = f"import runpy, sys; sys.modules[{package!r}] = None; sys.argv = ['x', '--num-steps', '1000000']; "
    code += f"runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    assert done.stderr.startswith("serve_and_ask.py: ")
    assert "pip install" in done.stderr and "train" not in done.stdout


@pytest.mark.slow(8)
def test_a_checkpoint_is_asked(example, checkpoint, dialogues):
    done = example("--checkpoint", checkpoint, "--ask-for", "Count to ten.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(dialogues["Count to ten."]) == 3  # whole, as a stream, in the JSON
    assert json.loads(done.stdout.splitlines()[-1])["reply"] == dialogues["Count to ten."]
    assert "there is no folder" in example("--checkpoint", checkpoint / "nothing").stderr
