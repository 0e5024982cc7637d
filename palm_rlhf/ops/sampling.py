"""The distribution that tokens are sampled from: its options, and the way from logits to it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from beartype import BeartypeConf, beartype
from torch import Tensor

from palm_rlhf.ops.nucleus import nucleus_cut, top_k_cut

# The range of each option, as a test of a value and in words.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda t: 0 <= t < math.inf, "0 (greedy) or more, and finite"),
    "top_k": (lambda k: k is None or k >= 1, "at least 1, or None for all tokens"),
    "top_p": (lambda p: p is None or 0 <= p <= 1, "0 to 1, or None for all tokens"),
    "min_p": (lambda p: p is None or 0 <= p <= 1, "0 to 1, or None for all tokens"),
    "repetition_penalty": (lambda penalty: 0 < penalty < math.inf, "above 0 (1 is none), and finite"),
    "presence_penalty": (math.isfinite, "a finite number (0 is none)"),
    "frequency_penalty": (math.isfinite, "a finite number (0 is none)"),
}


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn from a model's logits; commands show the text below each field in their help.

    The penalties come first, then the temperature, then top-k, top-p and min-p, each on the tokens that are left.
    Raises ValueError for a value out of its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 is greedy and always takes the likeliest token."""

    top_k: int | None = None
    """Sample from this many of the likeliest tokens; None: from all."""

    top_p: float | None = None
    """Sample from the fewest tokens that hold this much of the probability (arXiv:1904.09751); None or 1: from all."""

    min_p: float | None = None
    """Sample from tokens of at least this share of the probability of the likeliest (arXiv:2407.01082); None: all."""

    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in prompt or response, multiplies negative ones (arXiv:1909.05858); 1: none."""

    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the response already has."""

    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time that the response already has it."""

    def __post_init__(self) -> None:
        for name, (holds, expected) in RANGES.items():
            if not holds(value := getattr(self, name)):
                raise ValueError(f"got {name}={value}, expected {expected}")

    @property
    def options(self) -> dict[str, Any]:
        """The options of sampling by their names, as `PaLM.generate` takes them."""
        return {field.name: getattr(self, field.name) for field in fields(Sampling)}


class UncheckedSampling(Sampling):
    """Options that a command line has parsed and `checked` checks.

    The parser would report an error of `Sampling` itself, in another form than the other errors of a command.
    """

    def __post_init__(self) -> None:
        """Leave the check of the ranges to `checked`."""

    def checked(self) -> Sampling:
        """Return the same options as a `Sampling`; ValueError for a value out of its range."""
        return Sampling(**self.options)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Divide positive logits of seen tokens by the penalty, multiply negative ones (Keskar et al. 2019, section 4.1).

    logits: `b v`, seen: `b v` bool -> `b v`, penalty: a number, or one for each logit
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits, and all equal to the k-th (Fan et al. 2018): `... v -> ... v`, else -inf."""
    return torch.where(top_k_cut(logits, k).keeps(logits), logits, -torch.inf)


def keep_top_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep the smallest set of tokens that holds at least p of the mass (Holtzman et al. 2019, section 3.1).

    It has one token at least; of equally likely tokens, those with the smaller ids come first.

    logits: `... v` -> `... v`, p: a number, or one for each row, `... 1`
    """
    return torch.where(nucleus_cut(logits, p).keeps(logits), logits, -torch.inf)


def keep_min_p(logits: Tensor, p: float | Tensor) -> Tensor:
    """Keep tokens of at least p times the probability of the likeliest (Nguyen et al. 2024).

    logits: `... v` -> `... v`, p: a number, or one for each row, `... 1`
    """
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < p * probs.amax(dim=-1, keepdim=True), -torch.inf)


def truncate(
    logits: Tensor, *, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None
) -> Tensor:
    """Apply top-k, top-p and min-p in turn: `... v -> ... v`, -inf at the tokens left out; without any, the logits."""
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None and top_p < 1.0:
        logits = keep_top_p(logits, top_p)
    if min_p is not None and min_p > 0.0:
        logits = keep_min_p(logits, min_p)
    return logits


def truncated_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    allowed_tokens: Tensor | None = None,
    always: Tensor | None = None,
) -> Tensor:
    """Return the logits of the distribution without penalties: temperature, then `truncate`.

    Args:
        logits: `... v`.
        temperature: 0 is greedy, with all mass on the first largest logit.
        allowed_tokens: `v` bool, False for ids that are never sampled, such as the padding of a vocabulary.
        always: `...`, a token of each row that truncation never leaves out.

    Returns:
        `... v`, float32 or wider, -inf at the tokens left out.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if allowed_tokens is not None:
        logits = logits.masked_fill(~allowed_tokens.to(logits.device), -torch.inf)
    if temperature == 0:
        certain = torch.full_like(logits, -torch.inf)
        return certain.scatter_(-1, logits.argmax(dim=-1, keepdim=True), 0.0)
    if temperature != 1.0:
        logits = logits / temperature
    kept = truncate(logits, top_k=top_k, top_p=top_p, min_p=min_p)
    if always is not None and kept is not logits:
        always = always.unsqueeze(-1)
        kept = kept.scatter(-1, always, logits.gather(-1, always))
    return kept


def sampling_logprobs(
    logits: Tensor,
    sampling: Sampling,
    *,
    seen: Tensor | None = None,
    counts: Tensor | None = None,
    allowed_tokens: Tensor | None = None,
) -> Tensor:
    """Return the log-probabilities of the distribution that is sampled from.

    Args:
        logits: `b v`.
        sampling: the options of the distribution.
        seen: `b v` bool, the tokens of prompt and response so far; needed for a repetition penalty.
        counts: `b v` integers, how often the response has each token; needed for a presence or frequency penalty.
        allowed_tokens: `v` bool, False for ids that are never sampled.

    Returns:
        `b v`, float32 or wider, -inf at the tokens left out.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.repetition_penalty != 1.0:
        assert seen is not None, "a repetition penalty needs the tokens seen"
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        assert counts is not None, "a presence or frequency penalty needs the counts of sampled tokens"
        present, counts = (counts > 0).to(logits.dtype), counts.to(logits.dtype)
        logits = logits - sampling.presence_penalty * present - sampling.frequency_penalty * counts
    return truncated_logits(
        logits,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        allowed_tokens=allowed_tokens,
    ).log_softmax(dim=-1)


def sample(logprobs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token a row, by the race of exponential clocks (Gumbel's trick): `b v -> b`."""
    if logprobs.device.type == "meta":
        return logprobs.argmax(dim=-1)
    return race(logprobs, torch.empty_like(logprobs).exponential_(generator=generator))


def race(logprobs: Tensor, clocks: Tensor) -> Tensor:
    """Return the token of each row whose clock rings first, faster by its probability: `b v, b v -> b`.

    With clocks from the exponential distribution, tokens come as often as their probabilities say.
    """
    return (logprobs.exp() / clocks).argmax(dim=-1)
