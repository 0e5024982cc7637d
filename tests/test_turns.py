"""Tests that take turns with --in-turns: each file of them runs in one week of three, and all others always do."""

import importlib.util


def test_each_file_has_one_week_of_three_and_others_run_always(root):
    spec = importlib.util.spec_from_file_location("conftest_of_all", root / "tests/conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    files = sorted((root / "tests").rglob("test_*.py"))
    weeks = {file: [conftest.is_its_turn(file, week) for week in range(1, 7)] for file in files}
    turns = {file for file in files if not all(weeks[file])}
    assert all(weeks[file][:3] == weeks[file][3:] and sum(weeks[file][:3]) == 1 for file in turns)
    named = {str(file.relative_to(root / "tests")) for file in turns}
    assert {"benchmarks/test_benchmarks.py", "ops/triton/test_ptx.py", "training/test_compilation.py"} <= named
    assert all(name.startswith(conftest.IN_TURNS) for name in named)
