"""Kernels in Triton's interpreter, in processes of their own, since it is chosen before the import."""

import numpy as np
import pytest

from palm_rlhf.ops.triton.versions import INSTALLED, explain_fault
from tests.conftest import NEEDS_TRITON
from tests.ops.triton.started_tests import started_tests


@pytest.fixture(scope="module")
def kernel_tests(request):
    """The files of `interpreted/` that a module names in INTERPRETED, at work side by side."""
    if (reason := explain_fault("interpreter", INSTALLED, numpy=np.__version__)) is not None:
        pytest.skip(f"{NEEDS_TRITON}: {reason}")
    files = {name: [f"tests/ops/triton/interpreted/{name}"] for name in request.module.INTERPRETED}
    with started_tests(request.config, files, interpret=True) as started:
        yield started
