"""What a model is fine-tuned on: tokens with the weight that the loss gives each; and rows of several of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from beartype import beartype
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf.model.inputs import check_token_ids
from palm_rlhf.training.epoch_sampler import EpochSampler


@beartype
@dataclass(frozen=True, eq=False)
class Example:
    """Tokens to read, and the weight of each as a target, 0 for those not to be learnt: both `n`.

    The first token is never a target, since nothing comes before it.
    """

    tokens: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def total_weight(self) -> float:
        """The sum of the weights that count."""
        return float(self.weights[1:].double().sum())


@beartype
def check_examples(examples: Sequence[Example], name: str, num_tokens: int) -> None:
    """ValueError by name for an example that cannot be learnt from."""
    if not examples:
        raise ValueError(f"{name} is empty, expected at least one example")
    for index, example in enumerate(examples):
        tokens, weights, label = example.tokens, example.weights, f"{name}[{index}]"
        if tokens.ndim != 1 or tokens.shape != weights.shape or not weights.is_floating_point():
            raise ValueError(
                f"{label} has tokens of shape {tuple(tokens.shape)} and weights of shape {tuple(weights.shape)} and "
                f"{weights.dtype}, expected one floating-point weight for each token of a 1-d tensor"
            )
        try:
            check_token_ids(tokens, num_tokens)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        if not bool((weights >= 0).all()) or not 0 < example.total_weight < float("inf"):
            raise ValueError(
                f"{label} has weights from {weights.tolist()!r:.80}, expected finite ones of at least 0, one of them "
                "above 0 after the first token: there is nothing to learn from it otherwise"
            )


@beartype
def digest_of(examples: Sequence[Example]) -> str:
    """What tells examples from others, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.tokens.cpu().long().numpy().tobytes())
        digest.update(example.weights.cpu().float().numpy().tobytes())
    return digest.hexdigest()


class Rows(NamedTuple):
    """Rows of examples next to each other, padded on the right: all `b n`.

    `document_ids` are equal for the tokens of one example, and None where no row has several.
    """

    tokens: Tensor
    weights: Tensor
    document_ids: Tensor | None

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on another device."""
        return Rows(*(t if t is None else t.to(device) for t in self))


@beartype
def lay_out(rows: Sequence[Sequence[Example]]) -> Rows:
    """Each list of examples as one row; pads have weight 0, and come after all tokens that a causal model relates."""
    tokens = [torch.cat([example.tokens for example in row]).long() for row in rows]
    weights = [torch.cat([example.weights for example in row]).float() for row in rows]
    ids = None
    if any(len(row) > 1 for row in rows):
        lengths = [torch.tensor([len(example) for example in row]) for row in rows]
        ids = [torch.arange(len(row)).repeat_interleave(length) for row, length in zip(rows, lengths, strict=True)]
        ids = pad_sequence(ids, batch_first=True, padding_value=-1)
    return Rows(pad_sequence(tokens, batch_first=True), pad_sequence(weights, batch_first=True), ids)


@runtime_checkable
class RowSampler(Protocol):
    """Deals examples out to rows, all of them once an epoch, in an order that its state brings back."""

    num_items: int

    @property
    def num_drawn(self) -> int:
        """Examples drawn so far, epoch after epoch; those drawn ahead of others do not count."""

    def draw(self, count: int) -> list[list[int]]:
        """The indices of the examples in each of the next `count` rows."""

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler is, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`; ValueError where it belongs to other data or settings."""


class OneInARow(EpochSampler):
    """A row for each example, in a new random order every epoch."""

    @beartype
    def draw(self, count: int) -> list[list[int]]:
        """The next `count` indices, each a row of its own."""
        return [[index] for index in super().draw(count)]
