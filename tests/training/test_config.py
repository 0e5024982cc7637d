"""Configs: bad numbers are refused by name, and every field has a help text on the command line."""

import contextlib
import dataclasses
import io
import re
import types
import typing

import pytest
import tyro
from beartype.roar import BeartypeCallHintParamViolation

from palm_rlhf.training import LMConfig, PPOConfig, PreferenceConfig, RewardConfig, SupervisedConfig


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("seq_len", -1),
        ("grad_accum", 0),
        ("num_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("eps", 0.0),
        ("max_seconds", 0),
        ("min_lr_ratio", 1.5),
        ("warmup_steps", -1),
        ("betas", (0.9, 1.0)),
        ("weight_decay", -0.1),
        ("grad_clip", -1.0),
        ("ema_decay", 1.0),
        ("eval_context", 257),
        ("eval_every", 0),
        ("save_every", 0),
        ("keep_checkpoints", 0),
        ("log_every", 0),
        ("seed", -1),
    ],
)
def test_a_bad_number_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"LMConfig\.{name} is {re.escape(str(value))}, expected "):
        LMConfig(**{name: value})


@pytest.mark.parametrize("config", [LMConfig, SupervisedConfig, RewardConfig, PreferenceConfig, PPOConfig])
def test_no_number_of_any_config_may_be_negative_or_nan(config):
    bad = {int: [-1], float: [-1.0, float("nan")]}
    for field in dataclasses.fields(config):
        for kind in typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,):
            for value in bad.get(kind, ()):
                with pytest.raises(ValueError, match=rf"{config.__name__}\.{field.name} is {value}, expected "):
                    config(**{field.name: value})


def test_whole_numbers_may_stand_for_floats():
    assert LMConfig(learning_rate=1, max_seconds=600, grad_clip=0) == LMConfig(
        learning_rate=1.0, max_seconds=600.0, grad_clip=0.0
    )


def test_a_wrong_type_is_refused():
    with pytest.raises(BeartypeCallHintParamViolation, match="num_steps"):
        LMConfig(num_steps="many")


def test_the_command_line_explains_every_field(monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    out = io.StringIO()
    with pytest.raises(SystemExit), contextlib.redirect_stdout(out):
        tyro.cli(LMConfig, args=["--help"])
    for field in dataclasses.fields(LMConfig):
        flag = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{flag}\b[^│]*[A-Z][^│]{{20,}}\(default: ", out.getvalue()), flag
