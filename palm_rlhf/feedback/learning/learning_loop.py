"""The learning loop: rounds of answers, votes, a reward model, PPO, and a new model beside the old one.

Each stage ends with a row of the database. A process that is killed at any moment goes on where it was: stages that
have their row are not done again, training resumes from its checkpoints, and answers are not drawn twice.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from beartype import beartype
from sqlalchemy.orm import Session

from palm_rlhf.evaluation.measures.model_folders import default_device
from palm_rlhf.feedback.learning.learning_settings import LearningSettings
from palm_rlhf.feedback.learning.model_answers import Scorer, compare, fill_pool
from palm_rlhf.feedback.learning.policy_improvement import improve_policy, register_policy
from palm_rlhf.feedback.learning.reward_fitting import fit_reward_model
from palm_rlhf.feedback.learning.round_context import REWARD, RoundContext, open_chat_model
from palm_rlhf.feedback.learning.round_prompts import Messages, choose_prompts, read_round_prompts
from palm_rlhf.feedback.learning.round_rows import (
    STAGES,
    all_rounds,
    events_of,
    folder_of_model,
    newest_model,
    record_stage,
    rounds_from,
    unfinished_round,
)
from palm_rlhf.feedback.learning.sole_learner import sole_learner
from palm_rlhf.feedback.learning.training_preferences import keep_preferences
from palm_rlhf.feedback.store.answer_tables import KnownModel
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.identities import remember_model, weights_digest
from palm_rlhf.feedback.store.learning_tables import Round
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.model.local_model import MODEL, local_model
from palm_rlhf.policy.reward_model import RewardModel

POLL_SECONDS = 2.0  # between looks at the database while votes are wanted
OF_ANSWERS = (  # settings that a round keeps from its first answer on; the others, from the time when it has its votes
    *("output_dir", "seed", "num_prompts", "num_answers", "num_evaluations", "max_new_tokens", "temperature", "top_p"),
    *("max_seq_len", "held_out"),
)


@beartype
def learn(
    store: Store,
    model: str | Path,
    output_dir: Path,
    settings: LearningSettings = LearningSettings(),  # noqa: B008 (it is frozen)
    *,
    num_rounds: int = 1,
    num_votes: int = 50,
    prompts: Sequence[Messages] = (),
    say: Callable[[str], None] = print,
    poll_seconds: float = POLL_SECONDS,
) -> Iterator[dict[str, Any]]:
    """Yield the result of one round after another; see `run_round` for the arguments.

    Raises ValueError if another process learns from the database, or in the folder.

    Args:
        num_rounds: Rounds to complete; the first may be one that was begun before. 0 goes on for ever.
    """
    with sole_learner(store, output_dir):
        completed = 0
        while not num_rounds or completed < num_rounds:
            yield run_round(
                store,
                model,
                output_dir,
                settings,
                num_votes=num_votes,
                prompts=prompts,
                say=say,
                poll_seconds=poll_seconds,
            )
            completed += 1


@beartype
def run_round(
    store: Store,
    model: str | Path,
    output_dir: Path,
    settings: LearningSettings = LearningSettings(),  # noqa: B008 (it is frozen)
    *,
    num_votes: int = 50,
    prompts: Sequence[Messages] = (),
    say: Callable[[str], None] = print,
    poll_seconds: float = POLL_SECONDS,
) -> dict[str, Any]:
    """Complete a round, a new one or one that was begun before; return its number, its model and its main figures.

    Raises ValueError for a round that was begun with other settings, from another model, or in another folder, and
    where there is nothing to learn from. Settings of training can change until the round has its votes.

    Args:
        store: The database.
        model: The first model, fine-tuned on conversations: its folder or .gguf file, the folder of a run, a hub id, or
            smollm2. A round begins with the newest model that rounds have made of it.
        output_dir: The folder of the rounds' folders, round-001 and so on.
        settings: The settings of the round.
        num_votes: New contributions of people since the round before that are waited for; 0 waits for none.
        prompts: Prompts beside those of people in the database.
        say: Prints a line for people.
        poll_seconds: Seconds between looks at the database.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("got several processes, expected one: start palm-rlhf learn without accelerate or torchrun")
    context = _begin(store, str(model), output_dir, settings, say)
    stages: dict[str, Callable[[], dict[str, Any]]] = {
        "answers": lambda: _answer(context, prompts),
        "votes": lambda: keep_preferences(context, num_votes, poll_seconds),
        "reward": lambda: fit_reward_model(context),
        "policy": lambda: improve_policy(context),
        "model": lambda: register_policy(context),
        "evaluation": lambda: _evaluate(context),
    }
    for stage in STAGES:
        with store.reading() as session:
            if stage in events_of(session, context.round_id):
                continue
        figures = stages[stage]()
        with store.writing() as session:
            record_stage(session, context.round_id, stage, figures, utc_now())
    with store.reading() as session:
        return _result(context, events_of(session, context.round_id))


