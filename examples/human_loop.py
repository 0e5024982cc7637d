"""People teach a small model by their votes, offline: train it, ask people in a browser, learn, ask again, compare.

pip install "palm-rlhf[examples]" && python examples/human_loop.py   # your browser shows two answers: which is better?
python examples/human_loop.py --simulate 2 --seed 0                  # two stand-in people vote in Chromium instead
"""

import json
import sys
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from palm_rlhf.ops.cpu.threads import share_the_machine

share_the_machine()  # before torch is imported

import torch
import tyro
from collecting import collecting
from dialogue_model import (
    FINE_TUNING,
    MODEL,
    PRETRAINING,
    FineTuning,
    fine_tune,
    hold_out,
    pretrain,
    read_conversations,
)
from rlhf_report import say
from stand_in_people import people_in_browsers

from palm_rlhf.cli import replace_unprintable_characters
from palm_rlhf.commands.run_folder import quoted, show_next
from palm_rlhf.data.conversation import encode_prompt, encode_response
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import ByteTokenizer, add_special_tokens
from palm_rlhf.feedback.learning.learning_loop import learn
from palm_rlhf.feedback.learning.learning_settings import LearningSettings
from palm_rlhf.feedback.learning.round_rows import all_rounds, events_of
from palm_rlhf.feedback.measures.blind_win_rate import BlindWinRate, round_win_rate
from palm_rlhf.feedback.measures.vote_records import vote_records
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import resize_token_embeddings
from palm_rlhf.training.language_model_config import LMConfig

LEARNING = LearningSettings(
    num_prompts=160,
    num_answers=4,
    num_evaluations=120,
    compare_with="first",
    max_new_tokens=48,
    temperature=0.7,
    max_seq_len=192,
    reward_epochs=4,
    reward_learning_rate=1e-3,
    num_steps=10,
    epochs=2,
    learning_rate=3e-4,
    kl_coef=0.1,
    missing_eos_penalty=0.5,
)


def train_model(
    model: PaLMConfig, pretraining: LMConfig, fine_tuning: FineTuning, output_dir: Path
) -> tuple[Path, list[str]]:
    """Train a model to answer, if the folder has none yet; return its folder, and the prompts that it knows."""
    data, folder = hold_out(read_conversations(), 0, pretraining.seed), output_dir / "model"
    if folder.is_dir():
        return folder, data.prompts
    say(f"pretraining on {len(data.conversations)} conversations")
    palm = PaLM.from_config(model)
    pretrain(palm, data.conversations, pretraining, output_dir / "pretraining", resume=True)
    tokenizer, template = ByteTokenizer(), PRESETS["default"]
    resize_token_embeddings(palm, tokenizer.num_tokens)
    add_special_tokens(palm, tokenizer, template.special_tokens)
    say(f"fine-tuning on {len(data.pairs)} answers")
    questions = [([{"role": "user", "content": prompt}], answer) for prompt, answer in data.pairs]
    pairs = [
        (encode_prompt(question, tokenizer, template), encode_response(question, answer, tokenizer, template))
        for question, answer in questions
    ]
    fine_tune(palm, pairs, fine_tuning, pretraining.seed)
    partial = folder.with_name("model.partial")
    for part in (palm, tokenizer, template):
        part.save_pretrained(partial)
    partial.rename(folder)
    return folder, data.prompts


def is_voting(store: Store, rounds: int) -> bool:
    """Return whether votes are wanted now: a round waits for them, or the last round is over and is judged."""
    with store.reading() as session:
        if not (found := all_rounds(session)):
            return False
        events = events_of(session, found[-1].id)
        judged = "evaluation" in events and found[-1].number == rounds
        return judged or ("answers" in events and "votes" not in events)


def wait_for_judges(store: Store, most: int, num_people: int, check: Callable[[], None]) -> BlindWinRate:
    """Wait for votes on the last model against the first, until every pair has its votes; return the win rate."""
    said = -1
    with store.reading() as session:
        last = all_rounds(session)[-1].id
        most = min(most, num_people * events_of(session, last)["evaluation"]["prompts"])
    while True:
        check()
        with store.reading() as session:
            found = round_win_rate(session, last)
        if found is None or found.num_votes >= most:
            break
        if found.num_votes // 20 > said:
            said = found.num_votes // 20
            say(f"{found.num_votes} of {most} blind votes on the last model and the first")
        time.sleep(0.5)
    if found is None or found.win_rate is None:
        raise ValueError("the last model gives the answers of the first: there is nothing to compare; take more steps")
    return found


