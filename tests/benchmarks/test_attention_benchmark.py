"""The benchmark of attention, as far as it goes without a GPU."""

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch


@pytest.fixture
def bench(root):
    def run(name: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(root / "benchmarks" / name), *options]
        return subprocess.run(command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True)

    return run


@pytest.fixture
def module(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


@pytest.mark.slow(11)
def test_the_benchmark_of_attention(bench, tmp_path):
    sizes = ["--lengths", "32", "--dims", "16", "--heads", "2", "--kv-heads", "1", "--rounds", "2"]
    done = bench("attention.py", *sizes, "--plot", str(tmp_path / "plot.png"))
    assert done.returncode == 0, done.stderr
    assert "parity" in done.stdout
    assert torch.cuda.is_available() or done.stdout.startswith("no GPU")
    result = json.loads(done.stdout.splitlines()[-1])
    lines = result["results"]
    assert len(lines) == 4 * 3 and {line["direction"] for line in lines} == {
        "forward",
        "backward",
        "both",
        "decode",
    }
    assert all(line["seconds"]["median"] > 0 and line["tflops"] > 0 and line["gb_per_second"] > 0 for line in lines)
    assert sum(line["peak_megabytes"] is not None for line in lines) == 3
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_implementation_is_not_timed(module):
    attention = module("attention")
    attention.check_parity((16,), 2, 1)
    original = attention.implementation
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "implementation", lambda name: lambda *t, **masks: original(name)(*t, **masks) * 1.001)
        with pytest.raises(AssertionError):
            attention.check_parity((16,), 2, 1)


def test_operations_and_bytes_of_known_work(module):
    Work = module("attention_work").Work
    work = Work(2, 4, 1, 3, 5, 8, torch.bfloat16, "cpu")
    # the first of 3 queries sees 3 of 5 keys, the last all: 12 pairs, each with 2 products of 8 numbers
    assert work.flops("forward") == 2 * 4 * 12 * 2 * 8 * 2
    assert work.flops("both") == work.flops("forward") + work.flops("backward") == 3.5 * work.flops("forward")
    # q and out of 4 heads, k and v of one
    assert work.moved("forward") == 2 * (2 * 2 * 4 * 3 * 8 + 2 * 2 * 5 * 8)


def test_errors_are_in_parts_of_what_the_type_allows(module):
    errors = module("attention_work").errors
    truth = [torch.full((3,), 2.0).double()] * 4
    got = [torch.full((3,), 2.0 + 5e-6)] * 3 + [torch.full((3,), math.nan)]
    found = errors(got, truth)
    assert found["out"] == pytest.approx(0.5, rel=0.1) and math.isnan(found["d_v"])
