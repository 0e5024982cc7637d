"""The prompts of a round: people's own from the database, and those of a file."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from beartype import beartype
from sqlalchemy import select
from sqlalchemy.orm import Session

from palm_rlhf.data.conversation import encode_prompt
from palm_rlhf.feedback.learning.round_context import RoundContext, template_of
from palm_rlhf.feedback.pairs.held_out_prompts import is_held_out
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Answer
from palm_rlhf.feedback.store.identities import prompt_key_of
from palm_rlhf.feedback.store.kept_trees import kept_trees
from palm_rlhf.feedback.store.withdrawals import not_withdrawn
from palm_rlhf.model.files import write_text
from palm_rlhf.serving.served_model import ServedModel

PROMPTS_FILE = "prompts.jsonl"
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class RoundPrompt:
    """A prompt of a round: whether people compare answers to it, and whether the old and the new model answer it.

    Votes on held-out prompts are not trained on, and PPO does not see these prompts.
    """

    prompt: Messages
    held_out: bool
    in_pool: bool
    in_evaluation: bool

    @property
    def key(self) -> str:
        """The key of the prompt in the database."""
        return prompt_key_of(self.prompt)


@beartype
def prompts_of_people(session: Session) -> list[Messages]:
    """Return the prompts that people wrote: accepted threads of trees up to a user's message, and prompts of chats."""
    messages = (message for _, root in kept_trees(session) for message in root.walk())
    found: list[Messages] = [message.conversation() for message in messages if message.row.role == "prompter"]
    chats = select(Answer).where(Answer.purpose == "chat", not_withdrawn(Answer))
    return found + [answer.prompt for answer in session.scalars(chats.order_by(Answer.created_at, Answer.id))]


@beartype
def choose_prompts(context: RoundContext, model: ServedModel, more: Sequence[Messages] = ()) -> list[RoundPrompt]:
    """Return the prompts of a round, and write them to its folder; a round that goes on has the same ones again.

    Raises ValueError if there is none.

    Args:
        context: The round.
        model: The model, whose tokens count.
        more: Prompts beside those in the database.
    """
    file = context.folder / PROMPTS_FILE
    if file.is_file():
        return [RoundPrompt(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    with context.store.reading() as session:
        known = prompts_of_people(session)
    distinct = {prompt_key_of(prompt): prompt for prompt in (*known, *more)}
    fitting = {key: prompt for key, prompt in sorted(distinct.items()) if _fits(context, model, prompt)}
    if left_out := len(distinct) - len(fitting):
        context.say(
            f"left out {left_out} prompts that leave no room for an answer within max_seq_len, or that the chat "
            "template does not write"
        )
    if not fitting:
        raise ValueError(
            "got no prompt for the model to answer, expected some: give a file of prompts by --prompts, or let people "
            "write some first (palm-rlhf collect, or the chat page of palm-rlhf serve --feedback)"
        )
    chosen = _assign(context, list(fitting.values()))
    context.folder.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(asdict(prompt)) + "\n" for prompt in chosen))
    return chosen


def _fits(context: RoundContext, model: ServedModel, prompt: Messages) -> bool:
    room = context.settings.max_seq_len - context.settings.max_new_tokens
    try:
        return len(encode_prompt(prompt, model.tokenizer, template_of(model))) <= room
    except ValueError:  # such as messages of a tool
        return False


def _assign(context: RoundContext, prompts: list[Messages]) -> list[RoundPrompt]:
    """Return the prompts in a random order of the round: the first are in the pool, the first held out evaluate."""
    settings = context.settings
    random.Random(f"{settings.seed} {context.number}").shuffle(prompts)
    collection = CollectionSettings(held_out=settings.held_out)
    sides = [is_held_out(prompt_key_of(prompt), collection) for prompt in prompts]
    evaluated = set([place for place, held_out in enumerate(sides) if held_out][: settings.num_evaluations])
    return [
        RoundPrompt(prompt, held_out, in_pool=place < settings.num_prompts, in_evaluation=place in evaluated)
        for place, (prompt, held_out) in enumerate(zip(prompts, sides, strict=True))
    ]


@beartype
def read_round_prompts(context: RoundContext) -> list[RoundPrompt]:
    """Return the prompts that `choose_prompts` wrote."""
    lines = (context.folder / PROMPTS_FILE).read_text(encoding="utf-8").splitlines()
    return [RoundPrompt(**json.loads(line)) for line in lines]


@beartype
def encoded(prompts: Iterable[RoundPrompt], model: ServedModel) -> list:
    """Return the tokens of prompts, up to where the model answers."""
    return [encode_prompt(each.prompt, model.tokenizer, template_of(model)) for each in prompts]
