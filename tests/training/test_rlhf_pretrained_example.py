"""examples/rlhf.py with a pretrained chat model: the check of answers, and the whole recipe on a tiny model."""

import importlib
import json
import math

import pytest
import torch
import tyro

from palm_rlhf.commands.start_models import open_chat_model
from palm_rlhf.data.conversation import encode_prompt, encode_response
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.run.log import read_metrics


@pytest.fixture(scope="module")
def modules(root):
    """The module of a name in examples/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "examples")
        yield importlib.import_module


@pytest.fixture(scope="module")
def facts(modules):
    """The questions and the check of answers."""
    return modules("facts")


@pytest.fixture(scope="module")
def recipe(modules):
    """The recipe."""
    return modules("rlhf_pretrained")


@pytest.fixture(scope="module")
def ask(facts):
    """`ask(text)`: the question with that text."""
    by_text = {question.text: question for question in facts.read_questions()}
    return by_text.__getitem__


def test_every_fact_in_a_short_sentence_is_right_and_every_wrong_one_is_not(facts):
    questions = facts.read_questions()
    assert len(questions) == len({question.text for question in questions}) == 64 * 3 + 40
    for question in questions:
        assert [facts.gold_score(question, f"It is {name}.", True) for name in question.answers] == [1.0] * len(
            question.answers
        )
        assert not any(facts.names_fact(question, f"It is {name}.") for name in question.wrong)
        assert not facts.names_fact(question, question.text)  # an echo of the question


CAPITAL, CONTINENT, LANGUAGE = (
    "What is the capital of Japan?",
    "On which continent is Brazil?",
    "Which language is spoken in Cambodia?",
)


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (CAPITAL, "The capital of Japan is Tokyo.", 1.0),
        (CAPITAL, "TOKYO is the capital of Japan!", 1.0),
        (CAPITAL, "The capital of Japan is Tokyo, a city with millions of inhabitants.", 1.0),  # 12 words
        (CAPITAL, "The capital of Japan is Tokyo, a big city with many millions of inhabitants.", 12 / 14),
        (CAPITAL, f"The capital of Japan is Tokyo, {'very ' * 0}{', '.join(f'big {n}' for n in 'abcdefghi')}.", 0.5),
        ("What is the capital of Brazil?", "The capital of Brazil is Brasília.", 1.0),  # accents
        ("What is the capital of China?", "The capital of China is Beijing.", 1.0),
        ("What is the chemical formula of water?", "The formula of water is H2O.", 1.0),
        (CAPITAL, "", 0.0),
        (CAPITAL, " ", 0.0),
        (CAPITAL, "Tokyo.", 0.0),  # no sentence
        (CAPITAL, "Tokyo, Japan.", 0.0),
        (CAPITAL, "Is Tokyo.", 0.0),
        (CAPITAL, "The capital of Japan, Tokyo.", 0.0),  # no verb
        (CAPITAL, "The capital of Japan is Tokyo", 0.0),  # cut off, though it ended
        (CAPITAL, "the capital of Japan is Tokyo.", 0.0),
        (CAPITAL, "The capital of Japan is Tokyo. It is big.", 0.0),
        (CAPITAL, "The capital of Japan is Tokyo.\nIt is big.", 0.0),
        (CAPITAL, "The capital of Japan is is Tokyo.", 0.0),
        (CAPITAL, "Tokyo Tokyo Tokyo Tokyo is.", 0.0),
        (CAPITAL, "Is the capital of Japan Tokyo?", 0.0),
        (CAPITAL, "The capital of Japan is Kyoto.", 0.0),
        (CAPITAL, "The capital of Japan is Tokyoto.", 0.0),  # a part of a word
        (CAPITAL, "It is Seoul, Beijing or Tokyo.", 0.0),  # guesses
        (CONTINENT, "Brazil is in South America.", 1.0),
        (CONTINENT, "Brazil is in America.", 0.0),
        (CONTINENT, "Brazil is in South America, Africa, Asia and Europe.", 0.0),
        (LANGUAGE, "Khmer is spoken in Cambodia.", 1.0),
        (LANGUAGE, "Cambodian is spoken in Cambodia.", 0.0),
    ],
)
def test_the_gold_score_is_of_one_short_sentence_that_names_the_fact(facts, ask, text, answer, expected):
    assert facts.gold_score(ask(text), answer, True) == pytest.approx(expected)
    assert facts.gold_score(ask(text), answer, False) == 0  # cut off


def test_held_out_questions_are_about_other_subjects(facts):
    questions = facts.read_questions()
    train, unseen = facts.hold_out(questions, 20, 0)
    assert sorted(map(id, train + unseen)) == sorted(map(id, questions))
    assert {question.subject for question in train}.isdisjoint(question.subject for question in unseen)
    assert len({question.subject for question in unseen}) == 20
    assert facts.hold_out(questions, 20, 0) == (train, unseen) != facts.hold_out(questions, 20, 1)


def test_figures_of_cheating_are_shares_of_the_answers(recipe, modules, ask):
    questions = [ask(CAPITAL), ask(CONTINENT)]
    answers = [["It is Tokyo.", "It is Tokyo."], ["Brazil is big, as is well known.", "South America. It is there."]]
    gold = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    measured = modules("rlhf_report").Measurement(answers, gold, -gold * 3 + 1, gold * 0)
    assert recipe.habits(questions, measured) == pytest.approx(
        {
            "names_fact": 3 / 4,
            "one_sentence": 3 / 4,
            "words": (3 + 3 + 7 + 5) / 4,
            "distinct": 3 / 4,
            "gold_proxy_correlation": -1.0,
        }
    )
    assert recipe.gold_reward(["It is Tokyo."] * 2, [ask(CAPITAL)] * 2, [False, True]) == [1.0, 0.0]


ANSWERS = ("It is Europe.", "It is Asia.", "Europe. It is")
TINY = [
    *("--held-out", "8", "--num-samples", "4", "--num-asked", "120", "--num-ranked", "6", "--measure-every", "4"),
    *("--reward-lora-r", "2", "--reward.num-epochs", "1", "--ppo.num-steps", "8", "--ppo.rollouts-per-step", "32"),
    *("--ppo.max-new-tokens", "20", "--ppo.actor-lora-r", "2", "--ppo.precision", "float32"),
    *("--ppo.learning-rate", "1e-2", "--ppo.sample-every", "2"),
]


@pytest.fixture(scope="module")
def chat_model(modules, facts, tmp_path_factory):
    """The folder of a tiny model that gives one of three answers to every question; some are right."""
    folder = tmp_path_factory.mktemp("chat_model")
    torch.manual_seed(0)
    PaLM(num_tokens=256, dim=48, depth=1, heads=2, dim_head=16, block="serial", norm="rms").save_pretrained(folder)
    palm, tokenizer, template = open_chat_model(folder)
    pairs = []
    for question in facts.read_questions()[:60]:
        messages = [{"role": "user", "content": question.text}]
        prompt = encode_prompt(messages, tokenizer, template)
        pairs += [(prompt, encode_response(messages, answer, tokenizer, template)) for answer in ANSWERS]
    dialogue_model = modules("dialogue_model")
    dialogue_model.fine_tune(palm, pairs, dialogue_model.FineTuning(num_steps=100, learning_rate=2e-2), seed=0)
    for part in (palm, tokenizer, template):
        part.save_pretrained(folder)
    return folder


def run(recipe, capsys, *options):
    """The JSON and the messages of a run."""
    tyro.cli(recipe.main, args=[*TINY, *map(str, options)])
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]), said.err


@pytest.mark.slow(15)
def test_the_recipe_trains_adapters_on_the_proxy_alone_and_a_run_that_was_stopped_goes_on(
    recipe, chat_model, tmp_path, capsys
):
    whole, said = run(recipe, capsys, "--model", chat_model, "--output-dir", tmp_path / "whole")
    assert all(f"{stage}. " in said for stage in (1, 2, 3))
    assert all(words in said for words in ("names_fact", "win rate", "over-optimised", "before:", "step 4:"))
    for name in ("gold", "proxy", "names_fact", "one_sentence", "words", "distinct", "gold_proxy_correlation"):
        assert math.isfinite(whole[f"{name}_before"]) and math.isfinite(whole[f"{name}_after"])
    assert whole["proxy_after"] > whole["proxy_before"]
    assert whole["kl"] > 0.01

    # the gold score is in the log, and not in the score that PPO maximises
    steps = read_metrics(tmp_path / "whole/ppo/metrics.jsonl")
    assert [step["score"] for step in steps] == pytest.approx([step["score/proxy"] for step in steps])
    assert any(step["score/gold"] > 0 for step in steps)

    # the saved model is the trained policy, without adapters
    base, trained = open_chat_model(chat_model).palm, open_chat_model(tmp_path / "whole").palm
    assert not trained.finetune_modules
    assert not torch.equal(base.layers[0].in_proj.weight, trained.layers[0].in_proj.weight)
    assert torch.equal(base.token_emb.weight, trained.token_emb.weight)
    assert RewardModel.from_pretrained(tmp_path / "whole/reward_model").lora_scope == "reward"
    assert (tmp_path / "whole/rlhf.png").read_bytes().startswith(b"\x89PNG")

    parts = ("--model", chat_model, "--output-dir", tmp_path / "parts")
    early, _ = run(recipe, capsys, *parts, "--ppo.max-seconds", "0.001")
    assert early["stopped_early"] == "max_seconds"
    late, said = run(recipe, capsys, *parts, "--resume")
    assert "1. ranking" not in said
    with pytest.raises(ValueError, match="has an earlier run"):
        run(recipe, capsys, *parts)
    same = ("gold_before", "gold_after", "proxy_after", "kl", "win_rate", "words_after")
    assert [late[name] for name in same] == [whole[name] for name in same]


def test_a_model_that_names_no_fact_is_refused_with_its_reason(recipe, tmp_path, capsys):
    torch.manual_seed(0)
    PaLM(num_tokens=256, dim=16, depth=1, heads=1, dim_head=16).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"got 0 rankings .* expected at least 10"):
        run(recipe, capsys, "--model", tmp_path / "model", "--output-dir", tmp_path / "run", "--num-asked", "4")


def test_model_chooses_the_recipe(modules, recipe):
    example = modules("rlhf")
    assert example.recipe(["--model", "smollm2"]) is example.recipe(["--seed", "1", "--model=smollm2"]) is recipe.main
    assert example.recipe(["--model.dim", "48"]) is example.recipe([]) is example.main
