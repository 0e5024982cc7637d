"""Evaluation on held-out prompts: what it measures, that the training does not feel it, and the checkpoint it keeps."""

import itertools
import json
import re
import shutil
import statistics

import pytest
import torch

from palm_rlhf import PaLM, PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.algorithms.win_rate import wilson_interval
from palm_rlhf.training.rlhf import metrics as rlhf_metrics
from palm_rlhf.training.run.checkpoints import best_checkpoint
from palm_rlhf.training.run.log import read_metrics
from tests.factories import Letters, evens, lengths, palm_of

EOS = 5
PROMPTS = [torch.arange(1 + index % 3) for index in range(8)]
HELD_OUT = [{"prompt": [7 - index % 4] * (1 + index % 2), "goal": index} for index in range(9)]
CLOCK = {"elapsed", "tokens_per_second"}


def tiny_palm() -> PaLM:
    return palm_of(depth=1, heads=1, dim_head=16)


def make_trainer(folder=None, reward=evens, prompts=PROMPTS, resume=False, **options) -> RLHFTrainer:
    names = ("eval_prompts", "eval_reward", "reference", "environment")
    given = {name: options.pop(name) for name in names if name in options}
    settings = {"num_steps": 4, "rollouts_per_step": 8, "minibatch_size": 8, "epochs": 1, "max_new_tokens": 6,
                "eos_token": EOS, "learning_rate": 1e-2, "save_every": 1, "plot": False}  # fmt: skip
    return RLHFTrainer(
        palm=tiny_palm(), reward_model=reward, prompts=prompts, output_dir=folder, resume=resume,
        config=PPOConfig(**{**settings, **options}), **given,
    )  # fmt: skip


def evaluations(trainer: RLHFTrainer) -> list[dict]:
    return [metrics for metrics in trainer.steps() if "eval_score" in metrics]


def without_clock(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if name not in CLOCK}


# when and of what


@pytest.mark.law("PPOConfig.eval_every")
def test_evaluations_come_when_due_and_at_the_end():
    def steps(**options) -> list[int]:
        return [metrics["step"] for metrics in evaluations(make_trainer(eval_prompts=HELD_OUT, **options))]

    assert steps(num_steps=3, eval_every=2) == [2, 3] and steps(num_steps=2) == [2]


def test_an_evaluation_measures_the_responses_by_hand():
    """Each named number is worked out from what the reward functions heard, and from the models' own logits."""
    heard = []

    def hearing(prompts, completions, goal, truncated):
        heard.append((prompts, completions, truncated))
        assert goal == [index for index in range(9) for _ in range(2)]
        return evens(prompts, completions)

    def training_or_held_out(prompts, completions, goal, truncated):
        if goal[0] is None:
            return evens(prompts, completions)
        return hearing(prompts, completions, goal, truncated)

    trainer = make_trainer(
        reward=training_or_held_out, eval_prompts=HELD_OUT, eval_reward={"gold": lengths}, eval_samples=2, num_steps=2,
        prompts=[{"prompt": prompt, "goal": None} for prompt in PROMPTS], temperature=0.7,
    )  # fmt: skip
    (metrics,) = evaluations(trainer)
    (_, theirs, _), (prompts, ours, truncated) = heard  # the reference's responses come first
    assert [prompt.tolist() for prompt in prompts] == [row["prompt"] for row in HELD_OUT for _ in range(2)]
    scores, reference = evens(None, ours), evens(None, theirs)
    assert metrics["eval_score"] == pytest.approx(statistics.mean(scores), abs=1e-6)
    assert metrics["eval_score/gold"] == metrics["eval_response_length"] == statistics.mean(map(len, ours))
    assert metrics["eval_eos_rate"] == pytest.approx(1 - statistics.mean(truncated))
    wins = [
        (a > b) + (a == b) / 2
        for index in range(0, 18, 2)
        for a, b in itertools.product(scores[index : index + 2], reference[index : index + 2])
    ]
    assert metrics["eval_win_rate"] == pytest.approx(statistics.mean(wins), abs=1e-6)
    ends = wilson_interval(metrics["eval_win_rate"], 9)
    assert (metrics["eval_win_rate_low"], metrics["eval_win_rate_high"]) == pytest.approx(ends)

    def logprob(palm, prompt, response) -> float:
        row = torch.cat([prompt, response])
        with torch.no_grad():
            said = (palm(row[None])[0] / 0.7).double().log_softmax(-1)
        return sum(float(said[place - 1, row[place]]) for place in range(len(prompt), len(row)))

    pairs = list(zip(prompts, ours, strict=True))
    kl = [logprob(trainer.palm, *pair) - logprob(trainer.reference.palm, *pair) for pair in pairs]
    assert metrics["eval_kl"] == pytest.approx(statistics.mean(kl), abs=1e-4) and abs(metrics["eval_kl"]) > 1e-3
    assert set(metrics) <= {*rlhf_metrics.__doc__.replace(",", " ").split(), "eval_score/gold"}