@contextmanager
def voters(
    url: str, store: Store, simulate: int, seed: int, rounds: int, browser: bool, output_dir: Path
) -> Iterator[Callable[[], None]]:
    """Let stand-in people vote, or ask the person at this machine; yield a function that raises an error of voters."""
    if simulate:
        with people_in_browsers(url, store, simulate, seed, lambda: is_voting(store, rounds), output_dir) as check:
            yield check
        return
    say(f"vote at {url}compare: which of two answers is better? The rounds are at {url}rounds")
    if browser:
        webbrowser.open(f"{url}compare")
    yield lambda: None


def main(
    simulate: int = 0,
    seed: int = 0,
    rounds: int = 2,
    votes: int | None = None,
    final_votes: int | None = None,
    output_dir: Path | None = None,
    browser: bool = True,
    port: int = 0,
    model: PaLMConfig = MODEL,
    pretraining: LMConfig = PRETRAINING,
    fine_tuning: FineTuning = FINE_TUNING,
    learning: LearningSettings = LEARNING,
) -> None:
    """The human loop on real dialogues; the last line on standard output is JSON.

    Args:
        simulate: Stand-in people that vote in headless browsers; 0 asks you.
        seed: Random seed of every stage, and of the stand-in people.
        rounds: Rounds of learning.
        votes: Votes that each round waits for; by default 200 of stand-in people and 30 of yours.
        final_votes: Blind votes on the last model and the first at the end; by default 200 and 30.
        output_dir: Folder of the database, the models and the rounds; by default a new one in runs/. A run that was
            interrupted goes on in its folder.
        browser: Open your browser.
        port: The port of the page; 0 takes any free port.
        model: Settings of the model.
        pretraining: Settings of the pretraining.
        fine_tuning: Settings of the fine-tuning.
        learning: Settings of the rounds.
    """
    started = time.perf_counter()
    if simulate < 0 or rounds < 1:
        raise ValueError(f"got --simulate {simulate} --rounds {rounds}, expected 0 or more people, and a round or more")
    votes, final_votes = (count or (200 if simulate else 30) for count in (votes, final_votes))
    output_dir = output_dir or Path("runs") / time.strftime("human-loop-%Y%m%d-%H%M%S")
    torch.manual_seed(seed)
    first, prompts = train_model(model, replace(pretraining, seed=seed), fine_tuning, output_dir)
    questions = [[{"role": "user", "content": prompt}] for prompt in prompts]
    database = output_dir / "feedback.db"
    with Store(database) as store, collecting(database, port, output_dir / "collect.log") as url:
        with voters(url, store, simulate, seed, rounds, browser, output_dir) as check:

            def tell(text: str) -> None:
                check()
                say(text)

            with store.reading() as session:
                missing = rounds - sum("evaluation" in events_of(session, row.id) for row in all_rounds(session))
            settings = replace(learning, seed=seed)
            options = {"num_votes": votes, "prompts": questions, "say": tell, "poll_seconds": 0.5}
            if missing > 0:
                for result in learn(store, first, output_dir / "rounds", settings, num_rounds=missing, **options):
                    say(f"round {result['round']} is complete: {json.dumps(result)}")
            win_rate = wait_for_judges(store, final_votes, simulate or 1, check)
        with store.reading() as session:
            num_votes, num_rounds = len(vote_records(session)), len(all_rounds(session))
    say(win_rate.sentence())
    database_name, last = quoted(database), quoted(output_dir / f"rounds/round-{num_rounds:03d}/policy")
    show_next(
        [
            ("talk with it", f"palm-rlhf chat {last}"),
            ("look at the votes", f"palm-rlhf collect --database {database_name}"),
            ("keep the votes", f"palm-rlhf export {database_name} votes.jsonl.gz --to preferences"),
        ]
    )
    shown = {"win_rate": win_rate.win_rate, "low": win_rate.low, "high": win_rate.high}
    numbers = {name: round(number, 4) for name, number in shown.items()}
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"rounds": num_rounds, "votes": num_votes, **numbers, "seconds": seconds}))


if __name__ == "__main__":
    replace_unprintable_characters()
    try:
        tyro.cli(main)
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        sys.exit(f"human_loop.py: {error}")
