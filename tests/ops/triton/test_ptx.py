"""The kernels as they are compiled for sm_80, run by the emulator in `ptx/`, each part in a process of its own."""

import pytest

from tests.ops.triton.own_process import require_passed


@pytest.mark.slow(57)
@pytest.mark.parametrize("part", ["bfloat16", "not bfloat16"])
def test_in_a_process(root, part):
    files = sorted(map(str, root.glob("tests/ops/triton/ptx/test_compiled_*.py")))
    require_passed(*files, "-k", part, interpret=False)
