"""Which versions of Triton run the kernels."""

import triton

OLDEST = (3, 8)


def parse(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def why_not_version(version: str) -> str | None:
    """Return why a version of Triton cannot run the kernels, or None if it can."""
    if parse(version) < OLDEST:
        return "Triton {}.{} or newer is needed, found {}".format(*OLDEST, version)
    return None


VERSION = triton.__version__
