"""Preferences between the policy's own responses: the pairs by hand, the step on them, the loop, a rule learnt."""

import copy
import json
import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.policy.sequences import join, response_logprobs
from palm_rlhf.training import OnlinePreferenceTrainer, PreferenceConfig, PreferenceTrainer, RolloutConfig
from palm_rlhf.training.run.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
# With an eps this large AdamW's first step is the gradient itself, so that weights show what gradients were.
GRADIENT_DESCENT = {"learning_rate": 1e6, "eps": 1e6, "warmup_steps": 0, "grad_clip": 0.0}

# Run by the tests themselves, and by processes of their own.
RUN = """
import sys
import torch
from palm_rlhf.training import OnlinePreferenceTrainer, Preference, PreferenceConfig, RolloutConfig
from tests import factories

def palm_of(seed=0, **fields):
    sizes = {"num_tokens": 8, "dim": 32, "depth": 1, "dim_head": 16, "dropout": 0.1}
    return factories.palm_of(seed, **{**sizes, **fields})

def counting(prompts, completions):
    scores = []
    for prompt, said in zip(prompts, completions):
        row = [int(prompt[-1]), *said.tolist()]
        scores.append(sum((after - before) % 8 == 1 for before, after in zip(row, row[1:])) / len(said))
    return scores

def prompts_of(count=32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(8, (number % 3 + 1,), generator=generator) for number in range(count)]

def make(folder=None, resume=False, *, palm=None, reward=counting, prompts=None, valid=None, rollouts={},
         reference=None, **fields):
    short = {"batch_size": 8, "grad_accum": 2, "num_epochs": 2, "warmup_steps": 0, "learning_rate": 5e-3,
             "log_every": 1, "save_every": 2, "eval_every": 2, "max_seq_len": 16, "precision": "float32", "plot": False}
    return OnlinePreferenceTrainer(
        palm or palm_of(), reward_model=reward, prompt_token_ids=prompts or prompts_of(), valid_prompts=valid,
        reference=reference, config=PreferenceConfig(**{**short, **fields}),
        rollouts=RolloutConfig(**{"num_samples": 4, "max_new_tokens": 4, **rollouts}), output_dir=folder, resume=resume)

def pairs_of(count):
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randint(8, (int(torch.randint(1, 5, (1,), generator=generator)),), generator=generator)
    return [Preference(draw(), torch.cat((draw(), torch.tensor([1]))), torch.cat((draw(), torch.tensor([2]))))
            for _ in range(count)]
"""
TWO_PROCESSES = """
from palm_rlhf.model.files import write_text
from pathlib import Path
import json

folder, asked = Path(sys.argv[1]), []

def reward(prompts, completions):
    asked.append([prompt.tolist() for prompt in prompts[::4]])
    return counting(prompts, completions)

for count in (5, 1):  # fewer than processes, too
    trainer = make(palm=palm_of(), reference=palm_of(1), batch_size=2, grad_accum=2)
    trainer.update(pairs_of(count))
    if trainer.run.is_main:
        trainer.palm.save_pretrained(folder / f"after {count}")
trainer = make(folder / "run", palm=palm_of(), reward=reward, batch_size=4, valid=prompts_of(5))
trainer.train()
weights = torch.cat([parameter.detach().flatten() for parameter in trainer.palm.parameters()])
write_text(folder / f"asked {trainer.run.rank}", json.dumps([asked, float(weights.double().sum())]))
torch.distributed.destroy_process_group()
"""
NAMES = {}
exec(RUN, NAMES)
palm_of, counting, prompts_of, make, pairs_of = (
    NAMES[name] for name in ("palm_of", "counting", "prompts_of", "make", "pairs_of")
)


def rollout_of(prompts, responses, truncated=None):
    sequences = join([torch.tensor(prompt) for prompt in prompts], [torch.tensor(said) for said in responses])
    truncated = [False] * len(responses) if truncated is None else truncated
    return Rollout(sequences, torch.zeros(len(responses), 3), torch.tensor(truncated))


def scores_of(numbers):
    return Scores(
        torch.tensor([number or 0.0 for number in numbers]), torch.tensor([number is not None for number in numbers])
    )


def as_lists(pairs):
    return [tuple(part.tolist() for part in (pair.prompt, pair.chosen, pair.rejected)) for pair in pairs]


