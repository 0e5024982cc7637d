"""Is what runs on this GPU right? Kernels and models against float64, laws, bits, and the tests that need a GPU.

python benchmarks/gpu_check.py                # all of it, at most 4 minutes; what did not fit is named
python benchmarks/gpu_check.py --device cpu   # the same checks of what the CPU runs, at small sizes; in Triton's
                                              # interpreter, where TRITON_INTERPRET=1 is set, of the kernels

The checks are shared among processes, which compile their kernels side by side. It needs the packages of a plain
installation; the tests that need a GPU are left out where pytest is missing. Exits with 0 where every check passes, 1
where one fails, 3 where there is no GPU to check.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from attention_checks import DECODED, SIZES, accuracy, choices, decoding, laws, repetitions
from attention_work import Work, gradients, implementation
from check_processes import Result, in_processes, in_this_process, worker
from fused_checks import layers, losses
from gpu_tests import LEFT_OUT, gpu_tests
from model_checks import KINDS, MODELS, adapters, blocks, fewer_bits, one_base
from side_by_side import alternate, surroundings

from palm_rlhf.ops.devices import available_implementations

NO_GPU = 3
DTYPES = {"cuda": ("bfloat16", "float16", "float32"), "cpu": ("float32",)}
OF_ATTENTION = ("repetitions", "accuracy", "decode", "laws")
ROUNDS = {"cuda": 20, "cpu": 2}
RESERVED = 15  # of the seconds allowed, for the timings at the end
# TFLOP/s of causal attention of 8k tokens, d 128, 16-bit, on an H100 (Shah et al. 2024, FlashAttention-3).
PUBLISHED = {"forward": {"Triton": 369, "FlashAttention-3": 602}, "both": {"FlashAttention-2": 308}}


def tasks_of(device: str, repeats: int) -> list[list]:
    """The checks in parts of a few seconds: a part's name, and the arguments that it takes beside the device."""
    tasks: list[list] = [["repetitions", dim, repeats] for dim in (64, 128)]
    for dtype in DTYPES[device]:
        tasks += [["accuracy", dtype, size] for size in reversed(SIZES[device])]  # the largest take longest
        tasks += [["decode", dtype, size] for size in DECODED[device]]
        tasks += [["laws", dtype], ["losses", dtype], ["layers", dtype]]
        tasks += [["blocks", dtype, name] for name in MODELS]
        tasks += [["adapters", dtype, name] for name in MODELS]
        tasks += [["bits", dtype, kind] for kind in KINDS]
    return [*tasks, *(["one base", name] for name in MODELS), ["auto"]]


def without_packages(tasks: list[list]) -> tuple[list[list], dict[str, str]]:
    """The checks that can run here, and the parts that are left out for want of a package."""
    lacking = {} if find_spec("bitsandbytes") else {"bits": "bitsandbytes is not installed"}
    return [task for task in tasks if task[0] not in lacking], lacking


def checks_of(task: list, function: Callable, device: str) -> Iterator[tuple[str, bool]]:
    """The checks of a task, each with whether it passed."""
    part, *arguments = task
    if part == "repetitions":
        return repetitions(function, device, *arguments)
    if part == "auto":
        return choices(device)
    if part == "one base":
        return one_base(device, *arguments)
    dtype = getattr(torch, arguments[0])
    if part == "accuracy":
        return accuracy(function, device, dtype, tuple(arguments[1]))
    if part == "decode":
        return decoding(function, device, dtype, tuple(arguments[1]))
    if part == "laws":
        return laws(function, device, dtype)
    of_dtype = {"losses": losses, "layers": layers, "blocks": blocks, "adapters": adapters, "bits": fewer_bits}
    return of_dtype[part](device, dtype, *arguments[1:])


def step_of(function: Callable, tensors: list[torch.Tensor], direction: str) -> Callable[[], object]:
    """One pass."""
    if direction == "both":
        return lambda: gradients(function, tensors, causal=True)
    return lambda: function(*(t.detach() for t in tensors[:3]), causal=True)


def timings(function: Callable, device: str) -> list[dict[str, object]]:
    """Speeds beside PyTorch's fused attention, with what others published for an H100."""
    length, batch = (8192, 2) if device == "cuda" else (64, 1)
    lines = []
    for dim in (64, 128):
        work = Work(batch, 16, 16, length, length, dim, torch.bfloat16, device)
        tensors = work.tensors()
        for direction in ("forward", "both"):
            steps = {
                "ours": step_of(function, tensors, direction),
                "PyTorch": step_of(implementation("fused"), tensors, direction),
            }
            medians = {name: statistics.median(s) for name, s in alternate(steps, rounds=ROUNDS[device]).items()}
            speeds = {name: work.flops(direction) / seconds / 1e12 for name, seconds in medians.items()}
            published = PUBLISHED[direction] if dim == 128 and device == "cuda" else {}
            lines.append({"direction": direction, "n": length, "d": dim, "tflops": speeds, "published": published})
    return lines


