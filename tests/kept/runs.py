"""A short run of each trainer, on data that is the same on every machine; `make.py` kept their first halves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from palm_rlhf import PaLM, RewardModel
from palm_rlhf.training import (
    Example,
    LanguageModelTrainer,
    LMConfig,
    OnlinePreferenceTrainer,
    PPOConfig,
    Preference,
    PreferenceConfig,
    PreferenceTrainer,
    Ranking,
    RewardConfig,
    RewardModelTrainer,
    RLHFTrainer,
    RolloutConfig,
    SupervisedConfig,
    SupervisedTrainer,
)

NUM_TOKENS, NUM_STEPS, KEPT_STEP = 24, 4, 2
CLOCK = ("elapsed", "seconds", "_per_second")
RUN = {
    "learning_rate": 1e-2, "warmup_steps": 1, "save_every": 2, "log_every": 1, "precision": "float32", "plot": False
}  # fmt: skip
STEPS = {**RUN, "num_steps": NUM_STEPS, "eval_every": 2}
EPOCHS = {**RUN, "batch_size": 2, "grad_accum": 2, "num_epochs": 2, "eval_every": 2}
ROLLOUTS = {
    **STEPS, "rollouts_per_step": 8, "minibatch_size": 4, "epochs": 2, "max_new_tokens": 5, "eos_token": 5,
    "sample_every": 1, "samples_kept": 2
}  # fmt: skip
TOKENS = torch.arange(NUM_TOKENS).unsqueeze(0)  # read by the models that come out


def palm_of(seed: int, **fields: Any) -> PaLM:
    """A tiny PaLM whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    sizes = {"num_tokens": NUM_TOKENS, "dim": 8, "depth": 2, "heads": 2, "dim_head": 4, "ff_mult": 2}
    return PaLM(**{**sizes, **fields})


def row(start: int, length: int) -> Tensor:
    """A row of tokens of a simple rule, which needs no random numbers."""
    return torch.tensor([(start * 5 + place * place) % NUM_TOKENS for place in range(length)])


def evens(prompts, completions) -> list[float]:
    """The share of even tokens: a reward that needs no model."""
    return [float((completion % 2 == 0).double().mean()) for completion in completions]


def length(prompts, completions) -> list[float]:
    """The length of a response: a reward to be watched, not learnt."""
    return [float(len(completion)) for completion in completions]


PROMPTS = [row(start, 1 + start % 4) for start in range(8)]
CHOSEN = [row(start + 8, 2 + start % 3) for start in range(8)]
REJECTED = [row(start + 16, 1 + start % 3) for start in range(8)]
OTHERS = [row(start + 30, 3) for start in range(3)]


def language_model(palm: PaLM, run: dict, **config: Any) -> LanguageModelTrainer:
    """Two sources, weighted, and validation data."""
    sources = [row(0, 60).numpy().astype(np.uint8), row(3, 40).numpy().astype(np.uint8)]
    config = LMConfig(**STEPS, batch_size=2, grad_accum=2, seq_len=8, eval_context=4, **config)
    data = {"train_data": sources, "valid_data": row(7, 50).numpy().astype(np.uint8), "weights": [2.0, 1.0]}
    return LanguageModelTrainer(palm, **data, valid_bytes=75, config=config, **run)


def supervised(palm: PaLM, run: dict) -> SupervisedTrainer:
    """Adapters and embeddings on weighted examples."""
    examples = [
        Example(torch.cat((prompt, chosen)), torch.cat((torch.zeros(len(prompt)), torch.ones(len(chosen)))))
        for prompt, chosen in zip(PROMPTS, CHOSEN, strict=True)
    ]
    config = SupervisedConfig(**EPOCHS, lora_r=2, lora_embeddings=True)
    return SupervisedTrainer(palm, train_data=examples, valid_data=examples[:3], config=config, **run)


def reward(palm: PaLM, run: dict) -> RewardModelTrainer:
    """Rankings of three responses and of two."""
    rankings = [
        Ranking(prompt, (chosen, *others, rejected))
        for prompt, chosen, others, rejected in zip(PROMPTS, CHOSEN, [OTHERS[:1], []] * 4, REJECTED, strict=True)
    ]
    return RewardModelTrainer(
        RewardModel(palm), train_data=rankings, valid_data=rankings[:3], config=RewardConfig(**EPOCHS), **run
    )