def test_the_best_stands_against_the_worst_response_to_the_same_prompt():
    prompts = [[1]] * 3 + [[2, 3]] * 3 + [[4]] * 3 + [[5]] * 3 + [[6]] * 3
    said = [[1, 1], [2], [3, 3, 3], [1], [2, 2], [3], [1], [2], [3], [7], [7], [1], [1], [2], [3]]
    numbers = [0.5, 2.0, -1.0, None, 3.0, 4.0, 1.0, 1.0, 1.0, 2.0, 1.0, None, None, None, 9.0]
    pairs, margins = make(rollouts={"num_samples": 3}).pair(rollout_of(prompts, said), scores_of(numbers))
    # those to [4] score the same, those to [5] say the same, and of those to [6] one has a score
    assert as_lists(pairs) == [([1], [2], [3, 3, 3]), ([2, 3], [3], [2, 2])]
    assert margins == [3.0, 1.0]


@pytest.mark.law("RolloutConfig.missing_eos_penalty")
def test_a_response_that_is_cut_off_pays_its_penalty():
    rollout = rollout_of([[1]] * 2, [[2, 3], [4, 0]], truncated=[True, False])
    for penalty, chosen in ((0.0, [2, 3]), (0.4, [2, 3]), (0.6, [4, 0])):
        trainer = make(rollouts={"num_samples": 2, "eos_token": 0, "missing_eos_penalty": penalty})
        (pair,), margins = trainer.pair(rollout, scores_of([1.0, 0.5]))
        assert pair.chosen.tolist() == chosen
        assert margins == pytest.approx([abs(0.5 - penalty)])


