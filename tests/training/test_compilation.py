"""Blocks that torch.compile compiles for the steps of a run: the same numbers, and only where that is wanted."""

import dataclasses

import pytest
import torch

from palm_rlhf.model.block import ParallelBlock
from palm_rlhf.model.palm import PaLM
from palm_rlhf.training import LMConfig, PPOConfig, PreferenceConfig, RewardConfig, SupervisedConfig
from palm_rlhf.training.run import compilation
from palm_rlhf.training.run.compilation import CompiledBlocks, is_wanted, why_not
from tests.factories import SERIAL

from .laws.trainers import build, law_of_each_config, palm_of

KINDS = (LMConfig, SupervisedConfig, RewardConfig, PreferenceConfig, PPOConfig)


def palm_in(trainer):
    return getattr(trainer, "palm", None) or trainer.reward_model.palm


@pytest.fixture
def eager_compiler(monkeypatch):
    """Traces what is compiled, and refuses a break in it, but runs the trace as it is: the C++ compiler takes long."""
    calls = []

    def compiler(graph, inputs):
        calls.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_(f, backend=compiler, fullgraph=True))
    torch._dynamo.reset()
    yield calls
    torch._dynamo.reset()


# ---- when


def test_a_model_is_compiled_where_it_is_asked_for_and_by_itself_on_a_gpu_in_long_runs():
    enough = compilation.MIN_BLOCK_PASSES
    assert is_wanted(True, "cpu", 1) and is_wanted(True, "cuda", 1)
    assert not is_wanted(False, "cuda", 10 * enough) and not is_wanted("auto", "cpu", 10 * enough)
    assert is_wanted("auto", "cuda", enough) and not is_wanted("auto", "cuda", enough - 1)


@law_of_each_config("compile")
@pytest.mark.parametrize("setting", ["auto", True, False])
def test_the_blocks_of_a_step_are_compiled_where_that_is_asked_for(kind, setting, eager_compiler, capsys):
    trainer = build(kind, compile=setting)
    list(trainer.steps())
    assert bool(eager_compiler) == (setting is True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "compiled" in line]
    num_blocks = 2 if kind is PPOConfig else 1  # the policy's and the critic's
    assert len(lines) == (setting is True)
    assert all(f"{num_blocks} blocks are compiled: the first step took" in line for line in lines)


@pytest.mark.parametrize("kind, forwards", [(LMConfig, 4 * 3), (SupervisedConfig, 8), (RewardConfig, 8)],
                         ids=lambda value: getattr(value, "__name__", None))  # fmt: skip
def test_the_passes_of_a_run_decide(kind, forwards, monkeypatch):
    """As many as there are: of 4 steps with 3 micro-batches; of twice 8 items, 2 in a batch."""
    asked = []
    monkeypatch.setattr(compilation, "is_wanted", lambda setting, device, passes: asked.append((setting, passes)))
    trainer = build(kind, palm=palm_of(depth=3), **({"grad_accum": 3} if kind is LMConfig else {}))
    seen = []
    palm_in(trainer).register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    list(trainer.steps())
    assert asked == [("auto", 3 * forwards)] and sum(seen) == forwards


@pytest.mark.parametrize("kind", [PreferenceConfig, PPOConfig], ids=lambda kind: kind.__name__)
def test_no_run_that_compares_logprobs_is_compiled_by_itself(kind, monkeypatch):
    asked = []
    monkeypatch.setattr(compilation, "is_wanted", lambda setting, device, passes: asked.append(passes))
    build(kind)
    assert asked == [0]


def test_a_compiler_that_fails_leaves_an_auto_run_as_it_is(monkeypatch, capsys):
    def fail(function):
        raise RuntimeError("no C compiler\nhere")

    monkeypatch.setattr(torch, "compile", fail)
    assert why_not(torch.device("cpu")) == "RuntimeError: no C compiler"
    monkeypatch.setattr(compilation, "is_wanted", lambda *_: True)
    blocks = CompiledBlocks(palm_of(), "auto", torch.device("cpu"), 1, speaks=True)
    assert blocks.blocks == []
    assert "not compiled: torch.compile fails here, RuntimeError: no C compiler" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        CompiledBlocks(palm_of(), True, torch.device("cpu"), 1, speaks=True)


# ---- what


