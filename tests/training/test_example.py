"""examples/train.py as a user runs it: text in, samples and a score out, resumed, and clear about mistakes."""

import json
import os
import subprocess
import sys

import pytest
import torch

from palm_rlhf.model.palm import PaLM

SMALL = [
    *("--dim", "32", "--depth", "1", "--heads", "2", "--dim-head", "16", "--seq-len", "32", "--eval-context", "16"),
    *("--batch-size", "4", "--save-every", "4", "--eval-every", "4", "--sample-every", "6", "--sample-bytes", "20"),
    *("--plot", "False", "--warmup-steps", "2"),
]


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """`run("--resume")` is a finished process of the example."""

    def start(*args: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": str(root), "PALM_RLHF_CACHE": str(tmp_path_factory.getbasetemp())}
        command = [sys.executable, str(root / "examples/train.py"), *map(str, args)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return start


@pytest.mark.slow(15)
def test_it_trains_samples_saves_and_resumes(run, tmp_path, text):
    (tmp_path / "letters.txt").write_bytes(text.tobytes())
    where = ["--data", tmp_path / "letters.txt", "--output-dir", tmp_path / "run", *SMALL]
    first = run(*where, "--num-steps", "8", "--prompts", "abcdef", "héllo")
    assert first.returncode == 0, first.stderr
    result = json.loads(first.stdout.splitlines()[-1])
    assert result["steps"] == 8
    assert 0 < result["bits_per_byte"] < 10
    assert result["seconds"] > 0
    assert all(word in first.stderr for word in ("letters.txt", "3,000 bytes", "abcdef", "héllo", "bits per byte"))

    palm = PaLM.from_pretrained(tmp_path / "run/model")
    assert palm.num_tokens == 256
    assert palm.generate(max_new_tokens=3, prompt=torch.tensor([97])).shape == (3,)

    again = run(*where, "--num-steps", "8")
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1].startswith("palm-rlhf: ")
    assert "earlier run" in again.stderr

    stopped = run(*where, "--num-steps", "10", "--resume", "--max-seconds", "0.001")
    assert stopped.returncode == 0, stopped.stderr
    result = json.loads(stopped.stdout.splitlines()[-1])
    assert (result["steps"], result["stopped_early"]) == (9, "max_seconds")
    assert "stopped early, after step 9 of 10: max_seconds is 0.001" in stopped.stderr

    more = run(*where, "--num-steps", "10", "--resume")
    assert more.returncode == 0, more.stderr
    result = json.loads(more.stdout.splitlines()[-1])
    assert result["steps"] == 10 and "stopped_early" not in result


def test_help_comes_from_the_configs_and_a_missing_file_is_one_clear_line(run, tmp_path):
    shown = run("--help")
    assert shown.returncode == 0
    for flag in ("--data", "--output-dir", "--resume", "--dim", "--kv-heads", "--learning-rate", "--ema-decay"):
        assert flag in shown.stdout
    missing = run("--data", tmp_path / "no-such-file", "--output-dir", tmp_path / "run")
    assert missing.returncode == 1
    assert missing.stdout == ""
    assert missing.stderr.startswith("palm-rlhf: ")
    assert "no-such-file" in missing.stderr
    assert not (tmp_path / "run").exists()
