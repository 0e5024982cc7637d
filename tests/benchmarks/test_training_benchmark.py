"""The benchmark of training steps, as far as it goes without a GPU."""

import importlib
import json
from dataclasses import replace

import pytest
import torch

from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.palm import PaLM


@pytest.fixture
def module(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


def test_the_operations_of_a_step_are_those_of_the_paper(module):
    """PaLM 540B (appendix B): L 118, H 48, Q 256, T 2048; 238.3k tokens/s on 6144 TPU v4 of 275 TFLOP/s are 45.7 %.

    The 46.2 % of the paper's table 3 count the attention, the 45.7 % do not.
    """
    utilization = module("utilization")
    config = PaLMConfig(num_tokens=256, dim=18432, depth=118, heads=48, dim_head=256)
    num_parameters = 540_350_000_000
    pod = utilization.Peak(6144 * 275e12, 0.0)
    with_attention = utilization.training_flops(config, num_parameters, 2048)
    assert utilization.mfu(238_300, with_attention, pod) == pytest.approx(0.462, abs=5e-4)
    assert utilization.mfu(238_300, 6 * num_parameters, pod) == pytest.approx(0.457, abs=5e-4)
    half = utilization.training_flops(config, num_parameters, 2048, causal=True)
    assert 2 * (half - 6 * num_parameters) == pytest.approx(with_attention - 6 * num_parameters)
    assert utilization.mfu(1.0, 1.0, None) is None


def test_a_gpu_is_known_by_its_name(module):
    peak_of = module("utilization").peak_of
    assert peak_of("NVIDIA H200").bandwidth == 4.8e12 and peak_of("NVIDIA H100 80GB HBM3").flops == 989e12
    assert peak_of("NVIDIA H100 PCIe").flops == 756e12 and peak_of("NVIDIA A100-SXM4-80GB").flops == 312e12
    assert peak_of("Another card") is None


@pytest.mark.parametrize(
    "name, millions", [("139M", 139), ("1B", 1050), ("SmolLM2 135M", 134.5), ("LLaMA 3.2 1B", 1236)]
)
def test_the_models_have_the_sizes_that_they_are_named_by(module, name, millions):
    with torch.device("meta"):
        palm = PaLM.from_config(module("training_models").SIZES[name].config)
    assert sum(parameter.numel() for parameter in palm.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3)


def test_the_packages_beside_ours_compute_the_same(module):
    pytest.importorskip("transformers")
    pytest.importorskip("palm_rlhf_pytorch", reason="needs the extra palm-rlhf[bench]")
    models = module("training_models")
    config = PaLMConfig(num_tokens=64, dim=32, depth=1, heads=4, dim_head=16)
    errors = models.parity_errors(config)
    assert set(errors) == {"transformers Cohere", "palm-rlhf-pytorch"} and max(errors.values()) < 1e-3
    llama = replace(config, **models.LLAMA, kv_heads=2)
    errors = models.parity_errors(llama)
    assert set(errors) == {"transformers LLaMA"} and max(errors.values()) < 1e-3
    # and the same loss, on the predictions that all of them make
    for of_block in (config, llama):
        palm = PaLM.from_config(of_block).eval()
        tokens = torch.randint(64, (2, 17))
        with torch.no_grad():
            theirs = models.hugging_face_loss(models.make_hugging_face(of_block, palm).eval(), tokens)
            ours = palm(tokens[:, :-1], return_loss=True)
        assert float(theirs) == pytest.approx(float(ours), rel=1e-5)


@pytest.fixture
def traces(monkeypatch):
    """What torch.compile has traced, which runs as it is: the C++ compiler takes long."""
    found, compile_ = [], torch.compile

    def compiler(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=compiler, **options))
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


@pytest.mark.slow(20)
def test_every_row_is_timed(module, traces, capsys):
    """On the CPU, where the rows are the same and the times mean nothing; compiled ones included."""
    pytest.importorskip("transformers")
    pytest.importorskip("palm_rlhf_pytorch", reason="needs the extra palm-rlhf[bench]")
    step, models = module("training_step"), module("training_models")
    size = models.Size(PaLMConfig(num_tokens=64, dim=32, depth=1, heads=4, dim_head=16), 2, 16)
    lines = step.measure(size, "cpu", num_steps=1)
    assert [line["name"] for line in lines] == list(models.rows(size, "cpu"))
    assert all(line["tokens_per_second"] > 0 and line["mfu"] is None for line in lines)
    for name, make in models.rows(size, "cpu").items():
        torch._dynamo.reset()
        traces.clear()
        make()()
        assert bool(traces) == ("compiled" in name), name


def test_the_parts_of_a_step_of_reinforcement_learning_are_timed(module, capsys):
    ppo = module("ppo_step")
    model = PaLMConfig(num_tokens=64, dim=32, depth=1, heads=4, dim_head=16)
    ppo.on_gpu(model, num_prompts=8, new_tokens=4, minibatch=4, rounds=1)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["seconds"]) == {"ppo", "grpo"}
    for parts in result["seconds"].values():
        assert tuple(parts) == ppo.PARTS and all(seconds > 0 for seconds in parts.values())
        assert parts["step"] == pytest.approx(sum(seconds for name, seconds in parts.items() if name != "step"))
