"""The benchmark of generation on a GPU, as far as it goes without one."""

import importlib

import pytest
import torch

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.palm import PaLM


@pytest.fixture
def generation(root, monkeypatch):
    monkeypatch.setenv("PALM_RLHF_CUDA_GRAPHS", "1")  # and back at the end
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("generation")


def test_its_rows(generation, capsys):
    config = PaLMConfig(num_tokens=64, dim=32, depth=1, heads=2, dim_head=16)
    rows = generation.on_gpu(config, "a title", prompt_len=4, num_tokens=3, rounds=1, device="cpu")
    assert [row["name"] for row in rows] == [
        *(f"{batch} rows, {graphs}" for batch in (1, 64) for graphs in ("CUDA graphs", "no graphs")),
        "rollouts, CUDA graphs",
        "rollouts, no graphs",
    ]
    for batch, row in zip((1, 1, 64, 64), rows, strict=False):
        assert row["bandwidth_share"] is None  # which a CPU has not
        per_token = row["milliseconds_per_token"] / 1e3
        assert row["tokens_per_second"] == pytest.approx(batch / per_token)
    assert all(row["seconds"] > 0 for row in rows[4:])
    out = capsys.readouterr().out
    assert "parity" in out and "128 rollouts of 3 tokens" in out


def test_the_bytes_of_a_step(generation):
    palm = PaLM(num_tokens=10, dim=4, depth=3, heads=2, dim_head=2, ff_mult=1).to(torch.bfloat16)
    block = 4 + 4 * (2 * 2 + 2 * 2) + 2 * 4 * 4 + 4 * 4 + 4 * 4  # norm, q k v, gate and value, both outputs
    weights = 10 * 4 + 3 * block + 4
    assert sum(parameter.numel() for parameter in palm.parameters()) == weights
    assert generation.step_bytes(palm, batch=5, length=7) == 2 * weights + 2 * 2 * 5 * 7 * 3 * 2
