"""Kernels in Triton's interpreter, in processes of their own, since it is chosen before the import."""

import os
import subprocess
import sys

import numpy as np
import pytest

from palm_rlhf.ops.triton.versions import INSTALLED, explain_fault
from tests.conftest import NEEDS_TRITON


@pytest.fixture(scope="module")
def processes(root, request):
    """The files of `interpreted/` that a module names in INTERPRETED, at work side by side."""
    if (reason := explain_fault("interpreter", INSTALLED, numpy=np.__version__)) is not None:
        pytest.skip(f"{NEEDS_TRITON}: {reason}")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    started = {}
    for name in request.module.INTERPRETED:
        command = [sys.executable, "-m", "pytest", "-q", "--strict-skips", f"tests/ops/triton/interpreted/{name}"]
        started[name] = subprocess.Popen(
            command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield started
    for process in started.values():
        process.kill()
        process.wait()
