"""RLHF of a pretrained chat model, offline: rank its answers, train a reward model, PPO; examples/rlhf.py runs it.

The model answers short questions about facts (facts.py). A program stands in for the people who rank: it prefers one
short sentence that names the fact. Its score is the gold score. PPO maximises the proxy, which is the score of a reward
model that learns from the rankings. The gold score has the weight 0 there: it is logged, and nothing learns from it.
Policy, reference and reward model are adapters over one base. All measurements are of held-out questions.

pip install "palm-rlhf[examples,smollm2]" && python examples/rlhf.py --model smollm2 --seed 0
"""

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from facts import Question, gold_score, hold_out, is_sentence, names_fact, read_questions, words_of
from rlhf_report import Measurement, correlation, draw_curves, report, say
from rlhf_stages import (
    Bench,
    ask,
    ended,
    folder_of_run,
    improve,
    learn_reward,
    rank,
    read_rankings,
    write_rankings,
)
from torch import Tensor

from palm_rlhf.commands.run_folder import finish_chat_model, quoted
from palm_rlhf.commands.start_models import ChatModel, open_chat_model
from palm_rlhf.data.conversation import encode_prompt
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.policy.actor_critic import ACTOR_SCOPE
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.ranked_data import Ranking
from palm_rlhf.training.reward_config import RewardConfig
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.trainer import RLHFTrainer
from palm_rlhf.training.run.checkpoints import METRICS_FILE
from palm_rlhf.training.run.log import read_metrics
from palm_rlhf.training.run.optimizer import forward_precision

PROXY, GOLD = "proxy", "gold"
# The defaults are for a model of 135 million parameters on two CPU cores.
REWARD = RewardConfig(
    batch_size=4,
    grad_accum=1,
    num_epochs=2,
    learning_rate=5e-4,
    warmup_steps=5,
    max_seq_len=128,
    keep_checkpoints=1,
)
PPO = PPOConfig(
    num_steps=15,
    rollouts_per_step=32,
    rollout_batch_size=32,
    max_new_tokens=32,
    temperature=0.7,
    minibatch_size=16,
    epochs=2,
    learning_rate=3e-4,
    critic_learning_rate=1e-3,
    kl_coef=0.05,
    reward_weights={GOLD: 0.0},
    sample_every=5,
    actor_lora_r=16,
    shared_trunk=True,
    share_base=True,
    precision="auto",
    keep_checkpoints=1,
)


def encoded(questions: Sequence[Question], chat_model: ChatModel) -> list[Tensor]:
    """Return the tokens of each question in the chat template."""
    _, tokenizer, template = chat_model
    messages = [[{"role": "user", "content": question.text}] for question in questions]
    return [encode_prompt(message, tokenizer, template) for message in messages]


def gold_scores(questions: Sequence[Question], answers: Sequence[str], ended: Sequence[bool]) -> list[float]:
    """Return the gold scores of answers, as many to each question, which are neighbours."""
    each = len(answers) // len(questions)
    asked = [question for question in questions for _ in range(each)]
    return [gold_score(*row) for row in zip(asked, answers, ended, strict=True)]


def gold_reward(completions: list[str], question: list[Question], truncated: list[bool]) -> list[float]:
    """Return the gold scores of PPO's answers, for the log alone."""
    return gold_scores(question, completions, [not cut for cut in truncated])


def ranked_answers(
    chat_model: ChatModel, questions: list[Question], ppo: PPOConfig, num_ranked: int, seed: int
) -> list[Ranking]:
    """Sample answers to each question, as PPO samples them, and rank them by the gold score."""
    palm, tokenizer, _ = chat_model
    prompts, generator = encoded(questions, chat_model), torch.Generator(palm.device).manual_seed(seed)
    sampling = ppo.sampling.restricted_to(known_tokens(tokenizer, palm.num_tokens))
    with forward_precision(ppo.precision, palm.device)():
        rollout, answers = ask(palm, prompts, sampling, tokenizer, num_ranked, generator=generator)
    return rank(prompts, rollout, answers, gold_scores(questions, answers, ended(rollout)))


def habits(questions: list[Question], measured: Measurement) -> dict[str, float]:
    """Return the figures by which cheating shows: a policy can gain from the proxy without naming more facts."""
    pairs = [(question, text) for question, texts in zip(questions, measured.answers, strict=True) for text in texts]
    texts = [text for _, text in pairs]
    return {
        "names_fact": sum(names_fact(*pair) for pair in pairs) / len(pairs),
        "one_sentence": sum(map(is_sentence, texts)) / len(texts),
        "words": sum(len(words_of(text)) for text in texts) / len(texts),
        "distinct": len(set(texts)) / len(texts),
        "gold_proxy_correlation": correlation(measured.gold, measured.proxy),
    }


