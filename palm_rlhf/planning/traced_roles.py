"""The models of a task, and one step of it, as its trainer builds and takes them, on tensors without numbers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf.algorithms.preferences import dpo_loss
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.modes import switch_off_dropout
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.sampling import Sampling, sampling_logprobs
from palm_rlhf.planning.plan_settings import PlanSettings, Task
from palm_rlhf.policy.actor_critic import ActorCritic, Reference
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import Sequences
from palm_rlhf.serving.engine.capacity import GPU_CHUNK, SAMPLING_BYTES
from palm_rlhf.training.preference_learner import SCOPE as PREFERENCE_SCOPE
from palm_rlhf.training.preference_learner import ResponseLogprobs
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.experience import Experience
from palm_rlhf.training.rlhf.objective import objective
from palm_rlhf.training.supervised import SCOPE as SUPERVISED_SCOPE
from palm_rlhf.training.supervised import RowsLoss
from palm_rlhf.training.weighted_examples import Rows


class FullRows(Sequences):
    """Prompts and responses that fill their rows, so that no mask is needed, and none has numbers to be looked at."""

    @property
    def key_mask(self) -> None:  # type: ignore[override]
        return None


@dataclass
class Roles:
    """The models of a task, and its steps.

    Args:
        models: by the names of their roles.
        loss: a forward with gradients, as a step of the optimiser takes it; None in serving.
        other_phases: what else runs, without gradients, by name.
    """

    models: dict[str, nn.Module]
    loss: Callable[[], Tensor] | None
    other_phases: dict[str, Callable[[], object]]


def roles_on_meta(task: Task, config: PaLMConfig, settings: PlanSettings, has_reward_model: bool = True) -> Roles:
    """Return the models of a task on the meta device. The steps need the tensors of `without_numbers`."""
    s, kept = settings, torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, s.dtype))
    try:
        with torch.device("meta"):
            palm = PaLM.from_config(replace(config, gradient_checkpointing=s.gradient_checkpointing))
            if s.quantize is not None:
                palm.quantize_(s.quantize)
            return BUILDERS[task](palm, s) if task != "ppo" else ppo_roles(palm, s, has_reward_model)
    finally:
        torch.set_default_dtype(kept)


def sft_roles(palm: PaLM, s: PlanSettings) -> Roles:
    """Return what `SupervisedTrainer` holds, and its step."""
    if s.lora_r:
        palm.add_finetune_params(SUPERVISED_SCOPE, s.lora_r, targets=s.lora_targets)
    loss = RowsLoss(palm, SUPERVISED_SCOPE if s.lora_r else None)

    def step() -> Tensor:
        tokens, weights = blank(s.batch_size, s.seq_len), torch.ones(s.batch_size, s.seq_len)
        return loss(Rows(tokens, weights, None, torch.arange(s.batch_size * (s.seq_len - 1))), 1.0)

    return Roles({"model": palm}, step, {})


def reward_roles(palm: PaLM, s: PlanSettings) -> Roles:
    """Return what `RewardTrainer` holds, and its step: a pair of responses for each row of the batch."""
    model = RewardModel(palm, use_lora=s.lora_r > 0, lora_r=s.lora_r or 8, lora_targets=s.lora_targets)

    def step() -> Tensor:
        tokens, lengths = blank(2 * s.batch_size, s.seq_len), torch.ones(2 * s.batch_size, 1, dtype=torch.long)
        scores = model(tokens, prompt_mask=torch.arange(s.seq_len) < lengths, raw=True).view(-1, 2)
        return -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()

    return Roles({"reward model": model}, step, {})


def dpo_roles(palm: PaLM, s: PlanSettings) -> Roles:
    """Return what `PreferenceTrainer` holds, and its step: a pair of responses for each row of the batch."""
    reference = palm if s.lora_r else copy.deepcopy(palm).requires_grad_(False)
    if s.lora_r:
        palm.add_finetune_params(PREFERENCE_SCOPE, s.lora_r, targets=s.lora_targets)
    policy = ResponseLogprobs(switch_off_dropout(palm), PREFERENCE_SCOPE if s.lora_r else None)
    theirs = ResponseLogprobs(switch_off_dropout(reference), None)

    def step() -> Tensor:
        rows = full_rows(2 * s.batch_size, s)
        with torch.no_grad():
            expected = theirs(rows)
        pairs = [part for both in (policy(rows), expected) for part in both.chunk(2)]
        return dpo_loss(*pairs, beta=0.1).loss.mean()

    return Roles({"policy": palm, "reference": reference}, step, {})


def ppo_roles(palm: PaLM, s: PlanSettings, has_reward_model: bool = True) -> Roles:
    """Return what `RLHFTrainer` holds with a reward model, and its phases; the critic begins as the reward model."""
    shared: dict[str, Any] = {"share_base": s.share_base, "lora_targets": s.lora_targets}
    reward = RewardModel(palm, use_lora=s.lora_r > 0, lora_r=s.lora_r or 8, **shared) if has_reward_model else None
    critic_r = 0 if reward is not None else s.lora_r
    actor_critic = ActorCritic(palm, reward, actor_lora_r=s.lora_r, critic_lora_r=critic_r, **shared)
    reference = Reference(actor_critic)
    config = PPOConfig()

    def update() -> Tensor:
        rows, count = full_rows(s.batch_size, s), torch.ones(())
        numbers = [torch.zeros(s.batch_size, s.new_tokens) for _ in range(5)]
        part = Experience(rows, torch.ones(s.batch_size, s.new_tokens, dtype=torch.bool), *numbers)
        counts: dict[str, Any] = {"num_tokens": count, "num_sequences": count, "max_length": s.new_tokens}
        return objective(config, part, actor_critic(rows), kl_coef=None, **counts).loss

    def estimate() -> object:
        rows = full_rows(s.batch_size, s)
        return actor_critic(rows, policy=s.dtype != "float32"), reference.logprobs(rows)

    def judge() -> object:
        rows = full_rows(s.batch_size, s)
        return None if reward is None else reward(rows.tokens, prompt_mask=rows.prompt_mask)

    phases = {"sampling": sampling(palm, s.rollout_batch_size, s), "scores": judge, "values and reference": estimate}
    models = {"policy": palm, "reference": reference.palm, "critic": actor_critic, "reward model": reward}
    return Roles({name: model for name, model in models.items() if model is not None}, update, phases)


def serve_roles(palm: PaLM, s: PlanSettings) -> Roles:
    """Return what a server holds, and its phases: a step of all replies, and the reading of a part of a prompt."""
    palm.eval()
    return Roles({"model": palm}, None, {"replies": decoding(palm, s), "prompts": reading(palm, s)})


def sampling(palm: PaLM, rows: int, s: PlanSettings) -> Callable[[], object]:
    """Return the phase in which a policy reads prompts into a cache, and draws the first token of each response."""

    def draw() -> object:
        prompt = max(s.seq_len - s.new_tokens, 1)
        cache = palm.make_cache(rows, s.seq_len)
        embeds = palm(blank(rows, prompt), cache=cache, return_only_embedding=True)
        return cache, sampling_logprobs(palm.to_logits(embeds[:, -1]), Sampling())

    return draw


def decoding(palm: PaLM, s: PlanSettings) -> Callable[[], object]:
    """Return the phase in which a server takes the next token of each reply; the cache is not part of it."""

    def replies() -> object:
        cache = palm.make_cache(s.batch_size, 1)
        embeds = palm(blank(s.batch_size, 1), cache=cache, return_only_embedding=True)
        clocks = torch.empty(s.batch_size, palm.num_tokens, SAMPLING_BYTES, dtype=torch.uint8)
        return clocks, palm.to_logits(embeds[:, -1])

    return replies


def reading(palm: PaLM, s: PlanSettings) -> Callable[[], object]:
    """Return the phase in which a server reads a part of a prompt."""

    def prompts() -> object:
        size = min(s.seq_len, GPU_CHUNK)
        return palm(blank(1, size), cache=palm.make_cache(1, size), return_only_embedding=True)

    return prompts


def blank(rows: int, columns: int) -> Tensor:
    """Return tokens: `b n`."""
    return torch.zeros(rows, columns, dtype=torch.long)


def full_rows(rows: int, s: PlanSettings) -> FullRows:
    """Return prompts with responses of `new_tokens`: `b n`."""
    prompt = s.seq_len - s.new_tokens
    lengths = [torch.full((rows,), size) for size in (prompt, s.new_tokens)]
    sequences = FullRows(blank(rows, s.seq_len), *lengths)
    sequences.__dict__["host_lengths"] = [(prompt, s.new_tokens)] * rows
    return sequences


BUILDERS: dict[str, Callable[[PaLM, PlanSettings], Roles]] = {
    "sft": sft_roles, "reward": reward_roles, "dpo": dpo_roles, "serve": serve_roles,
}  # fmt: skip
