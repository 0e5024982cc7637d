"""The models of a task, and one step of it, as its trainer builds and takes them, on tensors without numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf.algorithms.preferences import dpo_loss
from palm_rlhf.model.cache import Cache
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.modes import switch_off_dropout
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.sampling import Sampling, sampling_logprobs
from palm_rlhf.planning.plan_settings import PlanSettings, Task
from palm_rlhf.policy.actor_critic import ActorCritic, Reference
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import Sequences
from palm_rlhf.serving.engine.capacity import GPU_CHUNK, SAMPLING_BYTES, columns_of
from palm_rlhf.serving.engine.row_adapters import SideBySide
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.training.preference_learner import SCOPE as PREFERENCE_SCOPE
from palm_rlhf.training.preference_learner import ResponseLogprobs
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.experience import Experience
from palm_rlhf.training.rlhf.objective import objective
from palm_rlhf.training.supervised import SCOPE as SUPERVISED_SCOPE
from palm_rlhf.training.supervised import RowsLoss
from palm_rlhf.training.weighted_examples import Rows


class FullRows(Sequences):
    """Prompts and responses without padding, which need no mask: without numbers, a mask could not be read."""

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
            if s.quantize is not None and task != "ppo":
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
    lora: dict[str, Any] = {"lora_r": s.lora_r, "share_base": True, "lora_targets": s.lora_targets}
    model = RewardModel(palm, use_lora=True, **lora) if s.lora_r else RewardModel(palm)

    def step() -> Tensor:
        tokens, lengths = blank(2 * s.batch_size, s.seq_len), torch.ones(2 * s.batch_size, 1, dtype=torch.long)
        scores = model(tokens, prompt_mask=torch.arange(s.seq_len) < lengths, raw=True).view(-1, 2)
        return -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()

    return Roles({"reward model": model}, step, {})


def dpo_roles(palm: PaLM, s: PlanSettings) -> Roles:
    """Return what `PreferenceTrainer` holds, and its step: a pair of responses for each row of the batch.

    The reference is the policy before training, whose log-probabilities are computed before the first step.
    """
    if s.lora_r:
        palm.add_finetune_params(PREFERENCE_SCOPE, s.lora_r, targets=s.lora_targets)
    policy = ResponseLogprobs(switch_off_dropout(palm), PREFERENCE_SCOPE if s.lora_r else None)

    def logprobs() -> Tensor:
        return policy(full_rows(2 * s.batch_size, s))

    def step() -> Tensor:
        chosen, rejected = logprobs().chunk(2)
        return dpo_loss(chosen, rejected, *torch.zeros(2, s.batch_size), beta=0.1).loss.mean()

    return Roles({"policy": palm}, step, {"reference, before the first step": logprobs})


def ppo_roles(palm: PaLM, s: PlanSettings, has_reward_model: bool = True) -> Roles:
    """Return what `RLHFTrainer` holds with a reward model, and its phases; the critic begins as the reward model.

    The policy's base goes into fewer bits after the reward model has it or a copy of it, as in `palm-rlhf rlhf`.
    """
    shared: dict[str, Any] = {"share_base": s.share_base, "lora_targets": s.lora_targets}
    reward = RewardModel(palm, use_lora=s.lora_r > 0, lora_r=s.lora_r or 8, **shared) if has_reward_model else None
    if s.quantize is not None:
        palm.quantize_(s.quantize)
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
        again = s.dtype != "float32" or s.computes_in_bfloat16("ppo")
        return actor_critic(rows, policy=again), reference.logprobs(rows)

    def judge() -> object:
        rows = full_rows(s.batch_size, s)
        return None if reward is None else reward(rows.tokens, prompt_mask=rows.prompt_mask)

    phases = {"sampling": sampling(palm, s.rollout_batch_size, s), "scores": judge, "values and reference": estimate}
    models = {"policy": palm, "reference": reference.palm, "critic": actor_critic, "reward model": reward}
    return Roles({name: model for name, model in models.items() if model is not None}, update, phases)


def serve_roles(palm: PaLM, s: PlanSettings) -> Roles:
    """Return what a server holds beside its cache, and its phases: steps that compute all replies, or read prompts.

    Adapters are there twice: each alone, and side by side for batches whose replies have different ones.
    """
    palm.eval()
    scopes = [f"served-{number}" for number in range(s.num_adapters)]
    for scope in scopes:
        palm.add_finetune_params(scope, s.lora_r, targets=s.lora_targets)
    together = SideBySide(palm, scopes) if scopes else None

    @cache
    def slots() -> SlotCache:  # made in the first of two runs of a phase, so that it is not counted as part of it
        found = SlotCache(palm, max_tokens=s.batch_size * columns_of(s.seq_len), max_rows=s.batch_size)
        found.reserve(s.batch_size, columns_of(s.seq_len), [])
        return found

    def sampled(rows: int, columns: int, cache: Cache) -> object:
        if together is not None:
            together.mask.factors = torch.ones(rows, 1, s.lora_r * s.num_adapters, dtype=palm.dtype)
        adapters = None if together is None else together.blocks
        embeds = palm(blank(rows, columns), cache=cache, return_only_embedding=True, finetune_scope=adapters)
        numbers = torch.empty(rows, palm.num_tokens, SAMPLING_BYTES, dtype=torch.uint8)
        return embeds, numbers, palm.to_logits(embeds[:, -1])

    def replies() -> object:
        return sampled(s.batch_size, 1, slots().rows([s.seq_len - 1] * s.batch_size))

    def prompts() -> object:
        columns = min(s.seq_len, GPU_CHUNK)
        rows = min(s.batch_size, GPU_CHUNK // columns)
        return sampled(rows, columns, slots().row(0, 0, rows))

    def keeping() -> object:
        return slots().read(0, 0, s.seq_len) if s.prefix_memory else None

    models = {"model": palm, "adapters side by side": nn.ModuleList(together.blocks if together else [])}
    return Roles(models, None, {"replies": replies, "prompts": prompts, "keeping a reply": keeping})


def sampling(palm: PaLM, rows: int, s: PlanSettings) -> Callable[[], object]:
    """Return the phase in which a policy reads prompts into a cache, and draws the first token of each response."""

    def draw() -> object:
        prompt = max(s.seq_len - s.new_tokens, 1)
        cache = palm.make_cache(rows, s.seq_len)
        embeds = palm(blank(rows, prompt), cache=cache, return_only_embedding=True)
        return cache, sampling_logprobs(palm.to_logits(embeds[:, -1]), Sampling())

    return draw


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
