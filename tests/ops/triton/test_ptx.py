"""The kernels as they are compiled for sm_80, run by the emulator in `ptx/`, each part in a process of its own."""

import os
import subprocess
import sys

import pytest

PARTS = {"bfloat16": "bfloat16", "the others": "not bfloat16"}


@pytest.fixture(scope="module")
def processes(root):
    """The tests of compiled kernels in `ptx/`, at work side by side."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    files = sorted(map(str, root.glob("tests/ops/triton/ptx/test_compiled_*.py")))
    command = [sys.executable, "-m", "pytest", "-q", "--strict-skips", *files, "-k"]
    started = {
        part: subprocess.Popen(
            [*command, names], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for part, names in PARTS.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.slow(57)
@pytest.mark.parametrize("part", PARTS)
def test_compiled_kernels(processes, part):
    output, _ = processes[part].communicate()
    assert processes[part].returncode == 0, output
    assert " passed" in output and "skipped" not in output
