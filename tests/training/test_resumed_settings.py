"""Every field of every config at resume: it counts as in a new run, or another value of it is refused by name."""

import dataclasses
import itertools
import json

import pytest

from palm_rlhf.training import LMConfig, PPOConfig, PreferenceConfig, RewardConfig, SupervisedConfig

from .laws.trainers import ROLLOUTS, SETTINGS, make

GROUPS = {**ROLLOUTS, "algorithm": "grpo", "num_samples": 2}

# What a checkpoint is of, which no later setting can change; a test below says it of each field that is not here.
REFUSED = {
    LMConfig: {"seed", "optimizer", "seq_len"},
    SupervisedConfig: {"seed", "lora_r", "lora_alpha", "lora_targets", "lora_embeddings"},
    RewardConfig: {"seed", "loss", "centering", "max_seq_len"},
    PreferenceConfig: {
        *("seed", "loss", "beta", "label_smoothing", "nll_coef", "desirable_weight", "undesirable_weight"),
        *("simpo_beta", "simpo_gamma", "lora_r", "lora_alpha", "lora_targets", "precision"),
    },
    PPOConfig: {"seed", "algorithm", "actor_lora_r", "critic_lora_r", "lora_targets", "shared_trunk", "share_base"},
}
START = {
    **SETTINGS,
    LMConfig: {**SETTINGS[LMConfig], "ema_decay": 0.5},
    SupervisedConfig: {**SETTINGS[SupervisedConfig], "lora_r": 2},
}
# Other values where half of a number or the other of two words will not do, with what they need beside them.
OTHERS = {
    "precision": "bf16",
    "compile": True,
    "trackers": ("tensorboard",),
    "betas": (0.8, 0.99),
    "min_lr_ratio": 0.5,
    "label_smoothing": 0.1,
    "num_samples": 4,
    "rollouts_per_step": 4,
    "lora_alpha": 3.0,
    "lora_targets": ("v", "ff_out"),
    "max_seconds": 600.0,
    "max_seq_len": 9,
    "max_turn_tokens": 2,
    "top_k": 4,
    "top_p": 0.9,
    "micro_batch_size": 2,
    "critic_learning_rate": 1e-3,
    "clip_eps_high": 0.3,
    "early_stop_kl": 0.1,
    "kl_target": 2.0,
    "kl_coef": 0.3,
    "score_clip": 3.0,
    "kl_penalty": "loss",
    "reward_timeout": 60.0,
    "eval_temperature": 0.5,
    "reward_weights": {"evens": 0.5},
    "clip_eps": 0.1,
    "ratio_level": "sequence",
    "loss_aggregation": "sequence",
    "advantage_scale": "batch",
    "max_redraws": 2,
    "importance_cap": 2.0,
    "overlong_buffer": 2,
}
NEEDED = {
    (PPOConfig, "grpo_variant"): GROUPS,
    (PPOConfig, "algorithm"): GROUPS,
    (PPOConfig, "kl_estimator"): GROUPS,
    (PPOConfig, "advantage_scale"): GROUPS,
    (PPOConfig, "max_redraws"): GROUPS,
    (PPOConfig, "ratio_level"): GROUPS,
    (PPOConfig, "overlong_penalty"): {**ROLLOUTS, "overlong_buffer": 2},
    (PPOConfig, "importance_cap"): {**ROLLOUTS, "precision": "bf16"},
    (PPOConfig, "lora_targets"): {**ROLLOUTS, "actor_lora_r": 2},
    (PreferenceConfig, "lora_targets"): {**SETTINGS[PreferenceConfig], "lora_r": 2},
    (PPOConfig, "share_base"): {**ROLLOUTS, "actor_lora_r": 2, "critic_lora_r": 2},
    (PPOConfig, "kl_horizon"): {**ROLLOUTS, "kl_target": 2.0},
    (RewardConfig, "centering"): {**SETTINGS[RewardConfig], "loss": "ranking"},
    (PreferenceConfig, "desirable_weight"): {**SETTINGS[PreferenceConfig], "loss": "kto"},
    (PreferenceConfig, "undesirable_weight"): {**SETTINGS[PreferenceConfig], "loss": "kto"},
    (PreferenceConfig, "simpo_beta"): {**SETTINGS[PreferenceConfig], "loss": "simpo"},
    (PreferenceConfig, "simpo_gamma"): {**SETTINGS[PreferenceConfig], "loss": "simpo"},
}


def other_value(field: dataclasses.Field, value):
    if field.name in OTHERS:
        return OTHERS[field.name]
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str):
        return next(word for word in field.type.__args__ if word not in (value, "auto", "labels"))
    return value * 2 if isinstance(value, int) and value else value / 2 or 2


def held(trainer) -> dict:
    """What a trainer has of its config where it counts, and not in the config itself."""
    groups = [{name: value for name, value in group.items() if name not in ("params", "lr")}
              for group in trainer.run.optimizer.param_groups]  # fmt: skip
    names = ("kl_coef", "num_steps")
    return {
        "groups": groups,
        "rates": trainer.run.base_rates,
        "precision": trainer.run.autocast().__class__,
        "compiled": len(trainer.run.compiled.blocks),
        **{name: getattr(trainer, name) for name in names if hasattr(trainer, name)},
    }


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """`started(settings of a config)` is a copy of the folder of a run after one step."""
    folders = {}

    def folder_of(kind, settings) -> tuple:
        key = (kind, json.dumps(settings, sort_keys=True))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(kind.__name__)
            next(make(kind(**settings), folders[key]).steps())
        return folders[key]

    return folder_of


