"""The trainer: one normaliser, gradients by definition, averages, evaluation, budgets, logs and refusals."""

import itertools
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from palm_rlhf.training.language_model import LanguageModelTrainer
from palm_rlhf.training.run.log import read_metrics

# With an eps this large AdamW's first step is the gradient itself, so that weights show what gradients were.
GRADIENT_DESCENT = {"learning_rate": 1e6, "eps": 1e6, "warmup_steps": 0, "weight_decay": 0.0, "grad_clip": 0.0}


@pytest.fixture
def uneven():
    """Sources shorter than a window, so that windows and micro-batches hold different numbers of targets."""
    generator = np.random.default_rng(1)
    return [generator.integers(0, 256, length) for length in (40, 5, 9, 3)]


def one_step(palm, data, config) -> tuple[dict, dict[str, torch.Tensor]]:
    """The metrics of the first step, and the gradient that it followed."""
    before = {name: parameter.detach().clone() for name, parameter in palm.named_parameters()}
    metrics = next(LanguageModelTrainer(palm, train_data=data, config=config).steps())
    return metrics, {name: before[name] - parameter.detach() for name, parameter in palm.named_parameters()}


def gradients(palm, loss) -> dict[str, torch.Tensor]:
    names, parameters = zip(*palm.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).detach().abs().max()) for name in one)


def window_nats(palm, data, window) -> torch.Tensor:
    tokens = torch.from_numpy(data[window.source][window.start : window.stop]).long()
    return F.cross_entropy(palm(tokens[None, :-1])[0], tokens[1:], reduction="sum")


def test_a_step_follows_the_mean_over_all_its_targets_however_they_are_batched(tiny_palm, tiny_config, uneven):
    settings = {**GRADIENT_DESCENT, "num_steps": 1}
    config = tiny_config(batch_size=8, grad_accum=1, **settings)
    windows = LanguageModelTrainer(tiny_palm(), train_data=uneven, config=config).sampler.draw(8)
    sizes = [window.num_targets for window in windows]
    assert len(set(sizes)) > 2

    palm = tiny_palm(z_loss=0.0)
    nats = [window_nats(palm, uneven, window) for window in windows]
    mean = float(sum(nats).detach() / sum(sizes))
    pairs = [slice(first, first + 2) for first in range(0, 8, 2)]
    by_definition = gradients(palm, sum(nats) / sum(sizes))
    mean_of_means = gradients(palm, sum(sum(nats[pair]) / sum(sizes[pair]) for pair in pairs) / 4)
    for batch_size, grad_accum in ((8, 1), (4, 2), (2, 4), (1, 8)):
        config = tiny_config(batch_size=batch_size, grad_accum=grad_accum, **settings)
        metrics, followed = one_step(tiny_palm(z_loss=0.0), uneven, config)
        assert distance(followed, by_definition) < 1e-6
        assert distance(followed, mean_of_means) > 1e-4
        assert metrics["loss"] == pytest.approx(mean, rel=1e-6)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in by_definition.values()))
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_every_step_follows_its_own_gradient_alone(tiny_palm, tiny_config, text):
    config = tiny_config(**GRADIENT_DESCENT, betas=(0.0, 0.0), min_lr_ratio=1.0)
    trainer = LanguageModelTrainer(tiny_palm(z_loss=0.0), train_data=text, config=config)
    assert len(list(trainer.steps())) == 4

    palm = tiny_palm(z_loss=0.0)
    sampler = LanguageModelTrainer(palm, train_data=text, config=config).sampler
    for _ in range(4):
        windows = sampler.draw(4)
        nats = sum(window_nats(palm, [text], window) for window in windows)
        descent = gradients(palm, nats / sum(window.num_targets for window in windows))
        with torch.no_grad():
            for name, parameter in palm.named_parameters():
                parameter -= descent[name]
    assert distance(dict(trainer.palm.named_parameters()), dict(palm.named_parameters())) < 1e-5


def test_clipping_scales_the_gradient_to_its_largest_norm(tiny_palm, tiny_config, text):
    free = tiny_config(**GRADIENT_DESCENT)
    metrics, full = one_step(tiny_palm(), text, free)
    _, clipped = one_step(tiny_palm(), text, tiny_config(**{**GRADIENT_DESCENT, "grad_clip": metrics["grad_norm"] / 2}))
    assert distance({name: value / 2 for name, value in full.items()}, clipped) < 1e-6
    assert distance(full, clipped) > 1e-4


def test_gradient_checkpointing_and_accumulation_change_nothing_but_memory(tiny_palm, tiny_config, text):
    _, plain = one_step(tiny_palm(), text, tiny_config(**GRADIENT_DESCENT))
    _, checkpointed = one_step(tiny_palm(gradient_checkpointing=True), text, tiny_config(**GRADIENT_DESCENT))
    assert distance(plain, checkpointed) < 1e-6


@pytest.mark.slow(20)
def test_compiling_changes_nothing_but_speed(tiny_palm, tiny_config, text):
    _, eager = one_step(tiny_palm(depth=1), text, tiny_config(**GRADIENT_DESCENT))
    _, compiled = one_step(tiny_palm(depth=1), text, tiny_config(**GRADIENT_DESCENT, compile=True))
    assert distance(eager, compiled) < 1e-5


