"""What a trainer asks of the C library: that memory which a step frees is there for the next one."""

import sys

import pytest

FAULTS = """
import resource, sys, torch
from palm_rlhf.training.run.launch import build_accelerator, keep_freed_memory

def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(5 << 20) for _ in range(8)]  # 20 MB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

{prepare}
print([step() for _ in range(2)][-1])
"""


def faults(start_python, prepare=""):
    """Page faults of the second step that asks for 160 MB, 40,960 pages, and frees them."""
    out, error = start_python(FAULTS.format(prepare=prepare)).communicate(timeout=900)
    assert out, error
    return int(out)


def test_a_trainer_on_a_cpu_asks_for_its_memory_once(start_python):
    kept = faults(start_python, "build_accelerator(None, ())")
    if sys.platform == "linux":
        assert 2 * kept < 40_000 < faults(start_python)  # its last tensor was not free yet when the first was made


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings are of Linux")
@pytest.mark.parametrize(
    "name, value", [("MALLOC_TOP_PAD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.top_pad=131072")]
)
def test_settings_of_the_allocator_in_the_environment_stay(start_python, name, value):
    """They are set here after glibc has read its own, so that its defaults are what stays."""
    prepare = f"import os; os.environ[{name!r}] = {value!r}; build_accelerator(None, ())"
    assert faults(start_python, prepare) > 40_000
