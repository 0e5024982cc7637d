"""The memory allocator of a process that trains on a CPU."""

import ctypes
import os
import sys

# Parameters of glibc's mallopt: the largest threshold that it takes, and enough for a step of a model on a CPU.
MALLOC = {"M_MMAP_THRESHOLD": (-3, 32 << 20), "M_TRIM_THRESHOLD": (-1, 1 << 30), "M_TOP_PAD": (-2, 64 << 20)}


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees for the next step, unless the environment sets its allocator.

    Otherwise the kernel clears every page anew in every step. glibc has these settings for the whole process alone, so
    there is no narrower place for them; a process that trains on a CPU frees and asks for gigabytes in each step.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and not chosen and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for parameter, value in MALLOC.values():
            libc.mallopt(parameter, value)
