"""Rounds of learning from a person with a known taste: from votes in the database to a model that pleases more."""

import pytest
import torch
from sqlalchemy import select

from palm_rlhf.feedback.learning.learning_loop import learn
from palm_rlhf.feedback.learning.round_context import end_of_answer
from palm_rlhf.feedback.learning.round_rows import STAGES, events_of
from palm_rlhf.feedback.pairs.held_out_prompts import is_held_out
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Answer, AnswerScore, KnownModel
from palm_rlhf.feedback.store.learning_tables import Round
from palm_rlhf.policy.rollout import ResponseSampling, collect
from palm_rlhf.policy.sequences import spoken
from palm_rlhf.serving.served_model import load
from palm_rlhf.training.learning_settings import LearningSettings
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
