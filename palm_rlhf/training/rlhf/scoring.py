"""What reward functions can ask for of the run and its rollouts, by name."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from beartype import beartype

OF_ROLLOUT, OF_CONVERSATIONS, OF_RUN = ("truncated",), ("messages",), ("step", "trainer_state")


class TrainerState(NamedTuple):
    """How far a run is, by the names that TRL gives its reward functions: steps done, and steps of the whole run."""

    global_step: int
    max_steps: int


@beartype
def keyword_names(columns: Iterable[str], environment: Any) -> tuple[str, ...]:
    """All that functions can ask for beside prompts and completions: with an environment the messages too."""
    return (*columns, *OF_ROLLOUT, *OF_RUN, *(() if environment is None else OF_CONVERSATIONS))


@beartype
def run_keywords(steps_done: int, num_steps: int) -> dict[str, Any]:
    """The values of OF_RUN during the next step."""
    return dict(zip(OF_RUN, (steps_done + 1, TrainerState(steps_done, num_steps)), strict=True))