def show(result: Result) -> None:
    """Print a check."""
    print(f"{'passed' if result.passed else 'FAILED'}  {result.name}", flush=True)


def summary_table(results: list[Result], left_out: dict[str, str], seconds: dict[str, float]) -> str:
    """A row for each part: checks that passed and failed, and its seconds, those of all processes together."""
    lines = [f"{'part':14}{'passed':>8}{'failed':>8}{'seconds':>9}"]
    for part, taken in seconds.items():
        of_part = [result.passed for result in results if result.part == part]
        lines.append(f"{part:14}{sum(of_part):8}{len(of_part) - sum(of_part):8}{taken:9.1f}")
    lines += [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines)


def run_checks(function: Callable, device: str, repeats: int) -> list[str]:
    """Print every check of an attention in this process, and return the names of those that fail."""
    tasks = [task for task in tasks_of(device, repeats) if task[0] in OF_ATTENTION]
    results, _ = in_this_process(tasks, lambda task: checks_of(task, function, device), show)
    return [result.name for result in results if not result.passed]


def parse_arguments() -> argparse.Namespace:
    """The options of the command line, by `argparse`, which is always there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to compute (default: cuda)")
    parser.add_argument("--repeats", type=int, default=200, help="times that bits are compared (default: 200)")
    parser.add_argument("--max-seconds", type=float, default=240, help="end by then, and name what is left out")
    processes = min(16, os.cpu_count() or 1)
    parser.add_argument("--processes", type=int, help=f"share the checks among so many (default: {processes}; cpu: 0)")
    parser.add_argument("--tasks", help=argparse.SUPPRESS)  # in a process of check_processes: its tasks, as JSON
    options = parser.parse_args()
    if options.processes is None:
        options.processes = processes if options.device == "cuda" else 0
    return options


def main() -> None:
    """Check what runs on a GPU, or on the CPU at small sizes, and time attention."""
    started, options = time.monotonic(), parse_arguments()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none, so nothing was checked; --device cpu checks the CPU's")
        sys.exit(NO_GPU)
    refusal = available_implementations(device)["triton"]
    if device == "cuda" and refusal is not None:
        print(f"FAILED  the kernels cannot run here: {refusal}")
        sys.exit(1)
    name = "triton" if refusal is None else "chunked"
    function = implementation(name)

    def run(task: list) -> Iterator[tuple[str, bool]]:
        return checks_of(task, function, device)

    if options.tasks is not None:
        worker(json.loads(options.tasks), run)
        return
    tasks, lacking = without_packages(tasks_of(device, options.repeats))
    print(f"{name} attention on {device}\n")
    deadline = started + options.max_seconds - RESERVED
    tests = gpu_tests(deadline) if device == "cuda" else None  # they run beside the checks
    if options.processes:
        command = [sys.executable, __file__, "--device", device, "--tasks"]
        results, left_out = in_processes(command, tasks, options.processes, deadline, show)
    else:
        results, left_out = in_this_process(tasks, run, show, deadline)
    left_out |= lacking
    if tests is None:
        left_out["tests"] = LEFT_OUT["cpu"]
    else:
        found, reason = tests()
        for result in found:
            show(result)
        results += found
        if reason:
            left_out["tests"] = reason
    seconds: dict[str, float] = {}
    for result in results:
        seconds[result.part] = seconds.get(result.part, 0.0) + result.seconds
    interpreted = name == "triton" and device == "cpu"  # its time is no speed
    before = time.monotonic()
    lines = [] if interpreted else timings(function, device)
    print()
    for line in lines:
        speeds = {**line["tflops"], **{f"{who}, published": speed for who, speed in line["published"].items()}}
        text = ", ".join(f"{who} {speed:.1f}" for who, speed in speeds.items())
        print(f"{line['direction']:8} n {line['n']} d {line['d']:3}  TFLOP/s: {text}")
    seconds["timings"] = time.monotonic() - before
    print(f"\n{summary_table(results, left_out, seconds)}\n{time.monotonic() - started:.0f} s in all")
    failed = [result.name for result in results if not result.passed]
    report = {"check": "gpu", "implementation": name, "failed": failed, "left_out": left_out}
    report |= {"passed": len(results) - len(failed), "seconds": {k: round(v, 1) for k, v in seconds.items()}}
    report |= {"choices": [result.name for result in results if result.part == "auto"]}
    print(json.dumps({**report, **surroundings("triton"), "timings": lines}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
