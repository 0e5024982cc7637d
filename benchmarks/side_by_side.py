"""Timing implementations beside each other: in turn, in one process, as medians with their spread and as ratios."""

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch


def alternate(runs: dict[str, Callable[[], object]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each run, one list for each name: every round times all of them once, so that noise falls on all."""
    seconds = {name: [] for name in runs}
    for round_ in range(warmup + rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, in seconds."""
    ordered = sorted(seconds)
    at = [ordered[round(part * (len(ordered) - 1))] for part in (0.2, 0.8)]
    return {"median": statistics.median(ordered), "p20": at[0], "p80": at[1]}


def speedup(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How many times as fast ours is: the ratios of the rounds, which share their noise."""
    return summary([slow / fast for fast, slow in zip(ours, theirs, strict=True)])


def table(rows: dict[str, dict[str, float]], unit: str, scale: float = 1.0) -> str:
    """Rows of median, p20 and p80 as text."""
    lines = [f"{'':44}{'median':>10}{'p20':>10}{'p80':>10}  {unit}"]
    for name, row in rows.items():
        lines.append(f"{name:44}" + "".join(f"{row[key] * scale:10.2f}" for key in ("median", "p20", "p80")))
    return "\n".join(lines)


def version_of(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def surroundings(*packages: str) -> dict[str, object]:
    """What a figure depends on: device, threads, versions; None is the version of what is not installed."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", *packages)},
        "cuda": torch.version.cuda,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def report(
    title: str,
    seconds: dict[str, list[float]],
    ratios: dict[str, dict[str, float]],
    *packages: str,
    **facts: object,
) -> None:
    """Print a table of times, one of ratios, and a last line of JSON, with further facts."""
    times = {name: summary(values) for name, values in seconds.items()}
    print(f"{title}\n\n{table(times, 'ms', 1e3)}\n\n{table(ratios, 'times as fast')}\n")
    print(json.dumps({"benchmark": title, **surroundings(*packages), "seconds": times, "speedups": ratios, **facts}))
