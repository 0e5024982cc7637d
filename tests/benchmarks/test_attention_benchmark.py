"""The benchmark of attention, as far as it goes without a GPU."""

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from palm_rlhf.ops.attention_choices import PACKAGED, ChoiceTable, use_table


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


def test_the_table_of_choices_is_measured(bench, tmp_path):
    """On the tiny grid of a CPU: the table that is written loads, holds the others' entries, and ranks by the times."""
    path = tmp_path / "choices.json"
    done = bench("attention.py", "--write-table", "--output", str(path), CUDA_VISIBLE_DEVICES="")
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == int(result["failed"]), done.stderr
    packaged, written = ChoiceTable.load(PACKAGED), ChoiceTable.load(path)
    assert (
        written.entries == {**packaged.entries, "cpu": result["entry"]} and result["entry"] != packaged.entries["cpu"]
    )
    entry = result["entry"]
    assert entry["how"] == "measured" and entry["torch"] == torch.__version__ and entry["card"] == result["device"]
    work = [(row["pass"], row["mask"]) for row in entry["rows"]]
    whole = [("sequence", mask) for mask in ("none", "padding", "documents")]
    assert work == [*whole, ("extend", "none"), ("decode", "none"), ("decode", "padding")]
    for row, choice in zip(entry["rows"], result["choices"], strict=True):
        assert set(row["figures"]) == {"fused", "chunked"} == set(row["ranking"])
        assert all(
            len(times) == 1 + (row["pass"] == "sequence") and min(times) > 0 for times in row["figures"].values()
        )
        assert choice["auto"] == row["ranking"][0] and choice["slower"] >= 1
        assert f"{row['pass']:8} {row['mask']:9} float32" in done.stdout
    assert result["failed"] == any(choice["slower"] > 1.05 for choice in result["choices"])


def test_a_cpu_does_not_overwrite_the_table_of_the_package(bench):
    before = PACKAGED.read_bytes()
    done = bench("attention.py", "--write-table", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "give --output" in done.stderr and PACKAGED.read_bytes() == before


def test_one_choice_holds_for_both_passes(module):
    """The best is the one whose worse ratio is smallest."""
    table = module("attention_table")
    times = {"slow backward": [1.0, 10.0], "slow forward": [2.0, 9.0], "even": [1.2, 9.9]}
    assert table.ratios(times) == {
        "slow backward": pytest.approx(10 / 9),
        "slow forward": pytest.approx(2),
        "even": pytest.approx(1.2),
    }
    assert table.rank(times) == ["slow backward", "even", "slow forward"]


def test_an_implementation_that_disagrees_has_no_time(module):
    table = module("attention_table")
    cell = next(table.grid("cpu"))
    times, problems = table.measure(cell, 1)
    assert set(times) == {"fused", "chunked"} and problems == []
    original = table.attention

    def wrong(*tensors, implementation, **options):
        return original(*tensors, implementation=implementation, **options) * (
            1.001 if implementation == "chunked" else 1
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "attention", wrong)
        times, problems = table.measure(cell, 1)
    assert set(times) == {"fused"} and problems == ["chunked disagrees with fused"]


def test_time_that_is_up_leaves_rows_out(module, tmp_path, capsys):
    path = tmp_path / "choices.json"
    assert module("attention_table").write_table(path, budget=-1) == 0
    assert capsys.readouterr().out.count("left out, for the time is up") == 6
    use_table(None)
    assert ChoiceTable.load(path).entries["cpu"]["rows"] == []


def test_a_grid_of_a_gpu_asks_for_all_that_it_can_choose(module):
    """Made without memory: each pass, each mask, the head dimensions, groups and lengths that models have."""
    cells = list(module("attention_table").grid("meta"))
    assert {(cell.pass_name, cell.mask) for cell in cells} >= {
        *(("sequence", mask) for mask in ("none", "padding", "documents")),
        *((name, mask) for name in ("extend", "decode") for mask in ("none", "padding")),
    }
    plain = [cell.work for cell in cells if (cell.pass_name, cell.mask) == ("sequence", "none")]
    assert {work.dim for work in plain} == {64, 128, 256} and {work.num_keys for work in plain} >= {1024, 2048, 8192}
    assert len(set(cells)) == len(cells) == 40
    names = [cell.mask for cell in cells if cell.pass_name == "sequence"]
    assert names == sorted(names, key=lambda mask: mask != "none"), "what FlexAttention compiles comes last"


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
