"""Tests of kernels in a process of their own: interpreted or compiled, as Triton is told before its import."""

import os
import subprocess
import sys

from tests.conftest import ROOT


def require_passed(*arguments: str, interpret: bool) -> None:
    """Run tests in a process of their own, and fail with its output unless all pass and none skips."""
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "--strict-skips", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout and "skipped" not in done.stdout
