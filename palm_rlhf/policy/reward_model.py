"""The reward model: a PaLM that scores a whole sequence."""

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.lora import ATTENTION
from palm_rlhf.model.modes import switch_off_dropout
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.shared_base import is_shared, palm_over_base
from palm_rlhf.ops.cross_entropy import cross_entropy
from palm_rlhf.ops.masked import masked_mean, masked_sum
from palm_rlhf.policy import reward_model_folder
from palm_rlhf.policy.sequences import Sequences, batches_by_length

Pooling = Literal["last", "mean", "mean_all"]


class RewardModel(nn.Module):
    """A copy of a PaLM with a linear head on one final embedding of each sequence; its dropout is switched off.

    The output of the head is the score, or the logits of bins 0, 1, ..., whose expectation is the score. If prompts are
    marked, one embedding is added to prompt tokens and another one to all others; both start as zero.

    Args:
        palm: copied, unless `share_base`; the original does not change.
        num_binned_output: number of bins; 0 for the scalar head.
        pooling: the embedding that the head reads. "last": that of the last token before padding (Stiennon et al.
            2020). "mean": the mean over the response, or over all tokens if no prompt is marked. "mean_all": always the
            mean over all tokens.
        use_lora: train a LoRA scope of the PaLM in place of its weights.
        lora_r: rank of that scope.
        lora_targets: the matrices that have adapters in it, see `add_finetune_params`.
        reward_lora_scope: its name.
        share_base: hold the weights of `palm` itself, frozen and without dropout from now on, in place of a copy. The
            LoRA scope is the reward model's own: `palm` does not get it, and its scopes do not change the scores.
            Folders hold the base as well, and open without `palm`. A move of either moves the base: move both.
    """

    palm: PaLM
    head: nn.Linear
    lora_scope: str | None
    score_mean: Tensor
    score_std: Tensor

    # Methods that are functions of reward_model_folder.py, with the model as their first argument.
    save_pretrained = reward_model_folder.save_pretrained
    from_pretrained = classmethod(reward_model_folder.from_pretrained)
    from_palm_rlhf_pytorch = classmethod(reward_model_folder.from_palm_rlhf_pytorch)
    load = reward_model_folder.load

    @beartype
    def __init__(
        self,
        palm: PaLM,
        *,
        num_binned_output: int = 0,
        pooling: Pooling = "last",
        use_lora: bool = False,
        lora_r: int = 8,
        lora_targets: str | Sequence[str] = ATTENTION,
        reward_lora_scope: str = "reward",
        share_base: bool = False,
    ):
        super().__init__()
        if num_binned_output < 0 or num_binned_output == 1:
            raise ValueError(f"num_binned_output is {num_binned_output}; expected 2 or more bins, or 0 for a scalar")
        if share_base and not use_lora:
            raise ValueError(
                "got share_base=True and use_lora=False, expected use_lora=True: training the weights would change palm"
            )
        if not use_lora and lora_targets != ATTENTION:
            raise ValueError(f"got lora_targets={lora_targets} and use_lora=False, expected use_lora=True")
        self.num_binned_output, self.pooling = num_binned_output, pooling
        self.palm = switch_off_dropout(palm_over_base(palm) if share_base else copy.deepcopy(palm))
        if use_lora:
            self.palm.add_finetune_params(reward_lora_scope, lora_r, targets=lora_targets)
        self.use_lora_scope(reward_lora_scope if use_lora else None)

        dim, device, dtype = palm.config.dim, palm.device, palm.dtype
        self.prompt_embed = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.response_embed = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        # A score has no bias: a loss of score differences gives it a gradient of rounding errors, and Adam follows it.
        has_bias = num_binned_output > 0
        self.head = nn.Linear(dim, max(num_binned_output, 1), bias=has_bias, device=device, dtype=dtype)
        nn.init.normal_(self.head.weight, std=(dim + 1) ** -0.5)  # Stiennon et al. 2020
        self.register_buffer("score_mean", torch.zeros(1, device=palm.device))
        self.register_buffer("score_std", torch.ones(1, device=palm.device))

    @beartype
    def use_lora_scope(self, scope: str | None) -> None:
        """Score with a LoRA scope of the PaLM, or with none; only that scope, or else the base, is trained.

        Raises ValueError for none where another model holds the base.
        """
        if scope is None and is_shared(self.palm):
            raise ValueError("got no LoRA scope for a reward model over a shared base, expected one of its own")
        self.lora_scope = scope
        self.palm.requires_grad_(False)
        for parameter in self.palm.palm_parameters() if scope is None else self.palm.finetune_parameters(scope):
            parameter.requires_grad_(True)

    @property
    def reads_one_score_a_token(self) -> bool:
        """Whether the score of a sequence is a linear function of the embedding of its last token."""
        return self.pooling == "last" and not self.num_binned_output

    def finetune_parameters(self) -> list[nn.Parameter]:
        """Return all trained parameters: the head, the two embeddings, and the LoRA scope or else the whole PaLM."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def forward(
        self,
        tokens: Tensor,
        key_mask: Tensor | None = None,
        *,
        prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        denominator: Tensor | int | float | None = None,
        raw: bool = False,
        disable_lora: bool = False,
    ) -> Tensor:
        """Return scores, or with labels a loss.

        Args:
            tokens: `b n`.
            key_mask: `b n`, False for padding, which may be on either side.
            prompt_mask: `b n`, True for the tokens of the prompt.
            prompt_lengths: `b`, tokens of the prompt without padding, instead of the mask.
            labels: `b`, the target scores, or the target bins. The loss is on scores before their normalisation.
            denominator: divides the summed loss instead of the number of rows.
            raw: return scores before their normalisation; their differences are the trained log-odds.
            disable_lora: score with the base.

        Returns:
            `b` in at least float32, or the mean squared error, or the cross-entropy of the bins in nats.
        """
        if prompt_lengths is not None:
            if prompt_mask is not None:
                raise ValueError("got prompt_mask and prompt_lengths; expected one of them")
            real = torch.ones_like(tokens) if key_mask is None else key_mask
            prompt_mask = real.cumsum(dim=-1) <= prompt_lengths.unsqueeze(-1)
        embeds = self.embed(tokens, key_mask, prompt_mask=prompt_mask, disable_lora=disable_lora)
        scores = outputs = read_wide(self.head, self._pool(embeds, key_mask, prompt_mask))
        if labels is not None and labels.shape != tokens.shape[:1]:
            raise ValueError(f"labels have the shape {tuple(labels.shape)}; expected {len(tokens)}, one for each row")
        if self.num_binned_output:
            if labels is not None:
                return cross_entropy(outputs, labels, denominator=denominator)
            scores = outputs.softmax(dim=-1) * torch.arange(self.num_binned_output, device=outputs.device)
        scores = scores.sum(dim=-1)
        if labels is not None:
            return masked_mean((scores - labels).square(), denominator=denominator)
        return scores if raw else (scores - self.score_mean) / self.score_std

    def embed(
        self, tokens: Tensor, key_mask: Tensor | None = None, *, prompt_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return the final embeddings: `b n -> b n e`; `options` are those of the PaLM."""
        parts = self.prompt_embed, self.response_embed
        return self.palm(
            tokens,
            key_mask=key_mask,
            extra_embed=None if prompt_mask is None else torch.where(prompt_mask.unsqueeze(-1), *parts),
            return_only_embedding=True,
            finetune_scope=self.lora_scope,
            **options,
        )

    def _pool(self, embeds: Tensor, key_mask: Tensor | None, prompt_mask: Tensor | None) -> Tensor:
        """Return the embeddings that the head reads: `b n e -> b e`."""
        rows, columns = (torch.arange(size, device=embeds.device) for size in embeds.shape[:2])
        keep = torch.ones_like(embeds[..., 0], dtype=torch.bool) if key_mask is None else key_mask
        if self.pooling == "last":
            return embeds[rows, (columns * keep).amax(dim=-1)]
        if self.pooling == "mean" and prompt_mask is not None:
            keep = keep & ~prompt_mask
        return masked_sum(embeds, keep.unsqueeze(-1), dim=1) / keep.sum(dim=-1, keepdim=True).clamp(min=1)

    @torch.no_grad()
    @beartype
    def score(self, sequences: Sequences, *, batch_size: int = 64, raw: bool = False) -> Tensor:
        """Return the scores of prompts with responses, `b`, computed `batch_size` rows at a time without gradients."""
        batches = batches_by_length(sequences.lengths, batch_size)
        parts = [sequences.select(rows).to(self.palm.device) for rows in batches]
        scores = [self(part.tokens, part.key_mask, prompt_mask=part.prompt_mask, raw=raw) for part in parts]
        return torch.cat(scores)[torch.cat(batches).argsort().to(self.palm.device)]

    @torch.no_grad()
    @beartype
    def normalise(self, scores: Tensor) -> None:
        """Shift and scale future scores: `scores`, which this model returned, get mean 0 and deviation 1.

        The order of scores and the weights do not change. Normalisations add up: the same set again changes nothing.
        """
        std = scores.double().std(correction=0)
        if scores.ndim != 1 or not 0 < std < float("inf"):
            raise ValueError(f"got scores {tuple(scores.shape)} of deviation {std:g}; expected `b`, two that differ")
        self.score_mean += self.score_std * scores.double().mean()
        self.score_std *= std


def read_wide(head: nn.Linear, embeds: Tensor) -> Tensor:
    """Apply a head in float32, even under autocast and with narrower weights: `... e -> ... o`.

    In bfloat16 close scores would be equal, and values around 100 would move in steps of 0.5.
    """
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    with torch.autocast(embeds.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.to(dtype)
        return F.linear(embeds.to(dtype), head.weight.to(dtype), bias)
