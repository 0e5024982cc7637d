"""A run of reinforcement learning that was cut off, by kill -9 or otherwise, goes on to the bit."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palm_rlhf.training.rlhf.checkpoint import resume_from_checkpoint
from palm_rlhf.training.run.log import read_metrics

# Run by the tests themselves, and by processes that they kill.
RUN = """
import torch
from palm_rlhf import PaLM, PPOConfig, RLHFTrainer

def evens(prompts, completions):
    return [float((row % 2 == 0).float().mean()) for row in completions]

def trainer(folder, **options):
    torch.manual_seed(0)
    def build(**numbers):
        return PaLM(**{"num_tokens": 12, "dim": 16, "depth": 2, "heads": 2, "dim_head": 8, **numbers})
    models = {name: build(**numbers) for name, numbers in options.pop("models", {}).items()}
    models.setdefault("palm", build())
    resume = options.pop("resume", False)
    settings = {"num_steps": 6, "rollouts_per_step": 8, "minibatch_size": 4, "epochs": 2, "max_new_tokens": 6,
                "eos_token": 5, "learning_rate": 1e-2, "kl_target": 0.5, "kl_horizon": 100, "scale_scores": True,
                "save_every": 1, "keep_checkpoints": 10, "sample_every": 1, "plot": False, **options}
    prompts = [torch.arange(1 + index % 4) for index in range(7)]
    return RLHFTrainer(**models, reward_model=evens, prompt_token_ids=prompts, config=PPOConfig(**settings),
                       output_dir=folder, resume=resume)
"""
KILLED = """
import os, signal, sys
for metrics in trainer(sys.argv[1]).steps():
    if metrics["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""
VARIANTS = {
    "ppo": {},
    "lora": {"actor_lora_r": 2, "critic_lora_r": 2},
    "shared": {"shared_trunk": True},
    "grpo": {"algorithm": "grpo", "num_samples": 4},
}


@pytest.fixture(scope="module")
def make_trainer():
    names = {}
    exec(RUN, names)
    return names["trainer"]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints/step_00000006"
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}/{name}": t for file in files for name, t in load_file(file).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def log_of(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    clock = {"elapsed", "tokens_per_second"}
    return [{key: value for key, value in line.items() if key not in clock} for line in read_metrics(run / name)]


def test_a_killed_run_resumes_to_the_bit(make_trainer, root, tmp_path):
    list(make_trainer(tmp_path / "whole").steps())
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", RUN + KILLED, tmp_path / "cut"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    torch.manual_seed(99)
    resumed = make_trainer(tmp_path / "cut", resume=True)
    assert resumed.run.step == 3
    assert [metrics["step"] for metrics in resumed.steps()] == [4, 5, 6]
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "cut")
    assert log_of(tmp_path / "whole", "samples.jsonl") == log_of(tmp_path / "cut", "samples.jsonl")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_resumes_to_the_bit(make_trainer, tmp_path, variant):
    list(make_trainer(tmp_path / "whole", **VARIANTS[variant]).steps())
    list(itertools.islice(make_trainer(tmp_path / "cut", **VARIANTS[variant]).steps(), 2))
    list(make_trainer(tmp_path / "cut", **VARIANTS[variant], resume=True).steps())
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))


