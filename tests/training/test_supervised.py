"""Fine-tuning: the loss by definition, packed as unpacked, the same again after a kill, and what is refused."""

import math
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.cross_entropy import cross_entropy
from palm_rlhf.ops.masked import weighted_mean
from palm_rlhf.training import supervised
from palm_rlhf.training.run.checkpoints import complete_checkpoints
from palm_rlhf.training.run.log import read_metrics
from palm_rlhf.training.supervised import SupervisedTrainer
from palm_rlhf.training.supervised_config import SupervisedConfig
from palm_rlhf.training.weighted_examples import Example, lay_out

ROOT = Path(__file__).resolve().parents[2]
# With an eps this large AdamW's first step is the gradient itself, so that weights show what gradients were.
GRADIENT_DESCENT = {"learning_rate": 1e6, "eps": 1e6, "warmup_steps": 0, "grad_clip": 0.0}

# Run by the tests themselves, and by processes of their own.
RUN = """
import os, signal, sys
import numpy as np, torch
from palm_rlhf.data.packing import PackedSampler
from palm_rlhf.training.weighted_examples import Example
from palm_rlhf.training.supervised import SupervisedTrainer
from palm_rlhf.training.supervised_config import SupervisedConfig
from tests import factories

def examples_of(count, seed=0, longest=9):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, count)
    weights = [generator.choice([0, 0, 0.5, 1, 2], length) for length in lengths]
    for row in weights:
        row[-1] = 1
    return [Example(torch.from_numpy(generator.integers(0, 12, length)), torch.from_numpy(row).float())
            for length, row in zip(lengths, weights)]

def palm_of(seed=0, **fields):
    return factories.palm_of(seed, **{"z_loss": 0.1, **fields})

def trainer_of(folder=None, *, palm=None, data=None, valid_data=None, packed=0, resume=False, **options):
    data = examples_of(16) if data is None else data
    fields = {"batch_size": 2, "grad_accum": 2, "num_epochs": 2, "warmup_steps": 2, "learning_rate": 1e-2,
              "precision": "float32", "log_every": 1, "eval_every": 2, "save_every": 3, "plot": False}
    config = SupervisedConfig(**{**fields, **options})
    sampler = PackedSampler(list(map(len, data)), packed, config.seed) if packed else None
    return SupervisedTrainer(palm or palm_of(), train_data=data, valid_data=valid_data, sampler=sampler,
                             config=config, output_dir=folder, resume=resume)
"""
KILLED = """
for metrics in trainer_of(sys.argv[1], palm=palm_of(dropout=0.1), packed=12, num_epochs=5).steps():
    if metrics["step"] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
"""
TWO_PROCESSES = """
trainer_of(sys.argv[1], data=examples_of(32), valid_data=examples_of(7, 1), packed=12, num_epochs=2).train()
torch.distributed.destroy_process_group()
"""
NAMES = {}
exec(RUN, NAMES)
examples_of, palm_of, trainer_of = NAMES["examples_of"], NAMES["palm_of"], NAMES["trainer_of"]


