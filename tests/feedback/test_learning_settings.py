"""Every setting of a round reaches its place: answers, preferences, the reward model, PPO, and the comparison."""

import dataclasses
import itertools
import json
from collections import Counter
from datetime import datetime, timezone

import pytest
import torch
from sqlalchemy import select

from palm_rlhf.cli import main
from palm_rlhf.data.conversation import encode_prompt, encode_response
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.feedback.learning.learning_loop import learn
from palm_rlhf.feedback.learning.learning_settings import LearningSettings
from palm_rlhf.feedback.learning.reward_fitting import encode_rankings, measure
from palm_rlhf.feedback.learning.round_rows import events_of
from palm_rlhf.feedback.learning.training_preferences import LearntPreference
from palm_rlhf.feedback.pairs.held_out_prompts import is_held_out
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, KnownModel, ShownComparison
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.identities import prompt_key_of, remember_model, weights_digest
from palm_rlhf.feedback.store.learning_tables import ImportedRanking, Round
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import join
from palm_rlhf.serving.served_model import load
from palm_rlhf.training.ranked_data import Ranking, fingerprint
from palm_rlhf.training.run.checkpoints import complete_checkpoints, read_state
from tests.feedback.taste import PROMPTS, TINY, letter_tokenizer, save_chat_model, vote

# No value is the default.
SETTINGS = LearningSettings(
    seed=3, num_prompts=12, num_answers=2, num_evaluations=4, compare_with="first", max_new_tokens=6, temperature=0.9,
    top_p=0.95, max_seq_len=30, held_out=0.4, people_weight=2.0, imported_weight=0.75, ai_weight=0.0,
    pooling="mean_all", reward_epochs=2, reward_batch_size=9, reward_learning_rate=3e-3, num_steps=2,
    rollouts_per_step=8, minibatch_size=4, epochs=3, learning_rate=2e-2, kl_coef=0.2, missing_eos_penalty=0.3,
    actor_lora_r=2, lora_targets=("v", "ff_out"), save_every=3, plot=False,
)  # fmt: skip
OF_THE_REWARD_MODEL = {  # a setting of a round, and the field of RewardConfig that it is
    "max_seq_len": "max_seq_len", "reward_epochs": "num_epochs", "reward_batch_size": "batch_size",
    "reward_learning_rate": "learning_rate", "save_every": "save_every",
    "plot": "plot",
}  # fmt: skip
OF_PPO = {
    name: name
    for name in (
        *("max_new_tokens", "temperature", "top_p", "num_steps", "rollouts_per_step", "minibatch_size", "epochs"),
        *("learning_rate", "kl_coef", "missing_eos_penalty", "actor_lora_r", "lora_targets", "save_every", "plot"),
    )
}
SEEN_BELOW = {
    *("seed", "num_prompts", "num_answers", "num_evaluations", "compare_with", "held_out", "pooling"),
    *("people_weight", "imported_weight", "ai_weight"),
}
IMPORTED = [[{"role": "user", "content": f"add {number}?"}] for number in range(100, 112)]


@dataclasses.dataclass
class Learnt:
    """Two rounds that were learnt with `SETTINGS`, and their database."""

    store: Store
    folder: object
    model: object
    rounds: list
    events: list

    def config(self, number: int, part: str) -> dict:
        return self.state(number, part)["config"]

    def state(self, number: int, part: str) -> dict:
        return read_state(complete_checkpoints(self.folder / f"round-{number:03d}/{part}/checkpoints")[-1])

    def rows(self, table, **columns) -> list:
        with self.store.reading() as session:
            return list(session.scalars(select(table).filter_by(**columns)))


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learnt")
    model = save_chat_model(folder / "model")
    with Store(folder / "feedback.db") as store:
        with store.writing() as session:
            remember_model(session, weights_digest(load(model).palm), "by a page that does not know its folder")
            for place, prompt in enumerate(IMPORTED):
                kind = "ai" if place % 3 == 0 else "people"
                texts = ["aa", "e", "f"]
                row = {"digest": str(place), "source": "file", "kind": kind, "prompt": prompt, "responses": texts}
                session.add(ImportedRanking(**row, created_at=datetime(2026, 1, 1, second=place, tzinfo=timezone.utc)))

        def say(text):
            if text.startswith("waiting for"):
                vote(store, 5, seed=0)
                vote(store, 5, seed=1, chosen_by="uncertainty")

        options = {"num_rounds": 2, "num_votes": 8, "prompts": PROMPTS, "say": say, "poll_seconds": 0.0}
        list(learn(store, model, folder / "run", SETTINGS, **options))
        with store.reading() as session:
            rounds = session.scalars(select(Round).order_by(Round.number)).all()
            events = [events_of(session, row.id) for row in rounds]
        yield Learnt(store, folder / "run", model, rounds, events)


def test_each_setting_is_looked_for():
    names = {field.name for field in dataclasses.fields(LearningSettings)}
    assert names == {*OF_THE_REWARD_MODEL, *OF_PPO, *SEEN_BELOW}
    for field in dataclasses.fields(LearningSettings):
        assert getattr(SETTINGS, field.name) != field.default, field.name
    assert LearningSettings().held_out == CollectionSettings().held_out  # the pages choose random pairs by that one


