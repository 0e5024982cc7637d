"""The names that a reward function can ask for, beside prompts, completions and the prompts' columns."""

from collections.abc import Collection
from typing import Any, NamedTuple

from beartype import beartype

from palm_rlhf.policy.turns import Environment, asked_columns

OF_ROLLOUT, OF_CONVERSATIONS, OF_RUN = ("truncated",), ("messages",), ("step", "trainer_state")


class TrainerState(NamedTuple):
    """How far a run is, by the names that TRL gives its reward functions: steps done, and steps of the whole run."""

    global_step: int
    max_steps: int


@beartype
def keyword_names(columns: Collection[str], environment: Environment | None) -> tuple[str, ...]:
    """Return all names that reward functions can ask for; with an environment "messages" is among them.

    Raises ValueError, before a run begins, where the environment asks for a column that the prompts do not have.
    """
    if environment is not None:
        asked_columns(environment, columns)
    return (*columns, *OF_ROLLOUT, *OF_RUN, *(() if environment is None else OF_CONVERSATIONS))


@beartype
def run_keywords(steps_done: int, num_steps: int) -> dict[str, Any]:
    """Return the values of OF_RUN during the next step."""
    return dict(zip(OF_RUN, (steps_done + 1, TrainerState(steps_done, num_steps)), strict=True))
