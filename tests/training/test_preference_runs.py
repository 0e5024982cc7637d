"""Runs on preferences: bitwise resumption after a kill, two processes, and what is refused."""

import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from palm_rlhf.model.palm import PaLM
from palm_rlhf.training import Preference, PreferenceConfig, PreferenceTrainer
from palm_rlhf.training.run.checkpoints import complete_checkpoints
from palm_rlhf.training.run.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]

# Run by the tests themselves, and by processes of their own.
RUN = """
import os, signal, sys
import numpy as np, torch
from palm_rlhf.model.palm import PaLM
from palm_rlhf.training import Preference, PreferenceConfig, PreferenceTrainer, UnpairedPreference

def pairs(count, seed):
    generator = np.random.default_rng(seed)
    draw = lambda: torch.from_numpy(generator.integers(0, 12, generator.integers(1, 7)))
    drawn = [Preference(draw(), draw(), draw()) for _ in range(2 * count)]
    return [pair for pair in drawn if not torch.equal(pair.chosen, pair.rejected)][:count]

def liked(count, seed):
    return [UnpairedPreference(p.prompt, p.chosen, number % 3 == 0) for number, p in enumerate(pairs(count, seed))]

def trainer(folder, *, palm_seed=0, palm=None, train_data=None, valid_data=None, reference=None, resume=False,
            **options):
    torch.manual_seed(palm_seed)
    palm = palm or PaLM(num_tokens=12, dim=16, depth=2, heads=2, dim_head=8, dropout=0.1)
    if options.get("loss") == "kto":
        train_data, valid_data = liked(14, 0), liked(5, 1)
    fields = {"batch_size": 2, "grad_accum": 2, "num_epochs": 3, "warmup_steps": 2, "learning_rate": 1e-2,
              "precision": "float32", "log_every": 1, "eval_every": 2, "save_every": 3, "plot": False}
    return PreferenceTrainer(
        palm, train_data=train_data or pairs(14, 0), valid_data=valid_data or pairs(5, 1), reference=reference,
        config=PreferenceConfig(**{**fields, **options}), output_dir=folder, resume=resume)
"""
KILLED = """
for metrics in trainer(sys.argv[1]).steps():
    if metrics["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""
RUNS = {
    "whole": {},
    "adapters": {"lora_r": 2},
    "kto": {"loss": "kto", "undesirable_weight": 0.5},
    "likelihood": {"loss": "simpo", "nll_coef": 0.3},
}
TWO_PROCESSES = (
    f"RUNS = {RUNS}"
    + """
for name, options in RUNS.items():
    trainer(f"{sys.argv[1]}/{name}", **options).train()
