"""Checkpoints of a run: bitwise resumption, kills at any moment, a full disk, damage, and what is kept."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from palm_rlhf.model.palm import PaLM
from palm_rlhf.training.language_model import LanguageModelTrainer
from palm_rlhf.training.run.checkpoints import complete_checkpoints, new_checkpoint, write_state
from palm_rlhf.training.run.log import read_metrics
from palm_rlhf.training.run.random_state import rng_state, set_rng_state


@pytest.fixture
def make_trainer(tiny_palm, tiny_config, text):
    """`make_trainer(folder, resume=True)` is a run of 10 steps with dropout, a mixture, and a weights average."""

    def build(folder, *, resume=False, dim=32, ema_decay=0.9, valid_data=None, **fields) -> LanguageModelTrainer:
        settings = {"num_steps": 10, "save_every": 5, "grad_accum": 2, "ema_decay": ema_decay, **fields}
        return LanguageModelTrainer(
            tiny_palm(dropout=0.1, dim=dim),
            train_data=[text[:500], text[500:700]],
            valid_data=valid_data,
            weights=[1, 2],
            config=tiny_config(**settings),
            output_dir=folder,
            resume=resume,
        )

    return build


def weights_of(trainer: LanguageModelTrainer) -> list[torch.Tensor]:
    parameters = [*trainer.palm.parameters(), *trainer.trained.parameters()]
    return [parameter.detach().clone() for parameter in parameters]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def names(folder: Path) -> list[str]:
    return [checkpoint.name for checkpoint in complete_checkpoints(folder / "checkpoints")]


def run_and_die(script: str, *args: str) -> None:
    """Runs a script in a process of its own, and checks that it ended by `kill -9`."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", script, *args], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


KILLED_RUN = """
import os, signal, sys
import numpy as np, torch
from palm_rlhf.model.palm import PaLM
from palm_rlhf.training import LanguageModelTrainer, LMConfig

torch.manual_seed(0)
palm = PaLM(num_tokens=256, dim=32, depth=2, heads=2, dim_head=16, dropout=0.1)
text = np.load(sys.argv[2])
config = LMConfig(batch_size=4, seq_len=16, eval_context=8, num_steps=10, warmup_steps=2, log_every=1,
                  precision=sys.argv[3], optimizer=sys.argv[4], plot=False, save_every=5, grad_accum=2, ema_decay=0.9)
trainer = LanguageModelTrainer(palm, train_data=[text[:500], text[500:700]], weights=[1, 2], config=config,
                               output_dir=sys.argv[1])
for metrics in trainer.steps():
    if metrics["step"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("precision, optimizer", [("float32", "adamw"), ("bf16", "muon")])
def test_ten_steps_equal_five_a_kill_and_five_to_the_bit(make_trainer, text, tmp_path, precision, optimizer):
    arithmetic = {"precision": precision, "optimizer": optimizer}
    whole = make_trainer(tmp_path / "whole", **arithmetic)
    losses = [metrics["loss"] for metrics in whole.steps()]

    np.save(tmp_path / "text.npy", text)
    run_and_die(KILLED_RUN, str(tmp_path / "run"), str(tmp_path / "text.npy"), precision, optimizer)
    assert names(tmp_path / "run") == ["step_00000005"]
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 7]

    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    resumed = make_trainer(tmp_path / "run", resume=True, **arithmetic)
    assert resumed.elapsed == read_metrics(tmp_path / "run/metrics.jsonl")[4]["elapsed"]
    assert [line["step"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [metrics["loss"] for metrics in resumed.steps()] == losses[5:]
    assert equal(weights_of(resumed), weights_of(whole))
    for name in ("model/model.safetensors", "unaveraged/model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(tmp_path / run / "checkpoints/step_00000010" / name) for run in ("whole", "run"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert [line["loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")] == losses


def test_what_a_resumed_run_must_bring_back(make_trainer, tmp_path):
    """Each part of the state alone makes the difference: a run resumed without it is another run."""
    whole = make_trainer(tmp_path / "whole")
    list(whole.steps())
    list(itertools.islice(make_trainer(tmp_path / "run").steps(), 5))

    def differs(spoil) -> bool:
        shutil.copytree(tmp_path / "run", tmp_path / "spoilt")
        trainer = make_trainer(tmp_path / "spoilt", resume=True)
        spoil(trainer)
        list(trainer.steps())
        shutil.rmtree(tmp_path / "spoilt")
        return not equal(weights_of(trainer), weights_of(whole))

    def forget_moments(trainer):
        for state in trainer.run.optimizer.state.values():
            state["exp_avg_sq"].zero_()

    def forget_average(trainer):
        trainer.averaged.load_state_dict(trainer.palm.state_dict())

    assert not differs(lambda trainer: None)
    assert differs(lambda trainer: torch.manual_seed(0))
    assert differs(lambda trainer: trainer.sampler.draw(1))
    assert differs(lambda trainer: setattr(trainer.run, "step", 4))
    assert differs(forget_moments)
    assert differs(forget_average)


def test_evaluating_sampling_and_saving_leave_the_run_as_it_is(make_trainer, text, tmp_path):
    plain = make_trainer(tmp_path / "plain")
    list(plain.steps())
    busy = make_trainer(tmp_path / "busy", valid_data=text[:50], eval_every=2)
    for _ in busy.steps():
        busy.save()
        busy.trained.generate(max_new_tokens=3, prompt=torch.tensor([97]), generator=torch.Generator().manual_seed(0))
    assert equal(weights_of(plain), weights_of(busy))


def test_random_generators_go_on_where_they_were():
    def draws():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()

    random.gauss(0, 1), np.random.randn()  # leaves the second normal number of a pair for later
    state = json.loads(json.dumps(rng_state()))
    first = draws()
    assert draws() != first
    set_rng_state(state)
    assert draws() == first


def test_the_newest_checkpoints_are_kept_and_open_as_models(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, save_every=2, num_steps=9, keep_checkpoints=2)
    list(trainer.steps())
    assert names(tmp_path) == ["step_00000008", "step_00000009"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names(tmp_path)
    palm = PaLM.from_pretrained(tmp_path / "checkpoints/step_00000009/model")
    assert equal(list(palm.parameters()), list(trainer.trained.parameters()))
    assert not list(tmp_path.rglob("*.p[tk]*"))


def test_without_an_output_dir_nothing_is_written(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(None, plot=None).train()
    assert os.listdir(tmp_path) == []


KILLED_WRITE = """
import os, signal, sys
from pathlib import Path
from palm_rlhf.training.run.checkpoints import new_checkpoint, write_state

