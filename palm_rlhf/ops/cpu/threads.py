"""Sharing the processor with other work: how long threads wait awake for each other, and how many of them compute.

OpenMP's threads spin where they wait for each other, for milliseconds. Where other programs use the same cores, they
spin while the thread that they wait for is not even running, and a training step takes ten times as long. And every
operation that several threads share then waits until the system has run each of them.

`share_the_machine()`, before torch is imported, makes threads fall asleep soon; from then on `adapt()`, which trainers,
generation and the server call between their steps, chooses the number of threads by a short trial where other work is
in the way. What the user has set counts: with OMP_NUM_THREADS the number of threads stays as it is, with
OMP_WAIT_POLICY, GOMP_SPINCOUNT or KMP_BLOCKTIME they wait as those say. A program that does not call
`share_the_machine()` keeps its threads as they are. This module imports nothing heavy.
"""

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

WAITING = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"}  # tens of microseconds (GCC); a millisecond (Intel, LLVM)
LOOK = 1.0  # seconds between two looks at how long threads had to wait for a core
TOLERATED = 0.05  # the share of the time that they may wait before their number is tried
SOON, LATE = 10.0, 120.0  # seconds between two trials; those that change nothing come ever more rarely
SETTLE, MEASURE = 0.3, 0.15  # seconds of a trial of one number; the system needs some to spread threads over the cores
CLOSE = 1.05  # a number of threads is as good as a smaller one where it takes at most so many times as long


class _State:
    """What this process knows of its threads."""

    adapts = False
    most: int | None = None  # the number where the machine is quiet; None: not asked yet
    looked, waited = float("-inf"), 0.0  # when it looked last, and how long its threads had waited for a core by then
    tried, pause = float("-inf"), SOON  # when it tried last, and how long it leaves it at that


def share_the_machine() -> None:
    """Has threads wait awake only briefly, and their number follow the load; call it before torch is imported."""
    if not os.environ.keys() & {*WAITING, "OMP_WAIT_POLICY"}:
        os.environ.update(WAITING)
    _State.adapts = "OMP_NUM_THREADS" not in os.environ
    _State.looked, _State.waited = time.monotonic(), _seconds_waited() or 0.0


def adapt(device: str = "cpu") -> None:
    """Chooses the calling thread's number of threads by a short trial, where that is due; for computing on a CPU only.

    That is where threads had to wait for a core, or where fewer compute than could, but not soon after a trial. All
    other calls cost some microseconds.
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
    """Which of these numbers of threads takes the least time; the largest of those that are close to it."""
    seconds = {count: seconds_with(count) for count in counts}
    return max(count for count, taken in seconds.items() if taken <= CLOSE * min(seconds.values()))


def _trial(most: int) -> Callable[[int], float]:
    """Measures a block's work with so many threads: products, and elementwise operations between them.

    The mean counts: a thread that has to wait for a core does so rarely and long.
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
    """Whether threads had to wait for a core since the last look; True where the system does not say."""
    waited, passed = _seconds_waited(), time.monotonic() - _State.looked
    return waited is None or waited - _State.waited > TOLERATED * passed


def _seconds_waited() -> float | None:
    """How long all threads of this process have waited for a core so far; None where the system does not say."""
    try:
        lines = [path.read_text() for path in Path("/proc/self/task").glob("*/schedstat")]
        return sum(int(line.split()[1]) for line in lines) / 1e9 if lines else None
    except (OSError, ValueError, IndexError):  # there is no such file, or its thread has ended meanwhile
        return None
