"""Plants mutants in the code of RLHF, one at a time, and reports how many of them the tests kill.

    python tests/mutation/score.py                      every place that can be mutated, one mutant each: hours
    python tests/mutation/score.py --sample 60          as many, drawn by the seed of this week
    python tests/mutation/score.py --only 'palm_rlhf/algorithms/*.py'

The mutants are cosmic-ray's (pip install "palm-rlhf[mutation]"). Each is written into a copy of the checkout, where the
tests of its module run until one fails. Those that change nothing that can be observed are listed, with the reason, in
targets.py; they are neither run nor counted. Exit status 1 where the share that was killed is below --expect.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

from planting import Mutant, code_of, draw, mutants_of
from running import KNOWN, Outcome, Runner
from targets import TESTS

ROOT = Path(__file__).resolve().parents[2]


def this_week() -> int:
    """A seed that changes every Monday: the year and its ISO week, such as 202648."""
    year, week, _ = date.today().isocalendar()
    return 100 * year + week


def targets(only: str) -> dict[Path, list[str]]:
    """Modules to mutate, relative to the checkout, each with the tests that are to kill its mutants."""
    found = {}
    for pattern, tests in TESTS.items():
        modules = sorted(path.relative_to(ROOT) for path in ROOT.glob(pattern))
        missing = [test for test in tests if not (ROOT / test).exists()] if modules else [pattern]
        if missing:
            raise SystemExit(f"targets.py names {missing}, which the checkout lacks: name what it has")
        wanted = (module for module in modules if module not in found and fnmatch(str(module), only))
        found |= {module: own_tests_first(module, tests) for module in wanted}
    return found


def own_tests_first(module: Path, tests: list[str]) -> list[str]:
    """The tests of a module, first those that are named after it: pytest runs a file that is named twice once."""
    folders = [Path(test) if (ROOT / test).is_dir() else Path(test).parent for test in tests]
    own = dict.fromkeys(str(folder / f"test_{module.stem}.py") for folder in folders)
    return [*(test for test in own if (ROOT / test).exists()), *(test for test in tests if test not in own)]


def copies(number: int, folder: Path) -> list[Path]:
    """As many copies of the checkout, without what git does not track of it."""
    ignored = shutil.ignore_patterns(".git", "*.egg-info", "build", "dist", "runs", ".*_cache", ".venv", "node_modules")
    paths = [folder / str(index) for index in range(number)]
    for path in paths:
        shutil.copytree(ROOT, path, ignore=ignored)
    return paths


def run(planted: list[Mutant], tests: dict[Path, list[str]], processes: int, max_seconds: float) -> list[Outcome]:
    """The outcome of each mutant that there was time for."""
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        places: multiprocessing.Queue = multiprocessing.Queue()
        for path in copies(processes, Path(folder)):
            places.put(path)
        deadline = time.monotonic() + max_seconds
        used = sorted({test for mutant in planted for test in tests[mutant.module]})
        with multiprocessing.get_context("fork").Pool(processes, Runner.start, (places, deadline, used)) as pool:
            jobs = [(mutant, tests[mutant.module]) for mutant in planted]
            for outcome in pool.imap_unordered(Runner.outcome, jobs):
                if outcome is None:
                    continue
                outcomes.append(outcome)
                word = "killed  " if outcome.killed else "known   " if outcome.mutant.key in KNOWN else "SURVIVED"
                print(f"{word} {outcome.seconds:5.1f} s  {outcome.mutant}  {outcome.killer}", flush=True)
    return outcomes


def stale(known: Iterable[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """Modules and lines of listed mutants that the checkout has no longer."""
    lines = {module: (ROOT / module).read_text().splitlines() for module, *_ in known if (ROOT / module).exists()}
    found = {module: set(map(code_of, text)) for module, text in lines.items()}
    return [(module, before) for module, before, _ in known if before not in found.get(module, ())]


def report(outcomes: list[Outcome], num_planted: int) -> float:
    """Prints the survivors and the score, and returns the score: the killed share of those not equivalent."""
    survivors = [outcome.mutant for outcome in outcomes if not outcome.killed]
    equivalent = [mutant for mutant in survivors if mutant.key in KNOWN]
    for mutant in survivors:
        print(f"\n{mutant}\n  - {mutant.before}\n  + {mutant.after}\n  {KNOWN.get(mutant.key, 'SURVIVED')}")
    counted = len(outcomes) - len(equivalent)
    killed = len(outcomes) - len(survivors)
    score = killed / counted if counted else 1.0
    print(
        f"\n{killed} of {counted} mutants killed: {score:.1%} ({len(equivalent)} more change nothing; "
        f"{num_planted - len(outcomes)} of {num_planted} not reached in time)"
    )
    return score


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="mutants to draw; all places by default")
    parser.add_argument("--seed", type=int, default=this_week(), help="of the draw; by default the year and its week")
    parser.add_argument("--only", default="*", help="a pattern that the mutated modules' paths match")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="mutants that are tried at once")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="start no further mutant after these")
    parser.add_argument("--expect", type=float, default=0.95, help="the least share of the mutants to be killed")
    arguments = parser.parse_args()
    tests = targets(arguments.only)
    places = [mutant for module in tests for mutant in mutants_of(ROOT, module)]
    planted = draw(places, arguments.sample, arguments.seed)
    for module, line in stale(KNOWN):
        print(f"targets.py lists a mutant of {module} that is not there any more: {line}")
    print(f"{len(planted)} mutants of {len(places)} in {len(tests)} modules, seed {arguments.seed}", flush=True)
    score = report(run(planted, tests, arguments.processes, arguments.max_seconds), len(planted))
    return 0 if score >= arguments.expect else 1


if __name__ == "__main__":
    sys.exit(main())
