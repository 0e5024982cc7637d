"""Readings that are deferred, as on a GPU: a step reads nothing, and all numbers, weights and errors stay the same.

Most tests defer the readings of a run on the CPU, where a recorder sees each number that is read.
"""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from palm_rlhf.training import LMConfig, PPOConfig, PreferenceConfig, RewardConfig, SupervisedConfig
from palm_rlhf.training.run.log import read_metrics
from palm_rlhf.training.run.readings import DeferredMetrics, Readings

from .laws.trainers import build

BATCHED = (LMConfig, SupervisedConfig, RewardConfig, PreferenceConfig)
each_batched = pytest.mark.parametrize("kind", BATCHED, ids=lambda kind: kind.__name__)


class Recorder(TorchDispatchMode):
    """Counts the numbers that Python reads from tensors one by one, each a wait for the GPU there."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


def deferred(kind, *args, **settings):
    """A trainer that leaves its numbers on the device."""
    trainer = build(kind, *args, **settings)
    trainer.run.readings.deferred = True
    return trainer


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A CPU looks at the mask of a forward, since that costs it nothing; on a GPU the mask stays as it is."""
    monkeypatch.setattr("palm_rlhf.model.palm.without_right_padding", lambda key_mask: key_mask)


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.run.module.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# ---- a step reads nothing


def reads_of_an_update(trainer) -> int:
    trainer.palm = getattr(trainer, "palm", None) or trainer.reward_model.palm
    trainer.palm.train()
    trainer.update()
    with Recorder() as recorder:
        trainer.update()
    return recorder.count


@each_batched
def test_a_step_reads_no_number(kind, as_on_a_gpu):
    assert reads_of_an_update(deferred(kind)) == 0 < reads_of_an_update(build(kind))


@pytest.mark.parametrize("loss", ["ranking", "bradley_terry", "plackett_luce"])
def test_no_loss_of_a_reward_model_reads_a_number(loss, as_on_a_gpu):
    assert reads_of_an_update(deferred(RewardConfig, loss=loss)) == 0


@pytest.mark.parametrize("loss", ["ipo", "simpo", "orpo"])
def test_no_loss_of_pairs_reads_a_number(loss, as_on_a_gpu):
    assert reads_of_an_update(deferred(PreferenceConfig, loss=loss)) == 0


def test_no_step_of_muon_and_of_an_average_reads_a_number():
    assert reads_of_an_update(deferred(LMConfig, optimizer="muon", ema_decay=0.9)) == 0


def reads_of_a_rlhf_update(trainer) -> int:
    experience = trainer.estimate_advantages(*trainer.sample()[:2])
    with Recorder() as recorder:
        trainer.update(experience)
    return recorder.count


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_an_update_of_rlhf_reads_no_number_one_by_one_however_many_minibatches_it_has(algorithm, as_on_a_gpu):
    """Its metrics are read at once, at its end."""
    settings = {"algorithm": algorithm, "num_samples": 2, "epochs": 3, "precision": "bf16"}
    assert reads_of_a_rlhf_update(deferred(PPOConfig, **settings)) == 0
    assert reads_of_a_rlhf_update(build(PPOConfig, **settings)) > 6 * 3


# ---- the numbers are the same


@pytest.mark.parametrize("kind", (*BATCHED, PPOConfig), ids=lambda kind: kind.__name__)
def test_metrics_weights_and_checkpoints_are_the_same_to_the_bit(kind, tmp_path):
    at_once = build(kind, tmp_path / "at_once")
    first = list(at_once.steps())
    later = deferred(kind, tmp_path / "later", log_every=3)
    second = list(later.steps())
    timed = {"elapsed", "tokens_per_second", "responses_per_second"}
    for one, other in zip(first, second, strict=True):
        assert {key: one[key] for key in one if key not in timed} == {
            key: other[key] for key in other if key not in timed
        }
        assert list(one) == list(other) and all(other[key] > 0 for key in timed & set(other))
    assert_equal(weights_of(at_once), weights_of(later))
    assert [line["step"] for line in read_metrics(tmp_path / "later" / "metrics.jsonl")] == [3]
    resumed = deferred(kind, tmp_path / "later", resume=True, **{"num_steps" if kind is PPOConfig else "log_every": 4})
    assert resumed.run.step == 4
    assert_equal(weights_of(resumed), weights_of(later))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_averaged_weights_are_the_same(optimizer):
    trainers = [make(LMConfig, optimizer=optimizer, ema_decay=0.9) for make in (build, deferred)]
    for trainer in trainers:
        list(trainer.steps())
    for name, value in trainers[0].averaged.state_dict().items():
        torch.testing.assert_close(trainers[1].averaged.state_dict()[name], value, rtol=0, atol=1e-7)
    assert_equal(*map(weights_of, trainers))


# ---- updates that are left out


def poison(trainer, *at: int) -> None:
    """Makes the loss of some steps NaN, by an output of their first block."""
    palm = getattr(trainer, "palm", None) or trainer.reward_model.palm

    def hook(_, args, out):
        return out * float("nan") if torch.is_grad_enabled() and trainer.run.step + 1 in at else None

    palm.layers[0].register_forward_hook(hook)


