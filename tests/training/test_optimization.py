"""The schedule's known values, decay on matrices only, and the forward's precision."""

import math
import re
from pathlib import Path

import pytest
import torch

from palm_rlhf.ops.devices import computes_bfloat16
from palm_rlhf.training.run.muon import muon
from palm_rlhf.training.run.optimizer import adamw, forward_precision, warmup_cosine


def test_the_schedule_by_hand():
    assert warmup_cosine(0, 0.0, 10, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(4, 0.0, 10, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(9, 0.0, 10, 0.1) == pytest.approx(1.0)
    assert warmup_cosine(50, 0.0, 10, 0.1) == pytest.approx(1.0)
    assert warmup_cosine(50, 1 / 3, 10, 0.0) == pytest.approx(0.75)  # (1 + cos(60 degrees)) / 2
    assert warmup_cosine(50, 0.5, 10, 0.2) == pytest.approx(0.6)
    assert warmup_cosine(50, 1.0, 10, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(50, 7.0, 10, 0.1) == pytest.approx(0.1)
    assert warmup_cosine(0, 0.0, 0, 0.1) == pytest.approx(1.0)


def test_the_schedule_never_rises_after_the_warmup():
    factors = [warmup_cosine(step, step / 100, 5, 0.1) for step in range(100)]
    assert factors[:5] == sorted(factors[:5])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert math.isclose(max(factors), 1.0, abs_tol=0.01)


def test_decay_shrinks_matrices_and_leaves_vectors(tiny_palm):
    palm = tiny_palm()
    before = {name: parameter.detach().clone() for name, parameter in palm.named_parameters()}
    for parameter in palm.parameters():
        parameter.grad = torch.zeros_like(parameter)  # so that only the decay moves them
    adamw(palm, 0.1, (0.9, 0.95), 1e-8, weight_decay=0.5).step()
    kinds = set()
    for name, parameter in palm.named_parameters():
        kinds.add(parameter.ndim)
        factor = 1 - 0.1 * 0.5 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])
    assert kinds == {1, 2}


def test_frozen_parameters_are_left_out(tiny_palm):
    palm = tiny_palm()
    palm.token_emb.weight.requires_grad_(False)
    held = [p for group in adamw(palm, 0.1, (0.9, 0.95), 1e-8, 0.1).param_groups for p in group["params"]]
    assert len(held) == len(list(palm.parameters())) - 1
    assert all(parameter is not palm.token_emb.weight for parameter in held)


@pytest.mark.parametrize("make", [adamw, muon])
def test_a_model_with_nothing_to_train_is_refused(tiny_palm, make):
    with pytest.raises(ValueError, match="all weights are frozen"):
        make(tiny_palm().requires_grad_(False), 1e-3, (0.9, 0.95), 1e-8, 0.1)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_the_forward_computes_in_the_precision_asked_for(precision, dtype):
    with forward_precision(precision, torch.device("cpu"))():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype is dtype


def test_auto_takes_bfloat16_where_the_hardware_has_it():
    expected = torch.bfloat16 if computes_bfloat16(torch.device("cpu")) else torch.float32
    with forward_precision("auto", torch.device("cpu"))():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype is expected
    assert not computes_bfloat16(torch.device("meta"))


def test_the_hardware_is_asked_which_bfloat16_it_has():
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else None
    if flags is None:  # not Linux on x86
        assert computes_bfloat16(torch.device("cpu")) in (True, False)
    else:
        assert computes_bfloat16(torch.device("cpu")) == bool({"avx512_bf16", "amx_tile"} & set(flags[1].split()))


@pytest.mark.parametrize("probe", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_either_kind_of_bfloat16_is_enough_for_a_cpu(monkeypatch, probe):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == probe, raising=False)
    assert computes_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, probe, lambda: False)
    assert not computes_bfloat16(torch.device("cpu"))


def test_auto_takes_bfloat16_on_a_gpu(gpu):
    with forward_precision("auto", gpu)():
        product = torch.mm(torch.ones(2, 2, device=gpu), torch.ones(2, 2, device=gpu))
    assert (product.dtype is torch.bfloat16) == (torch.cuda.get_device_capability(gpu) >= (8, 0))
