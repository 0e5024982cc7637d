"""`pytest` shares the tests among the cores by itself: quick ones first, a file's together, a thread a process."""

import os
import shutil
import subprocess
import sys

import pytest

from .conftest import MEMORY_OF_A_PROCESS, num_processes

DROPPED = {"OMP_NUM_THREADS", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"}
FILE = """
    import os
    import pytest
    import torch

    def note(name):
        with open("log", "a") as file:
            file.write(f"{name} {os.environ.get('PYTEST_XDIST_WORKER')} {torch.get_num_threads()}\\n")

    @pytest.mark.slow({"a": 20, "b": 60, "c": 40}[__name__[-1]])
    def test_slow(request): note(f"slow:{request.path.stem}")

    @pytest.mark.parametrize("number", range(3))
    def test_quick(request, number): note(f"quick:{request.path.stem}")
    """


def run(root, folder, *options: str) -> list[list[str]]:
    """The tests in the order in which they ran, each with its process and the threads there."""
    shutil.copy(root / "tests/conftest.py", folder)
    for name in ("a", "b", "c"):
        (folder / f"test_{name}.py").write_text(FILE.replace("\n    ", "\n"))
    environment = {k: v for k, v in os.environ.items() if k not in DROPPED}
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 passed" in done.stdout
    return [line.split() for line in (folder / "log").read_text().splitlines()]


@pytest.mark.slow(10)
def test_processes_share_the_files_and_the_slow_tests_come_last(root, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "2")  # however many cores there are
    lines = run(root, tmp_path)
    assert {threads for *_, threads in lines} == {"1"}
    assert {process for _, process, _ in lines} == {"gw0", "gw1"}
    for worker in ("gw0", "gw1"):
        kinds = [name.partition(":")[0] for name, process, _ in lines if process == worker]
        assert kinds == sorted(kinds)  # quick before slow
    for file in "abc":  # what a file sets up for its tests, one process sets up
        assert len({process for name, process, _ in lines if name == f"quick:test_{file}"}) == 1


def test_one_process_runs_them_where_a_debugger_needs_the_terminal(root, tmp_path):
    lines = run(root, tmp_path, "--pdb")
    assert {process for _, process, _ in lines} == {"None"}
    assert [name.partition(":")[0] for name, *_ in lines] == ["quick"] * 9 + ["slow"] * 3
    assert [name for name, *_ in lines[9:]] == ["slow:test_b", "slow:test_c", "slow:test_a"]  # the longest first


def test_as_many_processes_as_cores_memory_and_files_allow(tmp_path):
    files = [tmp_path / f"test_{number}.py" for number in range(3)]
    for file in files:
        file.touch()
    one, *_ = files = [str(file) for file in files]
    plenty = 100 * MEMORY_OF_A_PROCESS
    assert num_processes(8, plenty, [str(tmp_path)]) == 9
    assert num_processes(8, 5 * MEMORY_OF_A_PROCESS, [str(tmp_path)]) == 5
    assert num_processes(8, MEMORY_OF_A_PROCESS, [str(tmp_path)]) == 0
    assert num_processes(2, plenty, [str(tmp_path)]) == 3
    assert num_processes(8, plenty, files) == 3
    assert num_processes(8, plenty, [f"{one}::test_quick"]) == 0
    assert num_processes(1, plenty, [str(tmp_path)]) == 0


def test_the_readmes_line_and_the_continuous_integration_run_the_same(root):
    """What the suite needs, it sets itself: no number of processes or threads stands in the script."""
    script = (root / ".ci/run").read_text()
    assert not any(word in script for word in ("OMP_NUM_THREADS", "numprocesses", "--dist", "-n "))
