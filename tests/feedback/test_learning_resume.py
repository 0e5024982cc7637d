"""palm-rlhf learn, killed at several moments: it goes on to the same bits, and nothing is there twice."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import select

from palm_rlhf.cli import main
from palm_rlhf.feedback.learning.learning_loop import learn
from palm_rlhf.feedback.learning.learning_settings import LearningSettings
from palm_rlhf.feedback.learning.policy_improvement import improve_policy
from palm_rlhf.feedback.learning.reward_fitting import fit_reward_model
from palm_rlhf.feedback.learning.round_context import RoundContext
from palm_rlhf.feedback.learning.round_rows import STAGES
from palm_rlhf.feedback.learning.sole_learner import sole_learner
from palm_rlhf.feedback.store.answer_tables import Answer
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.identities import weights_digest
from palm_rlhf.feedback.store.learning_tables import Round, RoundEvent
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.run.checkpoints import complete_checkpoints
from tests.feedback.taste import PROMPTS, TINY, save_chat_model, vote

ROOT = Path(__file__).resolve().parents[2]
NUM_VOTES = 30
SETTINGS = {**TINY, "save_every": 4, "reward_epochs": 3}
OPTIONS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def stages(store: Store) -> list[str]:
    """The stages that are complete, in their order."""
    with store.reading() as session:
        return sorted(session.scalars(select(RoundEvent.stage)), key=STAGES.index)


def contents(store: Store) -> Counter:
    """The answers, without ids and times."""
    with store.reading() as session:
        rows = session.scalars(select(Answer)).all()
        assert all(row.round_id for row in rows)
        return Counter((row.purpose, row.prompt_key, row.model_id, row.text, row.finish) for row in rows)


def reward_digest(run: Path) -> str:
    return weights_digest(RewardModel.from_pretrained(run / "round-001/reward/model"))


def learn_command(folder: Path, model: Path) -> list[str]:
    (folder / "prompts.txt").write_text("".join(f"{prompt[0]['content']}\n" for prompt in PROMPTS))
    files = [folder / "feedback.db", model, "--output-dir", folder / "run", "--prompts", folder / "prompts.txt"]
    return ["learn", *map(str, files), "--votes", str(NUM_VOTES), *OPTIONS]


def learn_here(store: Store, model: Path, run: Path, *, stop_at: str | None = None, **settings) -> None:
    """Learn one round in this process, with a person who votes when votes are waited for.

    `stop_at` begins a line that is said: the round is interrupted there.
    """

    def say(text: str) -> None:
        if stop_at is not None and text.startswith(stop_at):
            raise InterruptedError(stop_at)
        if text.startswith("waiting for"):
            vote(store, NUM_VOTES)

    options = {"prompts": PROMPTS, "num_votes": NUM_VOTES, "poll_seconds": 0.0, "say": say}
    list(learn(store, model, run, LearningSettings(**SETTINGS | settings), **options))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "dialogue")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> tuple[Counter, str]:
    """The answers, and the digest of the reward model, of a round that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with Store(folder / "feedback.db") as store:
        learn_here(store, model, folder / "run")
        return contents(store), reward_digest(folder / "run")


def check_is_whole(store: Store, run: Path, whole: tuple[Counter, str]) -> None:
    """The answers name the model by its weights, so equal answers are of equal weights."""
    assert Counter(stages(store)) == Counter(STAGES)
    assert (contents(store), reward_digest(run)) == whole
    with store.reading() as session:
        (row,) = session.scalars(select(Round))
        registered = next(e for e in session.scalars(select(RoundEvent)) if e.stage == "model").figures["model"]
    assert {model_id for _, _, model_id, *_ in whole[0]} == {row.base_model_id, registered}


def test_a_round_that_is_stopped_in_each_stage_goes_on(store, tmp_path, model, whole):
    for line in ("answered 16", "waiting", "fitting", "improving"):
        with pytest.raises(InterruptedError):
            learn_here(store, model, tmp_path / "run", stop_at=line)
    learn_here(store, model, tmp_path / "run")
    check_is_whole(store, tmp_path / "run", whole)


def test_training_that_was_killed_before_its_model_was_saved_ends_with_the_same_bits(store, tmp_path, model):
    learn_here(store, model, tmp_path / "run", num_steps=2, reward_epochs=1)
    with store.reading() as session:
        (row,) = session.scalars(select(Round))
    context = RoundContext(
        store=store,
        round_id=row.id,
        number=1,
        folder=tmp_path / "run/round-001",
        base_id=row.base_model_id,
        base=str(model),
        first_id=row.base_model_id,
        first=str(model),
        settings=LearningSettings(**{**SETTINGS, "num_steps": 2, "reward_epochs": 1}),
        say=lambda text: None,
    )
    for part, train, kind in (("reward", fit_reward_model, RewardModel), ("policy", improve_policy, PaLM)):
        saved = context.folder / part / "model"
        before, figures = weights_digest(kind.from_pretrained(saved)), train(context)
        shutil.rmtree(saved)
        assert train(context) == figures
        assert weights_digest(kind.from_pretrained(saved)) == before


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(store, tmp_path, model, whole):
    run = tmp_path / "run/round-001"
    moments = {  # the last stage that is complete then, the moment after it
        None: lambda: contents(store).total() > 0,
        "votes": lambda: len(complete_checkpoints(run / "reward/checkpoints")) > 0,
        "reward": lambda: len(complete_checkpoints(run / "policy/checkpoints")) > 0,
        "policy": lambda: "policy" in stages(store),
    }
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "palm_rlhf.cli", *learn_command(tmp_path, model)]
    num_voted = 0
    for complete, is_now in moments.items():
        with open(tmp_path / "log", "ab") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while not is_now():
            assert process.poll() is None, (complete, (tmp_path / "log").read_text())
            if not num_voted and "answers" in stages(store):
                num_voted = vote(store, NUM_VOTES)
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (stages(store) or [None])[-1] == complete
    with open(tmp_path / "log", "ab") as log:
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=log, check=True)
    check_is_whole(store, tmp_path / "run", whole)


@pytest.mark.parametrize("other", ["the database", "the folder"])
def test_a_second_learner_is_told_so(store, tmp_path, other, capsys):
    folder, database = tmp_path / "run", tmp_path / "feedback.db"
    arguments = [database, tmp_path / "model", "--output-dir", folder if other == "the folder" else tmp_path / "run 2"]
    if other == "the folder":
        arguments[0] = tmp_path / "second.db"
    with sole_learner(store, folder), pytest.raises(SystemExit, match=r"another process learns .* already: wait until"):
        main(["learn", *map(str, arguments), "--now"])
    with pytest.raises(SystemExit, match=r"there is no folder .*model"):  # free again: the missing model is found out
        main(["learn", *map(str, arguments), "--now"])
    assert not stages(store)


def test_one_learner_at_a_time_in_every_database(any_store, tmp_path):
    with Store(any_store.url) as second:
        with sole_learner(any_store, tmp_path / "one"):
            with pytest.raises(ValueError, match="another process learns from"), sole_learner(second, tmp_path / "two"):
                pass
        with sole_learner(second, tmp_path / "two"):
            pass
