"""Checks shared among processes: each runs some tasks, and writes a line of JSON for every check and every task's end.

A process that dies, as one does whose compiler crashes, has failed the task that it ran; another takes the rest.
"""

import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

Task = list  # the name of a part, and what else says what to check; JSON
TIME_WAS_UP = "the time was up"
ENDED = "ended"  # of a task, among the results


class Result(NamedTuple):
    """A check or a measurement that ran."""

    part: str
    name: str
    passed: bool
    seconds: float
    figures: dict[str, Any] | None = None


# (name, passed) of a check, or (name, passed, figures) of a measurement
Found = tuple[str, bool] | tuple[str, bool, dict[str, Any]]


def name_of(task: Task) -> str:
    """A task as text."""
    return " ".join(map(str, task))


def in_this_process(
    tasks: list[Task],
    run: Callable[[Task], Iterator[Found]],
    show: Callable[[Result], object],
    deadline: float = float("inf"),
    ended: Callable[[Task], object] = lambda task: None,
) -> tuple[list[Result], dict[str, str]]:
    """Run tasks until a moment of `time.monotonic`: the results, and the tasks left out, with the reason.

    A task that raises has failed.
    """
    results: list[Result] = []
    left_out: dict[str, str] = {}

    def note(part: str, name: str, passed: bool, since: float, *figures: dict[str, Any]) -> None:
        results.append(Result(part, name, bool(passed), time.monotonic() - since, *figures))
        show(results[-1])

    for task in tasks:
        since = time.monotonic()
        if since > deadline:
            left_out[name_of(task)] = TIME_WAS_UP
            continue
        try:
            for name, passed, *figures in run(task):
                note(task[0], name, passed, since, *figures)
                since = time.monotonic()
        except Exception as error:  # of a kernel, a compiler, or a driver; the other tasks go on
            note(task[0], f"{name_of(task)}: {type(error).__name__}: {error}"[:300].replace("\n", " "), False, since)
        ended(task)
    return results, left_out


def worker(tasks: list[Task], run: Callable[[Task], Iterator[Found]]) -> None:
    """Run tasks for the process that started this one, and write what it reads; other output is no result."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def write(message: object) -> None:
        lines.write(json.dumps(message) + "\n")

    in_this_process(tasks, run, show=write, ended=lambda task: write(ENDED))


class Worker:
    """A process with some tasks."""

    def __init__(self, command: list[str], tasks: list[Task], folder: Path, number: int):
        self.tasks, self.num_ended, self.rest = tasks, 0, ""
        self.out, self.errors = folder / f"{number}.out", folder / f"{number}.err"
        with open(self.out, "w") as out, open(self.errors, "w") as errors:
            self.process = subprocess.Popen([*command, json.dumps(tasks)], stdout=out, stderr=errors)
        self.reader = open(self.out)

    def read(self) -> Iterator[Result]:
        """The results that came since the last call."""
        *lines, self.rest = (self.rest + self.reader.read()).split("\n")
        for line in lines:
            message = json.loads(line)
            if message == ENDED:
                self.num_ended += 1
            else:
                yield Result(*message)

    def end(self) -> None:
        """Kill the process, where it still runs, and forget it."""
        self.process.kill()
        self.process.wait()
        self.reader.close()


def in_processes(
    command: list[str], tasks: list[Task], num_processes: int, deadline: float, show: Callable[[Result], object]
) -> tuple[list[Result], dict[str, str]]:
    """Run tasks by processes of `command` with a list of tasks at its end, until a moment of `time.monotonic`.

    What such a process calls is `worker`. The result is that of `in_this_process`.
    """
    results: list[Result] = []
    left_out: dict[str, str] = {}

    def note(result: Result) -> None:
        results.append(result)
        show(result)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        numbers = itertools.count()

        def start(some: list[Task]) -> Worker:
            found = Worker(command, some, Path(folder), next(numbers))
            stack.callback(found.end)
            return found

        workers = [start(tasks[first::num_processes]) for first in range(min(num_processes, len(tasks)))]
        while workers:
            for one in list(workers):
                status = one.process.poll()  # before reading, so that what it wrote last is read
                for result in one.read():
                    note(result)
                late = time.monotonic() > deadline
                if status is None and not late:
                    continue
                workers.remove(one)
                remaining = one.tasks[one.num_ended :]
                if status is None or (late and status == 0):
                    left_out |= {name_of(task): TIME_WAS_UP for task in remaining}
                elif remaining:
                    last = (one.errors.read_text().strip().splitlines() or ["no message"])[-1]
                    text = f"{name_of(remaining[0])}: its process ended with status {status}: {last[:200]}"
                    note(Result(remaining[0][0], text, False, 0.0))
                    if remaining[1:]:
                        workers.append(start(remaining[1:]))
            time.sleep(0.05)
    return results, left_out
