"""Prompts with responses as one block of tokens, and the policy's log-probabilities of those responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from beartype import beartype
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.logprobs import chunks_are_faster, distribution_entropy, linear_logprobs, token_logprobs
from palm_rlhf.ops.pinned_copy import upload
from palm_rlhf.ops.sampling import truncated_logits
from palm_rlhf.policy.shared_prompts import embeds_before_actions


@dataclass(frozen=True)
class Sequences:
    """Rows of a prompt followed by its response, padded on the right.

    The tokens of a response are actions; each is chosen at the token before it. If an environment replied between the
    policy's turns, its tokens are part of the response. They are read, but they are no actions.
    """

    tokens: Tensor  # b n
    prompt_lengths: Tensor  # b
    response_lengths: Tensor  # b
    policy_mask: Tensor | None = None  # b t, False for response tokens that an environment wrote; None: there are none

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row without padding: `b`."""
        return self.prompt_lengths + self.response_lengths

    @property
    def key_mask(self) -> Tensor:
        """False for padding: `b n`."""
        return self._columns < self.lengths.unsqueeze(-1)

    @property
    def prompt_mask(self) -> Tensor:
        """True for the tokens of the prompt: `b n`."""
        return self._columns < self.prompt_lengths.unsqueeze(-1)

    @property
    def response_mask(self) -> Tensor:
        """True for the actions, in their columns of `tokens`: `b n`."""
        mask = self.key_mask & ~self.prompt_mask
        if self.policy_mask is None:
            return mask
        steps = (self._columns - self.prompt_lengths.unsqueeze(-1)).clamp(0, self.policy_mask.shape[1] - 1)
        return mask & self.policy_mask.gather(-1, steps)

    @property
    def action_mask(self) -> Tensor:
        """True for the actions, counted from the start of each response: `b t`."""
        mask = self._steps < self.response_lengths.unsqueeze(-1)
        return mask if self.policy_mask is None else mask & self.policy_mask

    @property
    def actions(self) -> Tensor:
        """The actions, each response from column 0; 0 at padding and at tokens that are no actions: `b t`."""
        return self.responses.masked_fill(~self.action_mask, 0)

    @property
    def responses(self) -> Tensor:
        """The responses from column 0, an environment's tokens included; any token at padding: `b t`."""
        return self.tokens.gather(-1, self._action_columns)

    @cached_property
    def host_lengths(self) -> list[tuple[int, int]]:
        """Tokens of each row's prompt and of its response: read from the device once, and not from parts again."""
        return list(zip(self.prompt_lengths.tolist(), self.response_lengths.tolist(), strict=True))

    @property
    def num_actions(self) -> int:
        """Actions of all rows together."""
        return int(self.action_mask.sum())

    @property
    def _columns(self) -> Tensor:
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    @property
    def _steps(self) -> Tensor:
        return torch.arange(max(response for _, response in self.host_lengths), device=self.tokens.device)

    @property
    def _action_columns(self) -> Tensor:
        """The column of each action in `tokens`; at padding, any column of the row: `b t`."""
        return (self.prompt_lengths.unsqueeze(-1) + self._steps).clamp(max=self.tokens.shape[1] - 1)

    def before_actions(self, x: Tensor) -> Tensor:
        """Return the entries at the token before each action: `b n ... -> b t ...`."""
        index = self._action_columns - 1
        return x.gather(1, index.reshape(*index.shape, *(1 for _ in x.shape[2:])).expand(-1, -1, *x.shape[2:]))

    def select(self, rows: Tensor | slice) -> "Sequences":
        """Return some of the rows, without the columns that are padding in all of them."""
        places = torch.arange(len(self))[rows if isinstance(rows, slice) else rows.cpu()]
        lengths = [self.host_lengths[place] for place in places.tolist()]
        rows = rows if isinstance(rows, slice) else upload(places, self.tokens.device)
        tokens = self.tokens[rows][:, : max(map(sum, lengths))]
        mask = self.policy_mask
        mask = None if mask is None else mask[rows][:, : max(response for _, response in lengths)]
        return Sequences(tokens, self.prompt_lengths[rows], self.response_lengths[rows], mask)._knowing(lengths)

    def to(self, device: torch.device | str) -> "Sequences":
        """Return the same rows on another device."""
        mask = None if self.policy_mask is None else upload(self.policy_mask, device)
        tokens, prompts, responses = (
            upload(part, device) for part in (self.tokens, self.prompt_lengths, self.response_lengths)
        )
        return Sequences(tokens, prompts, responses, mask)._knowing(self.host_lengths)

    def _knowing(self, lengths: list[tuple[int, int]]) -> "Sequences":
        self.__dict__["host_lengths"] = lengths
        return self


