"""What every trainer does around its steps: seeds, arithmetic, sizes and lengths of runs, files and evaluations."""

import random
import time

import numpy as np
import pytest
import torch

from palm_rlhf.model.block import Block
from palm_rlhf.training import LMConfig, PPOConfig, PreferenceConfig, RewardConfig, SupervisedConfig
from palm_rlhf.training.run.log import read_metrics

from .trainers import CONFIGS, SETTINGS, build, law_of_each_config, record_tokens

BATCHED = (LMConfig, SupervisedConfig, RewardConfig, PreferenceConfig)
ROWS_OF_AN_ITEM = {LMConfig: 1, SupervisedConfig: 1, RewardConfig: 2, PreferenceConfig: 2}
VALIDATION = {LMConfig: "bits_per_byte", SupervisedConfig: "valid_loss", RewardConfig: "valid_accuracy",
              PreferenceConfig: "valid_loss"}  # fmt: skip


CURVES_DRAWN = {  # the metrics in curves.png: of a run without validation, and what validation adds
    LMConfig: ({"loss", "bits_per_byte", "learning_rate"}, set()),
    SupervisedConfig: ({"loss", "learning_rate"}, {"valid_loss"}),
    RewardConfig: ({"loss", "learning_rate", "accuracy", "valid_accuracy"}, set()),
    PreferenceConfig: (
        {"loss", "accuracy", "reward_margin"},
        {"valid_loss", "valid_accuracy", "valid_reward_margin"},
    ),
    PPOConfig: ({"score", "kl", "entropy", "response_length", "explained_variance", "clip_fraction"}, set()),
}


def palm_in(trainer):
    """The PaLM that a trainer trains."""
    return trainer.palm if hasattr(trainer, "palm") else trainer.reward_model.palm


@law_of_each_config("gradient_checkpointing")
def test_checkpointing_computes_every_block_a_second_time(kind):
    calls = {}
    for recompute in (False, True):
        trainer = build(kind, gradient_checkpointing=recompute)
        blocks = [part for part in trainer.run.module.modules() if isinstance(part, Block)]
        assert len(blocks) == (2 if kind is PPOConfig else 1)  # of the critic, too
        calls[recompute] = [[] for _ in blocks]
        for block, of_block in zip(blocks, calls[recompute], strict=True):
            block.register_forward_pre_hook(lambda *_, of_block=of_block: of_block.append(torch.is_grad_enabled()))
        next(trainer.steps())
    assert [sum(of_block) for of_block in calls[True]] == [2 * sum(of_block) for of_block in calls[False]]
    assert all(sum(of_block) > 0 for of_block in calls[False])


# ---- seeds


def drawn_in_a_run(kind, seed: int, drawn_before: int) -> dict:
    """All that is drawn at random in a run: order of the data, responses, adapters, what other code draws."""
    for draw in (torch.manual_seed, random.seed, np.random.seed):
        draw(drawn_before)
    adapters = {PPOConfig: {"actor_lora_r": 2}, SupervisedConfig: {"lora_r": 2}, PreferenceConfig: {"lora_r": 2}}
    trainer = build(kind, seed=seed, learning_rate=1e-9, **adapters.get(kind, {}))
    first = {name: p.detach().clone() for name, p in trainer.run.module.named_parameters() if name.endswith(".A")}
    assert bool(first) == (kind in adapters)
    generators = [random.random(), np.random.rand(), float(torch.rand(()))]
    seen = record_tokens(palm_in(trainer))
    list(trainer.steps())
    return {"seen": [tokens.tolist() for tokens in seen], "generators": generators, **first}


@law_of_each_config("seed")
def test_a_seed_makes_the_same_draws_and_another_seed_others(kind):
    one, again, other = (drawn_in_a_run(kind, *seeds) for seeds in ((3, 0), (3, 1), (4, 0)))
    for name, drawn in one.items():
        same = torch.equal if isinstance(drawn, torch.Tensor) else lambda a, b: a == b
        assert same(drawn, again[name]) and not same(drawn, other[name]), name


# ---- arithmetic


@law_of_each_config("precision")
@pytest.mark.parametrize("precision, dtype", [("float32", torch.float32), ("bf16", torch.bfloat16)])
def test_forwards_are_in_the_precision_asked_for_and_weights_stay_in_float32(kind, precision, dtype):
    trainer, found = build(kind, precision=precision), []

    def hook(*_):
        found.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)

    palm_in(trainer).layers[0].register_forward_pre_hook(hook)
    next(trainer.steps())
    assert set(found) == {dtype}
    assert {parameter.dtype for parameter in trainer.run.module.parameters()} == {torch.float32}


# ---- sizes and lengths


@law_of_each_config("batch_size", "grad_accum")
def test_a_step_has_so_many_forwards_of_so_many_items(kind):
    trainer = build(kind, batch_size=3, grad_accum=2)
    seen = record_tokens(palm_in(trainer))
    next(trainer.steps())
    assert [len(tokens) for tokens in seen] == [3 * ROWS_OF_AN_ITEM[kind]] * 2


