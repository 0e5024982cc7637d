"""Two real processes, with replicas or shards of the weights: their gradients are those of one, their runs resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from palm_rlhf import PaLM
from palm_rlhf.training.run.log import read_metrics

RUN = """
import dataclasses, itertools, sys
import torch
from palm_rlhf import PPOConfig, RLHFTrainer
from palm_rlhf.algorithms.advantages import whiten
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from tests import factories
from tests.factories import evens

def picky(prompts, completions):
    return [None if len(row) == 6 else float(len(row)) for row in completions]

def by_place(prompts, completions, place):
    assert [int(prompt[-1]) for prompt in prompts] == [number % 4 for number in place]
    return [None if number < 3 else float(number) for number in place]

def equal_for(*numbers):
    def reward(prompts, completions, place):
        return [3.0 if number in numbers else float(row % 2) for row, number in enumerate(place)]
    return reward

redrawn_by_one, redrawn_by_both = equal_for(4, 6, 5, 1), equal_for(2, 4, 5)

several = {"evens": evens, "place": by_place}
heard = []

def echo(messages):  # and one token more
    return torch.cat((messages[-1]["content"], torch.tensor([7])))

def listening(prompts, completions, place):
    said = (map(torch.Tensor.tolist, part) for part in (prompts, completions))
    heard.append(list(zip(place, *said)))
    return evens(prompts, completions)

def palm_of(seed, dtype=torch.float64):
    return factories.palm_of(seed).to(dtype)

def trainer(folder=None, dtype=torch.float64, resume=False, reward="evens", environment=None, reference=None,
            eval_prompts=None, eval_reward=None, **options):
    settings = {"num_steps": 4, "rollouts_per_step": 8, "minibatch_size": 8, "epochs": 1, "max_new_tokens": 6,
                "eos_token": 5, "grad_clip": 0.0, "save_every": 1, "plot": False, **options}
    prompts = [{"prompt": torch.arange(1 + index % 4), "place": index} for index in range(8)]
    return RLHFTrainer(palm=palm_of(0, dtype), reward_model=globals()[reward], prompts=prompts, reference=reference,
                       environment=globals().get(environment), eval_prompts=eval_prompts,
                       eval_reward=eval_reward, config=PPOConfig(**settings), output_dir=folder,
                       resume=resume)

def evaluated(folder=None):
    # a policy that stays where it is, and the likeliest tokens, so that evaluations draw nothing
    prompts = [{"prompt": torch.arange(1 + index % 3), "place": index % 3} for index in range(7)]

    def by_row(prompts, completions, prompt_ids, truncated):
        return [float(len(row) + 10 * len(ids) + cut) for row, ids, cut in zip(completions, prompt_ids, truncated)]

    return trainer(folder, num_steps=2, eval_every=1, eval_temperature=0.0, learning_rate=1e-12, kl_coef=0.5,
                   reward="evens", reference=palm_of(1, torch.float64), eval_prompts=prompts, eval_reward=by_row)

def share(rollout, rows):
    return Rollout(rollout.sequences.select(rows), rollout.logprobs[rows], rollout.truncated[rows])

def rollouts(**options):
    torch.manual_seed(1)
    return trainer(**options).collect()

def gradients(mine, whole, rows):
    part = share(whole, rows)
    width = part.sequences.action_mask.shape[1]
    part = dataclasses.replace(part, logprobs=part.logprobs[:, :width])
    experience = mine.estimate_advantages(part, mine.score(part))
    mine.run.base_rates = [0.0 for _ in mine.run.base_rates]
    metrics = mine.update(experience)
    found = {name: p.grad for name, p in mine.actor_critic.named_parameters() if p.grad is not None}
    return {name: getattr(grad, "full_tensor", grad.clone)() for name, grad in found.items()}, metrics
"""
# accelerate takes FSDP on GPUs alone: on a CPU its state is set as it does there
SHARDS = """
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from palm_rlhf.training.run import launch

def sharding_accelerator(**options):
    accelerator = Accelerator(**options)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator

