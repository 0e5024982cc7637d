"""The benchmarks run, at sizes that only show that they do, and end with a line of JSON whose ratios are theirs."""

import json
import runpy
import subprocess
import sys

import pytest


@pytest.fixture
def bench(root):
    pytest.importorskip("palm_rlhf_pytorch", reason="needs the extra palm-rlhf[bench]")

    def run(name: str, *options: str) -> dict:
        command = [sys.executable, str(root / "benchmarks" / name), *options]
        process = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
        assert process.returncode == 0, process.stderr
        assert "parity" in process.stdout
        return json.loads(process.stdout.splitlines()[-1])

    return run


@pytest.fixture
def bench_here(root, monkeypatch, capsys):
    """Runs a benchmark in this process, where torch and the other packages are imported already."""
    pytest.importorskip("palm_rlhf_pytorch", reason="needs the extra palm-rlhf[bench]")
    monkeypatch.syspath_prepend(str(root / "benchmarks"))

    def run(name: str, *options: str) -> dict:
        path = str(root / "benchmarks" / name)
        monkeypatch.setattr(sys, "argv", [path, *options])
        runpy.run_path(path, run_name="__main__")
        out = capsys.readouterr().out
        assert "parity" in out
        return json.loads(out.splitlines()[-1])

    return run


def test_training_step(bench):
    sizes = ["--dim", "32", "--depth", "1", "--batch", "1", "--seq-len", "32", "--rounds", "2"]
    result = bench("training_step.py", *sizes)
    assert len(result["seconds"]) == 3 and len(result["speedups"]) == 2


def test_generation(bench_here):
    sizes = ["--dim", "32", "--depth", "1", "--prompt-len", "4", "--num-tokens", "4", "--rounds", "2"]
    result = bench_here("generation.py", *sizes)
    assert len(result["seconds"]) == 4 and len(result["speedups"]) == 3


@pytest.mark.slow(5)
def test_ppo_step(bench_here):
    sizes = ["--dim", "32", "--depth", "1", "--num-prompts", "3", "--shortest", "8", "--longest", "12"]
    result = bench_here("ppo_step.py", *sizes, "--new-tokens", "4", "--minibatch", "2", "--rounds", "2")
    assert len(result["seconds"]) == 5 and len(result["speedups"]) == 6
    assert all(seconds["median"] > 0 for seconds in result["seconds"].values())


@pytest.mark.slow(6)
def test_loss(bench):
    result = bench("loss.py", "--num-tokens", "100", "--dim", "16", "--batch", "1", "--seq-len", "32", "--rounds", "2")
    assert len(result["seconds"]) == 4 and len(result["speedups"]) == 2 and len(result["peak_megabytes"]) == 2
    for name, seconds in result["seconds"].items():
        rates = result["rates"][name]
        assert rates["tflops"] * 1e12 * seconds["median"] == pytest.approx(3 * 2 * 32 * 16 * 100)
        assert rates["gb_per_second"] * 1e9 * seconds["median"] == pytest.approx(2 * 4 * (32 * 16 + 100 * 16))


def test_top_p(bench):
    result = bench("top_p.py", "--num-tokens", "2100", "--dim", "16", "--rows", "5", "--rounds", "2")
    assert len(result["seconds"]) == len(result["peak_megabytes"]) == 8 and len(result["cost"]) == 4
    assert set(result["memory"]) == set(result["cost"])


@pytest.mark.slow(12)
def test_busy(root):
    sizes = ["--dim", "32", "--depth", "1", "--batch", "1", "--seq-len", "16", "--rounds", "2", "--loops", "0", "1"]
    command = [sys.executable, str(root / "benchmarks/busy.py"), *sizes, "--no-peer", "--pin"]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    measured = json.loads(process.stdout.splitlines()[-1])["measured"]
    assert [(row["what"], row["loops"]) for row in measured] == [("step", 0), ("token", 0), ("step", 1), ("token", 1)]
    for row in measured:
        assert len(row["seconds"]) == 3 and len(row["speedups"]) == 2
        assert row["threads"]["palm-rlhf, one thread"] == 1
        quiet = next(other for other in measured if other["what"] == row["what"])
        for way, slower in row["slower_than_first"].items():
            assert slower == pytest.approx(row["seconds"][way]["median"] / quiet["seconds"][way]["median"])


def test_medians_and_ratios_of_known_times(root):
    module = runpy.run_path(str(root / "benchmarks" / "side_by_side.py"))
    assert module["summary"]([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    # round by round 2, 2 and 4 times; the ratio of the medians would be 3
    assert module["speedup"]([1.0, 3.0, 1.0], [2.0, 6.0, 4.0])["median"] == 2.0


def test_rounds_alternate(root):
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    seconds = runpy.run_path(str(root / "benchmarks" / "side_by_side.py"))["alternate"](runs, rounds=2)
    assert order == ["a", "b"] * 3  # the first round warms up
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.slow(9)
def test_serving(bench):
    small = "--dim", "32", "--depth", "1", "--prompt-len", "4", "--num-tokens", "4", "--rounds", "2"
    result = bench("serving.py", *small)
    assert len(result["seconds"]) == 6 and len(result["speedups"]) == 5


@pytest.mark.slow(6)
def test_the_engine_beside_generate(bench_here):
    small = (
        "--dim",
        "32",
        "--depth",
        "1",
        "--prompt-len",
        "4",
        "--num-tokens",
        "4",
        "--rounds",
        "2",
        "--clients",
        "1",
        "3",
    )
    result = bench_here("serving.py", *small, "--beside", "palm", "--vocabulary", "300")
    assert list(result["seconds"]) == [
        "engine, 1 clients",
        "generate, batch of 1",
        "engine, 3 clients",
        "generate, batch of 3",
    ]
    assert list(result["speedups"]) == ["1 clients", "3 clients", "tokens/s of 3 clients by those of 1"]