def test_it_learns(tiny_palm, tiny_config):
    period = np.tile(np.arange(32, dtype=np.uint8), 60)
    config = tiny_config(num_steps=60, batch_size=8, learning_rate=1e-2)
    trainer = LanguageModelTrainer(tiny_palm(), train_data=period[:1500], valid_data=period[1500:], config=config)
    assert trainer.evaluate() > 4
    assert trainer.train()["bits_per_byte"] < 0.5


@pytest.mark.law("LMConfig.ema_decay")
def test_the_weights_average_follows_its_recurrence_and_is_what_counts(tiny_palm, tiny_config, text, tmp_path):
    config = tiny_config(num_steps=6, ema_decay=0.3, learning_rate=1e-2)
    trainer = LanguageModelTrainer(tiny_palm(), train_data=text, valid_data=text[:50], config=config)
    average = {name: parameter.detach().clone() for name, parameter in trainer.palm.named_parameters()}
    for step, _ in enumerate(trainer.steps()):
        decay = min(0.3, (1 + step) / (10 + step))
        for name, parameter in trainer.palm.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
    torch.testing.assert_close(dict(trainer.trained.named_parameters()), average, rtol=0, atol=1e-6)
    assert distance(average, dict(trainer.palm.named_parameters())) > 1e-4
    score = trainer.evaluate()
    with torch.no_grad():
        trainer.palm.norm.weight.zero_()
    assert trainer.evaluate() == score
    assert not any(parameter.requires_grad for parameter in trainer.trained.parameters())


def test_evaluation_counts_bytes_not_tokens(tiny_palm, tiny_config, text):
    def trainer(**options):
        return LanguageModelTrainer(tiny_palm(), train_data=text, config=tiny_config(), **options)

    halves = [text[:40], text[40:100]]
    alone = trainer(valid_data=halves).evaluate()
    assert trainer(valid_data=halves, valid_bytes=400).evaluate() == pytest.approx(alone / 4)
    assert trainer(valid_data=halves, valid_bytes=(150, 250)).evaluate() == pytest.approx(alone / 4)
    assert trainer().evaluate(halves) == pytest.approx(alone)
    assert trainer().evaluate(halves, 400) == pytest.approx(alone / 4)
    first = [text[:20], text[40:70]]
    assert trainer(valid_data=halves, valid_bytes=400).evaluate(max_tokens=50) == pytest.approx(
        trainer(valid_data=first, valid_bytes=200).evaluate()
    )
    assert trainer(valid_data=halves).evaluate(max_tokens=1000) == pytest.approx(alone)
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        trainer().evaluate()


def test_evaluations_come_when_due(tiny_palm, tiny_config, text):
    config = tiny_config(num_steps=7, eval_every=3, eval_tokens=30)
    trainer = LanguageModelTrainer(tiny_palm(), train_data=text, valid_data=text[:90], config=config)
    evaluated = {metrics["step"] for metrics in trainer.steps() if "bits_per_byte" in metrics}
    assert evaluated == {3, 6}
    assert trainer.finish()["bits_per_byte"] == trainer.evaluate()


def test_the_learning_rate_is_the_schedules(tiny_palm, tiny_config, text):
    config = tiny_config(num_steps=10, warmup_steps=2, learning_rate=0.01, min_lr_ratio=0.5)
    rates = [
        metrics["learning_rate"]
        for metrics in LanguageModelTrainer(tiny_palm(), train_data=text, config=config).steps()
    ]
    assert rates[0] == pytest.approx(0.005)
    assert rates[5] == pytest.approx(0.0075)  # half-way down
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_a_limit_of_time_changes_no_step_and_resuming_makes_the_rest(tiny_palm, tiny_config, text, tmp_path, capsys):
    """Each trainer makes one step here, and all together they are the run that nothing stopped."""

    def trainer(folder, **fields):
        config = tiny_config(num_steps=3, warmup_steps=2, save_every=100, **fields)
        return LanguageModelTrainer(tiny_palm(), train_data=text, config=config, output_dir=folder, resume=True)

    whole = trainer(tmp_path / "whole")
    assert "stopped_early" not in whole.train()
    capsys.readouterr()
    for step in (1, 2, 3):
        stopped = trainer(tmp_path / "run", max_seconds=1e-9)
        result, said = stopped.train(), capsys.readouterr().err
        assert result["steps"] == step
        assert result.get("stopped_early") == ("max_seconds" if step < 3 else None)
        assert (f"stopped early, after step {step} of 3: max_seconds is 1e-09" in said) == (step < 3)
        assert (f"saved in {tmp_path / 'run/checkpoints'}" in said) == (step < 3)
    for one, other in zip(stopped.palm.parameters(), whole.palm.parameters(), strict=True):
        assert torch.equal(one, other)
    lines, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    rates = [[line["learning_rate"] for line in some if "learning_rate" in line] for some in (lines, expected)]
    assert rates[0] == rates[1] and len(rates[0]) == 3


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_by_name_and_changes_no_weight(tiny_palm, tiny_config, text, poison):
    palm = tiny_palm()
    trainer = LanguageModelTrainer(palm, train_data=text, config=tiny_config())
    steps = trainer.steps()
    next(steps)
    if poison == "loss":
        with torch.no_grad():
            palm.norm.weight[0] = float("nan")
    else:
        palm.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = palm.token_emb.weight.detach().clone()
    with pytest.raises(
        FloatingPointError, match=r"step 2 has the loss .* (nan|inf).*checkpoint is none.*learning_rate"
    ):
        next(steps)
    assert torch.equal(palm.token_emb.weight, before)


