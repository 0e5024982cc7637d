"""Tests of kernels in processes of their own: interpreted or compiled, as Triton is told before its import."""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import contextmanager

import pytest

from tests.conftest import ROOT


class StartedTests:
    """Tests at work in a process of their own, which take turns where these here do."""

    def __init__(self, config: pytest.Config, arguments: list[str], *, interpret: bool):
        self.in_turns = config.option.in_turns
        environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
        environment["PYTEST_ADDOPTS"] = "--in-turns" if self.in_turns else ""
        command = [sys.executable, "-m", "pytest", "-q", "--strict-skips", *arguments]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def require_passed(self):
        output, _ = self.process.communicate()
        assert self.process.returncode == 0, output
        assert " passed" in output and (self.in_turns or "skipped" not in output)


@contextmanager
def started_tests(config: pytest.Config, arguments: Mapping[str, list[str]], *, interpret: bool):
    """Start all at once, side by side; those that are still running at the end are killed."""
    started = {name: StartedTests(config, own, interpret=interpret) for name, own in arguments.items()}
    yield started
    for tests in started.values():
        tests.process.kill()
        tests.process.wait()
