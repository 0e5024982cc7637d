"""The command ``palm-rlhf learn``: rounds from people's votes to a better model."""

import json
from pathlib import Path
from typing import Annotated

from beartype import beartype
from tyro.conf import OmitArgPrefixes, Positional, arg

from palm_rlhf.commands.run_folder import quoted, say, show_next
from palm_rlhf.commands.start_models import ModelName
from palm_rlhf.commands.training_data import read_prompt_messages
from palm_rlhf.feedback.learning.learning_settings import LearningSettings


@beartype
def learn(
    database: Annotated[Positional[str], arg(metavar="DATABASE")],
    model: Positional[ModelName],
    *,
    output_dir: Annotated[Path, arg(metavar="FOLDER")],
    prompts: Annotated[Path | None, arg(metavar="FILE")] = None,
    votes: int = 50,
    now: bool = False,
    rounds: int = 1,
    learning: OmitArgPrefixes[LearningSettings] = LearningSettings(),  # noqa: B008 (it is frozen)
) -> None:
    """Improve a model by what people said of its answers: a reward model, PPO, and a blind comparison with the old.

    A round writes answers of the model to the database, waits for the votes of people (palm-rlhf collect, or the pages
    of palm-rlhf serve --feedback), fits a reward model to all preferences, improves the model by PPO, and writes
    answers of the new and of the old model to held-out prompts, which people compare without knowing which is which.
    The next round begins with the new model. The command can be killed at any moment, and goes on when it is started
    again. The last line on standard output is JSON: round, votes, accuracy of the reward model on held-out votes with
    its 95% interval, score, kl, model and output_dir.

    Args:
        database: The file of the database, or its URL.
        model: The first model, fine-tuned on conversations: its folder or .gguf file, the folder of a run, a hub id, or
            smollm2. A round begins with the newest model that earlier rounds made of it.
        output_dir: Folder of the rounds, each with its reward model and its policy.
        prompts: Prompts beside those of people in the database, as of `palm-rlhf rlhf`: a text file with a prompt on
            each line (.txt), or records in any format that `palm-rlhf data convert` reads.
        votes: New contributions of people that a round waits for: votes, rankings of replies, and better answers.
        now: Wait for none.
        rounds: Rounds to complete; the first may be one that was begun before. 0 goes on until it is interrupted.
        learning: Settings of a round.
    """
    from palm_rlhf.feedback.learning.learning_loop import learn as learn_rounds
    from palm_rlhf.feedback.store.database import Store

    if rounds < 0 or votes < 1:
        raise ValueError(f"got --rounds {rounds} --votes {votes}, expected 0 or more rounds, and at least one vote")
    if now and not rounds:
        raise ValueError("got --now with --rounds 0, which would learn from the same votes for ever: leave one out")
    with Store(database) as store:
        for result in learn_rounds(
            store,
            model,
            output_dir,
            learning,
            num_rounds=rounds,
            num_votes=0 if now else votes,
            prompts=[] if prompts is None else read_prompt_messages(prompts),
            say=say,
        ):
            say(f"round {result['round']} is complete: the new model is in {result['model']}")
            show_next(
                [
                    ("talk with it", f"palm-rlhf chat {quoted(result['model'])}"),
                    ("compare it", f"palm-rlhf collect {quoted(result['model'])} --database {quoted(database)}"),
                ]
            )
            print(json.dumps({**result, "output_dir": str(output_dir)}), flush=True)
