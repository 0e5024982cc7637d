"""Which versions of Triton run the kernels: a table of known faults, and not a bound on the version.

`benchmarks/triton_versions.py` installs versions beside each other, compiles every kernel with each of them for GPUs
that need not be there, and runs the kernels in their interpreters. The table holds what it found.
"""

from typing import Literal, NamedTuple, get_args

import triton

INSTALLED: str = triton.__version__
Numbers = tuple[int, int]
Part = Literal["kernels", "descriptors", "descriptors of one row", "interpreter"]
PARTS: tuple[Part, ...] = get_args(Part)


class Fault(NamedTuple):
    """A fault of the versions of Triton from `since` on; `until` is the first version without it.

    It is a fault of GPUs of a compute capability of at least `capability`, and with NumPy from `numpy` on.
    """

    part: Part
    since: Numbers
    until: Numbers
    problem: str
    instead: str
    capability: Numbers = (0, 0)
    numpy: Numbers = (0, 0)


FAULTS = (
    Fault(
        "kernels",
        since=(0, 0),
        until=(3, 2),
        problem="the kernels were never compiled with it",
        instead="use torch 2.6 or newer, which brings Triton 3.2",
    ),
    Fault(
        "kernels",
        since=(3, 2),
        until=(3, 3),
        capability=(10, 0),
        problem="its compiler knows no GPU above compute capability 9.0",
        instead="use torch 2.7 or newer, which brings Triton 3.3",
    ),
    Fault(
        "descriptors",
        since=(0, 0),
        until=(3, 4),
        problem="it has no tensor descriptors",
        instead="kernels read blocks through pointers",
    ),
    Fault(
        "descriptors of one row",
        since=(3, 4),
        until=(3, 7),
        capability=(9, 0),
        problem="its assembler crashes on loops over a single key that is read by a descriptor",
        instead="kernels read a single key through a pointer",
    ),
    Fault(
        "interpreter",
        since=(0, 0),
        until=(3, 7),
        numpy=(2, 4),
        problem="its interpreter fails with NumPy 2.4 or newer",
        instead="install numpy<2.4",
    ),
)


def parse_version(version: str) -> Numbers:
    """Return the first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def find_fault(part: Part, version: str, *, capability: Numbers = (0, 0), numpy: str = "0.0") -> Fault | None:
    """Return the fault of a part in a version of Triton, on a GPU and beside a version of NumPy, or None."""
    found = parse_version(version)
    for fault in FAULTS:
        concerns = capability >= fault.capability and parse_version(numpy) >= fault.numpy
        if fault.part == part and fault.since <= found < fault.until and concerns:
            return fault
    return None


def explain_fault(part: Part, version: str, *, capability: Numbers = (0, 0), numpy: str = "0.0") -> str | None:
    """Return what is wrong with a part in a version of Triton and what to do, or None if nothing is wrong."""
    fault = find_fault(part, version, capability=capability, numpy=numpy)
    return None if fault is None else f"Triton {version}: {fault.problem}; {fault.instead}"
