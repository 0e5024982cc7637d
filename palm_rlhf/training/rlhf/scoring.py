"""Rollouts of a run scored, and what reward functions can ask for of both by name."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from beartype import beartype

from palm_rlhf.policy.rewards import Rewards, Scores, score
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.policy.turns import Environment, asked_columns

if TYPE_CHECKING:
    from palm_rlhf.training.rlhf.trainer import RLHFTrainer

OF_ROLLOUT, OF_CONVERSATIONS, OF_RUN = ("truncated",), ("messages",), ("step", "trainer_state")


class TrainerState(NamedTuple):
    """How far a run is, by the names that TRL gives its reward functions: steps done, and steps of the whole run."""

    global_step: int
    max_steps: int


@beartype
def keyword_names(columns: Collection[str], environment: Environment | None) -> tuple[str, ...]:
    """All that reward functions can ask for beside prompts and completions: with an environment the messages too.

    ValueError, before a run begins, where the environment asks for a column that there is not.
    """
    if environment is not None:
        asked_columns(environment, columns)
    return (*columns, *OF_ROLLOUT, *OF_RUN, *(() if environment is None else OF_CONVERSATIONS))


@beartype
def run_keywords(steps_done: int, num_steps: int) -> dict[str, Any]:
    """The values of OF_RUN during the next step."""
    return dict(zip(OF_RUN, (steps_done + 1, TrainerState(steps_done, num_steps)), strict=True))


def score_rollout(
    trainer: "RLHFTrainer", rewards: Rewards, rollout: Rollout, weights: Mapping[str, float] | None = None
) -> Scores:
    """What rewards say of the responses in a rollout of a trainer, before any shaping."""
    config = trainer.config
    return score(
        rewards,
        rollout.sequences,
        tokenizer=trainer.tokenizer,
        eos_token=config.eos_token,
        batch_size=trainer.forward_size,
        weights=weights,
        timeout=config.reward_timeout,
        keywords={**rollout.keywords, **run_keywords(trainer.run.step, config.num_steps)},
    )