def summary(questions: list[Question], history: list[Measurement]) -> dict[str, float]:
    """Print what PPO changed, and return the figures before and after it."""
    numbers = report([question.text for question in questions], history)
    before, after = (habits(questions, measured) for measured in (history[0], history[-1]))
    say(f"{'held-out answers':<24} before  after")
    for name, old in before.items():
        say(f"{name:<24} {old:6.2f} {after[name]:6.2f}")
        numbers |= {f"{name}_before": round(old, 4), f"{name}_after": round(after[name], 4)}
    return numbers


def main(
    model: str,
    seed: int = 0,
    output_dir: Path | None = None,
    resume: bool = False,
    held_out: int = 20,
    num_samples: int = 2,
    num_asked: int = 120,
    num_ranked: int = 6,
    measure_every: int = 5,
    reward_lora_r: int = 16,
    reward: RewardConfig = REWARD,
    ppo: PPOConfig = PPO,
) -> None:
    """RLHF of a pretrained chat model on questions about facts; the last line on standard output is JSON.

    Args:
        model: The chat model: smollm2, a folder, a GGUF file, or a hub id.
        seed: Random seed of every stage.
        output_dir: Folder of models, metrics and curves; by default a new one in runs/.
        resume: Continue the run in output_dir, from the newest checkpoint of its last stage.
        held_out: Countries and other subjects whose questions are held out from all stages, for measurements.
        num_samples: Answers to each held-out question in a measurement.
        num_asked: Questions whose answers are ranked.
        num_ranked: Answers to each of these that are ranked.
        measure_every: Steps of PPO between measurements.
        reward_lora_r: Rank of the reward model's adapters.
        reward: Settings of the reward model's training.
        ppo: Settings of PPO.
    """
    started = time.perf_counter()
    output_dir = folder_of_run(output_dir, resume)
    chat_model = open_chat_model(model)
    palm, tokenizer, _ = chat_model
    reward, ppo = replace(reward, seed=seed), replace(ppo, seed=seed, eos_token=chat_model.end_of_turn)
    train, unseen = hold_out(read_questions(), held_out, seed)

    kept = output_dir / "rankings.jsonl"
    if kept.is_file() and not resume:
        raise ValueError(f"got {output_dir}, which has an earlier run, expected a new folder: name it, or --resume")
    output_dir.mkdir(parents=True, exist_ok=True)
    if kept.is_file():
        rankings = read_rankings(kept)
    else:
        asked = random.Random(seed).sample(train, min(num_asked, len(train)))
        say(f"1. ranking {num_ranked} answers to each of {len(asked)} questions")
        rankings = ranked_answers(chat_model, asked, ppo, num_ranked, seed)
        if len(rankings) < 10:  # a tenth is for validation
            raise ValueError(
                f"got {len(rankings)} rankings of answers that differ in their gold score, expected at least 10: take "
                "a model that knows more facts, or raise --num-asked or --num-ranked"
            )
        write_rankings(kept, rankings)
    say("2. the reward model")
    torch.manual_seed(seed)  # of the adapters and the head, which are the same in a resumed run
    reward_model = RewardModel(palm, use_lora=True, lora_r=reward_lora_r, share_base=True)
    learn_reward(reward_model, rankings, reward, output_dir / "reward", resume)

    say(f"3. PPO on {len(train)} questions")
    trainer = RLHFTrainer(
        palm=palm,
        reward_model={PROXY: reward_model, GOLD: gold_reward},
        prompts=[{"prompt": ids, "question": q} for ids, q in zip(encoded(train, chat_model), train, strict=True)],
        tokenizer=tokenizer,
        config=ppo,
        output_dir=output_dir / "ppo",
        resume=resume,
    )
    bench = Bench(
        encoded(unseen, chat_model),
        tokenizer,
        trainer.sampling,
        num_samples,
        lambda answers, ended: gold_scores(unseen, answers, ended),
        reward_model,
        reference=palm,
    )
    history = improve(trainer, bench.measure(palm), lambda: bench.measure(palm, ACTOR_SCOPE), measure_every)

    policy = copy.deepcopy(palm)  # with a base of its own, which takes the adapters in
    policy.merge_finetune_params(ACTOR_SCOPE)
    reward_model.save_pretrained(output_dir / "reward_model")
    draw_curves(output_dir / "rlhf.png", history, read_metrics(output_dir / "ppo" / METRICS_FILE))
    result = {**summary(unseen, history), "seconds": round(time.perf_counter() - started, 1)}
    options = f"--reference {quoted(model)} --reward-model {quoted(output_dir / 'reward_model')}"
    measuring = ("measure the run", f"palm-rlhf evaluate run {quoted(output_dir / 'ppo')} {options}")
    finish_chat_model({**result, **trainer.run.ending}, output_dir, chat_model._replace(palm=policy), [measuring])
