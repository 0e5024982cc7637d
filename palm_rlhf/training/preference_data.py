"""The data of preference trainers: pairs of responses, and single responses that people liked or did not."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from beartype import beartype
from torch import Tensor

from palm_rlhf.policy.sequences import Sequences, join
from palm_rlhf.training.ranked_data import Ranking, Rating, checked


@beartype
@dataclass(frozen=True)
class Preference:
    """A prompt and two responses to it, 1-d tensors of token ids."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor

    @property
    def responses(self) -> tuple[Tensor, ...]:
        """The chosen response, then the rejected one."""
        return self.chosen, self.rejected

    @property
    def comparison(self) -> Ranking:
        """The same as a ranking of two."""
        return Ranking(self.prompt, self.responses)

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward reads: the prompt comes with each response."""
        return sum(len(self.prompt) + len(response) for response in self.responses)


@beartype
@dataclass(frozen=True)
class UnpairedPreference:
    """A prompt, a response to it, and whether people want such a response: 1-d tensors of token ids, and a bool."""

    prompt: Tensor
    response: Tensor
    desirable: bool

    @property
    def responses(self) -> tuple[Tensor, ...]:
        """The one response."""
        return (self.response,)

    @property
    def comparison(self) -> Rating:
        """The same as a rating: 1 for a desirable response, else 0."""
        return Rating(self.prompt, self.response, int(self.desirable))

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward reads."""
        return len(self.prompt) + len(self.response)


Preferences = Sequence[Preference | UnpairedPreference]  # all of one kind


@beartype
def checked_preferences(
    data: Preferences, name: str, *, paired: bool, num_tokens: int, max_seq_len: int
) -> Preferences:
    """Return the data as int64 on the CPU, cut to `max_seq_len`. Raises ValueError for unsuitable items, by name."""
    expected = Preference if paired else UnpairedPreference
    if not all(isinstance(item, expected) for item in data):
        got = sorted({type(item).__name__ for item in data})
        raise ValueError(
            f"{name} has items of {got}, expected {expected.__name__} alone: the loss kto takes UnpairedPreference, "
            "all others take Preference"
        )
    if not paired and len(data) == 1:
        raise ValueError(f"{name} has one item, expected two or more: kto needs responses to other prompts")
    limits = {"num_tokens": num_tokens, "max_seq_len": max_seq_len}
    cut = checked([item.comparison for item in data], name, **limits)
    return [
        replace(item, prompt=one.prompt, response=one.responses[0])
        if isinstance(item, UnpairedPreference)
        else Preference(one.prompt, *one.responses)
        for item, one in zip(data, cut, strict=True)
    ]


@beartype
def mismatched(items: Sequence[UnpairedPreference]) -> list[UnpairedPreference]:
    """Return each prompt with the response to the prompt before it, and the first with the last response."""
    return [replace(item, response=before.response) for item, before in zip(items, [items[-1], *items[:-1]])]


@beartype
def as_rows(items: Preferences) -> Sequences:
    """Return the rows of one forward, one for each response: of pairs, all chosen ones come first."""
    responses = [response for side in zip(*(item.responses for item in items)) for response in side]
    return join([item.prompt for item in items] * len(items[0].responses), responses)