def test_before_it_has_learnt_anything_the_policy_is_its_reference():
    """With the same random numbers all is a tie, and the KL is 0."""
    (metrics,) = evaluations(make_trainer(eval_prompts=HELD_OUT, learning_rate=1e-12, num_steps=1, eval_samples=1))
    assert metrics["eval_win_rate"] == 0.5 and abs(metrics["eval_kl"]) < 1e-5


@pytest.mark.parametrize("options", [{"kl_coef": 0.0}, {"actor_lora_r": 2}, {"algorithm": "grpo", "num_samples": 4}])
def test_the_reference_is_the_policy_as_it_began(options):
    """A copy, the base below adapters, or none: the same responses are drawn of each before the first step."""
    whole, other = make_trainer(eval_prompts=HELD_OUT), make_trainer(eval_prompts=HELD_OUT, **options)
    for trainer in (whole, other):
        trainer.evaluator.begin(trainer)
    assert other.evaluator.reference == whole.evaluator.reference
    (metrics,) = evaluations(other)
    assert ("eval_kl" in metrics) == (options.get("kl_coef") != 0.0)
    assert other.evaluator.reference == whole.evaluator.reference


def test_a_reference_of_its_own_is_what_responses_are_compared_with():
    torch.manual_seed(5)
    stranger = PaLM(num_tokens=12, dim=16, depth=1, heads=1, dim_head=16)
    trainer = make_trainer(eval_prompts=HELD_OUT, reference=stranger)
    trainer.evaluator.begin(trainer)
    own = make_trainer(eval_prompts=HELD_OUT)
    own.evaluator.begin(own)
    assert trainer.evaluator.reference != own.evaluator.reference


@pytest.mark.law("PPOConfig.eval_temperature")
def test_greedy_evaluations_draw_nothing():
    """Each response is the likeliest token after token."""
    heard = []

    def reward(prompts, completions, goal):
        heard.append((prompts, completions) if goal[0] is not None else None)
        return evens(prompts, completions)

    prompts = [{"prompt": prompt, "goal": None} for prompt in PROMPTS]
    trainer = make_trainer(reward=reward, prompts=prompts, eval_prompts=HELD_OUT, eval_temperature=0.0, num_steps=1)
    (metrics,) = evaluations(trainer)
    for prompt, response in zip(*heard[-1], strict=True):
        row = prompt
        for token in response:
            with torch.no_grad():
                assert int(trainer.palm(row[None])[0, -1].argmax()) == int(token)
            row = torch.cat([row, token[None]])
    sampled = make_trainer(reward=reward, prompts=prompts, eval_prompts=HELD_OUT, num_steps=1)
    assert metrics["eval_score"] != evaluations(sampled)[0]["eval_score"]
    with pytest.raises(ValueError, match="eval_samples is 2, expected 1 where eval_temperature is 0"):
        PPOConfig(eval_temperature=0.0, eval_samples=2)


