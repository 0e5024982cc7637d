"""Rounds of learning from a person with a known taste: from votes in the database to a model that pleases more."""

from dataclasses import replace

import pytest
import torch
from sqlalchemy import select

from palm_rlhf.cli import main
from palm_rlhf.feedback.learning.learning_loop import learn
from palm_rlhf.feedback.learning.learning_settings import LearningSettings
from palm_rlhf.feedback.learning.round_context import end_of_answer
from palm_rlhf.feedback.learning.round_rows import STAGES, events_of
from palm_rlhf.feedback.pairs.held_out_prompts import is_held_out
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Answer, AnswerScore, KnownModel
from palm_rlhf.feedback.store.learning_tables import Round
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.rollout import ResponseSampling, collect
from palm_rlhf.policy.sequences import spoken
from palm_rlhf.serving.served_model import load
from tests.feedback.taste import PROMPTS, TINY, liking, save_chat_model, vote

SETTINGS = LearningSettings(**TINY)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model") / "dialogue")


@pytest.fixture
def rounds(store, chat_model, tmp_path):
    """`rounds(settings, num_rounds=2)` learns, with a person who votes whenever votes are waited for."""

    def run(settings=SETTINGS, *, num_votes=40, **options):
        said = []

        def say(text):
            said.append(text)
            if text.startswith("waiting for"):
                assert vote(store, num_votes, seed=len(said)) == num_votes

        options = {"prompts": PROMPTS, "num_votes": num_votes, "poll_seconds": 0.0, "say": say, **options}
        return list(learn(store, chat_model, tmp_path / "run", settings, **options)), said

    return run


def answers_of(store, **columns):
    with store.reading() as session:
        return session.scalars(select(Answer).filter_by(**columns)).all()


def mean_liking(folder) -> float:
    """Of many answers of a model, drawn with the same random numbers each time."""
    model = load(folder)
    sampling = ResponseSampling(max_new_tokens=8, eos_token=end_of_answer(model))
    prompts = [torch.tensor(model.encode_chat(prompt)) for prompt in PROMPTS]
    rollout = collect(model.palm, prompts, sampling, num_samples=5, generator=torch.Generator().manual_seed(0))
    _, texts = spoken(rollout.sequences, model.tokenizer, sampling.eos_token)
    return sum(map(liking, texts)) / len(texts)


def test_two_rounds_learn_the_taste(rounds, store, chat_model, tmp_path):
    results, _ = rounds(num_rounds=2)
    assert [result["round"] for result in results] == [1, 2]
    with store.reading() as session:
        rows = session.scalars(select(Round).order_by(Round.number)).all()
        one, two = (events_of(session, row.id) for row in rows)
        models = {row.id: row.folder for row in session.scalars(select(KnownModel))}
        scored = set(session.scalars(select(AnswerScore.answer_id)))
    assert list(one) == list(two) == list(STAGES)

    # each round begins with the model of the one before, and the new model is put beside it
    first, middle, last = rows[0].base_model_id, one["model"]["model"], two["model"]["model"]
    assert rows[1].base_model_id == middle and len({first, middle, last}) == 3
    assert models[first] == str(chat_model) and models[last] == results[1]["model"]
    assert [each["evaluation"]["models"] for each in (one, two)] == [[first, middle], [middle, last]]
    for row, pair in zip(rows, ({first, middle}, {middle, last}), strict=True):
        compared = {}
        for answer in answers_of(store, purpose="evaluation", round_id=row.id):
            compared.setdefault(answer.prompt_key, []).append(answer)
            assert is_held_out(answer.prompt_key, CollectionSettings(held_out=SETTINGS.held_out))
        assert len(compared) == SETTINGS.num_evaluations
        assert all({answer.model_id for answer in answers} == pair for answers in compared.values())
        assert all(len({answer.text.strip() for answer in answers}) == 2 for answers in compared.values())

    # the pool is of the newest model; the second one has scores of the first reward model
    pools = [answers_of(store, purpose="training", round_id=row.id) for row in rows]
    assert [{answer.model_id for answer in pool} for pool in pools] == [{first}, {middle}]
    assert scored == {answer.id for answer in pools[1]}
    assert [each["votes"]["new"] for each in (one, two)] == [40, 40] and two["votes"]["comparisons"] == 80
    assert one["reward"]["rankings"] + one["reward"]["num_pairs"] == 40

    # it pleases more, and the reward model knows why
    assert two["reward"]["accuracy"] > 0.6 and two["reward"]["low"] < two["reward"]["accuracy"] < two["reward"]["high"]
    assert two["policy"]["steps"] == [1, 2, 3, 4, 5, 6] and two["policy"]["kl"][-1] > 0.1
    assert mean_liking(models[last]) > mean_liking(chat_model) + 1


