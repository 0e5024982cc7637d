"""Is the code of one revision as fast as that of another? Both in turn, each in processes of its own.

python benchmarks/revisions.py 05d8e45          # the revision, and the package as it lies here, changes included
python benchmarks/revisions.py 05d8e45 main --rows generation-float32 engine --max-seconds 120

Each round starts a process for each revision, over the package as it was then. The two take turns, run by run. Before a
row is timed, its losses, metrics or tokens at one seed are compared: where they differ, the table says where, and the
command exits with 1, for the times may be those of other work. It also does where the newer revision fails at a row. A
row that the older one lacks is named. The ratios are those of neighbouring runs, older by newer.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from revision_rows import ROWS, SIZES
from side_by_side import report, speedup

ROOT = Path(__file__).resolve().parent.parent
WORKING_TREE = "working tree"
TOLERANCE = 1e-3  # of a number: another order of sums changes less


def git(repository: Path, *arguments: str) -> bytes:
    """Return what git prints; SystemExit with its message where it fails."""
    done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True)
    if done.returncode:
        sys.exit(f"revisions.py: git {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout


def exported(repository: Path, revision: str, folder: Path) -> str:
    """Write the package of a revision into a folder, and return the first digits of its commit."""
    commit = git(repository, "rev-parse", "--short", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    name = commit.decode().strip()
    folder.mkdir()
    packed = git(repository, "archive", "--format=tar", name, "palm_rlhf")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed, check=True)
    return name


class Process:
    """A process over the package of a revision, which prepares and times rows; see `revision_rows.main`."""

    def __init__(self, revision: str, package: Path, size: str):
        self.revision = revision
        threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))  # both have as many
        environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": threads}
        command = [sys.executable, str(Path(__file__).with_name("revision_rows.py")), str(package), size]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen(command, env=environment, **pipes)

    def ask(self, line: str = "") -> dict[str, Any]:
        """Prepare the row of this name, or time the last one; SystemExit where the process has died."""
        try:
            self.process.stdin.write(f"{line}\n")
        except BrokenPipeError:
            pass
        if not (answer := self.process.stdout.readline()):
            sys.exit(f"revisions.py: the process of {self.revision} ended with status {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def processes(packages: dict[str, Path], size: str) -> Iterator[list[Process]]:
    """A block with a process for each revision."""
    with ExitStack() as stack:
        started = [Process(revision, package, size) for revision, package in packages.items()]
        for process in started:
            stack.callback(process.end)
        yield started


def difference(old: dict[str, list], new: dict[str, list]) -> str | None:
    """Return where the results of a row differ first, of the names that both have; None where they are the same."""
    for name in (name for name in old if name in new):
        pairs = list(zip(old[name], new[name]))
        for place, (one, other) in enumerate(pairs):
            near = isinstance(one, float) and math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-6)
            if one != other and not near:
                return f"{name} {place + 1} of {len(pairs)}: {one} and {other}"
        if len(old[name]) != len(new[name]):
            return f"{name}: {len(old[name])} and {len(new[name])} of them"
    return None


@dataclass
class Comparison:
    """What is known of each row, by its name."""

    seconds: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)  # of the older, of the newer
    left_out: dict[str, str] = field(default_factory=dict)
    differs: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def prepare(self, row: str, pair: Sequence[Process]) -> bool:
        """Prepare a row in both processes, compare its results, and return whether it can be timed."""
        old, new = (process.ask(row) for process in pair)
        for answer, process in ((new, pair[1]), (old, pair[0])):
            if "error" in answer:
                self.left_out[row] = f"{process.revision}: {answer['error']}"
                if answer is new:
                    self.failed.append(row)
                return False
        where = difference(old["results"], new["results"])
        if row not in self.seconds:
            print(f"parity: {row}: {where or 'the same results'}", flush=True)
        if where is not None:
            self.differs[row] = where
        return True

    def time(self, row: str, pair: Sequence[Process], *, repeats: int, newer_first: bool) -> None:
        """Time a prepared row by turns."""
        times = self.seconds.setdefault(row, ([], []))
        for turn in range(repeats):
            for side in (1, 0) if (turn % 2 == 1) != newer_first else (0, 1):
                times[side].append(pair[side].ask()["seconds"])


def compare(
    packages: dict[str, Path], rows: Sequence[str], size: str, *, rounds: int, repeats: int, deadline: float
) -> Comparison:
    """Compare and time rows until a moment of `time.monotonic`."""
    found = Comparison()
    for round_ in range(rounds):
        with processes(packages, size) as pair:
            for row in rows:
                if time.monotonic() < deadline and row not in found.left_out and found.prepare(row, pair):
                    found.time(row, pair, repeats=repeats, newer_first=round_ % 2 == 1)
    found.left_out |= {row: "the time was up" for row in rows if row not in {**found.seconds, **found.left_out}}
    return found


def main(
    old: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OLD")],
    new: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NEW]")] = None,
    rows: tuple[Literal[tuple(ROWS)], ...] = tuple(ROWS),
    rounds: int = 8,
    repeats: int = 3,
    max_seconds: float = 360.0,
    size: Literal[tuple(SIZES)] = "usual",
    repository: Path = ROOT,
) -> None:
    """Compare the speed of two revisions.

    Args:
        old: The older revision: a commit, branch or tag.
        new: The newer revision; without it the package as it lies in the repository.
        rows: What to time.
        rounds: Pairs of processes, one after the other.
        repeats: Runs of a row in each process.
        max_seconds: Begin no row after so many seconds; rows without a run are named.
        size: tiny shows that it runs.
        repository: The checkout that has the revisions.
    """
    deadline = time.monotonic() + max_seconds
    with tempfile.TemporaryDirectory() as folder:
        packages = {}
        for place, revision in (("old", old), ("new", new)):
            package = repository if revision is None else Path(folder, place)
            name = WORKING_TREE if revision is None else exported(repository, revision, package)
            packages[f"{name} again" if name in packages else name] = package
        found = compare(packages, rows, size, rounds=rounds, repeats=repeats, deadline=deadline)
    for row, reason in found.left_out.items():
        print(f"left out: {row}: {reason}")
    names = list(packages)
    times = {f"{row}, {name}": each for row, pair in found.seconds.items() for name, each in zip(names, pair)}
    ratios = {row: speedup(new_times, old_times) for row, (old_times, new_times) in found.seconds.items()}
    report(f"{names[1]} beside {names[0]}", times, ratios, left_out=found.left_out, differs=found.differs)
    sys.exit(bool(found.differs or found.failed))


if __name__ == "__main__":
    tyro.cli(main)