def test_a_policy_and_a_critic_with_blocks_of_two_kinds_are_each_compiled_as_what_they_are(eager_compiler):
    options = {"num_tokens": 11, "dim": 8, "depth": 1, "heads": 2, "dim_head": 4, "flash_attn": False}
    models = torch.nn.ModuleList([PaLM(**options), PaLM(**options, block="serial", norm="rms")])
    tokens = torch.randint(11, (2, 5))
    expected = [model(tokens) for model in models]
    with CompiledBlocks(models, True, torch.device("cpu"), 1, speaks=False)():
        got = [model(tokens) for model in models]
    assert len(eager_compiler) == 2
    torch.testing.assert_close(got, expected)


def test_outside_of_the_steps_a_block_is_what_it_was(eager_compiler, tmp_path):
    """Generation and evaluation compile nothing, and a checkpoint has the names that it always had."""
    trainer = build(LMConfig, tmp_path, compile=True, valid=True, eval_every=1)
    list(trainer.steps())
    compiled = len(eager_compiler)
    assert compiled >= 1
    trainer.palm.generate(prompt=torch.tensor([1, 2, 3]), max_new_tokens=5)
    trainer.finish()
    assert len(eager_compiler) == compiled
    assert all("forward" not in block.__dict__ for block in trainer.palm.layers)
    assert not any("_orig_mod" in name for name in trainer.run.module.state_dict())
    again = build(LMConfig, tmp_path, resume=True)  # of a run that is not compiled
    assert again.step == 4


@pytest.mark.parametrize("fields", [{}, SERIAL], ids=["parallel", "serial"])
def test_all_blocks_are_compiled_once(fields, eager_compiler):
    trainer = build(LMConfig, palm=palm_of(depth=5, **fields), compile=True)
    list(trainer.steps())
    assert len(eager_compiler) == 1


@pytest.mark.parametrize("masks", [{}, {"loss_mask": "mask"}, {"key_mask": "mask"}, {"document_ids": "ids"},
                                   {"loss_mask": "mask", "document_ids": "ids"}], ids=str)  # fmt: skip
def test_a_whole_forward_with_its_loss_is_one_graph(masks, eager_compiler):
    palm = palm_of(depth=2).train()
    tokens = torch.randint(12, (2, 9))
    values = {"mask": torch.arange(9).expand(2, 9) < torch.tensor([[9], [6]]), "ids": torch.arange(9).div(4).floor()}
    options = {name: values[value].long() if value == "ids" else values[value] for name, value in masks.items()}
    if "document_ids" in options:
        options["document_ids"] = options["document_ids"].expand(2, 9)
    compiled = torch.compile(palm)(tokens, return_loss=True, **options)
    torch.testing.assert_close(compiled, palm(tokens, return_loss=True, **options), rtol=1e-5, atol=1e-5)


@pytest.mark.slow(35)
@pytest.mark.parametrize("kind", [LMConfig, PPOConfig], ids=lambda kind: kind.__name__)
def test_compiled_steps_are_those_of_the_definition(kind):
    """By the C++ compiler; with rows of uneven lengths, whose padding changes no loss."""
    torch._dynamo.reset()
    runs = []
    for setting in (False, True):
        trainer = build(kind, compile=setting, learning_rate=1e-2)
        metrics = list(trainer.steps())
        runs.append((metrics, trainer.run.module.state_dict()))
    (plain, weights), (compiled, compiled_weights) = runs
    timed = {"elapsed", "tokens_per_second", "responses_per_second"}
    for one, other in zip(plain, compiled, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - timed:
            assert other[name] == pytest.approx(one[name], rel=2e-3, abs=2e-4), name
    for name, value in weights.items():
        torch.testing.assert_close(compiled_weights[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.slow(20)
def test_blocks_that_are_adapted_and_recomputed_are_compiled_too():
    torch._dynamo.reset()
    losses = []
    for setting in (False, True):
        trainer = build(SupervisedConfig, compile=setting, learning_rate=1e-2, gradient_checkpointing=True, lora_r=2)
        losses.append([metrics["loss"] for metrics in trainer.steps()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_settings_of_every_trainer_have_it():
    assert all("compile" in {field.name for field in dataclasses.fields(kind)} for kind in KINDS)
    assert isinstance(palm_of().layers[0], ParallelBlock)