@pytest.mark.law("PPOConfig.eval_samples")
def test_an_evaluation_has_so_many_responses_to_each_prompt():
    counts = []

    def gold(prompts, completions):
        counts.append(len(prompts))
        return [1.0] * len(prompts)

    evaluations(make_trainer(eval_prompts=HELD_OUT, eval_reward=gold, eval_samples=3))
    assert counts == [27, 27]  # of the reference, and of the policy


def test_prompts_come_as_texts_in_a_file_too(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "goal": 3}\n{"prompt": "c", "goal": 4}\n')

    def gold(completions, prompts, goal):
        assert prompts == ["ab", "c"] and goal == [3, 4]
        return [float(len(text)) for text in completions]

    trainer = RLHFTrainer(
        palm=tiny_palm(), reward_model=lengths, prompts=["a", "b"], tokenizer=Letters(), eval_reward=gold,
        eval_prompts=tmp_path / "rows.jsonl",
        config=PPOConfig(num_steps=1, rollouts_per_step=8, minibatch_size=8, max_new_tokens=4, plot=False),
    )  # fmt: skip
    assert evaluations(trainer)[0]["eval_score/held_out"] == 4.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"eval_reward": lengths}, "got eval_reward without eval_prompts"),
        ({"eval_samples": 2}, "eval_samples is 2, expected 1, without eval_prompts"),
        ({"eval_prompts": []}, "eval_prompts holds no prompt"),
        ({"eval_prompts": ["ab"]}, "got eval_prompts, which are texts, without a tokenizer"),
        ({"eval_prompts": [torch.tensor([99])]}, "token id 99 is outside the vocabulary"),
        ({"eval_prompts": PROMPTS, "eval_reward": {"score": lengths}}, r"has the names \['score'\], which are the tr"),
        ({"eval_prompts": PROMPTS, "eval_reward": lambda prompts, completions, goal: 0}, "reward 'held_out' asks for"),
        ({"eval_prompts": PROMPTS, "reward": lambda prompts, completions, goal: 0,
          "prompts": [{"prompt": [1], "goal": 1}]}, "the reward function asks for 'goal'"),
    ],
)  # fmt: skip
def test_what_would_stop_an_evaluation_is_refused_before_the_run(options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


# the training does not feel it


def noisy(prompts, completions) -> list[float]:
    return (torch.rand(len(prompts)) + torch.tensor(evens(prompts, completions))).tolist()


@pytest.mark.parametrize("options", [{}, {"algorithm": "grpo", "num_samples": 4, "actor_lora_r": 2}], ids=str)
def test_the_bits_of_a_run_are_the_same_with_and_without_evaluation(tmp_path, options):
    """The reward draws random numbers itself, those that the whole run draws from."""
    alone = make_trainer(reward=noisy, **options)
    expected = [without_clock(metrics) for metrics in alone.steps()]
    after = torch.rand(3)
    seen = make_trainer(
        tmp_path, reward=noisy, eval_prompts=HELD_OUT, eval_reward=noisy, eval_every=1, eval_samples=2, **options
    )
    found = [without_clock(metrics) for metrics in seen.steps()]
    assert torch.equal(torch.rand(3), after) and all("eval_score" in metrics for metrics in found)
    trained = [{name: value for name, value in one.items() if not name.startswith("eval_")} for one in found]
    assert trained == expected
    state = seen.actor_critic.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in alone.actor_critic.state_dict().items())


def test_the_same_policy_is_measured_alike_each_time():
    trainer = make_trainer(eval_prompts=HELD_OUT, eval_samples=2)
    trainer.evaluator.begin(trainer)
    first = trainer.evaluator.evaluate(trainer)
    torch.manual_seed(77)
    again = trainer.evaluator.evaluate(trainer)
    assert {**again, "save": True} == {**first, "save": True}


# the best checkpoint


def scripted(values):
    """An evaluation reward that is a known number in each evaluation, the reference's first."""
    ahead = iter(values)

    def gold(prompts, completions):
        value = next(ahead)
        return [value] * len(prompts)

    return gold