launch.Accelerator = sharding_accelerator
"""
TALK = {"environment": "echo", "max_new_tokens": 20, "max_turns": 3, "max_turn_tokens": 6}
OPTIONS = [
    {},
    {"algorithm": "grpo", "num_samples": 2},
    {"micro_batch_size": 3},
    {"actor_lora_r": 2},
    TALK,
    {"reward": "picky", "scale_scores": True},  # which leaves the processes with different numbers of scores
    {"algorithm": "grpo", "grpo_variant": "gspo", "num_samples": 2, "advantage_scale": "batch", "mask_truncated": True},
]
ONE_BASE = {"actor_lora_r": 2, "critic_lora_r": 2, "share_base": True}
ROWS = [0, 1, 4, 5], [2, 3, 6, 7]  # of each process
STEERED = {"rollouts_per_step": 4, "minibatch_size": 4, "learning_rate": 1e-12, "kl_coef": 0.5, "kl_target": 5.0,
           "kl_horizon": 20, "eos_token": None, "max_new_tokens": 3}  # fmt: skip
REDRAWN = {"algorithm": "grpo", "grpo_variant": "dapo", "num_samples": 2, "max_redraws": 2, "num_steps": 1}
TWO_PROCESSES = """
out = sys.argv[1]
for index, options in enumerate(OPTIONS):
    whole = torch.load(f"{out}/{'talks' if 'environment' in options else 'rollouts'}.pt", weights_only=False)
    mine = trainer(**options)
    rank = mine.run.rank
    assert mine.run.num_processes == 2
    sharded = any(hasattr(parameter, "full_tensor") for parameter in mine.actor_critic.parameters())
    assert sharded == mine.accelerator.is_fsdp2 == ("sharding_accelerator" in globals())
    # the responses to one prompt stay together
    rows = torch.arange(8).unflatten(0, (-1, 2))[rank::2].flatten()
    found, metrics = gradients(mine, whole, rows)
    if rank == 0:
        torch.save((found, metrics), f"{out}/two{index}.pt")
try:
    mine = trainer(**ONE_BASE)
    whole = torch.load(f"{out}/rollouts.pt", weights_only=False)
    told = gradients(mine, whole, torch.arange(8).unflatten(0, (-1, 2))[mine.run.rank :: 2].flatten())
except ValueError as refusal:
    told = str(refusal)
torch.save(told, f"{out}/one_base.pt")
list(trainer(f"{out}/talking", **{**OPTIONS[4], "num_steps": 1}).steps())
steered = trainer(reward="listening", reference=palm_of(1), **STEERED)
metrics = list(steered.steps())
torch.save((heard, metrics, steered.kl_coef), f"{out}/heard{steered.run.rank}.pt")
for reward in ("redrawn_by_one", "redrawn_by_both"):
    redrawing = trainer(reward=reward, **REDRAWN)
    rollout, scores, _, counts = redrawing.sample()
    told = rollout.columns["place"], scores.scores.tolist(), counts, redrawing.sampler.num_drawn
    torch.save(told, f"{out}/{reward}{redrawing.run.rank}.pt")
    list(trainer(f"{out}/{reward}", reward=reward, **REDRAWN).steps())
still = trainer(dtype=torch.float32, precision="bf16", minibatch_size=4, micro_batch_size=1, learning_rate=1e-30)
first = next(still.steps())
if still.run.is_main:
    torch.save(first, f"{out}/bf16.pt")