FIELDS = [(kind, field) for kind in REFUSED for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("kind, field", FIELDS, ids=lambda part: getattr(part, "__name__", None) or part.name)
def test_another_value_of_a_field_counts_or_is_refused_by_name(started, kind, field):
    if field.name == "trackers":
        pytest.importorskip("tensorboard")
    settings = NEEDED.get((kind, field.name), START[kind])
    before = kind(**settings)
    value = other_value(field, getattr(before, field.name))
    change = {field.name: value}
    if (kind, field.name) == (PPOConfig, "algorithm"):
        value, change = "rloo", {"algorithm": "rloo"}
    after = dataclasses.replace(before, **change)
    assert getattr(after, field.name) != getattr(before, field.name)
    folder = started(kind, settings)
    if field.name in REFUSED[kind]:
        got, expected = (f"{field.name}={getattr(config, field.name)}" for config in (after, before))
        with pytest.raises(ValueError) as refusal:
            make(after, folder, resume=True)
        assert got in str(refusal.value) and expected in str(refusal.value)
        assert "remove that folder" not in str(refusal.value)
        return
    resumed = make(after, folder, resume=True)
    assert resumed.run.step == 1 and resumed.config == resumed.run.config == after
    new = make(dataclasses.replace(after, trackers=()))
    if field.name == "kl_horizon":  # the steered coefficient goes on from where it was
        new.kl_coef = resumed.kl_coef
    assert held(resumed) == held(new)
    resumed.run.log.close()


def test_the_table_of_fixed_fields_is_the_whole_one():
    assert {kind: set(kind.fixed) for kind in REFUSED} == REFUSED


def steered(folder, resume=False, **changes):
    settings = {**ROLLOUTS, "kl_target": 0.5, "kl_horizon": 20, "kl_coef": 0.3, **changes}
    return make(PPOConfig(**settings), folder, resume)


def test_a_kl_coefficient_given_at_resume_counts(tmp_path):
    """Unchanged, the steered one goes on, whatever its new target; another one is taken; without a target it is it."""
    list(itertools.islice(steered(tmp_path).steps(), 2))
    reached = steered(tmp_path, resume=True).kl_coef
    assert reached != 0.3
    assert steered(tmp_path, resume=True, kl_target=0.7).kl_coef == reached
    assert steered(tmp_path, resume=True, kl_coef=0.05).kl_coef == 0.05
    assert steered(tmp_path, resume=True, kl_target=None, kl_horizon=10_000).kl_coef == 0.3
    next_step = next(steered(tmp_path, resume=True, kl_coef=0.05).steps())
    assert next_step["step"] == 3 and next_step["kl_coef"] == 0.05


def test_a_coefficient_set_by_hand_during_a_run_goes_on(tmp_path):
    trainer = make(PPOConfig(**ROLLOUTS), tmp_path)
    next(trainer.steps())
    trainer.kl_coef = 0.7
    trainer.save()
    assert make(PPOConfig(**ROLLOUTS), tmp_path, resume=True).kl_coef == 0.7


def test_a_running_average_begins_with_its_run_or_not_at_all(tmp_path):
    settings = START[LMConfig]
    next(make(LMConfig(**settings), tmp_path).steps())
    with pytest.raises(ValueError, match=r"this run has ema_decay=0\.0, .* has ema_decay=0\.5: an average starts"):
        make(LMConfig(**{**settings, "ema_decay": 0.0}), tmp_path, resume=True)


def test_a_run_without_a_reference_resumes_without_one_and_gets_none_later(tmp_path):
    without = PPOConfig(**{**ROLLOUTS, "kl_coef": 0.0})
    list(itertools.islice(make(without, tmp_path).steps(), 2))
    assert not (tmp_path / "checkpoints/step_00000002/reference").exists()
    assert next(make(without, tmp_path, resume=True).steps())["step"] == 3
    with pytest.raises(
        ValueError, match=r"reference is a model of its own, that of .* is none, as with a kl_coef of 0"
    ):
        make(PPOConfig(**ROLLOUTS), tmp_path, resume=True)


def test_a_run_with_a_reference_may_leave_it(tmp_path):
    next(make(PPOConfig(**ROLLOUTS), tmp_path).steps())
    resumed = make(PPOConfig(**{**ROLLOUTS, "kl_coef": 0.0}), tmp_path, resume=True)
    assert resumed.reference is None and "kl" not in next(resumed.steps())


def test_a_checkpoint_that_is_older_than_a_field_had_its_default(tmp_path):
    next(make(PreferenceConfig(**SETTINGS[PreferenceConfig]), tmp_path).steps())
    file = tmp_path / "checkpoints/step_00000001/state.json"
    state = json.loads(file.read_text())
    del state["config"]["nll_coef"]
    file.write_text(json.dumps(state))
    assert make(PreferenceConfig(**SETTINGS[PreferenceConfig]), tmp_path, resume=True).step == 1
    with pytest.raises(ValueError, match=r"this run has \['nll_coef=0\.2'\], .* has \['nll_coef=0\.0'\]"):
        make(PreferenceConfig(**SETTINGS[PreferenceConfig], nll_coef=0.2), tmp_path, resume=True)