def _begin(
    store: Store, model: str, output_dir: Path, settings: LearningSettings, say: Callable[[str], None]
) -> RoundContext:
    """Return the round that is to be completed: the unfinished one, or a new one, whose row is written."""
    opened = open_chat_model(model)
    first = weights_digest(opened.palm)
    kept = {**asdict(settings), "output_dir": str(output_dir.resolve())}
    with store.writing() as session:
        first_folder = local_model(model).resolve()
        remember_model(session, first, opened.name, first_folder)
        row = unfinished_round(session)
        if row is None:
            number = 1 + max((each.number for each in all_rounds(session)), default=0)
            row = Round(number=number, base_model_id=newest_model(session, first), settings=kept)
            session.add(row)
            session.flush()
            if (folder := round_folder(output_dir, row)).exists():
                raise FileExistsError(
                    f"{folder} is of another database's round {row.number}, expected no such folder: choose another "
                    "output_dir, or move it away"
                )
        else:
            _go_on(session, row, first, kept)
        folder = round_folder(output_dir, row)
        base = folder_of_model(session, row.base_model_id) or str(first_folder)
        say(f"round {row.number} begins with the model in {base}; saved to {folder}")
        return RoundContext(
            store=store,
            round_id=row.id,
            number=row.number,
            folder=folder,
            base_id=row.base_model_id,
            base=base,
            first_id=first,
            first=str(first_folder),
            settings=settings,
            say=say,
        )


def round_folder(output_dir: Path, row: Round) -> Path:
    """Return the folder of a round."""
    return output_dir / f"round-{row.number:03d}"


def _go_on(session: Session, row: Round, first: str, kept: dict[str, Any]) -> None:
    """Give an unfinished round its settings. Raises ValueError if it needs others, or is of another model or folder."""
    if all(row.id != each.id for each in rounds_from(session, first)):
        known = session.get(KnownModel, row.base_model_id)
        raise ValueError(
            f"round {row.number} of this database was begun from another model, {known.folder if known else '?'}: "
            "complete it first, by palm-rlhf learn with that model"
        )
    defaults = {field.name: field.default for field in fields(LearningSettings)}
    there = {**defaults, **row.settings}
    there = {name: tuple(value) if isinstance(value, list) else value for name, value in there.items()}  # from JSON
    fixed = [name for name in kept if name != "plot"] if "votes" in events_of(session, row.id) else OF_ANSWERS
    if changed := [name for name in fixed if there[name] != kept[name]]:
        got, expected = ([f"{name}={values[name]}" for name in changed] for values in (kept, there))
        raise ValueError(
            f"got {got} for round {row.number}, which was begun with {expected}: complete it with these values, and "
            "give others for the round after it"
        )
    row.settings = kept


def _answer(context: RoundContext, prompts: Sequence[Messages]) -> dict[str, Any]:
    base = context.open_base()
    chosen = choose_prompts(context, base, prompts)
    return fill_pool(context, base, chosen, _scorer(context))


def _scorer(context: RoundContext) -> Scorer | None:
    """Return the reward model of the newest round before this one that began from the same first model."""
    with context.store.reading() as session:
        for row in reversed(all_rounds(session)):
            if row.number < context.number and "reward" in (events := events_of(session, row.id)):
                if events.get("model", {}).get("model") != context.base_id:
                    continue
                folder = round_folder(Path(row.settings["output_dir"]), row) / REWARD / MODEL
                return Scorer(row.id, RewardModel.from_pretrained(folder, device=default_device()))
    return None


def _evaluate(context: RoundContext) -> dict[str, Any]:
    old = {"old": (context.base_id, context.base), "first": (context.first_id, context.first)}
    other_id, other = old[context.settings.compare_with]
    policy = context.open_policy()
    models = {other_id: open_chat_model(other), weights_digest(policy.palm): policy}
    if len(models) < 2:
        context.say("the new model has the weights of the old one: there is nothing to compare")
        return {"prompts": 0, "models": list(models)}
    return compare(context, models, read_round_prompts(context))


def _result(context: RoundContext, events: dict[str, dict[str, Any]]) -> dict[str, Any]:
    votes, reward, policy = events["votes"], events["reward"], events["policy"]
    accuracy = {name: reward[name] for name in ("accuracy", "low", "high")}
    return {
        "round": context.number,
        "votes": votes["comparisons"],
        **{name if name == "accuracy" else f"accuracy_{name}": value for name, value in accuracy.items()},
        "score": policy["score"][-1],
        "kl": policy["kl"][-1],
        "comparisons": events["evaluation"]["prompts"],
        "model": events["model"]["folder"],
    }
