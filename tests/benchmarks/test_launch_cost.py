"""The benchmark of calls runs every operation both ways, and ends with a line of JSON."""

import json
import os
import subprocess
import sys


def test_every_call_is_timed_eager_and_as_an_operator(root):
    command = [sys.executable, str(root / "benchmarks/launch_cost.py"), "--times", "2", "--rounds", "2"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    names = {name.rpartition(", ")[0] for name in result["seconds"]}
    operations = {"attention", "rotary", "swiglu", "cross_entropy", "logprobs"}
    expected = {f"{name} {kind}" for name in operations for kind in ("forward", "both")} | {"decode forward"}
    assert names == set(result["speedups"]) == expected and len(result["seconds"]) == 2 * len(expected)
