"""Runs the tests of a mutant, in a process forked from one that has loaded torch: seconds a mutant, not tens."""

import compileall
import gc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

import pytest
from planting import Mutant
from targets import EQUIVALENT

LOADED_BEFORE = (
    "torch._dynamo",  # which torch imports at the first step of an optimiser
    "accelerate",
    "beartype",
    "einops",
    "hypothesis",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "numpy",
    "safetensors.torch",
    "tokenizers",
    "transformers",
)

OPTIONS = ("-x", "-q", "-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider",
           "--timeout", "90", "--hypothesis-profile", "mutation")  # fmt: skip
# A test that hangs is one that fails: most mutants of a loop's end hang.
LONGEST_TEST = 60.0  # seconds of a core, which a busy machine does not shorten
LONGEST_RUN = 900.0  # seconds of one run of pytest


KNOWN = {tuple(key): why for *key, why in EQUIVALENT}


@dataclass(frozen=True)
class Outcome:
    """Whether a test failed, or none ended in time, and how long that took."""

    mutant: Mutant
    killed: bool
    seconds: float = 0.0
    killer: str = ""  # the test that failed first


def preload() -> None:
    """Import what every test imports, but nothing of this project: the copies are to be imported."""
    for name in LOADED_BEFORE:
        importlib.import_module(name)
    import hypothesis
    import torch

    torch.set_num_threads(1)
    # that an example fails is enough: none smaller is looked for
    hypothesis.settings.register_profile(
        "mutation",
        derandomize=True,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take longer to load than most tests
    gc.freeze()  # no collection in a fork is to walk through, and copy, what is loaded


class FirstFailure:
    """A plugin of pytest that keeps the id of the first test that fails, or of the file that cannot be imported.

    It ends the run where a test takes longer than LONGEST_TEST.
    """

    path = Path("first_failure.txt")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        signal.setitimer(signal.ITIMER_PROF, LONGEST_TEST)  # then a signal ends the process
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.keep(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.keep(report)

    def keep(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and not self.path.exists():
            self.path.write_text(report.nodeid, encoding="utf-8")


class Runner:
    """The state of one worker process: its copy of the checkout, and when to start nothing more."""

    place: Path
    deadline: float
    sound: set[str]  # tests that were seen to pass without a mutant, and files to be imported

    @classmethod
    def start(cls, places: Queue, deadline: float, tests: list[str]) -> None:
        """Take a copy for this worker, and compile it and its tests, so that no run has to."""
        cls.place, cls.deadline, cls.sound = places.get(), deadline, set()
        preload()
        compileall.compile_dir(cls.place / "palm_rlhf", quiet=2)
        cls.run(["--collect-only", *tests], writes_bytecode=True)

    @classmethod
    def outcome(cls, job: tuple[Mutant, list[str]]) -> Outcome | None:
        """Plant a mutant, run its tests, and take it back; None past the deadline. One that is known to change nothing
        is not run.

        RuntimeError where the test that killed it fails without it as well.
        """
        mutant, tests = job
        if time.monotonic() > cls.deadline:
            return None
        path, started = cls.place / mutant.module, time.monotonic()
        source = path.read_text(encoding="utf-8")
        mutant = mutant.described(source)
        if mutant.key in KNOWN:
            return Outcome(mutant, killed=False)
        path.write_text(mutant.plant(source), encoding="utf-8")
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
        try:
            status = cls.run(tests)
        finally:
            path.write_text(source, encoding="utf-8")
        failure = cls.place / FirstFailure.path
        killer = failure.read_text(encoding="utf-8") if failure.exists() else ""
        if status > 0:
            cls.check([killer] if "::" in killer else ["--collect-only", *([killer] if killer else tests)])
        return Outcome(mutant, status != 0, time.monotonic() - started, killer or f"pytest ended with {status}")

    @classmethod
    def check(cls, arguments: list[str]) -> None:
        """RuntimeError where a test, or the import of files of tests, fails without a mutant."""
        name = " ".join(arguments).partition("[")[0]  # one case of a test stands for all
        if name in cls.sound:
            return
        status = cls.run(arguments)
        if status != 0:
            text = (cls.place / "output.txt").read_text(errors="replace")
            raise RuntimeError(
                f"{name} fails without a mutant (pytest ended with {status}), so it can judge none; mend it, or name "
                f"other tests in targets.py:\n{text[-3000:]}"
            )
        cls.sound.add(name)

    @classmethod
    def run(cls, arguments: list[str], *, writes_bytecode: bool = False) -> int:
        """The exit status of pytest; -1 where it did not end within LONGEST_RUN."""
        child = os.fork()
        if child == 0:
            # a mutant as long as the original, and of the same second, would pass for it
            sys.dont_write_bytecode = not writes_bytecode
            os.environ["PYTHONDONTWRITEBYTECODE"] = "" if writes_bytecode else "1"
            cls.be_pytest(arguments)
        ends = time.monotonic() + LONGEST_RUN
        while time.monotonic() < ends:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return -1

    @classmethod
    def be_pytest(cls, arguments: list[str]) -> None:
        """Become a run of pytest in the copy, whose output is kept in output.txt; does not return."""
        status = 3
        try:
            os.setsid()
            os.chdir(cls.place)
            FirstFailure.path.unlink(missing_ok=True)
            os.environ["PYTHONPATH"] = str(cls.place)  # for the processes that tests start
            sys.path.insert(0, str(cls.place))
            output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = int(pytest.main([*OPTIONS, *arguments], plugins=[FirstFailure()]))
        finally:
            sys.stdout.flush()
            os._exit(status)
