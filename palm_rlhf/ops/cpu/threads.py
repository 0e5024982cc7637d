"""Sharing the processor with other programs: how long idle threads spin, and how many threads compute.

OpenMP's threads spin for milliseconds while they wait for each other. If other programs use the same cores, threads
spin although the thread that they wait for is not running, and a training step takes ten times as long.

`share_the_machine()`, called before torch is imported, makes waiting threads sleep soon. After that, `adapt()` chooses
the number of threads by a short trial whenever other programs are in the way; trainers, generation and the server call
it between their steps. The settings of the user win: OMP_NUM_THREADS fixes the number of threads, and OMP_WAIT_POLICY,
GOMP_SPINCOUNT or KMP_BLOCKTIME how they wait. Without `share_the_machine()` nothing changes. This module does not
import torch until a trial is due.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}  # tens of microseconds (GCC); a millisecond (Intel, LLVM)
LOOK = 1.0  # seconds between two checks of how long threads had to wait for a core
TOLERATED = 0.05  # the share of the time that threads may wait before a trial
SOON, LATE = 10.0, 120.0  # seconds between two trials; after each trial without a change the pause doubles
SETTLE, MEASURE = 0.3, 0.15  # seconds of a trial of one number; first, the system spreads the threads over the cores
CLOSE = 1.05  # more threads are as good as fewer if they take at most this many times as long


class _State:
    """The state of `adapt` in this process."""

    adapts = False
    most: int | None = None  # the number of threads of a quiet machine; None before the first call
    looked, waited = float("-inf"), 0.0  # the time of the last check, and how long threads had waited for a core then
    tried, pause = float("-inf"), SOON  # the time of the last trial, and the seconds until the next


def share_the_machine() -> None:
    """Let threads spin only briefly, and let `adapt` choose their number; call this before torch is imported."""
    if not os.environ.keys() & {*WAITING, "OMP_WAIT_POLICY"}:
        os.environ.update(WAITING)
    _State.adapts = "OMP_NUM_THREADS" not in os.environ
    _State.looked, _State.waited = time.monotonic(), _seconds_waited() or 0.0


def adapt(device: str = "cpu") -> None:
    """Choose the number of threads for the calling thread by a short trial, if one is due; for CPUs only.

    A trial is due if threads had to wait for a core, or if fewer threads compute than could, and if the last trial was
    not too recent. Other calls take a few microseconds.
    """
    now = time.monotonic()
    if not _State.adapts or device != "cpu" or now - _State.looked < LOOK:
        return
    import torch

    current = torch.get_num_threads()
    _State.most = most = _State.most or current
    is_shared = _has_waited()
    if most > 1 and (is_shared or current < most) and now - _State.tried >= _State.pause:
        best = fastest(sorted({1, most // 2, most - (most + 7) // 8, most} - {0}), _trial(most))
        torch.set_num_threads(best)
        _State.pause = min(LATE, 2 * _State.pause) if best == current else SOON
        _State.tried = time.monotonic()
    _State.looked, _State.waited = time.monotonic(), _seconds_waited() or 0.0


def fastest(counts: Sequence[int], seconds_with: Callable[[int], float]) -> int:
    """Return the number of threads that takes the least time, or the largest number that is about as fast."""
    seconds = {count: seconds_with(count) for count in counts}
    return max(count for count, taken in seconds.items() if taken <= CLOSE * min(seconds.values()))


def _trial(most: int) -> Callable[[int], float]:
    """Return a function that measures, with a number of threads, matrix products and elementwise operations.

    It takes the mean time and not the minimum: waits for a core are rare and long.
    """
    import torch

    x, weight = torch.ones(256 * most, 256), torch.full((256, 256), 1 / 256)

    def mean_seconds(budget: float) -> float:
        started, number = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < budget:
            (x @ weight).mul_(1.5).tanh_()
            number += 1
        return passed / number

    def seconds_with(count: int) -> float:
        torch.set_num_threads(count)
        with torch.no_grad():
            if count > 1:
                mean_seconds(SETTLE)
            return mean_seconds(MEASURE)

    return seconds_with


def _has_waited() -> bool:
    """Return whether threads had to wait for a core since the last check; True if the system does not tell."""
    waited, passed = _seconds_waited(), time.monotonic() - _State.looked
    return waited is None or waited - _State.waited > TOLERATED * passed


def _seconds_waited() -> float | None:
    """Return how many seconds the threads of this process have waited for a core, or None if it is unknown."""
    try:
        lines = [path.read_text() for path in Path("/proc/self/task").glob("*/schedstat")]
        return sum(int(line.split()[1]) for line in lines) / 1e9 if lines else None
    except (OSError, ValueError, IndexError):  # no such file, or a thread has ended meanwhile
        return None