@pytest.mark.parametrize("kind", (*BATCHED, PPOConfig), ids=lambda kind: kind.__name__)
def test_a_step_that_is_not_finite_changes_nothing_and_is_reported_when_it_is_read(kind, tmp_path):
    """The second of four: the third changes nothing either, and its line in the log, the first, is never written."""
    trainer = deferred(kind, tmp_path, log_every=3, save_every=1 if kind is PPOConfig else 100)
    poison(trainer, 2)
    steps = trainer.steps()
    next(steps)
    before, moments = weights_of(trainer), copy.deepcopy(trainer.run.optimizer.state_dict()["state"])
    with pytest.raises(FloatingPointError, match=r"step 2 has the loss nan and the gradient norm nan"):
        list(steps)
    assert trainer.run.step == 1
    assert_equal(before, weights_of(trainer))
    after = trainer.run.optimizer.state_dict()["state"]
    for index, state in moments.items():
        assert_equal(state, after[index])
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    trainer.run.module.get_parameter(next(iter(before))).requires_grad_(True)
    if kind in BATCHED:  # who goes on after the error takes steps again
        trainer.run.step = 5
        trainer.update()
        assert any(not torch.equal(before[name], value) for name, value in weights_of(trainer).items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_average_and_muons_momentum_stay_as_well(optimizer):
    trainer = deferred(LMConfig, optimizer=optimizer, ema_decay=0.9, log_every=100, save_every=100)
    poison(trainer, 2)
    steps = trainer.steps()
    next(steps)
    average = copy.deepcopy(trainer.averaged.state_dict())
    before, moments = weights_of(trainer), copy.deepcopy(trainer.run.optimizer.state_dict()["state"])
    assert [next(steps)["step"], next(steps)["step"]] == [2, 3]  # the number of the step is known without a reading
    assert_equal(average, trainer.averaged.state_dict())
    assert_equal(before, weights_of(trainer))
    for index, state in moments.items():
        assert_equal(state, trainer.run.optimizer.state_dict()["state"][index])
    with pytest.raises(FloatingPointError, match="step 2 has the loss nan"):
        next(steps)  # the last: it is read before the checkpoint


def test_the_first_of_several_steps_that_are_not_finite_is_reported(tmp_path):
    trainer = deferred(LMConfig, tmp_path, log_every=3, save_every=100)
    poison(trainer, 2, 3)
    with pytest.raises(FloatingPointError, match="step 2 has the loss nan"):
        list(trainer.steps())


def test_a_run_ends_with_its_last_reference():
    """Otherwise connections to other processes would stay open until the garbage is collected."""
    trainer = build(LMConfig)
    run = weakref.ref(trainer.run)
    gc.disable()
    try:
        del trainer
        assert run() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("look", [lambda trainer, metrics: metrics["loss"], lambda trainer, metrics: trainer.save(),
                                  lambda trainer, metrics: trainer.finish()])  # fmt: skip
def test_whoever_looks_at_it_gets_the_error(look, tmp_path):
    trainer = deferred(LMConfig, tmp_path, log_every=100, save_every=100)
    poison(trainer, 1)
    metrics = next(trainer.steps())
    with pytest.raises(FloatingPointError, match="step 1 has the loss nan"):
        look(trainer, metrics)
    assert not (tmp_path / "checkpoints").exists()


# ---- the dict


def metrics_of(**values):
    readings = Readings(torch.device("cpu"), deferred=True, fail=lambda step, numbers: None)
    return readings.metrics({name: torch.tensor(v) if isinstance(v, float) else v for name, v in values.items()})


@pytest.mark.parametrize(
    "use",
    [
        dict,
        copy.copy,
        copy.deepcopy,
        lambda m: {**m},
        lambda m: m | {},
        lambda m: {} | m,
        lambda m: m.copy(),
        lambda m: dict(m.items()),
        lambda m: dict(zip(m, m.values(), strict=True)),
        lambda m: {name: m.get(name) for name in m},
        lambda m: {name: m.setdefault(name) for name in ("step", "loss", "norm")},
        lambda m: {name: m.pop(name) for name in ("step", "loss", "norm")},
        lambda m: json.loads(json.dumps(m)),
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: eval(repr(m)),
    ],
)
def test_any_use_of_the_dict_sees_numbers(use):
    plain = {"step": 3, "loss": 0.5, "norm": 2.0}
    assert isinstance(metrics_of(**plain), DeferredMetrics) and metrics_of(**plain) == plain
    used = use(metrics_of(**plain))
    assert used == plain and list(used) == list(plain)
    assert not any(isinstance(value, torch.Tensor) for value in used.values())


def test_what_is_known_is_read_from_no_device_and_all_else_at_once():
    metrics = metrics_of(step=3, loss=0.5, norm=2.0)
    with Recorder() as recorder:
        assert metrics["step"] == 3 and metrics.get("loss2", 7) == 7 and "loss" in metrics and len(metrics) == 3
        metrics["elapsed"] = 1.5
        assert recorder.count == 0
    values = dict.values(metrics)
    assert sum(isinstance(value, torch.Tensor) for value in values) == 2
    assert metrics["loss"] == 0.5 and not any(isinstance(value, torch.Tensor) for value in values)


# ---- on a GPU


@pytest.mark.gpu
@each_batched
def test_a_step_on_a_gpu_does_not_wait(kind):
    trainer = build(kind, log_every=100, save_every=100)
    assert trainer.run.readings.deferred
    trainer.palm = getattr(trainer, "palm", None) or trainer.reward_model.palm
    for _ in range(2):  # in which kernels are compiled, and memory is pinned
        trainer.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = trainer.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics["loss"] > 0


@pytest.mark.gpu
def test_an_update_on_a_gpu_is_left_out_where_its_loss_is_not_finite():
    trainer = build(LMConfig, log_every=100, save_every=100)
    poison(trainer, 2)
    steps = trainer.steps()
    next(steps)
    before = weights_of(trainer)
    next(steps), next(steps)
    assert_equal(before, weights_of(trainer))
    with pytest.raises(FloatingPointError, match="step 2 has the loss nan"):
        next(steps)