torch.distributed.destroy_process_group()
"""
)
NAMES = {}
exec(RUN, NAMES)
make_trainer, pairs = NAMES["trainer"], NAMES["pairs"]


def run(*command: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def plain(lines: list[dict]) -> list[dict]:
    """What does not depend on the clock."""
    return [{key: line[key] for key in line.keys() - {"elapsed", "tokens_per_second"}} for line in lines]


def assert_same_files(one: Path, other: Path) -> None:
    """The last checkpoints of two runs of 11 steps hold the same bits."""
    one, other = (files(run / "checkpoints/step_00000011") for run in (one, other))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def files(checkpoint: Path) -> dict[str, torch.Tensor]:
    names = ("model/model.safetensors", "reference.safetensors", "optimizer.safetensors")
    names = [name for name in names if (checkpoint / name).exists()]
    return {f"{name}:{key}": value for name in names for key, value in load_file(checkpoint / name).items()}


def test_a_run_that_was_killed_goes_on_to_the_bit_with_the_reference_that_it_had(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    metrics = list(whole.steps())
    assert len(metrics) == 11

    killed = run("-c", RUN + KILLED, tmp_path / "run")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000003"]

    # The weights that it is given do not matter, neither to the policy nor to the reference.
    resumed = make_trainer(tmp_path / "run", palm_seed=9, resume=True)
    assert resumed.step == 3
    assert plain(list(resumed.steps())) == plain(metrics[3:])
    assert plain(read_metrics(tmp_path / "run/metrics.jsonl")) == plain(metrics)
    assert_same_files(tmp_path / "whole", tmp_path / "run")


def test_adapters_go_on_to_the_bit(tmp_path):
    metrics = list(make_trainer(tmp_path / "whole", loss="ipo", lora_r=2).steps())
    list(islice(make_trainer(tmp_path / "run", loss="ipo", lora_r=2).steps(), 5))
    resumed = make_trainer(tmp_path / "run", loss="ipo", lora_r=2, palm_seed=9, resume=True)
    assert plain(list(resumed.steps())) == plain(metrics[3:])
    assert_same_files(tmp_path / "whole", tmp_path / "run")


def test_a_mutant_that_takes_its_reference_from_the_trained_weights_is_another_run(tmp_path):
    *_, seventh = islice(make_trainer(tmp_path / "whole").steps(), 7)
    list(islice(make_trainer(tmp_path / "run").steps(), 6))
    trained = PaLM.from_pretrained(tmp_path / "run/checkpoints/step_00000006/model")
    mutant = make_trainer(tmp_path / "run", resume=True)
    mutant.ref_logprobs = make_trainer(None, palm=trained).ref_logprobs
    assert next(mutant.steps())["loss"] != pytest.approx(seventh["loss"], abs=1e-2)
    assert next(make_trainer(tmp_path / "run", resume=True).steps())["loss"] == seventh["loss"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder that two processes have written their runs to."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "script.py").write_text(RUN + TWO_PROCESSES)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(*launch, folder / "script.py", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow(8)
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_do_what_one_does(two_processes, tmp_path, name):
    one = make_trainer(tmp_path, **RUNS[name], batch_size=4)
    one.train()
    mine, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, two_processes / name))
    assert len(mine) == len(theirs) == 7
    for first in (mine[0], theirs[0]):  # the policy is the reference: rounding decides which answer has the edge
        assert 0 <= first.pop("accuracy") < 1
    for line, other in zip(plain(mine), plain(theirs), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
    if name == "kto":
        assert max(line["z_ref"] for line in mine if "z_ref" in line) > 1e-3
    last = "checkpoints/step_00000006"
    here, there = (files(folder / last) for folder in (tmp_path, two_processes / name))
    assert here.keys() == there.keys()
    torch.testing.assert_close(here, there, rtol=0, atol=1e-4)


def changed(pair: Preference, **parts: torch.Tensor) -> list[Preference]:
    return [*pairs(3, 0), Preference(**{**vars(pair), **parts})]


LONG = Preference(torch.tensor([1]), torch.tensor([2, 3, 4, 5]), torch.tensor([2, 3, 4, 6]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_data": changed(LONG, rejected=LONG.chosen)}, r"responses 0 and 1 of train_data\[3\] are the same"),
        ({"train_data": changed(LONG), "max_seq_len": 4}, r"of train_data\[3\] become the same within max_seq_len=4"),
        ({"valid_data": changed(LONG), "max_seq_len": 4}, r"of valid_data\[3\] become the same .* larger max_seq_len"),
        ({"train_data": changed(LONG, prompt=torch.tensor([12]))}, r"prompt of train_data\[3\]: token id 12 .* 11"),
        ({"train_data": changed(LONG, chosen=torch.tensor([-1]))}, r"response 0 of train_data\[3\]: token id -1"),
        ({"train_data": changed(LONG, rejected=torch.tensor([0.5]))}, r"response 1 of train_data\[3\]: .*float32"),
        ({"train_data": changed(LONG, rejected=torch.tensor([], dtype=int))}, r"train_data\[3\] has the shape \(0,\)"),
        ({"train_data": changed(LONG, prompt=torch.tensor([[1]]))}, r"of train_data\[3\] has the shape \(1, 1\)"),
        ({"palm": PaLM(num_tokens=12, dim=16, depth=1, causal=False)}, "palm has causal=False"),
        ({"reference": PaLM(num_tokens=12, dim=16, depth=1, causal=False)}, "reference has causal=False"),
        ({"reference": PaLM(num_tokens=13, dim=16, depth=1)}, "reference has num_tokens=13; expected 12"),
        ({"resume": True}, "resume=True without output_dir"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(None, **change)


def test_a_model_that_cannot_be_policy_or_reference_is_refused():
    palm = PaLM(num_tokens=12, dim=16, depth=1)
    with pytest.raises(ValueError, match="reference is the palm to be trained: leave it out"):
        make_trainer(None, palm=palm, reference=palm)
    palm.add_finetune_params("sft", 2)
    with pytest.raises(ValueError, match=r"LoRA scopes \['sft'\]; expected none: merge them"):
        make_trainer(None, palm=palm)
    with pytest.raises(ValueError, match="train_data is empty"):
        PreferenceTrainer(PaLM(num_tokens=12, dim=16, depth=1), train_data=[])


def test_evaluation_needs_data_and_a_reference():
    palm = PaLM(num_tokens=12, dim=16, depth=1)
    trainer = PreferenceTrainer(palm, train_data=pairs(4, 0))
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="give the trainer a reference"):
        trainer.evaluate(pairs(4, 1))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"beta": 0.0}, "beta is 0.0, expected a number above 0"),
        ({"label_smoothing": 0.6}, "label_smoothing is 0.6, expected 0 to below 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "expected 0.0, with the loss ipo"),
        ({"max_seq_len": 1}, "max_seq_len is 1, expected at least 2"),
        ({"lora_r": -1}, "lora_r is -1"),
        ({"lora_r": 2, "lora_alpha": 0.0}, "lora_alpha is 0.0, expected None or a number above 0"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"betas": (0.9, 1.0)}, "betas is"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PreferenceConfig(**fields)


def test_another_run_is_not_resumed(tmp_path):
    list(make_trainer(tmp_path, num_epochs=1).steps())
    for change, message in [
        ({"loss": "ipo"}, r"this run has \['loss=ipo'\].*\['loss=sigmoid'\]"),
        ({"beta": 0.2}, "beta=0.1"),
        ({"lora_r": 2}, "lora_r=0"),
        ({"seed": 3}, "seed"),
        ({"train_data": pairs(15, 0)}, "num_items"),
        ({"train_data": pairs(14, 5)}, "train_data has changed"),
        ({"valid_data": pairs(5, 5)}, "valid_data has changed"),
        ({"max_seq_len": 8}, "train_data has changed .*another max_seq_len"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, resume=True, num_epochs=1, **change)
    assert len(list(make_trainer(tmp_path, resume=True, num_epochs=2).steps())) == 3


@pytest.mark.parametrize("name", ["reference.safetensors", "model/model.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, name):
    list(make_trainer(tmp_path, num_epochs=1).steps())
    file = tmp_path / "checkpoints/step_00000004" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="step_00000004"):
        make_trainer(tmp_path, resume=True, num_epochs=1)


def test_weights_that_are_not_finite_stop_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path)
    steps = trainer.steps()
    assert [next(steps)["step"] for _ in range(4)] == [1, 2, 3, 4]
    with torch.no_grad():
        trainer.palm.norm.weight[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 5 has the loss nan.*step_00000003"):
        next(steps)
    assert all(np.isfinite(metrics["loss"]) for metrics in make_trainer(tmp_path, resume=True).steps())
