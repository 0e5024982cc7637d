"""What the stages of a round have in common: its row, its folder, its settings, and the models that it opens."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from beartype import beartype

from palm_rlhf.data.conversation import Template, end_of_turn
from palm_rlhf.evaluation.measures.model_folders import default_device
from palm_rlhf.feedback.learning.learning_settings import LearningSettings
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.model.files import sync
from palm_rlhf.model.local_model import MODEL
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.serving.served_model import ServedModel, load

REWARD, POLICY = "reward", "policy"  # the folders of a round's training runs


@dataclass(frozen=True)
class RoundContext:
    """A round in the making.

    Args:
        store: The database.
        round_id: The id of its row.
        number: Its number, from 1.
        folder: Where its files are.
        base_id: The id of the model that it begins with.
        base: The folder of that model.
        first_id: The id of the first model, which the rounds before began with.
        first: The folder of the first model.
        settings: The settings of the round.
        say: Prints a line for people.
    """

    store: Store
    round_id: str
    number: int
    folder: Path
    base_id: str
    base: str
    first_id: str
    first: str
    settings: LearningSettings
    say: Callable[[str], None]

    def open_base(self) -> ServedModel:
        """Open the model that the round begins with."""
        return open_chat_model(self.base)

    def open_policy(self) -> ServedModel:
        """Open the model that the round has trained."""
        return open_chat_model(str(self.folder / POLICY))

    def open_reward_model(self) -> RewardModel:
        """Open the reward model that the round has trained."""
        return RewardModel.from_pretrained(self.folder / REWARD / MODEL, device=default_device())


@beartype
def open_chat_model(source: str) -> ServedModel:
    """Open a model with tokenizer and chat template. Raises ValueError if it has no template, and so writes no turns.

    Args:
        source: Its folder or .gguf file, the folder of a run, a hub id, or smollm2.
    """
    model = load(source)
    if model.template is None:
        raise ValueError(
            f"got the model {source} without a chat template, expected a model of conversations: fine-tune it first, "
            "palm-rlhf sft CONVERSATIONS --model MODEL"
        )
    return model


@beartype
def template_of(model: ServedModel) -> Template:
    """Return the chat template of an `open_chat_model`."""
    return cast(Template, model.template)


@beartype
def end_of_answer(model: ServedModel) -> int:
    """Return the token that ends an answer."""
    return end_of_turn(model.tokenizer, template_of(model))


@beartype
def save_whole(run: Path, model: PaLM | RewardModel, opened: ServedModel) -> None:
    """Write a model to the folder `model` of a run, with the tokenizer and the template of another one.

    The folder is there when all of it is on the disk, and not before.
    """
    partial = run / f".{MODEL}.partial"
    for part in (model, opened.tokenizer, template_of(opened)):
        part.save_pretrained(partial)
    for path in (*partial.rglob("*"), partial):
        sync(path)
    os.replace(partial, run / MODEL)
    sync(run)
