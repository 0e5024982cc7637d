"""Kernels in Triton's interpreter, where it can run them."""

import numpy as np
import pytest

from palm_rlhf.ops.triton.versions import INSTALLED, explain_fault
from tests.conftest import NEEDS_TRITON
from tests.ops.triton.own_process import require_passed


@pytest.fixture
def interpreted():
    """`interpreted(name)` runs a file of `interpreted/` in a process of its own; what fails there, fails here."""
    if (reason := explain_fault("interpreter", INSTALLED, numpy=np.__version__)) is not None:
        pytest.skip(f"{NEEDS_TRITON}: {reason}")

    def run(name: str) -> None:
        require_passed(f"tests/ops/triton/interpreted/{name}", interpret=True)

    return run
