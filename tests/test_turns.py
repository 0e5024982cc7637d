"""Tests that take turns with --in-turns: each file of them runs on one day of seven, and all others always do."""

import importlib.util
from collections import Counter


def test_each_file_has_one_day_of_seven_and_others_run_always(root):
    spec = importlib.util.spec_from_file_location("conftest_of_all", root / "tests/conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    files = [str(file.relative_to(root)) for file in sorted((root / "tests").rglob("test_*.py"))]
    tests = [f"{file}::test_it[{number}]" for file in files for number in range(2)]
    tests += [f"tests/ops/triton/test_ptx.py::test_in_a_process[{number}]" for number in range(700)]
    days = {test: [conftest.is_its_turn(test, day) for day in range(739_000, 739_014)] for test in tests}
    turns = {test for test in tests if not all(days[test])}
    assert all(days[test][:7] == days[test][7:] and sum(days[test][:7]) == 1 for test in turns)
    assert all(days[f"{file}::test_it[0]"] == days[f"{file}::test_it[1]"] for file in files)
    named = {test.partition("::")[0].removeprefix("tests/") for test in turns}
    assert {"benchmarks/test_benchmarks.py", "ops/triton/test_ptx.py", "training/test_compilation.py"} <= named
    assert all(name.startswith(conftest.IN_TURNS) for name in named)
    own_days = Counter(days[test].index(True) for test in turns if "test_in_a_process" in test)
    assert len(own_days) == 7 and min(own_days.values()) > 50
