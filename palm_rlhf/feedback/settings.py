"""The settings of a collection, with Open-Assistant's numbers as defaults.

Köpf et al., "OpenAssistant Conversations" (https://arxiv.org/abs/2304.07327), and the settings of their backend.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from beartype import beartype


@beartype
@dataclass(frozen=True)
class CollectionSettings:
    """How many trees are open, how large they become, and how many people look at each message."""

    max_open_trees: int = 10
    """The most trees of a language in prompt review or growing at once; while there are as many, nobody is asked for a
    prompt."""

    max_tree_size: int = 12
    """The most messages of a tree, the prompt included."""

    max_depth: int = 3
    """The most replies above each other: replies to a message of this depth are not asked for."""

    max_children: int = 3
    """The most replies of people to a prompt, or to another message of a user."""

    max_user_replies: int = 1
    """The most replies of users to a message of the assistant."""

    num_model_replies: int = 1
    """Replies of the model to each message of a user, which are ranked among people's."""

    num_reviews: int = 3
    """People that label a message before it is accepted or not."""

    min_acceptance: float = 0.6
    """A message is accepted if 1 - (mean spam + mean wrong language) is above this."""

    num_rankings: int = 3
    """People that rank the replies to a message."""

    allow_own: bool = False
    """Whether people may label, answer and rank their own messages: a collection of one person needs it."""

    min_replies_to_rank: int = 2
    """Fewer accepted replies than this are not ranked."""

    task_timeout: timedelta = timedelta(hours=2)
    """How long a task waits for the person who took it; then it goes to somebody else."""

    max_message_length: int = 8000
    """The most characters of a message."""

    max_tasks_per_hour: int = 200
    """The most tasks that one person is handed in an hour."""

    languages: tuple[str, ...] = ("en", "zh")
    """Languages in which messages are collected."""

    pairs: Literal["uncertainty", "random"] = "uncertainty"
    """Which pairs of answers people compare where the reward model learns: those of which the current one is least
    sure, or random ones."""

    random_share: float = 0.25
    """The share of random pairs among the comparisons from which the reward model learns."""

    held_out: float = 0.2
    """The share of prompts whose votes are never trained on, and of comparisons on them. Their pairs are random, and
    measure the accuracy of the reward model."""

    num_votes: int = 3
    """People that compare each pair of a blind evaluation, and each pair of a held-out prompt."""

    def __post_init__(self) -> None:
        counts = ("max_open_trees", "max_tree_size", "max_depth", "max_children", "num_reviews", "num_rankings")
        for name in (*counts, "num_votes", "max_message_length", "max_tasks_per_hour"):
            if getattr(self, name) < 1:
                raise ValueError(f"got {name}={getattr(self, name)}, expected at least 1")
        for name in ("max_user_replies", "num_model_replies"):
            if getattr(self, name) < 0:
                raise ValueError(f"got {name}={getattr(self, name)}, expected at least 0")
        if self.task_timeout <= timedelta(0):
            raise ValueError(f"got task_timeout={self.task_timeout}, expected a time above 0")
        if self.min_replies_to_rank < 2:
            raise ValueError(f"got min_replies_to_rank={self.min_replies_to_rank}, expected at least 2")
        for name in ("min_acceptance", "random_share", "held_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"got {name}={getattr(self, name)}, expected a share, from 0 to 1")
        if self.held_out == 1:
            raise ValueError("got held_out=1, expected less: leave some prompts to train on")
        if not self.languages:
            raise ValueError("got no languages, expected at least one, such as en")
