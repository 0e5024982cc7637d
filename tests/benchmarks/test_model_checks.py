"""The checks of whole models pass on a CPU, and refuse a model with one mistake."""

import importlib

import pytest
import torch

from palm_rlhf.model import norms
from palm_rlhf.model.cache import KVCache
from palm_rlhf.policy.actor_critic import ACTOR_SCOPE, Reference
from palm_rlhf.policy.sequences import response_logprobs
from palm_rlhf.serving.engine.row_adapters import RowAdapters


@pytest.fixture
def checks(root, monkeypatch):
    """The checks as a module."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("model_checks")


def failed(found) -> list[str]:
    """The checks that failed, without their figures."""
    return [name.partition(":")[0] for name, passed in found if not passed]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_of_16_bits_pass(checks, dtype):
    """The test of gpu_check.py has float32."""
    assert not failed(checks.blocks("cpu", dtype, "qwen3")) + failed(checks.adapters("cpu", dtype, "llama3"))
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e '.[quantize]'")
    assert not failed(checks.fewer_bits("cpu", dtype, "int8")) + failed(checks.fewer_bits("cpu", dtype, "int4"))


def test_a_wrong_norm_is_refused(checks, monkeypatch):
    right = norms.rms_norm
    monkeypatch.setattr(norms, "rms_norm", lambda x, *rest: right(x, *rest) * (1 + 1e-3 * (x.dtype == torch.float32)))
    found = failed(checks.blocks("cpu", torch.float32, "llama3"))
    label = "block llama3 torch.float32"
    assert {f"{label} {part}" for part in ("logits", "steps through the cache", "loss and gradients")} <= {*found}


def test_steps_at_wrong_positions_are_refused(checks, monkeypatch):
    right = KVCache.positions
    monkeypatch.setattr(KVCache, "positions", lambda cache, new, device: right(cache, new, device) + (new == 1))
    found = failed(checks.blocks("cpu", torch.float32, "qwen3"))
    assert found == [f"block qwen3 torch.float32 {part}" for part in ("steps through the cache", "greedy tokens")]


def test_adapters_of_other_rows_are_refused(checks, monkeypatch):
    right = RowAdapters.indices
    monkeypatch.setattr(RowAdapters, "indices", lambda rows, scopes: right(rows, scopes).roll(1))
    found = failed(checks.adapters("cpu", torch.float32, "palm"))
    assert [name.removeprefix("adapters palm torch.float32 ") for name in found] == [
        "one forward of mixed rows",
        "replies of one batch",
    ]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_wrong_scales_and_products_are_refused(checks, monkeypatch, kind):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e '.[quantize]'")
    from palm_rlhf.model.quantised import quantised_model

    label, pack, product = f"bits {kind} torch.float32", quantised_model.pack, quantised_model.product
    with monkeypatch.context() as patch:
        patch.setattr(quantised_model, "pack", lambda *args: pack(*args)._replace(scales=pack(*args).scales * 1.02))
        assert failed(checks.fewer_bits("cpu", torch.float32, kind)) == [f"{label} weights"]
    monkeypatch.setattr(quantised_model, "product", lambda *args: product(*args) * 1.001)
    assert f"{label} loss and gradients of adapters" in failed(checks.fewer_bits("cpu", torch.float32, kind))


def test_a_reference_with_the_adapter_of_the_policy_is_refused(checks, monkeypatch):
    @torch.no_grad()
    def logprobs(reference, sequences, **sampling):
        return response_logprobs(reference.palm, sequences, **sampling, **scope_of(reference))

    def scope_of(reference) -> dict:
        return {"finetune_scope": ACTOR_SCOPE} if reference.is_base else {}

    monkeypatch.setattr(Reference, "logprobs", logprobs)
    assert failed(checks.one_base("cpu", "palm")) == ["one base palm metrics of PPO", "one base palm weights after PPO"]
