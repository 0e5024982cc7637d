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
TOLERATED = 0.05  # the share of the time that threads may wait for a core before their number is tried again
ROUNDS = 8  # of a trial
CLOSE = 1.05  # a number of threads is as good as a smaller one where it takes at most so many times as long
SOON, LATE = 10.0, 60.0  # seconds between two looks; fewer threads that stay the fastest are tried ever more rarely


class _State:
    """What this process knows of its threads."""

    adapts = False
    most: int | None = None  # the number where the machine is quiet; None: not asked yet
    pause = SOON  # seconds from the last look to the next
    looked, waited = float("-inf"), 0.0  # when it looked last, and how long its threads had waited for a core by then


def share_the_machine() -> None:
    """Has threads wait awake only briefly, and their number follow the load; call it before torch is imported."""
    if not os.environ.keys() & {*WAITING, "OMP_WAIT_POLICY"}:
        os.environ.update(WAITING)
    _State.adapts = "OMP_NUM_THREADS" not in os.environ


def adapt(device: str = "cpu") -> None:
    """Chooses the calling thread's number of threads by a short trial, where that is due; for computing on a CPU only.

    The first call tries, and so do later ones, seconds apart, where threads had to wait for a core since the last, or
    where fewer compute than could. All other calls cost a microsecond.
    """
    if not _State.adapts or device != "cpu" or time.monotonic() - _State.looked < _State.pause:
        return
    import torch

    current, is_first = torch.get_num_threads(), _State.most is None
    _State.most = most = _State.most or current
    if most > 1 and (is_first or current < most or _has_waited()):
        counts = sorted({1, most // 4, most // 2, most * 3 // 4, most - 1, most} - {0})
        best = fastest(counts, _trial(most))
        torch.set_num_threads(best)
        _State.pause = min(LATE, 2 * _State.pause) if best == current < most else SOON
    _State.looked, _State.waited = time.monotonic(), _seconds_waited() or 0.0


def fastest(counts: Sequence[int], seconds_with: Callable[[int], float]) -> int:
    """Which of these numbers of threads, which rise, takes the least time; the largest of those that are close to it.

    `seconds_with(count)` measures once. Sums are compared, not medians: a thread that has to wait for a core does so
    rarely and long. A number whose sum is twice the least so far is measured no further.
    """
    totals: dict[int, float] = {}
    for count in counts:
        limit, totals[count] = 2 * min(totals.values(), default=float("inf")), 0.0
        for _ in range(ROUNDS):
            if totals[count] <= limit:
                totals[count] += seconds_with(count)
    return max(count for count, total in totals.items() if total <= CLOSE * min(totals.values()))


def _trial(most: int) -> Callable[[int], float]:
    """Measures a few milliseconds of a block's work: products, and elementwise operations between them."""
    import torch

    x, weight = torch.ones(256 * most, 256), torch.full((256, 256), 1 / 256)

    def seconds_with(count: int) -> float:
        torch.set_num_threads(count)
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(2):
                (x @ weight).mul_(1.5).tanh_()
        return time.perf_counter() - started

    seconds_with(most)  # what is made at the first time
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
