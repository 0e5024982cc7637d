"""How fast is this GPU with this package, beside what else is installed? Attention, decoding, training.

python benchmarks/gpu_speed.py                        # all rows, at most 5 minutes; what did not fit is named
python benchmarks/gpu_speed.py --only attention generation
python benchmarks/gpu_speed.py --device cpu           # tiny sizes, to see that it runs

Each part compares the results before it times them, and what is not right is not timed. Compilation comes first, in
processes side by side, and is timed apart, as "first". Packages beside ours, transformers, palm-rlhf-pytorch and
flash-attn, are left out where they are not installed. Prints a table and a line of JSON. Exits with 0, 1 where a
comparison or a row failed, 3 where there is no GPU.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import speed_attention
import speed_decoding
import speed_training
import speed_variants
import torch
from check_processes import Result, Task, in_processes, in_this_process, worker
from side_by_side import surroundings
from training_models import LLAMA, SIZES, Size

from palm_rlhf.model.config import PaLMConfig

NO_GPU = 3
PARTS = ("attention", "generation", "training", "rlhf", "engine", "example", "serial", "adapters", "bits")
TINY = {
    "tiny": Size(PaLMConfig(num_tokens=300, dim=32, depth=1, heads=2, dim_head=16), 2, 16),
    "tiny LLaMA": Size(PaLMConfig(num_tokens=300, dim=32, depth=1, heads=2, dim_head=16, **LLAMA), 2, 16),
}
FOR_COMPILATION = 0.4  # of the seconds allowed, at most
PREPARED_BY = 8  # processes side by side, each with its tensors on the GPU
OURS, TRAINER = "palm-rlhf", "palm-rlhf, trainer"
MEASURED = {  # rows of `training_models.rows`, by size
    "139M": (
        OURS,
        f"{OURS}, compiled",
        TRAINER,
        f"{TRAINER}, compiled",
        "transformers Cohere",
        "transformers Cohere, compiled",
        "palm-rlhf-pytorch",
    ),
    "1B": (TRAINER, f"{TRAINER}, compiled"),
    "tiny": (OURS, TRAINER, "transformers Cohere", "palm-rlhf-pytorch"),
    "SmolLM2 135M": (OURS, TRAINER, f"{TRAINER}, compiled", "transformers LLaMA"),
    "tiny LLaMA": (OURS, "transformers LLaMA"),
}


def size_of(title: str) -> Size:
    """A model and its batch by name."""
    return {**SIZES, **TINY}[title]


def tasks_of(device: str, only: list[str]) -> list[Task]:
    """The rows to measure, the most important first: a part's name, and which of its rows."""
    titles, rows = (("139M", "1B"), ((1, 64), (1,))) if device == "cuda" else (("tiny",), ((1, 2),))
    tasks: list[Task] = [["attention", number] for number in range(len(speed_attention.ROWS[device]))]
    tasks += [["generation", title, batch] for title, batches in zip(titles, rows, strict=True) for batch in batches]
    for title in titles:
        tasks += [["training", title, "parity"], *(["training", title, name] for name in MEASURED[title])]
    tasks += [["rlhf", titles[0], kind] for kind in speed_decoding.RLHF]
    tasks += [["engine", titles[0], clients] for clients in ((64, 16) if device == "cuda" else (2,))]
    tasks.append(["example"])
    serial = ("SmolLM2 135M", "LLaMA 3.2 1B") if device == "cuda" else ("tiny LLaMA",)
    tasks += [["serial", "generation", title, 1] for title in serial]
    tasks += [["serial", "training", serial[0], name] for name in ("parity", *MEASURED[serial[0]])]
    tasks += [["adapters", titles[0], 16 if device == "cuda" else 6]]
    tasks += [["bits", serial[-1], kind] for kind in ("int8", "int4")]
    return [task for task in tasks if task[0] in only]