def test_random_states_differ_between_seeds_and_not_between_runs(tiny_palm, tiny_config, text):
    def losses(seed):
        config = tiny_config(seed=seed)
        return [
            metrics["loss"]
            for metrics in LanguageModelTrainer(tiny_palm(dropout=0.2), train_data=text, config=config).steps()
        ]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_metrics_go_to_a_line_for_each_logged_step(tiny_palm, tiny_config, text, tmp_path):
    config = tiny_config(num_steps=6, log_every=2, eval_every=3)
    trainer = LanguageModelTrainer(
        tiny_palm(), train_data=text, valid_data=text[:40], config=config, output_dir=tmp_path
    )
    yielded = {}
    for metrics in trainer.steps():
        yielded[metrics["step"]] = metrics
        written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert written == [yielded[step] for step in (2, 3, 4, 6) if step in yielded]
    result = trainer.finish()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert last == {"step": 6, "bits_per_byte": result["bits_per_byte"]}
    assert result["steps"] == 6
    assert result["seconds"] > yielded[6]["elapsed"]


def test_the_progress_bar_shows_the_time_left_loss_and_speed_on_standard_error(tiny_palm, tiny_config, text, capsys):
    LanguageModelTrainer(tiny_palm(), train_data=text, config=tiny_config()).train()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"100% \|.*\| 4 of 4 steps in \d\d:\d\d, 00:00 left, .*loss=.*, tokens/s=", captured.err)


def test_a_tracker_gets_the_metrics(tiny_palm, tiny_config, text, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(num_steps=3, trackers=("tensorboard",))
    trainer = LanguageModelTrainer(tiny_palm(), train_data=text, config=config, output_dir=tmp_path)
    losses = {metrics["step"]: metrics["loss"] for metrics in trainer.steps()}
    trainer.finish()
    events = EventAccumulator(str(tmp_path / "palm-rlhf")).Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(losses)


def test_a_tracker_that_is_missing_or_homeless_is_refused(tiny_palm, tiny_config, text, tmp_path):
    with pytest.raises(ImportError, match=r"trackers has \['comet_ml'\].*install"):
        LanguageModelTrainer(
            tiny_palm(), train_data=text, config=tiny_config(trackers=("comet_ml",)), output_dir=tmp_path
        )
    with pytest.raises(ValueError, match="without output_dir"):
        LanguageModelTrainer(tiny_palm(), train_data=text, config=tiny_config(trackers=("tensorboard",)))


def test_the_curves_are_drawn(tiny_palm, tiny_config, text, tmp_path):
    from matplotlib.image import imread

    LanguageModelTrainer(
        tiny_palm(), train_data=text, valid_data=text[:40], config=tiny_config(plot=True), output_dir=tmp_path
    ).train()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(np.unique(imread(tmp_path / "curves.png"))) > 10


def test_curves_without_matplotlib_are_refused_or_left_out(tiny_palm, tiny_config, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install palm-rlhf\[plot\]"):
        LanguageModelTrainer(tiny_palm(), train_data=text, config=tiny_config(plot=True))
    LanguageModelTrainer(tiny_palm(), train_data=text, config=tiny_config(plot=None), output_dir=tmp_path).train()
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_data": np.array([1, 300])}, "train_data has the token id 300"),
        ({"valid_data": [np.array([1, 2]), np.array([256])]}, r"valid_data\[1\] has the token id 256"),
        ({"weights": [1.0, 2.0]}, "expected 1 positive numbers"),
        ({"resume": True}, "resume=True without output_dir"),
    ],
)
def test_bad_arguments_are_refused(tiny_palm, tiny_config, text, change, message):
    with pytest.raises(ValueError, match=message):
        LanguageModelTrainer(tiny_palm(), **{"train_data": text, "config": tiny_config(), **change})


def test_a_bidirectional_model_is_refused(tiny_palm, tiny_config, text):
    with pytest.raises(ValueError, match="causal=True"):
        LanguageModelTrainer(tiny_palm(causal=False), train_data=text, config=tiny_config())


def test_the_loop_may_be_left_and_taken_up_again(tiny_palm, tiny_config, text):
    whole = [m["loss"] for m in LanguageModelTrainer(tiny_palm(), train_data=text, config=tiny_config()).steps()]
    trainer = LanguageModelTrainer(tiny_palm(), train_data=text, config=tiny_config())
    parts = [m["loss"] for m in itertools.islice(trainer.steps(), 2)]
    assert parts + [m["loss"] for m in trainer.steps()] == whole