@law_of_each_config("num_steps")
def test_a_run_has_so_many_steps(kind):
    assert [metrics["step"] for metrics in build(kind, num_steps=3).steps()] == [1, 2, 3]


@law_of_each_config("num_epochs")
def test_a_run_reads_each_item_so_often(kind):
    """Eight items, three times, four in a step."""
    trainer = build(kind, num_epochs=3)
    seen = record_tokens(palm_in(trainer))
    steps = list(trainer.steps())
    assert len(steps) == 6 and steps[-1]["epoch"] == 3
    assert sum(map(len, seen)) == 3 * 8 * ROWS_OF_AN_ITEM[kind]


@law_of_each_config("max_seconds")
def test_a_run_ends_when_its_time_is_over(kind, tmp_path):
    trainer = build(kind, tmp_path, max_seconds=1e-9, save_every=100)
    assert len(list(trainer.steps())) == 1 and trainer.run.ending == {"stopped_early": "max_seconds"}
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert len(list(build(kind, max_seconds=1e6).steps())) == 4


# ---- files


@law_of_each_config("save_every", "keep_checkpoints", "log_every")
def test_checkpoints_and_metrics_are_written_when_due_and_the_newest_kept(kind, tmp_path):
    def saved_and_logged(name, **settings):
        list(build(kind, tmp_path / name, **settings).steps())
        folders = sorted(int(folder.name[5:]) for folder in (tmp_path / name / "checkpoints").iterdir())
        return folders, [line["step"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]

    assert saved_and_logged("each") == ([3, 4], [1, 2, 3, 4])  # 2 are kept where nothing else is said
    assert saved_and_logged("three", keep_checkpoints=3, log_every=3) == ([2, 3, 4], [3])
    assert saved_and_logged("some", save_every=3, keep_checkpoints=4, log_every=2) == ([3, 4], [2, 4])


@law_of_each_config("plot")
@pytest.mark.parametrize("plot", [True, False])
def test_curves_are_drawn_where_they_are_wanted(kind, plot, tmp_path):
    list(build(kind, tmp_path, plot=plot, save_every=100).steps())
    assert (tmp_path / "curves.png").exists() == plot


@law_of_each_config("trackers")
def test_trackers_get_the_metrics(kind, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = build(kind, tmp_path, trackers=("tensorboard",))
    rates = {metrics["step"]: metrics["learning_rate"] for metrics in trainer.steps()}
    trainer.run.log.close()
    events = EventAccumulator(str(tmp_path / "palm-rlhf")).Reload()
    assert {event.step: event.value for event in events.Scalars("learning_rate")} == pytest.approx(rates)


# ---- evaluations


@pytest.mark.law(
    "LMConfig.eval_every", "SupervisedConfig.eval_every", "RewardConfig.eval_every", "PreferenceConfig.eval_every"
)
@pytest.mark.parametrize("kind", BATCHED, ids=lambda kind: kind.__name__)
def test_evaluations_come_when_due(kind):
    def evaluated(every):
        trainer = build(kind, valid=True, eval_every=every)
        return [metrics["step"] for metrics in trainer.steps() if VALIDATION[kind] in metrics]

    assert evaluated(3) == [3] and evaluated(2) == [2, 4] and evaluated(100) == []


def test_every_setting_here_is_of_a_run_of_four_steps():
    assert all(len(list(build(kind).steps())) == 4 for kind in CONFIGS) and set(SETTINGS) == set(CONFIGS)


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_the_time_of_a_rate_is_that_of_its_step(kind):
    """The tokens, or responses, of a step over its rate are no more seconds than the step took."""
    fewest = {LMConfig: 2 * 8, SupervisedConfig: 4 * 3, RewardConfig: 4 * 2, PreferenceConfig: 4 * 6, PPOConfig: 8}
    rate = "responses_per_second" if kind is RewardConfig else "tokens_per_second"
    steps, before = build(kind).steps(), time.perf_counter()
    assert next(steps)[rate] * (time.perf_counter() - before) >= fewest[kind]


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_train_shows_a_progress_bar_and_steps_does_not(kind, capsys):
    list(build(kind).steps())
    assert "step" not in capsys.readouterr().err
    build(kind).train()
    assert "4 of 4 steps" in capsys.readouterr().err


@law_of_each_config("plot")
def test_the_curves_are_those_of_the_run_and_of_its_validation(kind):
    drawn, of_validation = CURVES_DRAWN[kind]
    for valid in (False, True):
        trainer = build(kind, valid=valid)
        panels = trainer.run.log.panels
        assert set(panels) == (drawn | of_validation if valid else drawn)
        assert len(set(panels.values())) == len(panels)
    if kind is PreferenceConfig:
        assert panels["loss"] == "train: loss" and panels["valid_loss"] == "valid: loss"
        assert panels["valid_reward_margin"] == "valid: reward of the chosen minus the rejected"


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_bar_is_drawn_where_it_is_asked_for_alone(kind, capsys):
    list(build(kind).steps())
    assert capsys.readouterr().err == ""
    list(build(kind).steps(progress_bar=True))
    assert "of 4 steps" in capsys.readouterr().err
