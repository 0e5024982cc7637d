"""Runs the tests of a mutant, in a process forked from one that has loaded torch: seconds a mutant, not tens."""

import importlib
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import pytest
from planting import Mutant

LOADED_BEFORE = (
    "torch",
    "accelerate",
    "beartype",
    "einops",
    "hypothesis",
    "numpy",
    "safetensors.torch",
    "transformers",
)


@dataclass(frozen=True)
class Outcome:
    """Whether a test failed (or none ended in time), and how long that took, in seconds."""

    mutant: Mutant
    killed: bool
    seconds: float


def preload() -> None:
    """Import what every test imports, but nothing of this project: the copies are to be imported."""
    for name in LOADED_BEFORE:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # a mutant as long as the original, of the same second, would pass for it
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


class Runner:
    """The state of one worker process: its copy of the checkout, and when to start nothing more."""

    place: Path
    deadline: float

    @classmethod
    def start(cls, places: Queue, deadline: float) -> None:
        """Take a copy for this worker."""
        cls.place, cls.deadline = places.get(), deadline
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    @classmethod
    def baseline(cls, tests: tuple[str, ...]) -> float:
        """Seconds that a mutant's tests may take: several times those of the code as it is, where all must pass."""
        started = time.monotonic()
        status = cls.run(list(tests), 900.0)
        if status != 0:
            text = (cls.place / "output.txt").read_text(errors="replace")
            raise RuntimeError(
                f"pytest ended with {status} without a mutant, expected 0, for these tests are to judge mutants; mend "
                f"them, or name others in targets.py:\n{text[-3000:]}"
            )
        return 20.0 + 4 * (time.monotonic() - started)

    @classmethod
    def outcome(cls, job: tuple[Mutant, list[str], float]) -> Outcome | None:
        """Plant a mutant, run its tests, and take it back; None past the deadline."""
        mutant, tests, limit = job
        if time.monotonic() > cls.deadline:
            return None
        path, started = cls.place / mutant.module, time.monotonic()
        source = path.read_text(encoding="utf-8")
        mutant = mutant.described(source)
        path.write_text(mutant.plant(source), encoding="utf-8")
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
        try:
            status = cls.run(tests, limit)
        finally:
            path.write_text(source, encoding="utf-8")
        return Outcome(mutant, status != 0, time.monotonic() - started)

    @classmethod
    def run(cls, tests: list[str], limit: float) -> int:
        """The exit status of pytest on these tests, -1 where it did not end in time."""
        child = os.fork()
        if child == 0:
            cls.be_pytest(tests)
        ends = time.monotonic() + limit
        while time.monotonic() < ends:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return -1

    @classmethod
    def be_pytest(cls, tests: list[str]) -> None:
        """Become a run of pytest in the copy, whose output is kept in output.txt; does not return."""
        status = 3
        try:
            os.setsid()
            os.chdir(cls.place)
            os.environ["PYTHONPATH"] = str(cls.place)  # for the processes that tests start
            sys.path.insert(0, str(cls.place))
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow"]
            status = int(pytest.main([*options, *tests]))
        finally:
            sys.stdout.flush()
            os._exit(status)
