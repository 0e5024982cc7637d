"""The command line that does a task with the settings of a plan."""

from typing import Any

from palm_rlhf.model.lora import ATTENTION
from palm_rlhf.planning.plan_settings import PlanSettings, Task
from palm_rlhf.training.rlhf.config import PPOConfig


def planned_command(task: Task, model: str, settings: PlanSettings) -> list[str]:
    """Return the words of the command line; words in capitals stand for files and folders of the user."""
    s, rank = settings, settings.lora_r or None
    options: dict[str, Any]
    if task == "serve":
        options = {"dtype": s.dtype, "quantize": s.quantize, "max-batch": s.batch_size, "context": s.seq_len}
        adapters = [word for number in range(s.num_adapters) for word in ("--lora", f"NAME{number + 1}=FOLDER")]
        return ["palm-rlhf", "serve", model, *as_words(options | {"prefix-memory": s.prefix_memory}), *adapters]
    command = {"sft": "sft CONVERSATIONS", "reward": "reward RANKINGS", "dpo": "dpo PREFERENCES", "ppo": "rlhf PROMPTS"}
    if task == "ppo":
        options = {"reward-model": "REWARD_MODEL", **ppo_options(s), "actor-lora-r": rank}
    else:
        length = "seq-len" if task == "sft" else "max-seq-len"
        options = {length: s.seq_len, "batch-size": s.batch_size, "lora-r": rank}
    if task == "reward":  # as many as in a step, which has two responses for each row
        options["eval-batch-size"] = 2 * s.batch_size
    options["lora-targets"] = None if s.lora_targets == ATTENTION else s.lora_targets
    options |= {"quantize": s.quantize, "gradient-checkpointing": s.gradient_checkpointing, "precision": s.precision}
    return ["palm-rlhf", *command[task].split(), "--model", model, *as_words(options)]


def ppo_options(s: PlanSettings) -> dict[str, Any]:
    """Return the options by which PPO has as many rows in a forward, and draws as many at once, as planned."""
    sizes: dict[str, Any] = {"micro-batch-size": s.batch_size, "rollout-batch-size": s.rollout_batch_size}
    usual = PPOConfig()
    if s.batch_size > usual.minibatch_size:
        sizes["minibatch-size"] = s.batch_size
    if (most := max(s.batch_size, s.rollout_batch_size)) > usual.rollouts_per_step:
        sizes["rollouts-per-step"] = most
    return {**sizes, "max-new-tokens": s.new_tokens, "share-base": s.share_base}


def as_words(options: dict[str, Any]) -> list[str]:
    """Return options as words: True is the name alone, None and False are left out."""
    words = []
    for name, value in options.items():
        if value is not None and value is not False:
            values = [] if value is True else value if isinstance(value, tuple) else [value]
            words += [f"--{name}", *map(str, values)]
    return words
