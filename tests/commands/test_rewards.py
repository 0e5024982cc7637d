"""Rewards and rows of the command line: functions in files, reward models in folders, and what functions are given."""

import json
import re

import pytest
import torch

from palm_rlhf.cli import main
from palm_rlhf.commands.reward_arguments import open_rewards, read_environment, read_function
from palm_rlhf.commands.start_models import open_chat_model
from palm_rlhf.commands.training_data import read_prompt_rows
from palm_rlhf.data.conversation import encode_prompt, encode_reply
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.training.run.log import read_metrics

SMALL = {"dim": 16, "depth": 1, "heads": 1, "dim_head": 8}
ROWS = [
    {"prompt": "What is 1+1?", "answer": "2", "id": 7},
    {"prompt": "What is 2+2?", "answer": "4", "hint": "count your fingers"},
    {"prompt": "What is 1+1?", "answer": "2", "id": 7},
    {"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "3+3?"}], "answer": "6"},
]  # fmt: skip
REWARDS = """
from beside import length

def correct(completions, answer, id, hint):
    assert set(answer) <= {"2", "4", "6"} and set(id) <= {7, None} and set(hint) <= {"count your fingers", None}
    return [float(expected in said) for said, expected in zip(completions, answer)]
"""
PPO = ["--plot", "False", "--num-steps", "2", "--rollouts-per-step", "4", "--minibatch-size", "4",
       "--max-new-tokens", "6", "--sample-every", "1"]  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """The folder of a PaLM of bytes; the file of rewards and that of the rows lie beside it."""
    PaLM(num_tokens=256, **SMALL).save_pretrained(tmp_path / "model")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "beside.py").write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "model"


def test_a_run_is_rewarded_by_functions_of_a_file(model, command):
    folder = model.parent
    rewards = [f"correct={folder}/my_rewards.py:correct", f"length={folder}/my_rewards.py:length"]
    options = ["--model", model, "--output-dir", folder / "run", *PPO, "--rewards", *rewards]
    result, said = command("rlhf", folder / "rows.jsonl", *options, "--reward-weights", "length", "-0.5")
    assert "3 prompts" in said and "evaluate run" not in said  # which needs a reward model
    assert result["score"] == pytest.approx(result["score/correct"] - 0.5 * result["score/length"], abs=1e-6)
    assert 0 < result["score/length"] <= 6
    for line in read_metrics(folder / "run/samples.jsonl"):
        assert line["scores"]["length"] == len(line["completion"])
        assert line["score"] == line["scores"]["correct"] - 0.5 * len(line["completion"])


def test_a_run_is_evaluated_on_prompts_of_its_own(model, command):
    """By rewards of the training and by one that only evaluations ask; what is best is kept and said."""
    folder = model.parent
    (folder / "more.jsonl").write_text('{"prompt": "4+4?", "answer": "8"}\n{"prompt": "5+5?", "answer": "0"}\n')
    (folder / "gold.py").write_text(
        "def right(completions, answer):\n    assert answer == ['8', '0']\n    return [len(c) for c in completions]\n"
    )
    options = [
        "--model",
        model,
        "--output-dir",
        folder / "run",
        *PPO,
        "--rewards",
        f"length={folder}/my_rewards.py:length",
    ]
    held_out = ["--eval-prompts", folder / "more.jsonl", "--eval-rewards", f"gold={folder}/gold.py:right"]
    every = ["--eval-every", "1", "--eval-temperature", "0", "--save-every", "9", "--keep-checkpoints", "1"]
    result, said = command("rlhf", folder / "rows.jsonl", *options, *held_out, *every)
    assert result["eval_score"] == result["eval_score/gold"] == result["eval_score/length"]
    assert 0 <= result["eval_win_rate_low"] <= result["eval_win_rate"] <= result["eval_win_rate_high"] <= 1
    best = json.loads((folder / "run/checkpoints/best.json").read_text())
    assert best["metric"] == "eval_score/gold"
    policy = folder / "run/checkpoints" / best["checkpoint"] / "policy"
    assert f"the best by eval_score/gold is {policy}" in said and PaLM.from_pretrained(policy).num_tokens == 261


