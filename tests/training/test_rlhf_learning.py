"""Tasks small enough to be solved in seconds, and the calls of the README of palm-rlhf-pytorch."""

import pytest
import torch

from palm_rlhf import PaLM, PPOConfig, RewardModel, RLHFTrainer

COUNT_TOKENS, LEN_TOKENS, LEN_EOS = 24, 6, 5


def count_reward(prompts, completions) -> list[float]:
    """The share of tokens that are the one before + 1."""
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before = torch.cat((prompt[-1:], completion[:-1]))
        scores.append(float((completion == (before + 1) % COUNT_TOKENS).float().mean()))
    return scores


def length_reward(prompts, completions) -> list[float]:
    """1 for 4 tokens, less for more and for fewer, 0 without an EOS."""
    return [max(0.0, 1 - abs(len(row) - 4) / 4) if int(row[-1]) == LEN_EOS else 0.0 for row in completions]


TASKS = {
    "count": (COUNT_TOKENS, count_reward, None, range(COUNT_TOKENS), (0.02, 0.07), 0.5),
    "len": (LEN_TOKENS, length_reward, LEN_EOS, range(LEN_EOS), (0.25, 0.5), 0.75),
}


def learn(task: str, seed: int, **options) -> list[float]:
    """The mean score of each of 20 updates of 64 rollouts."""
    num_tokens, reward, eos_token, firsts, _, _ = TASKS[task]
    torch.manual_seed(seed)
    palm = PaLM(num_tokens=num_tokens, dim=64, depth=2, heads=4, dim_head=16, logit_scale=0.5)
    torch.nn.init.normal_(palm.token_emb.weight, std=0.02)  # every token about as likely as any other
    config = PPOConfig(
        **{"num_steps": 20, "rollouts_per_step": 64, "max_new_tokens": 8, "eos_token": eos_token, "learning_rate": 3e-3,
           "kl_coef": 0.0, "seed": seed, **({} if "algorithm" in options else {"value_coef": 0.5}), **options}
    )  # fmt: skip
    prompts = [torch.tensor([first]) for first in firsts]
    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=prompts, config=config)
    return [metrics["score"] for metrics in trainer.steps()]


@pytest.mark.parametrize("task, seed", [("count", 0), ("len", 1)])
def test_ppo_learns(task, seed):
    *_, (low, high), threshold = TASKS[task]
    scores = learn(task, seed)
    assert low <= scores[0] <= high
    assert sum(scores[-2:]) / 2 >= threshold


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "grpo", "num_samples": 8},
        {"algorithm": "grpo", "num_samples": 8, "grpo_variant": "dr_grpo"},
        {"algorithm": "rloo", "num_samples": 8},
        {"shared_trunk": True},
    ],
    ids=lambda options: options.get("grpo_variant") or options.get("algorithm") or "shared trunk",
)
def test_the_other_algorithms_learn(options):
    scores = learn("len", 0, num_steps=12, **options)
    assert sum(scores[-3:]) / 3 >= scores[0] + 0.15


@pytest.mark.parametrize(
    "options",
    [
        {"grpo_variant": "dapo"},
        {"grpo_variant": "dapo", "overlong_buffer": 4},
        {"grpo_variant": "gspo"},
        {"grpo_variant": "cispo", "learning_rate": 1e-3, "num_steps": 24},  # nothing holds it back but the rate
        {"advantage_scale": "batch"},
        {"precision": "bf16", "importance_cap": 2.0},
    ],
    ids=str,
)
def test_the_variants_of_grpo_learn(options):
    """With the bounds of their papers."""
    scores = learn("len", 0, **{"num_steps": 12, "algorithm": "grpo", "num_samples": 8, **options})
    assert sum(scores[-3:]) / 3 >= scores[0] + 0.15


def test_a_reward_with_its_sign_flipped_is_unlearnt(monkeypatch):
    """What rises is what is asked for: the same run with the sign flipped ends below its start."""

    def flipped(prompts, completions) -> list[float]:
        return [-score for score in length_reward(prompts, completions)]

    monkeypatch.setitem(TASKS, "flipped", (LEN_TOKENS, flipped, *TASKS["len"][2:]))
    scores = learn("flipped", 0, num_steps=8)
    assert scores[-1] > scores[0] + 0.1 and -scores[-1] < 0.25


