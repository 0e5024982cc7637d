"""The policy with its critic in one module, and the reference policy that the KL is measured to."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.block import Block
from palm_rlhf.model.lora import ATTENTION
from palm_rlhf.model.modes import switch_off_dropout
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.shared_base import copy_over_base, palm_over_base
from palm_rlhf.policy.model_checks import check_model, check_options, check_shared_base
from palm_rlhf.policy.reward_model import RewardModel, read_wide
from palm_rlhf.policy.sequences import ActionLogprobs, Sequences, action_logprobs, response_logprobs
from palm_rlhf.policy.shared_prompts import embeds_before_actions

ACTOR_SCOPE, CRITIC_SCOPE = "actor", "critic"


class PolicyOutput(NamedTuple):
    """Numbers of each action, `b t` each in float32; None for those that were not asked for."""

    logprobs: Tensor | None
    entropy: Tensor | None
    values: Tensor | None


class ActorCritic(nn.Module):
    """A policy and a value for every action, in one module for one optimiser.

    Dropout is switched off in all parts for good, because the ratio of probabilities of two dropout masks means
    nothing.

    Args:
        palm: the policy, trained in place.
        critic: the start of the critic's trunk, copied: a PaLM, a RewardModel, or None for the policy itself. The copy
            is trained even if the original is frozen. The values of a reward model with a scalar head on the last token
            start as its scores of the text so far; all other values start as 0.
        value: "separate" for a trunk of the critic's own, "shared" for the policy's trunk, "none" for no critic.
        actor_lora_r: rank of the adapters that are trained in the policy, scope "actor"; 0 trains the whole policy.
        critic_lora_r: the same for a separate trunk that is a PaLM, scope "critic".
        lora_targets: the matrices that have adapters in both scopes, see `add_finetune_params`.
        share_base: hold the policy's base as the critic's too, which has adapters only: new ones over the policy's
            base, or a copy of those of a reward model over that base.

    Raises ValueError if options exclude each other, if the policy is frozen, and for a model that is bidirectional, has
    another vocabulary, or holds LoRA scopes, which would not be applied.
    """

    palm: PaLM
    critic: PaLM | RewardModel | None
    value_head: nn.Linear | None
    actor_scope: str | None
    critic_scope: str | None

    @beartype
    def __init__(
        self,
        palm: PaLM,
        critic: PaLM | RewardModel | None = None,
        *,
        value: str = "separate",
        actor_lora_r: int = 0,
        critic_lora_r: int = 0,
        lora_targets: str | Sequence[str] = ATTENTION,
        share_base: bool = False,
    ):
        super().__init__()
        check_options(critic, value=value, critic_lora_r=critic_lora_r)
        check_model("policy", palm, palm.num_tokens)
        if critic is not None:
            check_model("critic", critic, palm.num_tokens)
        if share_base:
            check_shared_base(palm, critic, value=value, actor_lora_r=actor_lora_r, critic_lora_r=critic_lora_r)
        self.actor_scope = self.critic_scope = self.critic = self.value_head = None
        if value == "separate":
            self.critic = copied_critic(palm, critic, share_base=share_base)
            if isinstance(self.critic, RewardModel):
                self.critic.requires_grad_(True)  # the original is often frozen
                self.critic.use_lora_scope(self.critic.lora_scope)
                self.critic.head.requires_grad_(False)  # the value head replaces it
            elif not any(parameter.requires_grad for parameter in self.critic.parameters()):
                self.critic.requires_grad_(True)  # a critic whose trunk is frozen would train its head only
            if critic_lora_r and isinstance(self.critic, PaLM):
                self.critic_scope = CRITIC_SCOPE
                self.critic.add_finetune_params(CRITIC_SCOPE, critic_lora_r, targets=lora_targets)
        self.palm = palm
        if actor_lora_r:
            self.actor_scope = ACTOR_SCOPE
            palm.add_finetune_params(ACTOR_SCOPE, actor_lora_r, targets=lora_targets)
        if value != "none":
            trunk = self.critic.palm if isinstance(self.critic, RewardModel) else self.critic or palm
            self.value_head = nn.Linear(trunk.config.dim, 1, device=palm.device, dtype=palm.dtype)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            if isinstance(self.critic, RewardModel) and self.critic.reads_one_score_a_token:
                start_from_the_score(self.value_head, self.critic)
        if not self.actor_parameters():
            raise ValueError("the policy is frozen; expected weights to train: palm.requires_grad_(), or actor_lora_r")
        switch_off_dropout(self)
        # accelerate makes a shard of each block, unless told otherwise, and asks for the names of their classes
        self._no_split_modules = sorted({type(part).__name__ for part in self.modules() if isinstance(part, Block)})

    def actor_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters of the policy."""
        return [parameter for parameter in self.palm.parameters() if parameter.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters that belong to the critic alone."""
        parts = [part for part in (self.critic, self.value_head) if part is not None]
        return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]

    def forward(
        self,
        sequences: Sequences,
        *,
        policy: bool = True,
        values: bool = True,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        allowed_tokens: Tensor | None = None,
        entropy_needs_grad: bool = False,
    ) -> PolicyOutput:
        """Return log-probabilities, entropies and values of all actions; with `policy=False` only the values."""
        logprobs = entropy = estimates = None
        if policy or (values and self.critic is None):
            embeds = embeds_before_actions(self.palm, sequences, self.actor_scope)
        if policy:
            logprobs, entropy = action_logprobs(
                self.palm,
                embeds,
                sequences.actions,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                allowed_tokens=allowed_tokens,
                entropy_needs_grad=entropy_needs_grad,
            )
        if values and self.value_head is not None:
            if self.critic is not None:
                embeds = self._critic_embeds(self.critic, sequences)
            estimates = read_wide(self.value_head, embeds).squeeze(-1)
        return PolicyOutput(logprobs, entropy, estimates)

    def _critic_embeds(self, critic: PaLM | RewardModel, sequences: Sequences) -> Tensor:
        """Return the final embeddings of a separate critic at the token before each action: `b t e`."""
        if isinstance(critic, PaLM):
            return embeds_before_actions(critic, sequences, self.critic_scope)
        embeds = critic.embed(sequences.tokens, sequences.key_mask, prompt_mask=sequences.prompt_mask)
        return sequences.before_actions(embeds)


class Reference:
    """The policy before training: a frozen copy, or with LoRA the policy itself without its adapter.

    It is no part of the trained module, so no optimiser sees it and no training step changes it.
    """

    @beartype
    def __init__(self, actor_critic: ActorCritic, palm: PaLM | None = None):
        if palm is not None:
            check_model("reference", palm, actor_critic.palm.num_tokens)
        self.is_base = palm is None and actor_critic.actor_scope is not None
        source = actor_critic.palm if palm is None else palm
        self.palm = source if self.is_base else switch_off_dropout(copy.deepcopy(source).requires_grad_(False))

    @torch.no_grad()
    def logprobs(self, sequences: Sequences, **sampling: Any) -> ActionLogprobs:
        """Return the reference's log-probabilities of the actions; `sampling` are the options of `action_logprobs`."""
        return response_logprobs(self.palm, sequences, **sampling)


def copied_critic(palm: PaLM, start: PaLM | RewardModel | None, *, share_base: bool) -> PaLM | RewardModel:
    """Return a copy of the model that the critic starts from: with `share_base`, of its adapters and heads alone."""
    if isinstance(start, RewardModel) and share_base:
        return copy_over_base(start, start.palm)
    return palm_over_base(palm) if share_base else copy.deepcopy(palm if start is None else start)


@torch.no_grad()
def start_from_the_score(head: nn.Linear, reward_model: RewardModel) -> None:
    """Let a value head return the reward model's normalised scores of the text so far (Ouyang et al. 2022)."""
    head.weight.copy_(reward_model.head.weight / reward_model.score_std)
    head.bias.copy_(-reward_model.score_mean / reward_model.score_std)