def run(*command: str | Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def loss_by_definition(palm: PaLM, examples: list[Example], z_loss: float = 0.1) -> torch.Tensor:
    """Each example alone, no pads and no batch."""
    total, weight = 0.0, 0.0
    for example in examples:
        logits = palm(example.tokens[None])[0, :-1]
        losses = F.cross_entropy(logits, example.tokens[1:], reduction="none")
        losses = losses + z_loss * logits.logsumexp(-1) ** 2
        total, weight = total + (losses * example.weights[1:]).sum(), weight + example.weights[1:].sum()
    return total / weight


def gradient_by_definition(examples: list[Example]) -> dict[str, torch.Tensor]:
    palm = palm_of().train()
    loss_by_definition(palm, examples).backward()
    return {name: parameter.grad for name, parameter in palm.named_parameters()}


def gradient_followed(**options) -> tuple[dict, dict[str, torch.Tensor]]:
    """The metrics of the first step, and what it subtracted from the weights."""
    palm = palm_of()
    before = {name: parameter.detach().clone() for name, parameter in palm.named_parameters()}
    metrics = next(trainer_of(palm=palm, **{**GRADIENT_DESCENT, **options}).steps())
    return metrics, {name: before[name] - parameter.detach() for name, parameter in palm.named_parameters()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def plain(lines: list[dict]) -> list[dict]:
    """What does not depend on the clock."""
    return [{key: line[key] for key in line.keys() - {"elapsed", "tokens_per_second"}} for line in lines]


def files(checkpoint: Path) -> dict[str, torch.Tensor]:
    names = ("model/model.safetensors", "optimizer.safetensors")
    return {f"{name}:{key}": value for name in names for key, value in load_file(checkpoint / name).items()}


def test_a_weighted_mean_by_hand():
    x, weights = torch.tensor([1.0, 2.0, math.nan, 4.0]), torch.tensor([0.25, 0.0, 0.0, 0.5])
    assert weighted_mean(x, weights).item() == pytest.approx((0.25 + 2) / 0.75)  # a sum below 1 divides as well
    assert weighted_mean(x, weights, denominator=3.0).item() == pytest.approx(0.75)


def test_a_weight_of_two_is_a_target_seen_twice():
    logits, targets = torch.randn(3, 5), torch.tensor([0, 3, 4])
    twice = [0, 0, 2, 2, 2]
    weighted = cross_entropy(logits, targets, weights=torch.tensor([2.0, 0.0, 3.0]), z_loss=0.5)
    torch.testing.assert_close(weighted, cross_entropy(logits[twice], targets[twice], z_loss=0.5))


BATCHES = [(16, 1, False), (4, 4, False), (4, 4, True), (1, 16, False)]


@pytest.mark.parametrize("batch_size, grad_accum, checkpointing", BATCHES)
def test_a_step_follows_the_loss_of_all_its_tokens_however_it_is_batched(batch_size, grad_accum, checkpointing):
    examples = examples_of(16)
    metrics, followed = gradient_followed(
        data=examples, batch_size=batch_size, grad_accum=grad_accum, gradient_checkpointing=checkpointing
    )
    assert distance(followed, gradient_by_definition(examples)) < 1e-6
    assert metrics["loss"] == pytest.approx(loss_by_definition(palm_of(), examples).item(), abs=1e-5)


def test_the_gradient_rejects_other_losses():
    examples = examples_of(16)
    expected = gradient_by_definition(examples)
    for mutant in (
        [Example(example.tokens, torch.ones(len(example))) for example in examples],  # a loss on all tokens
        [Example(example.tokens, (example.weights > 0).float()) for example in examples],  # weights as a mask
        [Example(example.tokens, example.weights / example.total_weight) for example in examples],  # a mean of means
    ):
        assert distance(gradient_by_definition(mutant), expected) > 1e-3


def test_packed_and_unpacked_follow_the_same_gradient():
    examples = [*examples_of(18, longest=6), *examples_of(2, seed=3, longest=9)]
    unpacked = gradient_followed(data=examples, batch_size=20, grad_accum=1)[1]

    class Once:
        """All examples, once, in four rows of uneven lengths."""

        num_items, num_drawn = 20, 0

        def draw(self, count):
            self.num_drawn = 20
            return [[0, 5, 7], [19], [1, 2, 3, 4, 6, 8, 9, 10, 18], [11, 12, 13, 14, 15, 16, 17]]

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    config = SupervisedConfig(batch_size=2, grad_accum=2, precision="float32", plot=False, **GRADIENT_DESCENT)
    palm = palm_of()
    before = {name: parameter.detach().clone() for name, parameter in palm.named_parameters()}
    next(SupervisedTrainer(palm, train_data=examples, sampler=Once(), config=config).steps())
    packed = {name: before[name] - parameter.detach() for name, parameter in palm.named_parameters()}
    assert distance(packed, unpacked) < 1e-6
    assert distance(packed, gradient_by_definition(examples)) < 1e-6

    rows = Once().draw(4)
    joined = [
        Example(*(torch.cat([getattr(examples[i], part) for i in row]) for part in ("tokens", "weights")))
        for row in rows
    ]
    assert distance(gradient_by_definition(joined), unpacked) > 1e-3  # a mutant whose examples see each other


def test_rows_are_laid_out_with_pads_that_weigh_nothing():
    a, b, c = (Example(torch.tensor(tokens), torch.ones(len(tokens))) for tokens in ([5, 6, 7], [8, 0], [9, 1]))
    rows = lay_out([[a, b], [c]])
    assert rows.tokens.tolist() == [[5, 6, 7, 8, 0], [9, 1, 0, 0, 0]]
    assert rows.weights.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert rows.document_ids.tolist() == [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]]
    assert lay_out([[a], [c]]).document_ids is None


@pytest.mark.parametrize("limit", [1, 100, 12 * 7])
def test_logits_in_parts_are_logits_at_once(limit, monkeypatch):
    whole = gradient_followed()[1]
    monkeypatch.setattr(supervised, "LOGITS", limit)
    assert distance(gradient_followed()[1], whole) < 1e-6


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that is made inside."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.size = max(
                self.size, tensor.untyped_storage().nbytes() // 4 if isinstance(tensor, torch.Tensor) else 0
            )
        return out


