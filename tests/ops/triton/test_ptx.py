"""The kernels as they are compiled for sm_80, run by the emulator in `ptx/`, each part in a process of its own."""

import pytest

from tests.ops.triton.started_tests import started_tests

PARTS = {"bfloat16": "bfloat16", "the others": "not bfloat16"}


@pytest.fixture(scope="module")
def kernel_tests(root, request):
    """The tests of compiled kernels in `ptx/`, at work side by side."""
    files = sorted(map(str, root.glob("tests/ops/triton/ptx/test_compiled_*.py")))
    parts = {part: [*files, "-k", names] for part, names in PARTS.items()}
    with started_tests(request.config, parts, interpret=False) as started:
        yield started


@pytest.mark.slow(57)
@pytest.mark.parametrize("part", PARTS)
def test_compiled_kernels(kernel_tests, part):
    kernel_tests[part].require_passed()
