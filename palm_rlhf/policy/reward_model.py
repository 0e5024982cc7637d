"""The reward model: a PaLM that scores a whole sequence."""

import copy
from typing import Literal

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.generate import switch_off_dropout
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.cross_entropy import cross_entropy
from palm_rlhf.ops.masked import masked_mean, masked_sum
from palm_rlhf.policy.reward_model_folder import StoredRewardModel
from palm_rlhf.policy.sequences import Sequences

Pooling = Literal["last", "mean", "mean_all"]


class RewardModel(StoredRewardModel):
    """A copy of a PaLM with a linear head on one final embedding of each sequence; dropout is switched off in it.

    The head gives the score, or the logits of bins 0, 1, ..., and the score is then their expectation. Where prompts
    are marked, an embedding is added to prompt tokens and another to all others; both are zero at the start.

    Args:
        palm: copied, and left as it is.
        num_binned_output: number of bins; 0 is the scalar head.
        pooling: what the head reads: "last" is the last real token (Stiennon et al. 2020), "mean" the mean over the
            response, over all real tokens where no prompt is marked, "mean_all" that over all real tokens always.
        use_lora: train a LoRA scope of the PaLM in place of its weights.
        lora_r: rank of that scope.
        reward_lora_scope: its name.
    """

    @beartype
    def __init__(
        self,
        palm: PaLM,
        *,
        num_binned_output: int = 0,
        pooling: Pooling = "last",
        use_lora: bool = False,
        lora_r: int = 8,
        reward_lora_scope: str = "reward",
    ):
        super().__init__()
        if num_binned_output < 0 or num_binned_output == 1:
            raise ValueError(f"num_binned_output is {num_binned_output}; expected 2 or more bins, or 0 for a scalar")
        self.num_binned_output, self.pooling = num_binned_output, pooling
        self.palm = switch_off_dropout(copy.deepcopy(palm))
        if use_lora:
            self.palm.add_finetune_params(reward_lora_scope, lora_r)
        self.use_lora_scope(reward_lora_scope if use_lora else None)

        dim, like = palm.config.dim, {"device": palm.device, "dtype": palm.dtype}
        self.prompt_embed = nn.Parameter(torch.zeros(dim, **like))
        self.response_embed = nn.Parameter(torch.zeros(dim, **like))
        # A score needs no bias: in a loss of differences, its gradient would be rounding, which Adam makes steps of.
        self.head = nn.Linear(dim, max(num_binned_output, 1), bias=num_binned_output > 0, **like)
        nn.init.normal_(self.head.weight, std=(dim + 1) ** -0.5)  # Stiennon et al. 2020
        self.register_buffer("score_mean", torch.zeros(1, device=palm.device))
        self.register_buffer("score_std", torch.ones(1, device=palm.device))

    @beartype
    def use_lora_scope(self, scope: str | None) -> None:
        """Score with a LoRA scope of the PaLM, or with none; of the PaLM, only that or else the base is trained."""
        self.lora_scope = scope
        self.palm.requires_grad_(False)
        for parameter in self.palm.palm_parameters() if scope is None else self.palm.finetune_parameters(scope):
            parameter.requires_grad_(True)

    @property
    def reads_one_score_a_token(self) -> bool:
        """Whether the head gives the score of a sequence from the embedding of its last token, linearly."""
        return self.pooling == "last" and not self.num_binned_output

    def finetune_parameters(self) -> list[nn.Parameter]:
        """All that is trained: the head, the two embeddings, and the LoRA scope or else the whole PaLM."""
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
        """Scores, or with labels a loss.

        Args:
            tokens: `b n`.
            key_mask: `b n`, True for real tokens; pads may be on either side.
            prompt_mask: `b n`, True for the tokens of the prompt.
            prompt_lengths: `b`, real tokens of the prompt, instead of the mask.
            labels: `b`, what the score should be, or the bin; the loss is on scores before their normalisation.
            denominator: divides the summed loss instead of the number of rows.
            raw: scores before their normalisation, whose differences are the log-odds that were trained.
            disable_lora: score by the base.

        Returns:
            `b` in at least float32, or the mean squared error, or the cross-entropy of the bins in nats.
        """
        if prompt_lengths is not None:
            if prompt_mask is not None:
                raise ValueError("got a prompt_mask and prompt_lengths; expected one of them")
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
        self, tokens: Tensor, key_mask: Tensor | None = None, *, prompt_mask: Tensor | None = None, **options
    ) -> Tensor:
        """The final embeddings; `options` are for the PaLM: `b n -> b n e`."""
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
        """`b n e -> b e`"""
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
        """The scores of prompts with responses, so many rows at a time, without gradients: `b`."""
        order = sequences.lengths.argsort(stable=True)  # rows of like length together: few pads are read
        parts = [sequences.select(rows).to(self.palm.device) for rows in order.split(batch_size)]
        scores = [self(part.tokens, part.key_mask, prompt_mask=part.prompt_mask, raw=raw) for part in parts]
        return torch.cat(scores)[order.argsort().to(self.palm.device)]

    @torch.no_grad()
    @beartype
    def normalise(self, scores: Tensor) -> None:
        """Shift and scale all scores so that these, just given by this model, have mean 0 and deviation 1 from now on.

        Their order stays, and the weights. It builds on an earlier normalisation: the same set again changes nothing.
        """
        std = scores.double().std(correction=0)
        if scores.ndim != 1 or not 0 < std < float("inf"):
            raise ValueError(f"got scores {tuple(scores.shape)} of deviation {std:g}; expected `b`, two that differ")
        self.score_mean += self.score_std * scores.double().mean()
        self.score_std *= std


def read_wide(head: nn.Linear, embeds: Tensor) -> Tensor:
    """A head in float32, under autocast and with narrower weights too, where bfloat16 would round: `... e -> ... o`.

    Scores near each other would be equal in bfloat16, and values around 100 would go in steps of 0.5.
    """
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    with torch.autocast(embeds.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.to(dtype)
        return F.linear(embeds.to(dtype), head.weight.to(dtype), bias)