def test_rows_carry_what_is_not_of_their_question(model):
    chat = open_chat_model(model)
    rows = read_prompt_rows(model.parent / "rows.jsonl", chat, with_columns=True)
    assert [{key: value for key, value in row.items() if key != "prompt"} for row in rows] == [
        {"answer": "2", "id": 7}, {"answer": "4", "hint": "count your fingers"}, {"answer": "6"}
    ]  # fmt: skip
    texts = ["What is 1+1?", "What is 2+2?"]
    expected = [encode_prompt([{"role": "user", "content": text}], *chat[1:]) for text in texts]
    expected.append(encode_prompt(ROWS[3]["prompt"], *chat[1:]))
    assert [row["prompt"].tolist() for row in rows] == [tokens.tolist() for tokens in expected]
    questions = [{"instruction": "Add.", "input": "1+1", "system": "Be brief.", "output": "2"}]
    (model.parent / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (row,) = read_prompt_rows(model.parent / "alpaca.jsonl", chat, with_columns=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add.\n1+1"}]
    assert row.pop("prompt").tolist() == encode_prompt(messages, *chat[1:]).tolist()
    assert row == {"output": "2"}


def test_models_and_functions_stand_side_by_side(model):
    chat = open_chat_model(model)
    reward_model = RewardModel(PaLM(num_tokens=chat.palm.num_tokens, **SMALL))
    reward_model.save_pretrained(model.parent / "reward")
    named = [f"gold={model.parent}/reward", f"length={model.parent}/my_rewards.py:length"]
    found = open_rewards(str(model.parent / "reward"), named, chat, "model")
    assert list(found) == ["reward_model", "gold", "length"]
    assert isinstance(found["reward_model"], RewardModel) and isinstance(found["gold"], RewardModel)
    assert found["length"]([], ["abc", ""]) == [3, 0]


@pytest.mark.parametrize(
    "rewards, expected",
    [
        ([], r"got no reward, expected --reward-model FOLDER, --rewards NAME=FILE\.py:FUNCTION, or both"),
        (["rewards.py:length"], r"got the reward 'rewards\.py:length', expected NAME=FILE\.py:FUNCTION, or NAME="),
        (["a={}/my_rewards.py:length", "a={}/my_rewards.py:correct"], "two rewards called 'a'"),
        (["a={}/my_rewards.py:size"], r"has no function 'size', expected one of \['correct', 'length'\]"),
        (["a={}/none.py:size"], r"there is no file .*none\.py"),
        (["a={}/none"], "there is no folder .*none"),
    ],
)
def test_rewards_that_are_none_are_refused(model, rewards, expected):
    options = ["--model", model, "--output-dir", model.parent / "run", *PPO]
    named = [reward.format(model.parent) for reward in rewards]
    arguments = ["rlhf", model.parent / "rows.jsonl", *options, *(["--rewards", *named] if named else [])]
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, str) and re.search(expected, end.value.code), end.value.code
    assert not (model.parent / "run").exists()


def test_a_function_asks_in_vain_before_the_run_begins(model):
    with pytest.raises(SystemExit, match="the reward 'correct' asks for 'answer' and 'id' and 'hint'; expected names"):
        (model.parent / "prompts.txt").write_text("One?\n")
        named = f"correct={model.parent}/my_rewards.py:correct"
        options = ["--model", model, "--output-dir", model.parent / "run", *PPO, "--rewards", named]
        main(["rlhf", str(model.parent / "prompts.txt"), *map(str, options)])
    assert not (model.parent / "run").exists()


def test_a_function_is_read_with_what_it_imports_beside_it(model):
    assert read_function(model.parent / "my_rewards.py", "length")([], ["ab"]) == [2]


def test_a_function_is_read_from_a_python_file_only(model):
    (model.parent / "rewards.txt").write_text("def length(): ...\n")
    with pytest.raises(ValueError, match=r"ends in \.py"):
        read_function(model.parent / "rewards.txt", "length")


ENVIRONMENT = """
def tell(messages, answer):
    return f"It is {answer}." if len(messages) == 2 else None
"""


def test_a_run_talks_with_a_function_of_a_file(model, command):
    """Its words become messages of the user. A model that reads its last token alone ends every turn at once."""
    folder, palm = model.parent, PaLM.from_pretrained(model)
    with torch.no_grad():
        for layer in palm.layers:
            layer.attn_out.weight.zero_()
            layer.ff_out.weight.zero_()
    palm.save_pretrained(model)
    chat = open_chat_model(model)
    prompt = encode_prompt([{"role": "user", "content": "?"}], *chat[1:])
    eos = int(chat.palm.generate(prompt=prompt, max_new_tokens=1, temperature=0))
    (folder / "talk.py").write_text(ENVIRONMENT)
    options = ["--model", model, "--output-dir", folder / "run", *PPO, "--rewards", f"size={folder}/beside.py:length",
               "--environment", f"{folder}/talk.py:tell", "--max-turns", "2", "--top-k", "1", "--eos-token", eos,
               "--max-new-tokens", "80"]  # fmt: skip
    result, _ = command("rlhf", folder / "rows.jsonl", *options)
    assert result["turns"] == 2
    for line in read_metrics(folder / "run/samples.jsonl"):
        answer = {"1+1": "2", "2+2": "4"}.get(line["prompt"].rstrip()[-4:-1], "6")
        assert [message["content"] for message in line["messages"][1:]] == ["", f"It is {answer}.", ""]
        assert line["completion_tokens"] == [eos, *encode_reply(f"It is {answer}.", *chat[1:]).tolist(), eos]


def test_an_environment_that_is_none_is_refused(model):
    with pytest.raises(ValueError, match=r"got the environment 'tell', expected FILE\.py:FUNCTION"):
        read_environment("tell", open_chat_model(model))