@pytest.mark.parametrize("part, names", [("reward", OF_THE_REWARD_MODEL), ("policy", OF_PPO)])
def test_training_has_the_settings_of_the_round(learnt, part, names):
    given = json.loads(json.dumps(dataclasses.asdict(SETTINGS)))
    for number in (1, 2):
        config = learnt.config(number, part)
        assert {name: config[field] for name, field in names.items()} == {name: given[name] for name in names}
        assert config["seed"] == SETTINGS.seed + number  # rounds draw other numbers
    assert {**learnt.rounds[0].settings, **given} == learnt.rounds[0].settings


def test_answers_have_the_settings_of_the_round(learnt):
    pool = learnt.rows(Answer, purpose="training", round_id=learnt.rounds[0].id)
    counts = Counter(answer.prompt_key for answer in pool)
    assert len(counts) == 12 and set(counts.values()) <= {1, 2} and counts.total() > 12
    assert all(len(answer.text) <= 6 for answer in pool) and any(len(answer.text) == 6 for answer in pool)
    assert {answer.finish for answer in pool} == {"stop", "length"}
    for answer in pool:
        assert answer.finish == "length" or len(answer.text) < 6  # special tokens are no text
        assert answer.sampling == {"temperature": 0.9, "top_p": 0.95, "max_new_tokens": 6, "seed": 3}
    compared = learnt.rows(Answer, purpose="evaluation")
    assert Counter(answer.round_id for answer in compared) == {row.id: 8 for row in learnt.rounds}
    held_out = {key: is_held_out(key, CollectionSettings(held_out=0.4)) for key in map(prompt_key_of, PROMPTS)}
    assert 8 < sum(held_out.values()) < 24
    assert all(held_out[answer.prompt_key] for answer in compared)


def test_the_new_model_can_be_compared_with_the_first(learnt):
    first = learnt.rounds[0].base_model_id
    middle, last = (each["model"]["model"] for each in learnt.events)
    assert [each["evaluation"]["models"] for each in learnt.events] == [[first, middle], [first, last]]
    assert learnt.rounds[1].base_model_id == middle
    for row in learnt.rows(Answer, purpose="evaluation", round_id=learnt.rounds[1].id):
        assert row.model_id in (first, last)


def test_the_policy_learns_on_prompts_that_are_not_held_out(learnt):
    keys = map(prompt_key_of, PROMPTS)
    number = sum(not is_held_out(key, CollectionSettings(held_out=SETTINGS.held_out)) for key in keys)
    assert 0 < number < len(PROMPTS)
    for round_number in (1, 2):
        assert learnt.state(round_number, "policy")["sampler"]["num_items"] == number


def test_adapters_are_merged(learnt):
    base = PaLM.from_pretrained(learnt.model)
    policy = PaLM.from_pretrained(learnt.folder / "round-001/policy")
    assert not policy.finetune_modules
    assert policy.state_dict().keys() == base.state_dict().keys()
    assert not all(map(torch.equal, policy.state_dict().values(), base.state_dict().values()))


def votes_of(learnt) -> list[tuple[str, list[dict], list[str], bool]]:
    """Each vote of the first round: the key, the prompt, the better and the worse text, and whether it was random."""
    answers = {answer.id: answer for answer in learnt.rows(Answer)}
    verdicts = {row.comparison_id: row.verdict for row in learnt.rows(ComparisonVote)}
    found = []
    shown_in_order = sorted(learnt.rows(ShownComparison, round_id=learnt.rounds[0].id), key=lambda row: row.created_at)
    for shown in shown_in_order:
        texts = [answers[shown.left_id].text, answers[shown.right_id].text]
        texts = texts if verdicts[shown.id] == "left" else texts[::-1]
        found.append((shown.prompt_key, answers[shown.left_id].prompt, texts, shown.chosen_by == "random"))
    return found


def test_the_reward_model_learns_from_all_but_held_out_prompts_by_weight(learnt):
    model, collection = load(learnt.model), CollectionSettings(held_out=SETTINGS.held_out)

    def ranking(prompt, texts, weight):
        tokens = encode_prompt(prompt, model.tokenizer, model.template)
        return Ranking(
            tokens, [encode_response(prompt, each, model.tokenizer, model.template) for each in texts], weight=weight
        )

    votes = votes_of(learnt)
    expected = [ranking(prompt, texts, 2.0) for key, prompt, texts, _ in votes if not is_held_out(key, collection)]
    for place, prompt in enumerate(IMPORTED):
        if place % 3 and not is_held_out(prompt_key_of(prompt), collection):
            expected.append(ranking(prompt, ["aa", "e", "f"], 0.75))
    figures = learnt.events[0]["reward"]
    assert 0 < sum(each.weight == 2.0 for each in expected) < 10 and figures["rankings"] == len(expected)
    assert learnt.state(1, "reward")["data"] == fingerprint(expected)
    assert figures["pairs"] == sum(each.num_pairs for each in expected)


