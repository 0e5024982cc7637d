"""Runs of the reward model's trainer: resumed after a kill, on two processes, and on real rankings."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.ranked_data import Ranking
from palm_rlhf.training.reward import RewardConfig, RewardModelTrainer
from palm_rlhf.training.run.checkpoints import complete_checkpoints
from palm_rlhf.training.run.log import read_metrics

# Run by the tests themselves, and by processes that they start.
RUN = """
import numpy as np, torch
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.ranked_data import Ranking
from palm_rlhf.training.reward import RewardConfig, RewardModelTrainer

def rankings(count, seed=0):
    generator = np.random.default_rng(seed)
    draw = lambda low, high: torch.from_numpy(generator.integers(0, 64, generator.integers(low, high)))
    return [Ranking(draw(1, 5), [draw(2, 9) for _ in range(generator.integers(2, 5))]) for _ in range(count)]

def trainer(folder, resume=False, change=0, model=None, **fields):
    torch.manual_seed(0)
    palm = PaLM(num_tokens=64, dim=16, depth=1, heads=2, dim_head=8, dropout=0.1)
    settings = dict(batch_size=2, grad_accum=2, num_epochs=2, learning_rate=1e-2, warmup_steps=2, save_every=3,
                    eval_every=2, log_every=1, precision="float32", plot=False)
    return RewardModelTrainer(RewardModel(palm, **(model or {})), train_data=rankings(14, change),
                              valid_data=rankings(5, 1), config=RewardConfig(**{**settings, **fields}),
                              output_dir=folder, resume=resume)
"""
KILLED = """
import os, signal, sys
for metrics in trainer(sys.argv[1]).steps():
    if metrics["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""
TWO_PROCESSES = """
import sys
for loss in ("ranking", "bradley_terry"):
    trainer(f"{sys.argv[1]}/{loss}", batch_size=1, loss=loss).train()
torch.distributed.destroy_process_group()
"""
made: dict = {}
exec(RUN, made)
make_trainer = made["trainer"]


def run(*args: str | Path) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, *args], env=environment, capture_output=True, text=True)


def weights(trainer: RewardModelTrainer) -> dict[str, torch.Tensor]:
    return trainer.reward_model.state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def plain(lines: list[dict]) -> list[dict]:
    """Metrics without what the clock says."""
    return [{k: v for k, v in line.items() if k not in ("elapsed", "responses_per_second")} for line in lines]


def test_seven_steps_equal_five_a_kill_and_the_rest_to_the_bit(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    assert whole.step == 7
    done = run("-c", RUN + KILLED, str(tmp_path / "run"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in complete_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000003"]
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    resumed = make_trainer(tmp_path / "run", resume=True)
    assert resumed.step == 3
    resumed.train()
    assert same(weights(resumed), weights(whole))
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    assert plain(one) == plain(other) and len(one) == 8


def test_what_a_resumed_run_must_bring_back(tmp_path):
    """Each part of the state alone makes the difference: a run resumed without it is another run."""
    whole = make_trainer(tmp_path / "whole")
    list(whole.steps())
    list(itertools.islice(make_trainer(tmp_path / "run").steps(), 3))

    def forget_moments(trainer):
        for state in trainer.run.optimizer.state.values():
            state["exp_avg"].zero_()

    for spoil, differs in (
        (lambda trainer: None, False),
        (lambda trainer: trainer.sampler.draw(1), True),
        (lambda trainer: setattr(trainer.run, "step", 2), True),
        (forget_moments, True),
    ):
        shutil.copytree(tmp_path / "run", tmp_path / "spoilt")
        trainer = make_trainer(tmp_path / "spoilt", resume=True)
        spoil(trainer)
        list(trainer.steps())
        shutil.rmtree(tmp_path / "spoilt")
        assert same(weights(trainer), weights(whole)) != differs


@pytest.mark.parametrize(
    "change, message",
    [
        ({"change": 5}, "train_data has changed"),
        ({"loss": "plackett_luce"}, r"\['loss=plackett_luce'\].*\['loss=auto'\]"),
        ({"max_seq_len": 9}, "max_seq_len=9"),
        ({"seed": 3}, r"this run has \['seed=3'\]"),
        ({"model": {"num_binned_output": 3}}, "num_binned_output=0, and this model 3"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, change, message):
    list(itertools.islice(make_trainer(tmp_path).steps(), 3))
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, resume=True, **change)


@pytest.mark.slow(8)
def test_two_processes_do_what_one_does(tmp_path):
    (tmp_path / "script.py").write_text(RUN + TWO_PROCESSES)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(*launch, tmp_path / "script.py", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    for loss in ("ranking", "bradley_terry"):
        one = make_trainer(tmp_path / loss, loss=loss)
        one.train()
        mine, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (tmp_path / loss, tmp_path / "two" / loss))
        assert len(mine) == len(theirs) == 8
        for line, other in zip(plain(mine), plain(theirs), strict=True):
            assert line == pytest.approx(other, rel=1e-4, abs=1e-5)
        there = RewardModel.from_pretrained(tmp_path / "two" / loss / "checkpoints/step_00000007/model").state_dict()
        torch.testing.assert_close(weights(one), there, rtol=0, atol=1e-4)


# ---- real rankings

END, MAX_SEQ_LEN = 256, 1024


def encode(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()))


def ranked(message: dict, conversation: str = "") -> Iterator[Ranking]:
    """Every prompt of a message tree that has two or more ranked replies, as bytes; rank 0 is the best."""
    conversation += f"<{message['role']}>{message['text']}\n"
    replies = sorted((r for r in message["replies"] if r.get("rank") is not None), key=lambda reply: reply["rank"])
    responses = [torch.cat((encode(reply["text"]), torch.tensor([END]))) for reply in replies]
    distinct = {tuple(response[: MAX_SEQ_LEN - 1].tolist()) for response in responses}
    if message["role"] == "prompter" and len(responses) == len(distinct) > 1:
        yield Ranking(encode(conversation), responses)
    for reply in message["replies"]:
        yield from ranked(reply, conversation)


@pytest.mark.slow(8)
def test_real_rankings_are_learnt_above_chance(shared_data, capsys):
    """A tiny model of bytes, never pretrained, on four fifths of the trees; the rest is held out.

    It learns little more than that people prefer longer replies, which `longer_accuracy` shows beside it.
    """
    trees = [json.loads(line) for line in shared_data("oasst_en_100_tree.jsonl").read_text().splitlines()]
    train, held_out = (
        [ranking for index, tree in enumerate(trees) if (index % 5 == 0) == held for ranking in ranked(tree["prompt"])]
        for held in (False, True)
    )
    assert len(train) > 150 and len(held_out) > 40
    torch.manual_seed(0)
    palm = PaLM(num_tokens=257, dim=32, depth=1, heads=2, dim_head=16)
    config = RewardConfig(batch_size=8, grad_accum=1, learning_rate=3e-3, warmup_steps=10, max_seq_len=MAX_SEQ_LEN,
                          weight_decay=0.1, precision="float32", plot=False)  # fmt: skip
    trainer = RewardModelTrainer(RewardModel(palm), train_data=train, config=config)
    list(trainer.steps())
    measured = trainer.evaluate(held_out)
    with capsys.disabled():
        print(f"\n{measured}")
    assert measured.accuracy_low > 0.5