def test_the_calls_of_the_readme_of_palm_rlhf_pytorch(tmp_path):
    """Their three blocks with our import, sizes scaled down."""
    palm = PaLM(num_tokens=200, dim=32, depth=2, flash_attn=True)
    seq = torch.randint(0, 200, (1, 64))
    loss = palm(seq, return_loss=True)
    loss.backward()
    assert palm.generate(64).shape == (1, 64)

    palm = PaLM(num_tokens=200, dim=32, depth=2, causal=False)
    reward_model = RewardModel(palm, num_binned_output=5)
    seq = torch.randint(0, 200, (1, 64))
    prompt_mask = torch.zeros(1, 64).bool()
    labels = torch.randint(0, 5, (1,))
    loss = reward_model(seq, prompt_mask=prompt_mask, labels=labels)
    loss.backward()
    reward = reward_model(seq, prompt_mask=prompt_mask)
    assert reward.shape == (1,) and 0 <= reward.item() <= 4

    palm = PaLM(num_tokens=200, dim=32, depth=2)
    torch.save(palm.state_dict(), tmp_path / "palm.pt")
    palm.load(tmp_path / "palm.pt")
    reward_model = RewardModel(palm, num_binned_output=5)
    torch.save(reward_model.state_dict(), tmp_path / "reward_model.pt")
    reward_model.load(tmp_path / "reward_model.pt")
    prompts = torch.randint(0, 200, (50, 16))
    trainer = RLHFTrainer(palm=palm, reward_model=reward_model, prompt_token_ids=prompts)
    metrics = trainer.train(
        num_episodes=2, max_timesteps=4, update_timesteps=4, max_batch_size=2, max_seq_len=32, eos_token=None,
        temperature=1.0,
    )  # fmt: skip
    assert metrics["step"] == 2 and metrics["response_length"] == 16
    answer = trainer.generate(64, prompt=prompts[0], num_samples=10)
    assert answer.shape == (48,)


@pytest.mark.parametrize(
    "episodes, per_update, steps, rollouts",
    [({"num_episodes": 6, "max_timesteps": 2}, 4, 3, 4), ({"num_episodes": 1, "max_timesteps": 2}, 8, 1, 2)],
)
def test_episodes_are_so_many_rollouts(episodes, per_update, steps, rollouts):
    seen = []

    def reward(prompts, completions):
        seen.append(len(prompts))
        return [0.0] * len(prompts)

    palm = PaLM(num_tokens=8, dim=16, depth=1, heads=2, dim_head=8)
    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=[torch.tensor([1])])
    trainer.train(**episodes, update_timesteps=per_update, max_seq_len=4)
    assert seen == [rollouts] * steps


@pytest.mark.parametrize(
    "numbers, message",
    [
        ({"num_episodes": 0}, "got num_episodes=0 and max_timesteps=500, expected at least 1 of each"),
        ({"num_episodes": 2, "max_timesteps": 0}, "num_episodes=2 and max_timesteps=0"),
        ({"num_episodes": -2, "max_timesteps": -3}, "num_episodes=-2"),
        ({"num_episodes": 2, "update_timesteps": 0}, "rollouts_per_step is 0, expected a number above 0"),
    ],
    ids=str,
)
def test_no_episodes_are_refused(numbers, message):
    palm = PaLM(num_tokens=8, dim=16, depth=1, heads=2, dim_head=8)
    trainer = RLHFTrainer(palm=palm, reward_model=length_reward, prompt_token_ids=[torch.tensor([1])])
    with pytest.raises(ValueError, match=message):
        trainer.train(**numbers)


def test_the_best_of_n_is_the_one_that_scores_best():
    torch.manual_seed(0)
    palm = PaLM(num_tokens=8, dim=16, depth=1, heads=2, dim_head=8)
    asked = []

    def reward(prompts, completions):
        asked.extend(row.tolist() for row in completions)
        return [float(row.sum()) for row in completions]

    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=[torch.tensor([1])])
    best = trainer.generate(max_new_tokens=5, prompt=torch.tensor([1, 2]), num_samples=6)
    assert len(asked) == 6 and best.tolist() == max(asked, key=sum)
    with pytest.raises(ValueError, match="expected one of them"):
        trainer.generate(prompt=torch.tensor([1]))
