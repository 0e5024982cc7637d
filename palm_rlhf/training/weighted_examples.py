"""The data of supervised fine-tuning: tokens with their weights in the loss, and rows of several examples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from beartype import beartype
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf.model.inputs import check_token_ids
from palm_rlhf.ops.logprobs import target_mask
from palm_rlhf.ops.pinned_copy import upload
from palm_rlhf.training.epoch_sampler import EpochSampler


@beartype
@dataclass(frozen=True, eq=False)
class Example:
    """Tokens to read, and the weight of each as a target, 0 for tokens that are not learnt: both `n`.

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
    """Raise ValueError, with the name of the data, for an example that cannot be learnt from."""
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
    """Return a digest of the examples in their order, by which a resumed run knows that it has the same data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.tokens.cpu().long().numpy().tobytes())
        digest.update(example.weights.cpu().float().numpy().tobytes())
    return digest.hexdigest()


class Rows(NamedTuple):
    """Rows of examples next to each other, padded on the right: `b n`.

    `document_ids` are equal for the tokens of one example, and None where no row has several. `counted` are the places
    of the targets that have a weight, counted through `b (n-1)`.
    """

    tokens: Tensor
    weights: Tensor
    document_ids: Tensor | None
    counted: Tensor

    def to(self, device: torch.device | str) -> "Rows":
        """Return the same rows on another device."""
        ids = None if self.document_ids is None else upload(self.document_ids, device)
        return Rows(upload(self.tokens, device), upload(self.weights, device), ids, upload(self.counted, device))


@beartype
def lay_out(rows: Sequence[Sequence[Example]]) -> Rows:
    """Return each list of examples as one row, padded on the right; padding has the weight 0."""
    tokens = [torch.cat([example.tokens for example in row]).long() for row in rows]
    weights = [torch.cat([example.weights for example in row]).float() for row in rows]
    document_ids = None
    if any(len(row) > 1 for row in rows):
        lengths = [torch.tensor([len(example) for example in row]) for row in rows]
        ids = [torch.arange(len(row)).repeat_interleave(length) for row, length in zip(rows, lengths, strict=True)]
        document_ids = pad_sequence(ids, batch_first=True, padding_value=-1)
    padded = pad_sequence(weights, batch_first=True)
    mask = target_mask(loss_mask=padded != 0, document_ids=document_ids)
    assert mask is not None
    return Rows(pad_sequence(tokens, batch_first=True), padded, document_ids, mask.flatten().nonzero().flatten())


@runtime_checkable
class RowSampler(Protocol):
    """A sampler that puts examples into rows, each of them once an epoch, in an order that its state restores."""

    @property
    def num_items(self) -> int:
        """Number of examples."""
        ...

    @property
    def num_drawn(self) -> int:
        """Examples drawn so far, over all epochs; examples drawn ahead of others do not count."""

    def draw(self, count: int) -> list[list[int]]:
        """Return the indices of the examples in each of the next `count` rows."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sampler, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError where it belongs to other data or settings."""


class OneInARow:
    """A row for each example, in a new random order every epoch."""

    @beartype
    def __init__(self, num_items: int, seed: int):
        self.num_items, self._sampler = num_items, EpochSampler(num_items, seed)

    @property
    def num_drawn(self) -> int:
        return self._sampler.num_drawn

    @beartype
    def draw(self, count: int) -> list[list[int]]:
        """Return the next `count` indices, each a row of its own."""
        return [[index] for index in self._sampler.draw(count)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the sampler, as JSON."""
        return self._sampler.state_dict()

    @beartype
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError where it belongs to other data or another seed."""
        self._sampler.load_state_dict(state)