@pytest.mark.parametrize("options", [{"beta": 0.3}, {"loss": "ipo"}, {"loss": "simpo"}, {"loss": "orpo", "beta": 0.3}])
def test_a_step_is_that_of_the_trainer_of_given_pairs(options):
    """The same loss, metrics and gradient, by a reference that is another model."""
    pairs, palm, other = pairs_of(5), palm_of(), palm_of()
    config = PreferenceConfig(
        **options, **GRADIENT_DESCENT, batch_size=5, grad_accum=1, precision="float32", plot=False
    )
    models = {} if options.get("loss") in ("simpo", "orpo") else {"reference": palm_of(1)}
    expected = next(PreferenceTrainer(palm, train_data=pairs, config=config, **models).steps())
    online = make(palm=other, **models, **options, **GRADIENT_DESCENT, batch_size=2, grad_accum=2)
    got = online.update(pairs)
    known = expected.keys() - {"epoch", "elapsed", "tokens_per_second", "learning_rate"}
    assert {name: got[name] for name in known} == pytest.approx({name: expected[name] for name in known}, abs=1e-5)
    for mine, theirs in zip(other.parameters(), palm.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert (online.learner.reference is None) == (not models)


def test_a_step_draws_scores_pairs_and_learns_in_this_order():
    """By hand: the same responses from the same seed, scored, paired, and one step on the pairs."""
    asked = []

    def reward(prompts, completions):
        asked.append([tuple(said.tolist()) for said in completions])
        return counting(prompts, completions)

    trainer, by_hand = make(reward=reward), make()
    torch.manual_seed(5)
    metrics = next(trainer.steps())
    torch.manual_seed(5)
    rollout = by_hand.collect()
    assert [tuple(said) for said in rollout.sequences.actions.tolist()] == asked[0]
    prompts = [by_hand.prompts["train"].token_ids[index].tolist() for index in copy.deepcopy(by_hand.sampler).draw(16)]
    assert len(asked) == 1 and len(prompts) == 16 and len(asked[0]) == 64
    scores = counting(
        [row[:length] for row, length in zip(rollout.sequences.tokens, rollout.sequences.prompt_lengths)],
        list(rollout.sequences.actions),
    )
    groups = [scores[first : first + 4] for first in range(0, 64, 4)]
    margins = [max(group) - min(group) for group in groups if max(group) > min(group)]
    assert metrics["score"] == pytest.approx(sum(scores) / 64)
    assert metrics["pair_rate"] == len(margins) / 16 and 0 < metrics["pair_rate"] < 1
    assert metrics["score_margin"] == pytest.approx(sum(margins) / len(margins))
    assert metrics["response_length"] == 4 and "eos_rate" not in metrics
    assert metrics["loss"] == pytest.approx(0.693147, abs=1e-5)  # the policy is the reference, and they are its own
    pairs, _ = by_hand.pair(rollout, scores_of(scores))
    by_hand.update(pairs)
    for mine, theirs in zip(by_hand.palm.parameters(), trainer.palm.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_each_prompt_comes_once_an_epoch():
    asked = []

    def reward(prompts, completions):
        asked.extend(tuple(prompt.tolist()) for prompt in prompts[::4])
        return counting(prompts, completions)

    trainer = make(reward=reward, num_epochs=3)
    assert trainer.num_steps == 6
    assert [metrics["epoch"] for metrics in trainer.steps()] == [0.5, 1, 1.5, 2, 2.5, 3]
    prompts = sorted(tuple(prompt.tolist()) for prompt in prompts_of())
    assert [sorted(asked[first : first + 32]) for first in (0, 32, 64)] == [prompts] * 3


def test_responses_are_those_of_the_policy_as_it_is(tmp_path):
    """What it says after steps has the probabilities that were recorded; with adapters too."""
    for lora_r in (0, 2):
        trainer = make(lora_r=lora_r, learning_rate=0.05)
        before = copy.deepcopy(trainer.palm)
        list(islice(trainer.steps(), 3))
        rollout = trainer.collect()
        scope = "policy" if lora_r else None
        with torch.no_grad():
            now = response_logprobs(trainer.palm, rollout.sequences, finetune_scope=scope).logprobs
            then = response_logprobs(before, rollout.sequences, finetune_scope=scope).logprobs
        torch.testing.assert_close(rollout.logprobs, now, rtol=0, atol=1e-4)
        assert (then - now).abs().max() > 0.05


def test_the_reference_is_what_training_started_from():
    for fields, is_copy in (({}, True), ({"lora_r": 2}, False)):
        palm = palm_of()
        before = copy.deepcopy(palm.state_dict())
        trainer = make(palm=palm, learning_rate=0.02, **fields)
        list(trainer.steps())
        reference = trainer.learner.reference
        assert (reference.palm is not palm) == is_copy and reference.scope is None
        kept = reference.palm.state_dict()
        assert all(torch.equal(kept[name], value) for name, value in before.items())
        assert trainer.evaluate(prompts_of(8))["kl"] > 0.01
    given = palm_of(1)
    trainer = make(reference=given)
    assert trainer.evaluate(prompts_of(8))["kl"] > 0.01  # from the start
    assert trainer.learner.reference.palm is not given and all(p.requires_grad for p in given.parameters())


def test_without_pairs_nothing_is_learnt():
    palm = palm_of()
    before = copy.deepcopy(palm.state_dict())
    trainer = make(palm=palm, reward=lambda prompts, completions: [1.0] * len(prompts))
    metrics = list(trainer.steps())
    assert [step["step"] for step in metrics] == [1, 2, 3, 4]
    assert all(step["pair_rate"] == 0 and step["score"] == 1 and "loss" not in step for step in metrics)
    assert all(torch.equal(before[name], value) for name, value in palm.state_dict().items())
    with pytest.raises(ValueError, match="returned None for all responses of step 1"):
        next(make(reward=lambda prompts, completions: [None] * len(prompts)).steps())


def test_evaluation_is_of_the_held_out_prompts_and_draws_nothing_from_training():
    runs = []
    for valid in (None, prompts_of(8)):
        trainer = make(valid=valid)
        runs.append(list(trainer.steps()))
    for plain, evaluated in zip(*runs, strict=True):
        assert plain["loss"] == evaluated["loss"] and plain["score"] == evaluated["score"]
    assert [("valid_score" in step, "valid_kl" in step) for step in runs[1]] == [(False,) * 2, (True,) * 2] * 2
    once, again = trainer.evaluate(), trainer.evaluate()
    assert once == again and set(once) == {"score", "response_length", "kl"}
    assert runs[1][-1]["valid_score"] == once["score"]
    asked = []
    other = make(reward=lambda prompts, completions: asked.extend(prompts) or counting(prompts, completions))
    other.evaluate(prompts_of(3))
    assert [prompt.tolist() for prompt in asked] == [p.tolist() for p in prompts_of(3) for _ in range(4)]
    assert list(make(valid=prompts_of(1)).evaluate()) == ["score", "response_length", "kl"]  # one prompt is enough
    with pytest.raises(ValueError, match="nothing to evaluate on: give the trainer valid_prompts"):
        make().evaluate()
    with pytest.raises(ValueError, match="got 0 prompts to evaluate on, expected one or more for each of 1 processes"):
        make().evaluate([])


def test_a_reward_model_scores_and_texts_go_to_a_function():
    class Letters:
        num_tokens = 8

        def encode(self, text):
            return [ord(letter) - 97 for letter in text]

        def decode(self, tokens):
            return "".join(chr(97 + token) for token in tokens)

    torch.manual_seed(0)
    judge = RewardModel(palm_of(1))
    judge.head.weight.data.normal_()
    metrics = next(make(reward=judge).steps())
    assert metrics["pair_rate"] == 1 and metrics["score_margin"] > 0
    asked = []

    def reward(prompts, completions):
        asked.extend(zip(prompts, completions))
        return [said.count("b") for said in completions]

    trainer = OnlinePreferenceTrainer(
        palm_of(),
        reward_model=reward,
        prompts=["abc", "cab"],
        tokenizer=Letters(),
        config=PreferenceConfig(batch_size=2, grad_accum=1, precision="float32", plot=False, max_seq_len=16),
        rollouts=RolloutConfig(max_new_tokens=4, eos_token=0),
    )
    metrics = next(trainer.steps())
    assert {prompt for prompt, _ in asked} == {"abc", "cab"} and len(asked) == 4
    assert not any(said.endswith("a") for _, said in asked) and 0 <= metrics["eos_rate"] <= 1


@pytest.mark.law("RolloutConfig.reward_weights", "RolloutConfig.reward_timeout")
def test_several_rewards_count_by_their_weights_and_get_the_columns_of_their_prompts():
    asked, counts = [], {"reward_weights": {"low": 2.0, "seen": 0.0}}

    def low(completions, wanted, step):
        asked.extend(zip(wanted, [step] * len(wanted), strict=True))
        return [-float(said.double().mean()) for said in completions]

    def seen(completions):
        return [1.0] * len(completions)

    rows = [{"prompt": prompt, "wanted": number} for number, prompt in enumerate(prompts_of())]
    names = {"low": low, "seen": seen, "count": counting}
    trainer = OnlinePreferenceTrainer(
        palm_of(),
        reward_model=names,
        prompts=rows,
        config=make().config,
        rollouts=RolloutConfig(num_samples=4, max_new_tokens=4, **counts),
    )
    metrics = next(trainer.steps())
    drawn = make().sampler.draw(16)
    assert asked == [(index, 1) for index in drawn for _ in range(4)]
    assert metrics["score/seen"] == 1
    assert metrics["score"] == pytest.approx(2 * metrics["score/low"] + metrics["score/count"], rel=1e-5)
    with pytest.raises(ValueError, match="reward_weights"):
        make(rollouts={"reward_weights": {"low": 2.0}})
    with pytest.raises(ValueError, match="asks for"):
        make(reward=low)
    with pytest.raises(TimeoutError):
        make(reward=lambda prompts, completions: time.sleep(0.5), rollouts={"reward_timeout": 0.02}).train()


def test_a_run_goes_on_to_the_bit(tmp_path):
    def plain(steps):
        return [{key: step[key] for key in step.keys() - {"elapsed", "tokens_per_second"}} for step in steps]

    for name, fields in (("copy", {}), ("adapters", {"lora_r": 2}), ("none", {"loss": "simpo"})):
        whole = list(make(tmp_path / name / "whole", valid=prompts_of(4), **fields).steps())
        list(islice(make(tmp_path / name / "part", valid=prompts_of(4), **fields).steps(), 3))
        resumed = make(tmp_path / name / "part", True, palm=palm_of(7), valid=prompts_of(4), **fields)
        assert resumed.step == 2
        assert plain(resumed.steps()) == plain(whole[2:])
        assert (tmp_path / name / "part/checkpoints/step_00000002/reference").is_dir() == (name == "copy")


@pytest.mark.law("RolloutConfig.sample_every", "RolloutConfig.samples_kept")
def test_samples_metrics_and_curves_are_written(tmp_path):
    trainer = make(tmp_path, valid=prompts_of(4), plot=True, rollouts={"sample_every": 2, "samples_kept": 3})
    result = trainer.train()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    assert {"score", "pair_rate", "loss", "accuracy", "valid_score"} <= lines[1].keys()
    samples = read_metrics(tmp_path / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [2, 2, 2, 4, 4, 4]
    assert result["valid_score"] == trainer.evaluate()["score"] and result["steps"] == 4
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.law("RolloutConfig.num_samples", "RolloutConfig.max_new_tokens", "RolloutConfig.temperature")
@pytest.mark.law(
    "RolloutConfig.top_k", "RolloutConfig.top_p", "RolloutConfig.eos_token", "RolloutConfig.rollout_batch_size"
)
def test_how_responses_are_drawn():
    def said(**rollouts):
        trainer = make(rollouts=rollouts)
        torch.manual_seed(0)
        return trainer.collect()

    assert len(said(num_samples=3).sequences) == 48
    assert said(max_new_tokens=2).sequences.response_lengths.tolist() == [2] * 64
    greedy = said(top_k=1).sequences.actions
    assert torch.equal(greedy, greedy[::4].repeat_interleave(4, dim=0))
    assert torch.equal(greedy, said(top_p=1e-6).sequences.actions)
    assert torch.equal(greedy, said(temperature=1e-4).sequences.actions)
    ended = said(eos_token=3).sequences
    assert any(length < 4 for length in ended.response_lengths.tolist())
    assert not torch.equal(said().sequences.actions, greedy)
    calls = []
    trainer = make(rollouts={"rollout_batch_size": 16})
    trainer.palm.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    trainer.collect()
    assert calls and max(calls) <= 16


def test_long_prompts_lose_their_left():
    prompts = [torch.arange(8).repeat(3), torch.tensor([5])]
    trainer = make(prompts=prompts, max_seq_len=9)
    assert [prompt.tolist() for prompt in trainer.prompts["train"].token_ids] == [[3, 4, 5, 6, 7], [5]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss": "kto"}, "got the loss kto, expected one of pairs"),
        ({"max_seq_len": 4}, "got max_new_tokens=4 with max_seq_len=4, expected room for a prompt"),
        ({"prompts": [torch.tensor([8])]}, "token id 8"),
        ({"reward": RewardModel(PaLM(num_tokens=9, dim=16, depth=1))}, "reward model has num_tokens=9; expected 8"),
        ({"loss": "orpo", "reference": palm_of(1)}, "a reference with the loss orpo, which has none"),
        ({"rollouts": {"num_samples": 1}}, "RolloutConfig.num_samples is 1, expected at least 2"),
        (
            {"rollouts": {"missing_eos_penalty": 1.0}},
            "missing_eos_penalty is 1.0, expected 0.0, where eos_token",
        ),
        ({"rollouts": {"temperature": 0.0}}, "temperature is 0.0"),
        ({"rollouts": {"top_p": 1.5}}, "top_p is 1.5"),
        ({"rollouts": {"top_k": 0}}, "top_k is 0"),
        ({"rollouts": {"eos_token": -1}}, "eos_token is -1"),
        ({"resume": True}, "resume=True without output_dir"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


@pytest.mark.parametrize("seed", [0, 1])
def test_counting_is_learnt_from_its_own_responses(seed):
    """The next number is the one before plus 1: a random policy scores 1 in 8."""
    trainer = make(palm=palm_of(seed), seed=seed, batch_size=16, grad_accum=1, num_epochs=20)
    assert trainer.evaluate(prompts_of(16))["score"] < 0.25
    list(trainer.steps())
    assert trainer.evaluate(prompts_of(16))["score"] > 0.7


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    """The folder that two processes have written to."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "script.py").write_text(RUN + TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, folder / "script.py", folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow(8)
@pytest.mark.parametrize("count", [5, 1])
def test_two_processes_learn_from_any_number_of_pairs_as_one_does(two_processes, count):
    trainer = make(palm=palm_of(), reference=palm_of(1), batch_size=8)
    trainer.update(pairs_of(count))
    theirs = load_file(two_processes / f"after {count}/model.safetensors")
    mine = trainer.palm.state_dict()
    assert max(float((mine[name] - palm_of().state_dict()[name]).abs().max()) for name in theirs) > 1e-3
    torch.testing.assert_close({name: mine[name] for name in theirs}, theirs, rtol=0, atol=1e-4)


def test_two_processes_ask_different_prompts_and_learn_the_same(two_processes):
    (mine, weights), (theirs, same) = (json.loads((two_processes / f"asked {rank}").read_text()) for rank in (0, 1))
    assert weights == same
    lines = read_metrics(two_processes / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    # of a step each process has every other prompt; the rewards of evaluations come between, and at the end
    drawn = make().sampler
    prompts = [prompt.tolist() for prompt in prompts_of()]
    steps = [[prompts[index] for index in drawn.draw(16)] for _ in range(4)]
    held_out = [prompt.tolist() for prompt in prompts_of(5)]
    order = [steps[0], steps[1], held_out, steps[2], steps[3], held_out, held_out]
    assert mine == [step[::2] for step in order] and theirs == [step[1::2] for step in order]