def folders(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def test_the_best_checkpoint_is_kept_and_named(tmp_path):
    gold = scripted([0, 1, 5, 2, 5, 3, 4])
    trainer = make_trainer(
        tmp_path, eval_prompts=HELD_OUT, eval_reward=gold, eval_every=1, num_steps=6, save_every=2, keep_checkpoints=1
    )
    best = []
    for _ in trainer.steps():
        best.append(best_checkpoint(tmp_path / "checkpoints").name)
    assert best == ["step_00000001"] + ["step_00000002"] * 5  # an equal one later is no better
    assert folders(tmp_path) == ["step_00000002", "step_00000006"]
    said = json.loads((tmp_path / "checkpoints/best.json").read_text())
    assert said == {"checkpoint": "step_00000002", "step": 2, "metric": "eval_score/held_out", "value": 5.0}
    palm = PaLM.from_pretrained(tmp_path / "checkpoints/step_00000002/policy")
    assert palm.num_tokens == 12
    # a run without evaluations goes on, and the best stays; without what came after, it is gone on from
    last = make_trainer(tmp_path, resume=True, num_steps=8, keep_checkpoints=1)
    list(last.steps())
    assert folders(tmp_path) == ["step_00000002", "step_00000008"]
    shutil.rmtree(tmp_path / "checkpoints/step_00000008")
    assert make_trainer(tmp_path, resume=True).run.step == 2


def test_a_best_evaluation_is_saved_though_no_checkpoint_is_due(tmp_path):
    options = {"eval_prompts": HELD_OUT, "eval_every": 1, "save_every": 100, "keep_checkpoints": 1}
    list(make_trainer(tmp_path, eval_reward=scripted([9, 1, 3, 2, 0]), **options).steps())
    assert folders(tmp_path) == ["step_00000002", "step_00000004"]


def test_the_score_tells_the_best_where_no_reward_is_held_out(tmp_path):
    rewards = {"evens": evens, "length": lengths}
    for name, weights in (("score", None), ("held out", {"length": 0.0})):
        trainer = make_trainer(tmp_path / name, reward=rewards, reward_weights=weights, eval_prompts=HELD_OUT,
                               eval_every=1)  # fmt: skip
        found = evaluations(trainer)
        metric = "eval_score" if weights is None else "eval_score/length"
        said = json.loads((tmp_path / name / "checkpoints/best.json").read_text())
        assert said["metric"] == metric
        assert said["value"] == max(line[metric] for line in found)
        assert said["step"] == max(found, key=lambda line: line[metric])["step"]


def test_evaluations_resume_to_the_bit(tmp_path):
    """Metrics, the reference's scores, the best so far: as in a run that was never cut."""
    options = {"eval_prompts": HELD_OUT, "eval_reward": lengths, "eval_every": 1, "eval_samples": 2}
    list(make_trainer(tmp_path / "whole", **options).steps())
    list(itertools.islice(make_trainer(tmp_path / "cut", **options).steps(), 2))
    resumed = make_trainer(tmp_path / "cut", resume=True, **options)
    assert resumed.evaluator.reference is not None and len(resumed.evaluator.history["score"]) == 3
    list(resumed.steps())
    lines = [list(map(without_clock, read_metrics(tmp_path / name / "metrics.jsonl"))) for name in ("whole", "cut")]
    assert lines[0] == lines[1] and all("eval_score" in line for line in lines[0])
    best = [(tmp_path / name / "checkpoints/best.json").read_text() for name in ("whole", "cut")]
    assert best[0] == best[1]
    with pytest.raises(ValueError, match=r"'held_out': 4.*resume with the eval_prompts and rewards that the run had"):
        make_trainer(tmp_path / "cut", resume=True, **{**options, "eval_prompts": HELD_OUT[:4]})


# over-optimisation


def test_overoptimisation_is_warned_of_once_in_plain_words(tmp_path, capsys):
    """The score of each evaluation and the held-out reward are known: 0 and 9 at first, then 1 more and 2 less."""

    def rewards_of(step):
        def proxy(prompts, completions, goal):
            return [float(step["number"]) + 0.01 * index for index, _ in enumerate(prompts)]

        def gold(prompts, completions, goal):
            step["number"] += 1
            return [9.0 - 2.0 * (step["number"] - 1) + 0.02 * (index % 3) for index, _ in enumerate(prompts)]

        return proxy, gold

    prompts = [{"prompt": prompt, "goal": None} for prompt in PROMPTS]
    options = {"prompts": prompts, "eval_prompts": HELD_OUT, "eval_every": 1, "num_steps": 3}
    proxy, gold = rewards_of({"number": 0})
    trainer = make_trainer(tmp_path, reward=proxy, eval_reward={"gold": gold}, **options)
    assert [metrics["eval_overoptimized"] for metrics in trainer.steps()] == [1, 1, 1]
    said = capsys.readouterr().err
    assert said.count("over-optimisation") == 1
    first, _, rest = said.partition(" (standard scores ")
    assert first == (
        "over-optimisation at step 1: on the held-out prompts the score, which is learnt from, is 1 higher than that "
        "of the reference, and 'gold', which is not, 2 lower"
    )
    numbers = re.fullmatch(r"(\S+) and (\S+), beyond the (\S+) that chance stays below\)\. (.*)\n", rest)
    assert min(float(numbers[1]), float(numbers[2])) > float(numbers[3]) > 0
    assert numbers[4] == (
        "The policy seems to please the reward rather than what it stands for: stop here, take the best checkpoint, or "
        "give more kl_coef or a better reward"
    )
    resumed = make_trainer(tmp_path, reward=proxy, eval_reward={"gold": gold}, resume=True,
                           **{**options, "num_steps": 4})  # fmt: skip
    assert next(resumed.steps())["eval_overoptimized"] == 1
    assert "over-optimisation" not in capsys.readouterr().err
    fair = make_trainer(reward=lambda prompts, completions: [0.0] * len(prompts),
                        eval_reward={"gold": scripted([9, 7, 5, 3])}, **options)  # fmt: skip
    assert [metrics["eval_overoptimized"] for metrics in fair.steps()] == [0, 0, 0]


def test_the_warning_names_the_evaluation_that_was_the_best(capsys):
    """The held-out reward is 1 at first, 9 after 2 steps and 5 after 4, while the score rises."""
    gold = {0: 1.0, 2: 9.0, 4: 5.0}
    trainer = make_trainer(
        reward=lambda prompts, completions: [float(trainer.run.step) + 0.01 * index for index, _ in enumerate(prompts)],
        eval_reward={
            "gold": lambda prompts, completions, goal: [
                gold[trainer.run.step] + 0.02 * (index % 3) for index, _ in enumerate(prompts)
            ]
        },
        eval_prompts=HELD_OUT, eval_every=2, num_steps=4,
    )  # fmt: skip
    assert [metrics.get("eval_overoptimized") for metrics in trainer.steps()] == [None, 0, None, 1]
    said = capsys.readouterr().err
    assert "at step 4: " in said and "learnt from, is 2 higher than that of evaluation 1, of " in said
    assert "of every 2 steps, and 'gold', which is not, 4 lower" in said


def test_a_reward_model_is_a_held_out_reward_as_well():
    torch.manual_seed(4)
    model = RewardModel(tiny_palm())
    trainer = make_trainer(eval_prompts=HELD_OUT, eval_reward={"gold": model}, num_steps=1)
    (metrics,) = evaluations(trainer)
    assert "eval_overoptimized" in metrics and trainer.evaluator.best_metric == "eval_score/gold"
    trainer.evaluator.reference = None
    trainer.evaluator.begin(trainer)
    again = trainer.evaluator.evaluate(trainer)["eval_score/gold"]
    assert again == metrics["eval_score/gold"] != metrics["eval_score"]
    with pytest.raises(ValueError, match="the reward model 'gold' has num_tokens=13; expected 12"):
        other = RewardModel(PaLM(num_tokens=13, dim=16, depth=1, heads=1, dim_head=16))
        make_trainer(eval_prompts=HELD_OUT, eval_reward={"gold": other})
