"""Tests see a GPU where they ask for one, and else compute on the CPU, whatever the machine has."""

import re
import shutil
import subprocess
import sys

import pytest

FILES = {
    # A GPU as far as anyone asks for one.
    "one_gpu.py": """
        import torch
        torch.cuda.is_available = torch.accelerator.is_available = lambda: True
        torch.cuda.device_count = lambda: 1
        """,
    "test_devices.py": """
        import os, subprocess, sys
        import pytest, torch
        from accelerate import Accelerator

        def seen():
            code = "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('ACCELERATE_USE_CPU'))"
            child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
            trainer = Accelerator(cpu=not torch.accelerator.is_available()).device.type
            return torch.cuda.is_available(), torch.cuda.device_count(), trainer, child

        CPU, GPU = (False, 0, "cpu", "true"), (True, 1, "cuda", "None None")

        def test_plain(): assert seen() == CPU
        def test_fixture(gpu): assert seen() == GPU and gpu.type == "cuda"
        def test_plain_again(): assert seen() == CPU
        def test_each(device): assert seen() == (GPU if device.type == "cuda" else CPU)
        @pytest.mark.gpu
        def test_mark(): assert seen() == GPU
        def test_plain_at_the_end(): assert seen() == CPU
        """,
}


@pytest.fixture
def run(root, tmp_path, monkeypatch):
    """`run("-m", "gpu")` is the exit status and the output of pytest, for the files above and this conftest."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(re.sub("^ {8}", "", text, flags=re.MULTILINE))
    shutil.copy(root / "tests/conftest.py", tmp_path)
    for name in ("PYTEST_ADDOPTS", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    always = ["-rs", "-c", "/dev/null", "--rootdir=.", "-p", "no:cacheprovider", "-p", "no:xdist", "--strict-skips"]

    def pytest_run(*options):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *always, *options], cwd=tmp_path, capture_output=True, text=True
        )
        return done.returncode, done.stdout

    return pytest_run


def test_a_gpu_is_hidden_from_tests_that_do_not_ask_for_one(run):
    code, output = run("-p", "one_gpu")
    assert code == 0 and "7 passed" in output, output


def test_the_marker_collects_what_needs_a_gpu(run):
    code, output = run("-p", "one_gpu", "-m", "gpu")
    assert code == 0 and "3 passed, 4 deselected" in output, output


def test_without_a_gpu_they_skip_with_a_reason_that_is_allowed(run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    code, output = run()
    assert code == 0 and "4 passed, 3 skipped" in output, output
    assert "needs a GPU: torch" in output