@pytest.mark.parametrize("num_examples", [1, 4])
def test_a_context_of_8192_holds_neither_all_scores_nor_all_logits(num_examples, monkeypatch):
    monkeypatch.setattr(supervised, "LOGITS", 1 << 20)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 500, (num_examples, 8192 // num_examples)))
    row = [Example(one, torch.ones(len(one))) for one in tokens]
    palm = palm_of(num_tokens=500, depth=1, heads=1, dim=8, dim_head=2, gradient_checkpointing=True)
    loss = supervised.RowsLoss(palm, None).train()
    with Largest() as largest:
        loss(lay_out([row]), 8192.0).backward()
    assert largest.size <= 1 << 21 < 8192 * 500 < 8192 * 8192


def test_weights_of_words_decide_what_is_learnt():
    """Each question has one answer; the words of questions are random, and cannot be learnt."""
    generator = np.random.default_rng(0)

    def conversation():
        question = generator.integers(0, 10, 4)
        tokens = torch.tensor([*question, 10, (question[0] + 1) % 10, 11])
        return Example(tokens, torch.tensor([0.0, 0, 0, 0, 0, 1, 1]))

    palm = palm_of(z_loss=1e-4)
    trainer = trainer_of(
        palm=palm, data=[conversation() for _ in range(256)], valid_data=[conversation() for _ in range(64)],
        packed=28, num_epochs=12, batch_size=8, grad_accum=1,
    )  # fmt: skip
    started = trainer.evaluate()
    list(trainer.steps())
    assert trainer.evaluate() < 0.2 < 1 < started
    prompt = torch.tensor([3, 7, 7, 1, 10])
    answer = palm.generate(prompt=prompt, max_new_tokens=9, temperature=0, eos_token=11)
    assert answer.tolist()[:2] == [4, 11]


def test_evaluation_is_the_definition_without_z_loss_and_dropout():
    held_out = examples_of(7, seed=1)
    palm = palm_of(dropout=0.5)
    trainer = trainer_of(palm=palm, valid_data=held_out)
    with torch.no_grad():
        expected = loss_by_definition(palm_of(), held_out, z_loss=0.0).item()
    assert trainer.evaluate() == pytest.approx(expected, abs=1e-5)
    assert trainer.evaluate(held_out[:3]) != pytest.approx(expected, abs=1e-3)
    assert trainer.train()["valid_loss"] == trainer.evaluate()


def test_validation_comes_when_it_is_due_and_at_the_end_where_there_is_data_for_it(tmp_path):
    held_out = examples_of(5, seed=1)
    trainer = trainer_of(tmp_path / "with", valid_data=held_out, eval_every=3, log_every=100)
    seen = {}
    for metrics in trainer.steps():
        if "valid_loss" in metrics:
            seen[metrics["step"]] = metrics["valid_loss"]
            with torch.no_grad():
                expected = loss_by_definition(trainer.palm, held_out, z_loss=0.0).item()
            assert metrics["valid_loss"] == pytest.approx(expected, abs=1e-5)
    assert list(seen) == [3, 6] and trainer.step == 8
    end = trainer.finish()
    logged = {line["step"]: line["valid_loss"] for line in read_metrics(tmp_path / "with/metrics.jsonl")}
    assert logged == {**seen, 8: end["valid_loss"]}  # a step with validation is logged whatever log_every is
    assert end["valid_loss"] == trainer.evaluate()
    trainer = trainer_of(tmp_path / "without", eval_every=3, log_every=100)
    assert "valid_loss" not in trainer.train()
    assert read_metrics(tmp_path / "without/metrics.jsonl") == []


@pytest.mark.law("SupervisedConfig.lora_embeddings")
@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_adapters_alone_are_trained_or_the_embeddings_too(tied, embeddings):
    palm = palm_of(tie_embeddings=tied)
    before = {name: parameter.detach().clone() for name, parameter in palm.named_parameters()}
    trainer = trainer_of(palm=palm, lora_r=2, lora_embeddings=embeddings)
    metrics = list(trainer.steps())
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    changed = {
        name for name, parameter in palm.named_parameters() if name in before and not before[name].equal(parameter)
    }
    trainable = {"token_emb.weight"} if tied else {"token_emb.weight", "lm_head.weight"}
    assert changed == (trainable if embeddings else set())
    with_adapters = palm.eval()(torch.tensor([[1, 2, 3]]), finetune_scope="supervised")
    assert not torch.allclose(with_adapters, palm(torch.tensor([[1, 2, 3]])))


@pytest.mark.parametrize("packed", [0, 12])
def test_each_example_is_seen_so_often_and_the_rate_follows(packed):
    trainer = trainer_of(packed=packed, num_epochs=3, learning_rate=0.01, min_lr_ratio=0.5)
    metrics = list(trainer.steps())
    assert metrics[-2]["epoch"] < 3 <= metrics[-1]["epoch"] < 4
    assert len(metrics) == (12 if not packed else pytest.approx(3 * sum(map(len, trainer.examples)) / 48, abs=1.5))
    assert metrics[0]["learning_rate"] == pytest.approx(0.01 / 2)
    assert 0.005 <= metrics[-1]["learning_rate"] < 0.0065
    assert all(m["filled"] > 0.95 for m in metrics) == bool(packed)


def test_a_run_that_was_killed_goes_on_to_the_bit_in_the_middle_of_an_epoch(tmp_path):
    options = {"packed": 12, "num_epochs": 5}
    metrics = list(trainer_of(tmp_path / "whole", palm=palm_of(dropout=0.1), **options).steps())
    killed = run("-c", RUN + KILLED, tmp_path / "run")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run/checkpoints")] == ["step_00000003"]

    resumed = trainer_of(tmp_path / "run", palm=palm_of(9, dropout=0.1), resume=True, **options)
    assert resumed.step == 3 and resumed.epoch % 1 and resumed.sampler._waiting
    assert plain(list(resumed.steps())) == plain(metrics[3:])
    assert plain(read_metrics(tmp_path / "run/metrics.jsonl")) == plain(metrics)
    one, other = (files(complete_checkpoints(tmp_path / name / "checkpoints")[-1]) for name in ("whole", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_adapters_and_embeddings_go_on_to_the_bit(tmp_path):
    options = {"lora_r": 2, "lora_embeddings": True}
    metrics = list(trainer_of(tmp_path / "whole", **options).steps())
    list(islice(trainer_of(tmp_path / "run", **options).steps(), 4))
    mutant = trainer_of(tmp_path / "run", resume=True, **options)
    mutant.sampler.load_state_dict({**mutant.sampler.state_dict(), "num_drawn": 0})
    assert mutant.step == 3 and plain([next(mutant.steps())]) != plain(metrics[3:4])
    resumed = trainer_of(tmp_path / "run", palm=palm_of(9), resume=True, **options)
    assert plain(list(resumed.steps())) == plain(metrics[3:])


@pytest.mark.slow(8)
def test_two_processes_do_what_one_does(tmp_path):
    (tmp_path / "script.py").write_text(RUN + TWO_PROCESSES)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run(*launch, tmp_path / "script.py", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    trainer_of(
        tmp_path / "one", data=examples_of(32), valid_data=examples_of(7, 1), packed=12, num_epochs=2, batch_size=4
    ).train()
    mine, theirs = (plain(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    assert len(mine) == len(theirs) > 4
    for line, other in zip(mine, theirs, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


GOOD = examples_of(3)
BAD = {
    "is empty": [],
    r"train_data\[1\] has tokens of shape \(2,\) and weights of shape \(3,\)": (torch.tensor([1, 2]), torch.ones(3)),
    "expected one floating-point weight": (torch.tensor([1, 2]), torch.ones(2, dtype=torch.long)),
    "token id 12 is outside the vocabulary": (torch.tensor([1, 12]), torch.ones(2)),
    "there is nothing to learn from it": (torch.tensor([1, 2]), torch.tensor([1.0, 0.0])),
    "has weights from": (torch.tensor([1, 2]), torch.tensor([1.0, math.nan])),
}


@pytest.mark.parametrize("message", list(BAD))
def test_examples_that_cannot_be_learnt_from_are_refused(message):
    data = BAD[message] and [GOOD[0], Example(*BAD[message])]
    with pytest.raises(ValueError, match=message):
        trainer_of(data=data)


def test_models_samplers_and_settings_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="causal=False"):
        trainer_of(palm=palm_of(causal=False))
    adapted = palm_of()
    adapted.add_finetune_params("policy", 2)
    with pytest.raises(ValueError, match=r"LoRA scopes \['policy'\]"):
        trainer_of(palm=adapted)
    with pytest.raises(ValueError, match="the sampler deals 2 examples, train_data has 3"):
        SupervisedTrainer(palm_of(), train_data=GOOD, sampler=NAMES["PackedSampler"]([3, 4], 9))
    with pytest.raises(ValueError, match="expected False without adapters"):
        SupervisedConfig(lora_embeddings=True)
    with pytest.raises(ValueError, match="there is nothing to evaluate on"):
        trainer_of().evaluate()

    list(islice(trainer_of(tmp_path).steps(), 3))
    for change, message in (
        ({"data": [*examples_of(15), GOOD[0]]}, "train_data has changed"),
        ({"data": examples_of(15)}, "the checkpoint's sampler has num_items 16"),
        ({"lora_r": 2}, r"this run has \['lora_r=2'\]"),
        ({"palm": palm_of(depth=1)}, "is of another model"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(tmp_path, resume=True, **change)
