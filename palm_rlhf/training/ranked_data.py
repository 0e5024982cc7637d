"""The data of a reward model: rankings of responses, and ratings; checked, and cut to a length."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from beartype import BeartypeConf, beartype
from torch import Tensor

from palm_rlhf.model.inputs import check_token_ids


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class Ranking:
    """A prompt and two or more responses to it, best first: 1-d tensors of token ids.

    `margins` are the differences in score that the better responses should have: one number for all pairs, or one each
    in the order of `itertools.combinations`: the first and the second, the first and the third, ... A ranking of
    `weight` 2 counts in the loss as two rankings of weight 1; evaluations count pairs without weights.
    """

    prompt: Tensor
    responses: Sequence[Tensor]
    margins: float | Sequence[float] = 0.0
    weight: float = 1.0

    @property
    def num_pairs(self) -> int:
        """The number of pairs: K(K-1)/2 for K responses."""
        return math.comb(len(self.responses), 2)

    @property
    def pair_margins(self) -> list[float]:
        """A margin for each pair."""
        return list(self.margins) if isinstance(self.margins, Sequence) else [self.margins] * self.num_pairs

    def cut(self, max_seq_len: int) -> "Ranking":
        """Return the ranking cut by `cut_to`, with one prompt for all responses."""
        prompt, responses = cut_to(max_seq_len, self.prompt, self.responses)
        return replace(self, prompt=prompt, responses=responses)


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class Rating:
    """A prompt, a response to it, and its label: the score it should get, or the number of its bin."""

    prompt: Tensor
    response: Tensor
    label: float | int

    @property
    def responses(self) -> list[Tensor]:
        """The one response."""
        return [self.response]

    @property
    def num_pairs(self) -> int:
        """0: a rating has no pairs."""
        return 0

    def cut(self, max_seq_len: int) -> "Rating":
        """Return the rating cut by `cut_to`."""
        prompt, (response,) = cut_to(max_seq_len, self.prompt, [self.response])
        return replace(self, prompt=prompt, response=response)


Item = Ranking | Rating


@beartype
def cut_to(max_seq_len: int, prompt: Tensor, responses: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a prompt and responses of at most `max_seq_len` tokens together.

    Responses lose their ends until one token of the prompt fits, then the prompt loses its start. All responses keep
    the same prompt, as much of it as fits before the longest one.
    """
    responses = [response[: max_seq_len - 1] for response in responses]
    return prompt[-(max_seq_len - max(map(len, responses))) :], responses


@beartype
def checked(
    data: Sequence[Item],
    name: str,
    *,
    num_tokens: int,
    max_seq_len: int,
    num_bins: int = 0,
) -> list[Item]:
    """Return the data as int64 on the CPU, cut to `max_seq_len`.

    Raises ValueError, with the name of the data, for items that cannot be learnt from, such as rankings in which two
    responses are the same after the cut: no model can tell them apart.
    """
    if not data:
        raise ValueError(f"{name} is empty: expected at least one Ranking or Rating")
    if len({type(item) for item in data}) > 1:
        raise ValueError(f"{name} mixes Rankings and Ratings: expected one kind, each has losses of its own")
    if not any(isinstance(item, Rating) or item.weight for item in data):
        raise ValueError(f"{name} has rankings of weight 0 only: expected one with a weight above 0 to learn from")
    ready: list[Item] = []
    for index, item in enumerate(data):
        label = f"{name}[{index}]"
        _check_tokens(label, item.prompt, item.responses, num_tokens)
        prompt, responses = item.prompt.cpu().long(), [response.cpu().long() for response in item.responses]
        if isinstance(item, Rating):
            _check_label(label, item.label, num_bins)
            ready.append(replace(item, prompt=prompt, response=responses[0]).cut(max_seq_len))
        else:
            _check_ranking(label, item)
            ready.append(replace(item, prompt=prompt, responses=responses).cut(max_seq_len))
        _check_distinct(label, item.responses, ready[-1].responses, max_seq_len)
    return ready


def _check_tokens(label: str, prompt: Tensor, responses: Sequence[Tensor], num_tokens: int) -> None:
    parts = {"prompt": prompt, **{f"response {place}": tokens for place, tokens in enumerate(responses)}}
    for part, tokens in parts.items():
        if tokens.ndim != 1 or len(tokens) == 0:
            raise ValueError(
                f"the {part} of {label} has the shape {tuple(tokens.shape)}, expected a 1-d tensor of token ids"
            )
        try:
            check_token_ids(tokens, num_tokens)
        except ValueError as error:
            raise ValueError(f"the {part} of {label}: {error}") from None


def _check_ranking(label: str, ranking: Ranking) -> None:
    if len(ranking.responses) < 2:
        raise ValueError(f"{label} has {len(ranking.responses)} responses, expected two or more to rank")
    margins = ranking.pair_margins
    if len(margins) != ranking.num_pairs or not all(map(math.isfinite, margins)):
        raise ValueError(
            f"{label} has the margins {margins}, expected one number, or {ranking.num_pairs}: one for each pair"
        )
    if not 0 <= ranking.weight < math.inf:
        raise ValueError(f"{label} has the weight {ranking.weight}, expected a finite number of 0 or more")


def _check_label(label: str, value: float | int, num_bins: int) -> None:
    if num_bins and value not in range(num_bins):
        raise ValueError(f"{label} has the label {value}, expected the number of a bin, 0 to {num_bins - 1}")
    if not math.isfinite(value):
        raise ValueError(f"{label} has the label {value}, expected a finite number")


def _check_distinct(label: str, whole: Sequence[Tensor], cut: Sequence[Tensor], max_seq_len: int) -> None:
    seen: dict[bytes, int] = {}
    for place, response in enumerate(cut):
        first = seen.setdefault(response.numpy().tobytes(), place)
        if first != place:
            same = torch.equal(whole[first], whole[place])
            reason = "are the same" if same else f"become the same within max_seq_len={max_seq_len}"
            mend = "leave one of them out" if same else "choose a larger max_seq_len, or leave one of them out"
            raise ValueError(
                f"the responses {first} and {place} of {label} {reason}, expected ones that differ: {mend}"
            )


@beartype
def fingerprint(data: Sequence[Item]) -> str:
    """Return a digest of the data, by which a resumed run knows that it has the same data."""
    digest = hashlib.sha256()
    for item in data:
        digest.update(repr(item.label if isinstance(item, Rating) else item.pair_margins).encode())
        if isinstance(item, Ranking) and item.weight != 1:  # without weights the digest is the one of earlier runs
            digest.update(f"weight {float(item.weight)!r}".encode())
        for tokens in (item.prompt, *item.responses):
            digest.update(len(tokens).to_bytes(8, "little") + tokens.numpy().tobytes())
    return digest.hexdigest()
