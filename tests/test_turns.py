"""Tests that take turns with --in-turns: each of them runs in one week of three, and all others always do."""

import importlib.util


def test_each_has_one_week_of_three_and_others_run_always(root):
    spec = importlib.util.spec_from_file_location("conftest_of_all", root / "tests/conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    folders = ("benchmarks/test_gpu_speed.py", "ops/triton/test_ptx.py", "training/test_compilation.py")
    in_turns = [f"tests/{file}::test_it[{number}]" for file in folders for number in range(200)]
    always = [f"tests/{file}::test_it" for file in ("ops/test_attention.py", "training/test_rlhf.py", "test_turns.py")]
    weeks = {test: [conftest.is_its_turn(test, week) for week in range(1, 7)] for test in in_turns}
    assert all(found[:3] == found[3:] and sum(found[:3]) == 1 for found in weeks.values())
    assert all(150 < sum(found[week] for found in weeks.values()) < 250 for week in range(3))
    assert all(conftest.is_its_turn(test, week) for test in always for week in range(1, 7))
