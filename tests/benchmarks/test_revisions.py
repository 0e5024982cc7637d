"""The benchmark of two revisions: it compares their results first, and its ratios are of the older by the newer."""

import importlib
import json
import shutil
import subprocess
import sys

import pytest

OLDER = """

import time

fast = PaLM.generate


def slow(palm, *args, **options):
    time.sleep(0.3)
    return fast(palm, *args, **options)


PaLM.generate = slow
"""


def git(repository, *arguments: str) -> str:
    command = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def repository(root, tmp_path_factory):
    """The package as it is, above a commit whose generation is slower, whose loss is another, and without an engine."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(root / "palm_rlhf", folder / "palm_rlhf", ignore=shutil.ignore_patterns("__pycache__"))
    palm, engine = folder / "palm_rlhf/model/palm.py", folder / "palm_rlhf/serving/engine/engine.py"
    now = {path: path.read_text() for path in (palm, engine)}
    older = now[palm].replace("z_loss: float | int = 1e-4", "z_loss: float | int = 1.0")
    assert older != now[palm]
    palm.write_text(older + OLDER)
    engine.unlink()
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "older")
    for path, text in now.items():
        path.write_text(text)
    return folder


@pytest.mark.slow(8)
def test_rows_are_compared_and_timed(root, repository):
    command = [sys.executable, str(root / "benchmarks/revisions.py"), "HEAD", "--repository", str(repository)]
    rows = ["--rows", "training-float32", "generation-float32", "engine"]
    sizes = ["--size", "tiny", "--rounds", "1", "--repeats", "3"]
    done = subprocess.run([*command, *rows, *sizes], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # the losses differ
    assert "parity: generation-float32: the same results" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    commit = git(repository, "rev-parse", "--short", "HEAD")
    assert result["benchmark"] == f"working tree beside {commit}"
    assert set(result["seconds"]) == {
        f"{row}-float32, {name}" for row in ("training", "generation") for name in (commit, "working tree")
    }
    assert result["seconds"][f"generation-float32, {commit}"]["median"] > 0.3
    assert result["speedups"]["generation-float32"]["median"] > 1
    assert list(result["differs"]) == ["training-float32"]
    assert result["differs"]["training-float32"].startswith("loss 1 of 2: ")
    assert list(result["left_out"]) == ["engine"] and result["left_out"]["engine"].startswith(f"{commit}: ")
    assert "ModuleNotFoundError" in result["left_out"]["engine"]


@pytest.fixture
def revisions(root, monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("revisions")


def test_where_results_differ(revisions):
    difference = revisions.difference
    assert difference({"loss": [1.0, 0.0], "old": [1]}, {"loss": [1.0005, 1e-7], "new": [2]}) is None
    assert difference({"loss": [5.0, 1.0, 3.0]}, {"loss": [5.0, 1.002, 4.0]}) == "loss 2 of 3: 1.0 and 1.002"
    assert difference({"token": [4000, 4001]}, {"token": [4000, 4002]}) == "token 2 of 2: 4001 and 4002"
    assert difference({"token": [1, 2]}, {"token": [1]}) == "token: 2 and 1 of them"
    assert difference({"loss": [float("nan")]}, {"loss": [float("nan")]}) == "loss 1 of 1: nan and nan"


def test_a_revision_that_is_not_there_is_named(revisions, repository):
    with pytest.raises(SystemExit, match="git rev-parse"):
        revisions.main("--all", repository=repository)


def test_time_that_is_up_leaves_rows_out(revisions, repository, capsys):
    with pytest.raises(SystemExit) as ended:
        revisions.main("HEAD", "HEAD", rows=("ppo", "grpo"), rounds=0, max_seconds=0.0, repository=repository)
    assert ended.value.code == 0
    assert capsys.readouterr().out.count("the time was up") == 4
