"""The tests that need a GPU, run by pytest beside the checks of `gpu_check.py`."""

import ast
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from check_processes import TIME_WAS_UP, Result

ROOT = Path(__file__).resolve().parent.parent
NEEDS_GPU = re.compile(r"def test_\w+\([^)]*\b(gpu|device)\b|\bmark\.gpu\b")
LEFT_OUT = {"cpu": "they need a GPU"}


def files_of_tests() -> list[Path]:
    """The test files in which a test asks for a GPU; the others would take long to import, and need more packages."""
    found = [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if NEEDS_GPU.search(path.read_text("utf-8"))]
    return [path for path in found if path.name != "test_devices_of_tests.py"]


def missing_packages(path: Path) -> set[str]:
    """The packages that a test file, or a conftest.py above it, imports at its top and that are not installed."""
    folders = [folder for folder in path.parents if folder == ROOT / "tests" or ROOT / "tests" in folder.parents]
    names: set[str] = set()
    for file in [path, *(folder / "conftest.py" for folder in folders if (folder / "conftest.py").exists())]:
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return {name for name in names - {"tests", "palm_rlhf"} if importlib.util.find_spec(name) is None}


def read_report(text: str) -> list[Result]:
    """Results from pytest's report in JUnit's form; tests that were skipped are none."""
    results = []
    for case in ET.fromstring(text).iter("testcase"):
        if case.find("skipped") is None:
            passed = case.find("failure") is None and case.find("error") is None
            name = f"{case.get('classname', '')}::{case.get('name')}"
            results.append(Result("tests", name, passed, float(case.get("time", 0))))
    return results


def gpu_tests(deadline: float, num_processes: int = 4) -> Callable[[], tuple[list[Result], str | None]]:
    """Start the tests, and return a function that waits for them: their results, and why some or all are left out.

    Args:
        deadline: a moment of `time.monotonic` at which they are ended.
        num_processes: that share the tests, where pytest-xdist is installed.
    """
    if importlib.util.find_spec("pytest") is None:
        return lambda: ([], "pytest is missing: pip install pytest pytest-xdist hypothesis")
    missing = {path: missing_packages(path) for path in files_of_tests()}
    files = [str(path) for path, names in missing.items() if not names]
    reasons = [
        f"{path.relative_to(ROOT)} for want of {', '.join(sorted(names))}" for path, names in missing.items() if names
    ]
    incomplete = "; ".join(reasons) or None
    if not files:
        return lambda: ([], incomplete)
    folder = tempfile.TemporaryDirectory()
    report = Path(folder.name) / "report.xml"
    shared = ["-n", str(num_processes)] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    command += ["--continue-on-collection-errors", *shared, *files]
    with open(Path(folder.name) / "output", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    def wait() -> tuple[list[Result], str | None]:
        with folder:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return [], TIME_WAS_UP
            if not report.exists():
                last = (Path(folder.name) / "output").read_text().strip().splitlines()[-1:]
                return [Result("tests", f"pytest ended with status {process.returncode}: {last}", False, 0.0)], None
            return read_report(report.read_text()), incomplete

    return wait
