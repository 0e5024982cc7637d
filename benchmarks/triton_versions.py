"""Versions of Triton side by side: what each compiles the kernels to, and whether they are right in its interpreter.

python benchmarks/triton_versions.py                       # 3.6.0, 3.8.0 and 3.9.0
python benchmarks/triton_versions.py --versions 3.2.0 --archs sm_90

Each version is installed into a folder of its own, which is deleted afterwards, and runs beside the installed torch.
Two steps follow, each of which can be left out: all kernels are compiled for GPUs that need not be there, with the gate
of `kernels_static.py`, and the tests of `tests/ops/triton/interpreted` run. Faults that are known of a version
(`palm_rlhf/ops/triton/versions.py`) are left out. It exits with 1 if a kernel does not compile or a test fails, and
with 3 if no package index has the version. What the gate refuses is slow, not wrong: it is printed, and changes no exit
code.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

from palm_rlhf.ops.triton.versions import explain_fault, find_fault, parse_version

ROOT = Path(__file__).resolve().parent.parent
NUMPY_BEFORE_2_4 = "numpy==2.2.6"
NO_PACKAGE = 3
# One query and one key, in a process of its own: compilers know that their loops end after one turn.
ONE_KEY = """
import sys, torch
from aot import build, record
from palm_rlhf.ops.triton.attention_backward import backward
from palm_rlhf.ops.triton.attention_forward import forward

q, k = (torch.empty(2, heads, 1, 64, dtype=torch.bfloat16, device="meta") for heads in (8, 2))

def both():
    out, lse = forward(q, k, k, True, None, None)
    backward(out, q, k, k, out, lse, True, None, None)

for launch in record(both, sys.argv[1]):
    build(launch, sys.argv[1])
"""


class Plan(NamedTuple):
    """What is done with a version: its packages, architectures to compile for, and what is left out and why."""

    packages: list[str]
    archs: list[str]
    left_out: list[str]


class Outcome(NamedTuple):
    """What became of a step for a version."""

    version: str
    step: str
    passed: bool
    remarks: list[str]


def make_plan(version: str, archs: tuple[str, ...], numpy: str) -> Plan:
    """Return what is done with a version, by the table of known faults."""
    left_out, compiled = [], []
    for arch in archs:
        number = int(arch.removeprefix("sm_")) if arch.startswith("sm_") else 0
        reason = explain_fault("kernels", version, capability=divmod(number, 10))
        if reason is None:
            compiled.append(arch)
        else:
            left_out.append(f"{arch}: {reason}")
    packages = [f"triton=={version}"]
    if find_fault("interpreter", version, numpy=numpy) is not None:
        packages.append(NUMPY_BEFORE_2_4)
    return Plan(packages, compiled, left_out)


def install(packages: list[str], folder: Path) -> str | None:
    """Install packages into a folder without what they depend on, and return why that failed, or None."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def environment(folder: Path, *, interpret: bool) -> dict[str, str]:
    """Return the variables of a process that finds the packages of a folder before all others."""
    paths = [str(folder), str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TRITON_CACHE_DIR": str(folder / "cache"),
        "TRITON_INTERPRET": "1" if interpret else "0",
        "OMP_NUM_THREADS": "1",
    }


def judge(output: str) -> list[str]:
    """Return what the gate refuses, from the output of `kernels_static.py`; raises ValueError if there is no result."""
    try:
        lines = json.loads(output.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise ValueError("no result") from None
    return [f"{line['kernel']} {line['arch']}: {line['gate']}" for line in lines if line["gate"] != "passed"]


def last_error(text: str) -> str:
    """Return the last line of an output that tells of an error."""
    lines = [line for line in text.splitlines() if "rror" in line] or text.splitlines() or ["no output"]
    return lines[-1].strip()[:200]


def compile_kernels(version: str, arch: str, operations: tuple[str, ...], folder: Path, processes: int) -> Outcome:
    """Compile all kernels, and those of a single key, for an architecture."""
    command = [sys.executable, str(ROOT / "benchmarks/kernels_static.py"), "--archs", arch]
    command += ["--processes", str(processes), *(("--operations", *operations) if operations else ())]
    variables = environment(folder, interpret=False)
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    try:
        remarks = judge(done.stdout)
    except ValueError:
        return Outcome(version, f"compile for {arch}", False, [last_error(done.stderr)])
    one = subprocess.run([sys.executable, "-c", ONE_KEY, arch], env=variables, capture_output=True, text=True)
    if one.returncode != 0:
        return Outcome(version, f"compile for {arch}", False, [f"a single key: {last_error(one.stderr)}"])
    return Outcome(version, f"compile for {arch}", True, remarks)


def interpret(version: str, tests: tuple[str, ...], folder: Path) -> Outcome:
    """Run the tests of the kernels in the interpreter of a version."""
    paths = [f"tests/ops/triton/interpreted/{name}" for name in tests] or ["tests/ops/triton/interpreted"]
    command = [sys.executable, "-m", "pytest", "-q", "--strict-skips", "-p", "no:cacheprovider", "-n", "0", *paths]
    done = subprocess.run(command, cwd=ROOT, env=environment(folder, interpret=True), capture_output=True, text=True)
    failed = [line.partition(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    closing = done.stdout.strip().splitlines()[-1:] or [last_error(done.stderr)]
    return Outcome(version, "interpret", done.returncode == 0, [*failed, *closing])


def examine(
    version: str, archs: tuple[str, ...], operations: tuple[str, ...], tests: tuple[str, ...], steps: tuple[str, ...],
    processes: int,
) -> list[Outcome]:  # fmt: skip
    """Install a version, take the steps, and return what became of them."""
    plan = make_plan(version, archs, np.__version__)
    with tempfile.TemporaryDirectory(prefix="triton-") as name:
        folder = Path(name)
        if (reason := install(plan.packages, folder)) is not None:
            print(f"{version} cannot be installed: {reason}")
            sys.exit(NO_PACKAGE)
        outcomes = [Outcome(version, "left out", True, [remark]) for remark in plan.left_out]
        if "compile" in steps:
            outcomes += [compile_kernels(version, arch, operations, folder, processes) for arch in plan.archs]
        if "interpret" in steps:
            outcomes.append(interpret(version, tests, folder))
    return outcomes


def main(
    versions: tuple[str, ...] = ("3.6.0", "3.8.0", "3.9.0"),
    archs: tuple[str, ...] = ("sm_80", "sm_90", "sm_100"),
    operations: tuple[str, ...] = (),
    tests: tuple[str, ...] = (),
    steps: tuple[str, ...] = ("compile", "interpret"),
    processes: int = 2,
) -> None:
    """Print what each version makes of the kernels, and a last line of JSON.

    Args:
        versions: Versions of Triton, as the package index has them.
        archs: NVIDIA architectures to compile for.
        operations: Operations of `kernels_static.py` to compile; all if there are none.
        tests: Files in `tests/ops/triton/interpreted` to run; all if there are none.
        steps: The steps to take: compile, interpret.
        processes: How many kernels compile side by side.
    """
    outcomes = []
    for version in sorted(versions, key=parse_version):
        for outcome in examine(version, archs, operations, tests, steps, processes):
            print(f"Triton {version}, {outcome.step}: {'passed' if outcome.passed else 'FAILED'}", flush=True)
            for remark in outcome.remarks:
                print(f"    {remark}", flush=True)
            outcomes.append(outcome)
    print(json.dumps([outcome._asdict() for outcome in outcomes]))
    sys.exit(not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    tyro.cli(main)