def test_its_accuracy_counts_votes_on_random_pairs_of_held_out_prompts(learnt):
    collection = CollectionSettings(held_out=SETTINGS.held_out)
    held_out = [vote for vote in votes_of(learnt) if is_held_out(vote[0], collection)]
    model, reward_model = load(learnt.model), RewardModel.from_pretrained(learnt.folder / "round-001/reward")
    assert reward_model.pooling == "mean_all" and float(reward_model.score_std) != 1

    def score(prompt, text):
        tokens = encode_prompt(prompt, model.tokenizer, model.template)
        answer = encode_response(prompt, text, model.tokenizer, model.template)
        scores = reward_model(torch.cat([tokens, answer])[None], prompt_lengths=torch.tensor([len(tokens)]))
        return float(scores.detach()[0])

    right = [
        (score(prompt, better) > score(prompt, worse), at_random) for _, prompt, (better, worse), at_random in held_out
    ]
    figures, at_random = learnt.events[0]["reward"], [is_right for is_right, at_random in right if at_random]
    assert 0 < len(at_random) < len(right)
    assert (figures["num_pairs"], figures["num_pairs_all"]) == (len(at_random), len(right))
    assert figures["accuracy"] == pytest.approx(sum(at_random) / len(at_random))
    assert figures["accuracy_all"] == pytest.approx(sum(is_right for is_right, _ in right) / len(right))


def test_votes_on_one_prompt_count_as_fewer(tmp_path):
    """Ten votes on each of two prompts, of which the model has all of the first right and none of the second."""
    model = load(save_chat_model(tmp_path / "model"))
    reward_model = RewardModel(model.palm, pooling="mean")

    def scores(prompt, texts):
        pairs = [
            (
                encode_prompt(prompt, model.tokenizer, model.template),
                encode_response(prompt, text, model.tokenizer, model.template),
            )
            for text in texts
        ]
        return reward_model.score(join(*zip(*pairs)), raw=True).tolist()

    votes = []
    for place, prompt in enumerate(PROMPTS[:2]):
        texts = ["".join(letters) for letters in itertools.product("abe", repeat=2)]
        ordered = [text for _, text in sorted(zip(scores(prompt, texts), texts), reverse=place == 0)]
        pairs = list(itertools.combinations(ordered, 2))[:10]
        votes += [LearntPreference(prompt, list(pair), "people", "comparison", True, True) for pair in pairs]
    found = measure(reward_model, votes, model, 32)
    assert (found.accuracy, found.num_pairs) == (0.5, 20)
    assert found.low < 0.1 and found.high > 0.9  # as of two prompts; twenty votes alone would give 0.30 to 0.70
    assert measure(reward_model, [], model, 32) == (None, None, None, 0)


def test_preferences_of_weight_zero_are_left_out(tmp_path):
    model = load(save_chat_model(tmp_path / "model"))
    given = [
        LearntPreference(PROMPTS[0], ["a", "b"], origin, "file", False, False)
        for origin in ("people", "imported", "ai")
    ]
    rankings = encode_rankings(given, model, 32, {"people": 1.0, "imported": 0.5, "ai": 0.0})
    assert [ranking.weight for ranking in rankings] == [1.0, 0.5]
    tool = [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]
    written = [LearntPreference(tool, ["a", "b"], "people", "file", False, False), given[0]]
    assert len(encode_rankings(written, model, 32, {"people": 1.0})) == 1  # the other, no chat template of ours writes


def test_the_command_learns_from_imported_preferences_alone(tmp_path, capsys):
    save_chat_model(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt[0]['content']}\n" for prompt in PROMPTS))
    with Store(tmp_path / "feedback.db") as store, store.writing() as session:
        for place, prompt in enumerate(IMPORTED):
            row = {"digest": str(place), "source": "file", "prompt": prompt, "responses": ["aa", "e"]}
            session.add(ImportedRanking(kind="people", **row))
    small = {**TINY, "num_steps": 1, "num_evaluations": 2, "reward_epochs": 1, "num_prompts": 3}
    options = [word for name, value in small.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    files = [tmp_path / "feedback.db", tmp_path / "model", "--output-dir", tmp_path / "run", "--now"]
    main(["learn", *map(str, files), "--prompts", str(tmp_path / "prompts.txt"), *options])
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert len(captured.out.splitlines()) == 1
    assert result.keys() == {
        *("round", "votes", "accuracy", "accuracy_low", "accuracy_high", "score", "kl", "comparisons", "model"),
        "output_dir",
    }
    assert (result["round"], result["votes"], result["accuracy"], result["comparisons"]) == (1, 0, None, 2)
    assert load(result["model"]).template == PRESETS["default"]
    assert f"palm-rlhf chat {result['model']}" in captured.err
    assert load(result["model"]).tokenizer.fingerprint == letter_tokenizer().fingerprint
    with Store(tmp_path / "feedback.db") as store, store.reading() as session:
        assert {row.name for row in session.scalars(select(KnownModel))} == {"model", "round 1"}