def preference(palm: PaLM, run: dict) -> PreferenceTrainer:
    """DPO of all weights."""
    pairs = [Preference(*triple) for triple in zip(PROMPTS, CHOSEN, REJECTED, strict=True)]
    return PreferenceTrainer(palm, train_data=pairs, valid_data=pairs[:3], config=PreferenceConfig(**EPOCHS), **run)


def online_preference(palm: PaLM, run: dict) -> OnlinePreferenceTrainer:
    """DPO on the policy's own responses, beside a copy as reference."""
    config = PreferenceConfig(**EPOCHS, max_seq_len=16)
    rollouts = RolloutConfig(num_samples=4, max_new_tokens=5, eos_token=5, sample_every=1, samples_kept=2)
    return OnlinePreferenceTrainer(
        palm, reward_model=evens, prompt_token_ids=PROMPTS, valid_prompts=OTHERS, config=config, rollouts=rollouts,
        **run
    )  # fmt: skip


def ppo(palm: PaLM, run: dict) -> RLHFTrainer:
    """A critic, a reference, a KL that is steered, scores that are scaled, and evaluations on held-out prompts."""
    config = PPOConfig(**ROLLOUTS, kl_target=0.5, kl_horizon=100, scale_scores=True)
    return RLHFTrainer(
        palm=palm, reward_model=evens, prompt_token_ids=PROMPTS, eval_prompts=OTHERS, eval_reward=length,
        config=config, **run
    )  # fmt: skip


def grpo(palm: PaLM, run: dict) -> RLHFTrainer:
    """Adapters, whose base is the reference."""
    config = PPOConfig(**{**ROLLOUTS, "eval_every": 10}, algorithm="grpo", num_samples=4, actor_lora_r=2)
    return RLHFTrainer(palm=palm, reward_model=evens, prompt_token_ids=PROMPTS, config=config, **run)


RUNS: dict[str, Callable[[PaLM, dict], Any]] = {
    "language_model": language_model,
    "language_model_muon": lambda palm, run: language_model(palm, run, optimizer="muon", ema_decay=0.5),
    "supervised": supervised,
    "reward": reward,
    "preference": preference,
    "online_preference": online_preference,
    "ppo": ppo,
    "grpo": grpo,
}


def trainer_of(name: str, folder: Path, *, seed: int, resume: bool = False) -> Any:
    """The trainer of a run; what it begins with depends on the seed, which a resumed run must not notice."""
    return RUNS[name](palm_of(seed), {"output_dir": folder, "resume": resume})


def checkpoint(folder: Path, step: int) -> Path:
    """The checkpoint of a step of the run in a folder."""
    return folder / "checkpoints" / f"step_{step:08d}"


def tensors(saved: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by file and name."""
    files = sorted(saved.rglob("*.safetensors"))
    return {f"{file.relative_to(saved).as_posix()}/{key}": t for file in files for key, t in load_file(file).items()}


def without_clock(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics that are the same at every run."""
    return {key: value for key, value in metrics.items() if not key.endswith(CLOCK)}


def lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines, without what a clock says."""
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [without_clock(line) for line in found]


def read(model: PaLM | RewardModel) -> list[float]:
    """The score of `TOKENS`, or the logits after the last of them, with the model's adapters where it has some."""
    model.eval()
    with torch.no_grad():
        if isinstance(model, RewardModel):
            return model(TOKENS).tolist()
        scope = next(iter(model.finetune_modules), None)
        return model(TOKENS, finetune_scope=scope)[0, -1].tolist()


def trained(name: str, saved: Path) -> PaLM | RewardModel:
    """The model that a checkpoint of a run holds."""
    kind = RewardModel if name == "reward" else PaLM
    return kind.from_pretrained(saved / ("policy" if name in ("ppo", "grpo") else "model"))


def outcome(name: str, trainer: Any, folder: Path) -> dict[str, Any]:
    """Takes the steps that a run has left, and says what came of them."""
    metrics = [without_clock(step) for step in trainer.steps()]
    result = trainer.finish() if hasattr(trainer, "finish") else {}
    return {
        "metrics": metrics,
        "result": without_clock(result),
        "logged": lines(folder / "metrics.jsonl"),
        "samples": lines(folder / "samples.jsonl"),
        "outputs": read(trained(name, checkpoint(folder, NUM_STEPS))),
    }
