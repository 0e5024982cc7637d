"""The defaults of `palm-rlhf train`: by the device, and overridden by options one by one."""

import importlib.util
import inspect

import pytest
import torch
import tyro

from palm_rlhf.commands import train_command
from palm_rlhf.commands.train_command import defaults_of
from palm_rlhf.model.palm import PaLM


def command_on(device_type: str, monkeypatch):
    """The command as it is imported on a machine with that device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device_type == "cuda")
    spec = importlib.util.spec_from_file_location(f"train_on_{device_type}", train_command.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.train


WORTH = {  # dim, depth, millions of parameters; batch_size, seq_len, num_steps, learning_rate
    "cpu": (256, 6, 3.4, 16, 256, 1300, 1e-2),
    "mps": (256, 6, 3.4, 16, 256, 1300, 1e-2),
    "cuda": (768, 12, 100.5, 32, 1024, 10_000, 6e-4),
}


@pytest.mark.parametrize("device_type", WORTH)
def test_a_device_gets_a_model_and_a_run_that_it_is_worth(device_type):
    model, training = defaults_of(device_type)
    with torch.device("meta"):
        millions = sum(parameter.numel() for parameter in PaLM.from_config(model).parameters()) / 1e6
    run = (training.batch_size, training.seq_len, training.num_steps, training.learning_rate)
    assert (model.dim, model.depth, round(millions, 1), *run) == WORTH[device_type]
    assert training.eval_context < training.seq_len and training.warmup_steps < training.num_steps / 10


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_command_has_the_defaults_of_its_device(device_type, monkeypatch, capsys):
    command = command_on(device_type, monkeypatch)
    chosen = inspect.signature(command).parameters
    assert (chosen["fresh"].default, chosen["training"].default) == tuple(defaults_of(device_type))
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        tyro.cli(command, args=["--help"])
    shown = capsys.readouterr().out
    dim, _, _, _, seq_len, num_steps, _ = WORTH[device_type]
    for number in (dim, seq_len, num_steps):
        assert f"(default: {number})" in shown
    assert "3.4M parameters" in shown and "100M parameters" in shown  # of both, whatever the machine


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_an_option_overrides_a_default_and_leaves_the_others(device_type, monkeypatch):
    command = command_on(device_type, monkeypatch)

    model_default, training_default = (
        inspect.signature(command).parameters[name].default for name in ("fresh", "training")
    )

    def received(fresh=model_default, training=training_default):
        return fresh, training

    received.__annotations__ = {name: command.__annotations__[name] for name in ("fresh", "training")}
    fresh, training = tyro.cli(received, args=["--dim", "64", "--learning-rate", "0.5", "--compile", "False"])
    model_default, training_default = defaults_of(device_type)
    assert (fresh.dim, training.learning_rate, training.compile) == (64, 0.5, False)
    assert (fresh.depth, training.num_steps) == (model_default.depth, training_default.num_steps)
