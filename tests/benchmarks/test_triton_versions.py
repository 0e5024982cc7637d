"""The benchmark of versions: what it does with each, what it makes of a result, and a version that it cannot get."""

import importlib
import json
import os
import subprocess
import sys

import pytest

ARCHS = ("sm_80", "sm_90", "sm_100")


@pytest.fixture
def versions(root, monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("triton_versions")


def test_known_faults_are_left_out_with_their_reason(versions):
    packages, archs, left_out = versions.make_plan("3.2.0", ARCHS, "2.4.6")
    assert packages == ["triton==3.2.0", "numpy==2.2.6"] and archs == ["sm_80", "sm_90"]
    (reason,) = left_out
    assert reason.startswith("sm_100: Triton 3.2.0: its compiler knows no GPU above")
    assert versions.make_plan("3.6.0", ARCHS, "2.3.5") == (["triton==3.6.0"], list(ARCHS), [])
    assert versions.make_plan("3.9.0", ARCHS, "2.4.6") == (["triton==3.9.0"], list(ARCHS), [])


def test_the_gate_is_read_from_the_last_line(versions):
    rows = [
        {"kernel": "swiglu forward", "arch": "sm_80", "gate": "passed"},
        {"kernel": "attention d64 forward", "arch": "sm_90", "gate": "5 spills in the hot loop"},
    ]
    assert versions.judge("a table\n" + json.dumps(rows)) == ["attention d64 forward sm_90: 5 spills in the hot loop"]
    for output in ("", "Traceback\nRuntimeError: PTXAS failed"):
        with pytest.raises(ValueError, match="no result"):
            versions.judge(output)
    assert versions.last_error("first\nRuntimeError: PTXAS failed\n  at the end") == "RuntimeError: PTXAS failed"


def test_a_version_that_no_index_has_ends_with_its_reason(root):
    command = [sys.executable, str(root / "benchmarks/triton_versions.py"), "--versions", "3.6.0"]
    done = subprocess.run(command, env={**os.environ, "PIP_NO_INDEX": "1"}, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "3.6.0 cannot be installed: ERROR: No matching distribution found for triton==3.6.0" in done.stdout