def rows_of(task: Task, device: str) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Measure a task."""
    part, *which = task[1:] if task[0] == "serial" else task
    if part == "attention":
        return speed_attention.attention(device, *which)
    if part == "example":
        return speed_training.example(device)
    title, choice = which
    size = size_of(title)
    if part == "training":
        if choice == "parity":
            return speed_training.parity(size, title)
        return speed_training.training(device, size, title, choice)
    measure = {"generation": speed_decoding.generation, "rlhf": speed_decoding.rlhf, "engine": speed_decoding.engine}
    measure |= {"adapters": speed_variants.adapters, "bits": speed_variants.fewer_bits}
    return measure[part](device, size.config, title, choice)


def measured(task: Task, device: str) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """Measure a task, and free its memory."""
    torch.manual_seed(0)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield from rows_of(task, device)
    gc.collect()
    if device == "cuda":
        torch.compiler.reset()
        torch.cuda.empty_cache()


def compiled_tasks(tasks: list[Task]) -> list[Task]:
    """The tasks in which torch.compile or Triton compile for long."""
    found = [task for task in tasks if "training" in task and task[-1].endswith("compiled")]
    return [*found, *(task for task in tasks if task[0] == "attention")]


def prepared(task: Task, device: str) -> Iterator[tuple[str, bool]]:
    """Compile what a task needs into the caches on disk."""
    if task[0] == "attention":
        speed_attention.prepare(device, task[1])
    else:
        speed_training.prepare(device, size_of(task[-2]), task[-1])
    yield " ".join(map(str, task)), True


def shown(value: object) -> str:
    """A figure as text, with three digits where it is not whole."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def show(result: Result) -> None:
    """Print a row of the table."""
    figures = ", ".join(f"{name} {shown(value)}" for name, value in (result.figures or {}).items())
    print(f"{'' if result.passed else 'FAILED  '}{result.name:56} {figures}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """The options of the command line, by `argparse`, which is always there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to compute (default: cuda)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to measure")
    parser.add_argument("--max-seconds", type=float, default=300, help="end by then, and name what is left out")
    parser.add_argument("--tasks", help=argparse.SUPPRESS)  # in a process of check_processes: its tasks, as JSON
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure the parts, each in its turn."""
    started, options = time.monotonic(), parse_arguments()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none, so nothing was timed; --device cpu runs tiny sizes")
        sys.exit(NO_GPU)
    if options.tasks is not None:
        run = prepared if options.prepare else measured
        worker(json.loads(options.tasks), lambda task: run(task, device))
        return
    deadline = started + options.max_seconds - 2
    tasks = tasks_of(device, options.only)
    compilation = 0.0
    if device == "cuda":
        command = [sys.executable, __file__, "--device", device]
        until = started + FOR_COMPILATION * options.max_seconds
        waiting = compiled_tasks(tasks)
        processes = min(PREPARED_BY, os.cpu_count() or 1)
        in_processes([*command, "--prepare", "--tasks"], waiting, processes, until, lambda result: None)
        compilation = time.monotonic() - started
        print(f"compiled in {compilation:.0f} s, by {min(processes, len(waiting))} processes\n", flush=True)
        results, left_out = in_processes([*command, "--tasks"], tasks, 1, deadline, show)
    else:
        results, left_out = in_this_process(tasks, lambda task: measured(task, device), show, deadline)
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    seconds: dict[str, float] = {"compilation": compilation}
    for result in results:
        seconds[result.part] = seconds.get(result.part, 0.0) + result.seconds
    print(", ".join(f"{part} {taken:.0f} s" for part, taken in seconds.items()))
    failed = [result.name for result in results if not result.passed]
    report = {"benchmark": "gpu_speed", "failed": failed, "left_out": left_out, "seconds": seconds}
    report |= surroundings("triton", "transformers", "palm-rlhf-pytorch", "flash-attn")
    print(json.dumps({**report, "rows": {result.name: result.figures for result in results}}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