list(trainer(f"{out}/whole").steps())
list(itertools.islice(trainer(f"{out}/cut").steps(), 2))
list(trainer(f"{out}/cut", resume=True).steps())
list(trainer(f"{out}/several", num_steps=2, reward="several", reward_weights={"place": 0.5}).steps())
mine = evaluated(f"{out}/evaluated")
torch.save([metrics for metrics in mine.steps()], f"{out}/evaluated{mine.run.rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def names() -> dict:
    """What the script defines, here in one process."""
    names = {}
    exec(RUN, names)
    return names


@pytest.fixture(scope="module", params=["replicas", "shards"])
def runs(request, names, tmp_path_factory, root) -> Path:
    """The folder that two processes have written to."""
    folder, sharded = tmp_path_factory.mktemp("runs"), request.param == "shards"
    torch.save(names["rollouts"](), folder / "rollouts.pt")
    torch.save(names["rollouts"](**TALK), folder / "talks.pt")
    (folder / "script.py").write_text(
        RUN
        + f"OPTIONS, ONE_BASE, STEERED, REDRAWN = {OPTIONS!r}, {ONE_BASE!r}, {STEERED!r}, {REDRAWN!r}\n"
        + (SHARDS if sharded else "")
        + TWO_PROCESSES
    )
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment |= {"PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, "--main_process_port", "0", folder / "script.py", folder],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow(8)
@pytest.mark.parametrize("index", range(len(OPTIONS)), ids=map(str, OPTIONS))
def test_the_gradients_of_two_processes_are_those_of_one(runs, names, index):
    whole = torch.load(runs / ("talks.pt" if OPTIONS[index] is TALK else "rollouts.pt"), weights_only=False)
    if OPTIONS[index] is TALK:
        counts = [names["share"](whole, torch.tensor(rows)).sequences.num_actions for rows in ROWS]
        assert counts[0] != counts[1] and sum(counts) < int(whole.sequences.response_lengths.sum())
    else:
        judged = [names["share"](whole, torch.tensor(rows)).sequences.response_lengths < 6 for rows in ROWS]
        assert judged[0].sum() != judged[1].sum() and all(part.any() for part in judged)
    one, metrics = names["gradients"](names["trainer"](**OPTIONS[index]), whole, torch.arange(8))
    two, their_metrics = torch.load(runs / f"two{index}.pt", weights_only=False)
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-9
    assert their_metrics == pytest.approx(metrics, abs=1e-6)
    # what one of them alone would have done is something else
    alone, _ = names["gradients"](names["trainer"](**OPTIONS[index]), whole, torch.tensor(ROWS[0]))
    assert max(float((one[name] - alone[name]).abs().max()) for name in one) > 1e-4


def test_one_base_for_all_roles_is_trained_by_replicas_and_refused_in_shards(runs, names):
    two = torch.load(runs / "one_base.pt", weights_only=False)
    if isinstance(two, str):
        assert "weights in shards (FSDP), expected whole weights in every process" in two
        return
    whole = torch.load(runs / "rollouts.pt", weights_only=False)
    one, metrics = names["gradients"](names["trainer"](**ONE_BASE), whole, torch.arange(8))
    assert one.keys() == two[0].keys() and any("critic.finetune" in name for name in one)
    assert max(float((one[name] - two[0][name]).abs().max()) for name in one) < 1e-9
    assert two[1] == pytest.approx(metrics, abs=1e-6)


def test_each_prompt_is_answered_by_one_process_and_the_prompts_are_those_of_one_process(runs, names):
    """Two epochs of eight prompts in four steps."""
    order = names["trainer"]().sampler.draw(16)
    assert sorted(order) == sorted([*range(8)] * 2)
    for rank in (0, 1):
        steps = torch.load(runs / f"heard{rank}.pt", weights_only=False)[0]
        told = [[place for place, _, _ in step] for step in steps]
        assert told == [order[4 * step + rank : 4 * step + 4 : 2] for step in range(4)]


@pytest.mark.parametrize(
    "reward, places, num_redrawn, num_left",
    [("redrawn_by_one", [2, 1, 3, 0], 3, 1), ("redrawn_by_both", [1, 0, 3, 6], 3, 0)],
)
def test_prompts_that_are_drawn_again_are_those_of_one_process(runs, names, reward, places, num_redrawn, num_left):
    """After 2, 4, 3 and 6 come 5, 0 and 1; in some round one process has nothing to draw again."""
    assert names["trainer"]().sampler.draw(7) == [2, 4, 3, 6, 5, 0, 1]
    alone = names["trainer"](reward=reward, **REDRAWN)
    one = alone.sample()
    assert one.rollout.columns["place"] == [place for place in places for _ in range(2)]
    assert one.metrics == {"redrawn_groups": num_redrawn, "equal_groups": num_left}
    of_prompt = dict(zip(places, one.scores.scores.view(4, 2).tolist(), strict=True))
    for rank in (0, 1):
        mine, scores, counts, num_drawn = torch.load(runs / f"{reward}{rank}.pt", weights_only=False)
        assert mine == [place for place in places[rank::2] for _ in range(2)]
        assert scores == [score for place in places[rank::2] for score in of_prompt[place]]
        assert (counts, num_drawn) == (one.metrics, alone.sampler.num_drawn) and num_drawn == 4 + num_redrawn
    (line,) = read_metrics(runs / reward / "metrics.jsonl")
    assert (line["redrawn_groups"], line["equal_groups"]) == (num_redrawn, num_left)
    drawn = [3.0, 3.0] * (num_redrawn + num_left) + [0.0, 1.0] * (4 - num_left)
    assert line["score"] == pytest.approx(sum(drawn) / len(drawn))


def test_the_kl_is_steered_by_the_responses_of_both_processes(runs, names):
    """The mean over four responses, and four responses of the horizon; the policy stays where it is."""
    palms = [names["palm_of"](seed) for seed in (0, 1)]
    told = [torch.load(runs / f"heard{rank}.pt", weights_only=False) for rank in (0, 1)]
    expected = 0.5
    for mine, theirs, one, other in zip(told[0][0], told[1][0], told[0][1], told[1][1], strict=True):
        kls = []
        for _, prompt, completion in mine + theirs:
            tokens = torch.tensor([prompt + completion])
            with torch.no_grad():
                policy, reference = (palm(tokens[:, :-1])[0].log_softmax(dim=-1) for palm in palms)
            said = range(len(prompt) - 1, tokens.shape[1] - 1)
            kls.append(sum(float((policy - reference)[t, tokens[0, t + 1]]) for t in said))
        assert one["kl"] == other["kl"] == pytest.approx(sum(kls) / 4, rel=1e-6)
        assert one["kl"] != pytest.approx(sum(kls[:2]) / 2, rel=1e-3)
        assert one["kl_coef"] == other["kl_coef"] == pytest.approx(expected, rel=1e-9)
        expected *= 1 + min(max(one["kl"] / 5.0 - 1, -0.2), 0.2) * 4 / 20
    assert told[0][2] == told[1][2] == pytest.approx(expected, rel=1e-9)


def test_the_first_ratios_of_two_processes_in_bfloat16_are_exactly_1(runs):
    metrics = torch.load(runs / "bf16.pt", weights_only=False)
    assert metrics["optimizer_steps"] == 2
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["kl"] == 0


def test_two_processes_resume_to_the_bit(runs):
    for name in ("policy/model.safetensors", "critic.safetensors", "optimizer.safetensors"):
        one, other = (load_file(runs / run / "checkpoints/step_00000004" / name) for run in ("whole", "cut"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    scores = [[line["score"] for line in read_metrics(runs / run / "metrics.jsonl")] for run in ("whole", "cut")]
    assert len(scores[0]) == 4 and scores[0] == scores[1]


def test_named_rewards_of_two_processes_are_logged_as_means_over_both(runs):
    """Each prompt comes once a step, so that the places are known: 3 to 7, and None for the rest."""
    for line in read_metrics(runs / "several/metrics.jsonl"):
        assert line["score/place"] == 5.0 and line["score_std/place"] == pytest.approx(2**0.5)
        assert line["score"] == pytest.approx(line["score/evens"] + 0.5 * (3 + 4 + 5 + 6 + 7) / 8)


def test_an_evaluation_by_two_processes_is_that_of_one(runs, names):
    """Seven prompts, of which one process has four; both know all that is found, and one checkpoint is the best."""
    found = [torch.load(runs / f"evaluated{rank}.pt", weights_only=False) for rank in (0, 1)]
    expected = list(names["evaluated"]().steps())
    for one, *both in zip(expected, *found, strict=True):
        measured = {name: value for name, value in one.items() if name.startswith("eval_")}
        assert measured.keys() >= {"eval_score", "eval_score/held_out", "eval_kl", "eval_win_rate", "eval_eos_rate"}
        assert abs(measured["eval_kl"]) > 1e-3 and measured["eval_score/held_out"] > 10
        for metrics in both:
            assert {name: metrics[name] for name in measured} == pytest.approx(measured, abs=1e-9)
    assert json.loads((runs / "evaluated/checkpoints/best.json").read_text())["step"] == 1


def test_two_processes_hold_conversations_of_different_lengths(runs):
    (line,) = read_metrics(runs / "talking" / "metrics.jsonl")
    assert 1 < line["turns"] < 3 and line["response_length"] < 20


def test_the_policy_that_they_save_opens_alone(runs):
    folder = runs / "whole/checkpoints/step_00000004/policy"
    answer = PaLM.from_pretrained(folder).generate(prompt=torch.tensor([1, 2]), max_new_tokens=3)
    assert answer.shape == (3,)


def test_each_process_draws_responses_of_its_own(runs):
    state = json.loads((runs / "whole/checkpoints/step_00000004/state.json").read_text())
    first, second = state["random_states"]
    assert first["torch"] != second["torch"]