def test_it_says_how_many_votes_are_wanted(any_store, chat_model, tmp_path):
    said, store = [], any_store

    def say(text):
        said.append(text)
        if text.startswith("waiting for"):
            vote(store, 12)

    options = {"prompts": PROMPTS, "num_votes": 12, "poll_seconds": 0.0, "say": say}
    list(learn(store, chat_model, tmp_path / "run", replace(SETTINGS, num_steps=1, reward_epochs=1), **options))
    (line,) = (text for text in said if text.startswith("waiting"))
    assert line.startswith("waiting for 12 more votes: they are given at /compare of palm-rlhf collect")


def test_a_round_goes_on_with_its_settings(store, chat_model, tmp_path):
    """Those of answers are fixed by the first answer, those of training by the votes."""

    def run(settings, *, now=False, model=chat_model, folder=tmp_path / "run"):
        def say(text):
            if text.startswith(("waiting", "improving") if not now else "improving"):
                raise InterruptedError

        options = {"prompts": PROMPTS, "num_votes": 0 if now else 12, "poll_seconds": 0.0, "say": say}
        list(learn(store, model, folder, settings, **options))

    with pytest.raises(InterruptedError):
        run(SETTINGS)
    with pytest.raises(ValueError, match=r"got \['temperature=0.5'\] for round 1, which was begun with"):
        run(replace(SETTINGS, temperature=0.5))
    with pytest.raises(ValueError, match=r"got \['output_dir=.*other'\] for round 1, which was begun with"):
        run(SETTINGS, folder=tmp_path / "other")
    with pytest.raises(ValueError, match=r"round 1 of this database was begun from another model, .*dialogue"):
        run(SETTINGS, model=save_chat_model(tmp_path / "another", seed=1))
    vote(store, 12)
    changed = replace(SETTINGS, kl_coef=0.2, reward_epochs=1)
    with pytest.raises(InterruptedError):
        run(changed)
    with store.reading() as session:
        assert session.scalars(select(Round)).one().settings["kl_coef"] == 0.2
    for name, value in (("kl_coef", 0.3), ("reward_epochs", 2)):
        with pytest.raises(ValueError, match=rf"got \['{name}={value}'\] for round 1, which was begun with"):
            run(replace(changed, **{name: value}))
    with pytest.raises(InterruptedError):
        run(changed, now=True)  # how many votes are waited for is no setting of the round


def test_what_cannot_be_learnt_from_is_refused(store, chat_model, tmp_path, monkeypatch):
    def run(settings=SETTINGS, folder="run", prompts=PROMPTS, model=chat_model):
        options = {"num_votes": 0, "prompts": prompts, "say": lambda text: None}
        list(learn(store, model, tmp_path / folder, settings, **options))

    with pytest.raises(ValueError, match="without a chat template, expected a model of conversations"):
        palm = PaLM(num_tokens=256, dim=16, depth=1, heads=1, dim_head=8)
        palm.save_pretrained(tmp_path / "plain")
        run(model=tmp_path / "plain")
    (tmp_path / "used/round-001").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="round-001 is of another database's round 1"):
        run(folder="used")
    assert not store_rows(store, Round)
    with pytest.raises(ValueError, match="got no prompt for the model to answer, expected some: give a file"):
        run(prompts=[])
    with pytest.raises(ValueError, match="got no prompt for the model to answer"):
        run(prompts=[[{"role": "user", "content": "a" * 40}]])  # no room for an answer
    with pytest.raises(ValueError, match="got no preference to learn from, expected one on a prompt that is not held"):
        run()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="got several processes, expected one"):
        run()


def store_rows(store, table):
    with store.reading() as session:
        return session.scalars(select(table)).all()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--now", "--rounds", "0"], "got --now with --rounds 0, which would learn from the same votes for ever"),
        (["--rounds", "-1"], "got --rounds -1 --votes 50, expected 0 or more rounds, and at least one vote"),
        (["--votes", "0"], "got --rounds 1 --votes 0"),
        (["--held-out", "1"], "held_out is 1.0, expected at least 0 and below 1"),
        (["--num-answers", "1"], "num_answers is 1, expected at least 2"),
        (["--ai-weight", "-1"], "ai_weight is -1.0, expected 0 or more"),
        (["--max-seq-len", "128"], "max_seq_len is 128, expected above max_new_tokens"),
        (["--num-steps", "0"], "num_steps is 0"),
        (["--reward-epochs", "0"], "num_epochs is 0"),
    ],
)
def test_the_command_refuses_settings_before_it_begins(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["learn", str(tmp_path / "feedback.db"), "model", "--output-dir", str(tmp_path / "run"), *options])
    assert message in " ".join(f"{ended.value} {capsys.readouterr().err}".replace("│", "").split())
    assert not (tmp_path / "run").exists()