for step in (1, 2):
    with new_checkpoint(Path(sys.argv[1]), step, keep=1) as folder:
        write_state(folder, {"step": step})
        if step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path):
    run_and_die(KILLED_WRITE, str(tmp_path))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000001"]
    assert len(os.listdir(tmp_path)) == 2
    with new_checkpoint(tmp_path, 2, keep=2) as folder:
        write_state(folder, {"step": 2})
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]


def test_checkpoints_are_ordered_by_their_steps(tmp_path):
    for step in (99_999_999, 100_000_000, 7):
        with new_checkpoint(tmp_path, step, keep=5) as folder:
            write_state(folder, {})
    (tmp_path / "step_00000200").mkdir()  # not a checkpoint: nothing in it
    (tmp_path / "step_x").mkdir()
    assert [int(path.name[5:]) for path in complete_checkpoints(tmp_path)] == [7, 99_999_999, 100_000_000]


@contextmanager
def room_for_files_of(num_bytes: int):
    """A real limit of the system: longer files cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [50_000, 300_000])
def test_a_full_disk_stops_the_run_by_name_and_keeps_what_was_saved(make_trainer, tmp_path, room):
    whole = make_trainer(tmp_path / "whole")
    list(whole.steps())
    steps = make_trainer(tmp_path / "run").steps()
    list(itertools.islice(steps, 9))
    sizes = [path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("*.safetensors")]
    assert max(sizes) > 300_000 > min(sizes) > 50_000  # so that it fails early, and half-way
    with room_for_files_of(room), pytest.raises(OSError, match=r"step_00000010 could not be written.*intact.*resume"):
        next(steps)
    assert os.listdir(tmp_path / "run/checkpoints") == ["step_00000005"]
    resumed = make_trainer(tmp_path / "run", resume=True)
    list(resumed.steps())
    assert equal(weights_of(resumed), weights_of(whole))


def test_metrics_on_a_full_disk_are_an_error_too_and_a_torn_line_is_dropped(make_trainer, tmp_path):
    steps = make_trainer(tmp_path).steps()
    list(itertools.islice(steps, 6))
    written = (tmp_path / "metrics.jsonl").read_bytes()
    with room_for_files_of(len(written) + 20), pytest.raises(OSError, match=r"metrics in .* could not be written"):
        next(steps)
    assert (tmp_path / "metrics.jsonl").read_bytes()[:-20] == written
    make_trainer(tmp_path, resume=True)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_what_is_not_finite_leaves_the_last_good_checkpoint_to_go_on_from(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    steps = trainer.steps()
    list(itertools.islice(steps, 6))
    with torch.no_grad():
        trainer.palm.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 7 has the loss nan.*step_00000005"):
        next(steps)
    assert names(tmp_path) == ["step_00000005"]
    assert all(np.isfinite(metrics["loss"]) for metrics in make_trainer(tmp_path, resume=True).steps())


def test_a_run_is_not_written_over_by_accident(make_trainer, tmp_path):
    list(itertools.islice(make_trainer(tmp_path).steps(), 2))
    with pytest.raises(FileExistsError, match=r"metrics\.jsonl is of an earlier run: pass resume=True"):
        make_trainer(tmp_path)
    list(make_trainer(tmp_path, resume=True).steps())  # there is no checkpoint yet, so it starts anew
    with pytest.raises(FileExistsError, match="step_00000010 is of an earlier run"):
        make_trainer(tmp_path)
    assert list(make_trainer(tmp_path, resume=True).steps()) == []
    assert len(list(make_trainer(tmp_path, resume=True, num_steps=12).steps())) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 48}, "dim=32"),
        ({"seed": 7}, "seed"),
        ({"seq_len": 24}, "seq_len"),
        ({"ema_decay": 0.0}, "ema_decay=0.9"),
        ({"optimizer": "muon"}, "optimizer=adamw"),
    ],
)
def test_another_run_is_not_resumed(make_trainer, tmp_path, change, message):
    list(itertools.islice(make_trainer(tmp_path).steps(), 5))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, resume=True, **change)


@pytest.mark.parametrize("name", ["state.json", "optimizer.safetensors", "model/model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "remove"])
def test_a_damaged_checkpoint_is_refused_by_name(make_trainer, tmp_path, name, damage):
    list(make_trainer(tmp_path).steps())
    file = tmp_path / "checkpoints/step_00000010" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    if name == "state.json" and damage == "remove":  # without it, it is not a checkpoint
        assert names(tmp_path) == ["step_00000005"]
    else:
        with pytest.raises(ValueError, match="step_00000010"):
            make_trainer(tmp_path, resume=True)
        shutil.rmtree(tmp_path / "checkpoints/step_00000010")
    assert make_trainer(tmp_path, resume=True).step == 5
