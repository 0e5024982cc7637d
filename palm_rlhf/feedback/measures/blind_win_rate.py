"""The blind win rate of a new model against an old one, and the sentence that says whether it is better."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from beartype import beartype
from sqlalchemy.orm import Session

from palm_rlhf.algorithms.win_rate import wilson_interval
from palm_rlhf.feedback.learning.round_rows import events_of
from palm_rlhf.feedback.measures.vote_records import VoteRecord, vote_records
from palm_rlhf.feedback.web.catalogues import N_
from palm_rlhf.training.reward_metrics import effective_count

Verdict = Literal["better", "worse", "unclear", "no votes"]
SENTENCES = {
    "better": N_(
        "The new model is better: people preferred it in %(rate)s of %(votes)s blind comparisons (95%% interval "
        "%(low)s to %(high)s)."
    ),
    "worse": N_(
        "The new model is worse: people preferred it in only %(rate)s of %(votes)s blind comparisons (95%% interval "
        "%(low)s to %(high)s)."
    ),
    "unclear": N_(
        "The new model is not shown to be better: people preferred it in %(rate)s of the blind comparisons (%(votes)s "
        "so far, 95%% interval %(low)s to %(high)s)."
    ),
    "no votes": N_("Nobody has compared the new model with the old one yet."),
}


@dataclass(frozen=True)
class BlindWinRate:
    """How often people preferred the new model to the old one without knowing which is which.

    `win_rate` is the mean over all votes, in which a tie, and two bad answers, are half a win. `low` and `high` are
    Wilson's 95% interval with the prompts as clusters: several votes on one prompt count as fewer, as far as they are
    alike. It is an interval for these people and more prompts, and holds for a number of votes that was fixed before.
    Without votes all three are None.
    """

    wins: int
    losses: int
    ties: int
    num_people: int
    num_prompts: int
    win_rate: float | None
    low: float | None
    high: float | None

    @property
    def num_votes(self) -> int:
        """The number of votes."""
        return self.wins + self.losses + self.ties

    @property
    def verdict(self) -> Verdict:
        """Better or worse where the whole interval lies on one side of 1/2."""
        if self.low is None or self.high is None:
            return "no votes"
        return "better" if self.low > 0.5 else "worse" if self.high < 0.5 else "unclear"

    @property
    def message(self) -> str:
        """The sentence that says for everybody whether the new model is better, in English, with places for `shown`."""
        return SENTENCES[self.verdict]

    @property
    def shown(self) -> dict[str, str]:
        """The numbers of the sentence, as they are shown in it."""
        numbers = {"rate": self.win_rate, "low": self.low, "high": self.high}
        return {
            "votes": str(self.num_votes),
            **{name: "" if value is None else f"{value:.0%}" for name, value in numbers.items()},
        }

    def sentence(self) -> str:
        """Return the sentence in English."""
        return self.message % self.shown


@beartype
def win_rate_of(votes: Sequence[VoteRecord], *, new: str, old: str) -> BlindWinRate:
    """Return the win rate of the model `new` against the model `old`, by their ids; other votes are left out."""
    votes = [vote for vote in votes if {vote.left_model, vote.right_model} == {new, old}]
    shares = [vote.left_share if vote.left_model == new else 1 - vote.left_share for vote in votes]
    prompts = {key: place for place, key in enumerate(dict.fromkeys(vote.prompt_key for vote in votes))}
    rate, low, high = None, None, None
    if votes:
        rate = sum(shares) / len(shares)
        clusters = torch.tensor([prompts[vote.prompt_key] for vote in votes])
        low, high = wilson_interval(rate, effective_count(torch.tensor(shares, dtype=torch.float64), clusters))
    return BlindWinRate(
        wins=shares.count(1.0),
        losses=shares.count(0.0),
        ties=shares.count(0.5),
        num_people=len({vote.person_id for vote in votes}),
        num_prompts=len(prompts),
        win_rate=rate,
        low=low,
        high=high,
    )


@beartype
def blind_win_rate(session: Session, *, new: str, old: str, round_id: str | None = None) -> BlindWinRate:
    """Return the win rate of one model against another in the blind comparisons of a round, or of all rounds."""
    return win_rate_of(vote_records(session, purpose="evaluation", round_id=round_id), new=new, old=old)


@beartype
def round_win_rate(session: Session, round_id: str) -> BlindWinRate | None:
    """Return the win rate of the new model of a round against the old one; None before their answers are there."""
    models = events_of(session, round_id).get("evaluation", {}).get("models", [])
    if len(models) != 2:
        return None
    old, new = models
    return blind_win_rate(session, new=new, old=old, round_id=round_id)