@beartype
def join(
    prompts: Sequence[Tensor], responses: Sequence[Tensor], policy_masks: Sequence[Tensor] | None = None
) -> Sequences:
    """Lay out prompts and responses, 1-d tensors of any lengths above 0, one pair a row.

    `policy_masks` are True for the tokens of each response that the policy wrote; None means all of them.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(
            f"got {len(prompts)} prompts and {len(responses)} responses; expected the same number, at least one"
        )
    for kind, rows in (("prompt", prompts), ("response", responses)):
        for index, row in enumerate(rows):
            if row.ndim != 1 or len(row) == 0:
                raise ValueError(
                    f"{kind} {index} has the shape {tuple(row.shape)}; expected a 1-d tensor of at least one token"
                )
    if policy_masks is not None and [len(mask) for mask in policy_masks] != [len(row) for row in responses]:
        raise ValueError("got policy_masks of other lengths than the responses; expected one entry for each token")
    rows = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    device = rows[0].device
    prompt_lengths, response_lengths = (
        torch.tensor([len(row) for row in part], device=device) for part in (prompts, responses)
    )
    mask = None if policy_masks is None else pad_sequence([mask.to(device) for mask in policy_masks], batch_first=True)
    return Sequences(pad_sequence(rows, batch_first=True), prompt_lengths, response_lengths, mask)


@beartype
def batches_by_length(lengths: Tensor, size: int, shard: tuple[int, int] = (0, 1)) -> list[Tensor]:
    """Return the rows of batches of up to `size` rows of similar length, which need little padding: `b -> ...`.

    With `shard=(i, k)` they are the batches of the i-th of k processes, which takes every k-th row by length.
    """
    index, num_shards = shard
    rows = lengths.argsort(stable=True)[index::num_shards]
    return [batch for batch in rows.split(size) if len(batch)]


@beartype
def spoken(sequences: Sequences, tokenizer: Any = None, eos_token: int | None = None) -> tuple[list, list]:
    """Return prompts and completions: texts if there is a tokenizer (completions without the EOS), else 1-d tensors."""
    prompts, completions = [], []
    for row, prompt, response in zip(
        sequences.tokens, sequences.prompt_lengths.tolist(), sequences.response_lengths.tolist(), strict=True
    ):
        completion = row[prompt : prompt + response]
        if tokenizer is not None and eos_token is not None and int(completion[-1]) == eos_token:
            completion = completion[:-1]
        # copies, since a view that is kept would keep the whole block of tokens
        prompts.append(row[:prompt].clone() if tokenizer is None else tokenizer.decode(row[:prompt].tolist()))
        completions.append(completion.clone() if tokenizer is None else tokenizer.decode(completion.tolist()))
    return prompts, completions


class ActionLogprobs(NamedTuple):
    """Log-probability and entropy of each action under its sampling distribution: `b t` each, float32."""

    logprobs: Tensor
    entropy: Tensor


def action_logprobs(
    palm: PaLM,
    embeds: Tensor,
    actions: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    allowed_tokens: Tensor | None = None,
    entropy_needs_grad: bool = False,
) -> ActionLogprobs:
    """Return the log-probability of each action under the sampling distribution, and its entropy in nats.

    An action always counts as kept by top-k and top-p: they cut the distribution of the policy that sampled it, and the
    policy has changed since.

    Shapes: embeds `b t e`, at the token before each action; actions `b t`; allowed_tokens `v` bool.
    """
    weight, in_chunks = palm.output_weight, temperature > 0
    if allowed_tokens is not None:  # ids that pad the vocabulary are at its end, and are cut off
        num_allowed = int(allowed_tokens.sum())
        in_chunks = in_chunks and bool(allowed_tokens[:num_allowed].all())
        weight = weight[:num_allowed]
    if in_chunks and chunks_are_faster(embeds, weight, entropy_needs_grad=entropy_needs_grad):
        scale = palm.config.output_scale / temperature
        return ActionLogprobs(
            *linear_logprobs(
                embeds,
                weight,
                actions,
                scale=scale,
                top_k=top_k,
                top_p=top_p,
                entropy_needs_grad=entropy_needs_grad,
            )
        )
    logits = palm.to_logits(embeds, wide=True)  # as those of the chunks are
    logits = truncated_logits(
        logits, temperature=temperature, top_k=top_k, top_p=top_p, allowed_tokens=allowed_tokens, always=actions
    )
    return ActionLogprobs(token_logprobs(logits, actions), distribution_entropy(logits, needs_grad=entropy_needs_grad))


def response_logprobs(
    palm: PaLM, sequences: Sequences, *, finetune_scope: str | None = None, **sampling: Any
) -> ActionLogprobs:
    """Return `action_logprobs` of the responses under a PaLM; `sampling` are its options."""
    embeds = embeds_before_actions(palm, sequences, finetune_scope)
    return action_logprobs(palm, embeds, sequences.actions, **sampling)