def test_what_a_resumed_run_must_bring_back(make_trainer, tmp_path):
    """Each part of the state alone makes the difference: a run resumed without it is another run."""
    list(make_trainer(tmp_path / "whole").steps())
    list(itertools.islice(make_trainer(tmp_path / "cut").steps(), 3))

    def differs(spoil) -> bool:
        shutil.copytree(tmp_path / "cut", tmp_path / "spoilt")
        trainer = make_trainer(tmp_path / "spoilt", resume=True)
        spoil(trainer)
        list(trainer.steps())
        result = not equal(tensors(tmp_path / "whole"), tensors(tmp_path / "spoilt"))
        shutil.rmtree(tmp_path / "spoilt")
        return result

    def forget_moments(parameters):
        def spoil(trainer):
            for parameter in parameters(trainer):
                trainer.run.optimizer.state[parameter]["exp_avg"].zero_()

        return spoil

    def take_the_policy_for_the_reference(trainer):
        trainer.reference.palm.load_state_dict(trainer.palm.state_dict())

    assert not differs(lambda trainer: None)
    assert differs(forget_moments(lambda trainer: trainer.actor_critic.actor_parameters()))
    assert differs(forget_moments(lambda trainer: trainer.actor_critic.critic_parameters()))
    assert differs(lambda trainer: torch.manual_seed(0))
    assert differs(lambda trainer: trainer.sampler.draw(1))
    assert differs(lambda trainer: setattr(trainer, "kl_coef", 0.05))
    assert differs(lambda trainer: setattr(trainer.score_moments, "count", 1))
    assert differs(take_the_policy_for_the_reference)


def test_the_reference_comes_back_though_a_trained_palm_is_given(make_trainer, tmp_path):
    first = make_trainer(tmp_path / "run")
    list(itertools.islice(first.steps(), 2))
    resumed = make_trainer(tmp_path / "run", resume=True)
    with torch.no_grad():
        resumed.palm.token_emb.weight.add_(1.0)
    resume_from_checkpoint(resumed)
    for name, weight in first.reference.palm.state_dict().items():
        assert torch.equal(resumed.reference.palm.state_dict()[name], weight)
    assert not torch.equal(resumed.palm.token_emb.weight, resumed.reference.palm.token_emb.weight)


def test_a_checkpoint_of_another_kind_of_run_is_refused(make_trainer, tmp_path):
    list(itertools.islice(make_trainer(tmp_path / "run").steps(), 1))
    with pytest.raises(ValueError, match=r"this run has \['algorithm=grpo'\], .* has \['algorithm=ppo'\]"):
        make_trainer(tmp_path / "run", resume=True, algorithm="grpo", num_samples=4)
    with pytest.raises(FileExistsError, match="resume=True"):
        make_trainer(tmp_path / "run")


@pytest.mark.parametrize(
    "before, after, message",
    [
        ({"reference": {}}, {}, "reference is the base below the adapters, that of .* is a model of its own"),
        ({}, {"reference": {}}, "this run's reference is a model of its own, that of .* is the base below"),
        ({}, {"palm": {"rotary_theta": 99.0}}, r"policy is of another model: rotary_theta=10000.0 there and 99.0 here"),
        ({"critic": {}}, {"critic": {"depth": 1}}, "critic.safetensors has the unexpected critic.layers.1"),
        ({"critic": {}}, {"critic": {"dim_head": 4}}, r"critic.safetensors has another shape of critic.layers.0"),
    ],
    ids=str,
)
def test_the_models_of_another_run_are_refused(make_trainer, tmp_path, before, after, message):
    """By what differs, and without the advice to remove the checkpoint, which is sound."""

    def build(models: dict, resume: bool = False):
        return make_trainer(tmp_path / "run", models=models, actor_lora_r=2, resume=resume)

    next(build(before).steps())
    assert build(before, resume=True).run.step == 1
    with pytest.raises(ValueError, match=message) as refusal:
        build(after, resume=True)
    assert "remove that folder" not in str(refusal.value)


def test_what_is_not_finite_leaves_the_last_good_checkpoint(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run")
    steps = trainer.steps()
    next(steps)
    saved = tmp_path / "run/checkpoints/step_00000001"
    before = {path.name: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    trainer.reward_model = lambda prompts, completions: [float("nan")] * len(prompts)
    with pytest.raises(FloatingPointError, match="expected a finite number"):
        next(steps)
    assert {path.name: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000001"]
    state = json.loads((saved / "state.json").read_text())
    assert state["step"] == 1 and state["score_moments"]["count"] == 8
