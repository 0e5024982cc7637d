"""The rounds in the database, their stages, and the models that they lead to.

A round is done with a stage once the stage has its row of `RoundEvent`. The stages in their order, and their figures:

answers     prompts, answers: rows of the pool that people compare; scored: whether they have scores of a reward model
votes       comparisons, rankings, corrections: contributions of people so far that are not withdrawn; new: those since
            the round before
reward      rankings, by origin, and pairs that were trained on; held-out accuracy, low, high and num_pairs on votes on
            random pairs, and accuracy_all and num_pairs_all on all held-out votes (None where there is none); steps
policy      steps, score and kl: lists, the curves of PPO: mean score by the reward model, KL in nats per answer
model       model, the id of the new model; folder
evaluation  prompts, and models: the ids of the models whose answers are compared, the old one and the new one
"""

from datetime import datetime
from typing import Any

from beartype import beartype
from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.feedback.store.learning_tables import Round, RoundEvent

STAGES = ("answers", "votes", "reward", "policy", "model", "evaluation")


@beartype
def events_of(session: Session, round_id: str) -> dict[str, dict[str, Any]]:
    """Return the figures of the stages that a round has completed, by stage."""
    rows = session.scalars(select(RoundEvent).where(RoundEvent.round_id == round_id))
    return {row.stage: row.figures for row in rows}


@beartype
def record_stage(session: Session, round_id: str, stage: str, figures: dict[str, Any], now: datetime) -> None:
    """Write that a round has completed a stage."""
    session.add(RoundEvent(round_id=round_id, stage=stage, figures=figures, at=now))


@beartype
def all_rounds(session: Session) -> list[Round]:
    """Return the rounds of the database, the first one first."""
    return list(session.scalars(select(Round).order_by(Round.number)))


@beartype
def unfinished_round(session: Session) -> Round | None:
    """Return the round that has not completed its last stage, or None."""
    done = select(RoundEvent.round_id).where(RoundEvent.stage == STAGES[-1])
    return session.scalars(select(Round).where(Round.id.not_in(done)).order_by(Round.number)).first()


@beartype
def rounds_from(session: Session, model_id: str) -> list[Round]:
    """Return the rounds that led from a model to the newest one made of it, each from the model of the one before."""
    chain = []
    for row in all_rounds(session):
        if row.base_model_id == model_id:
            chain.append(row)
            model_id = events_of(session, row.id).get("model", {}).get("model", model_id)
    return chain


@beartype
def newest_model(session: Session, model_id: str) -> str:
    """Return the id of the newest model that rounds made of a model: the model itself where there is no round."""
    for row in rounds_from(session, model_id):
        model_id = events_of(session, row.id).get("model", {}).get("model", model_id)
    return model_id


@beartype
def folder_of_model(session: Session, model_id: str) -> str | None:
    """Return the folder of a model that a round has made, or None for another model."""
    for row in reversed(all_rounds(session)):
        figures = events_of(session, row.id).get("model", {})
        if figures.get("model") == model_id:
            return figures["folder"]
    return None
