"""Rewards in the trainer: what functions are given of prompts and rollouts, and several rewards with weights."""

import itertools
import json
import statistics
import threading
from collections import Counter

import pytest
import torch

from palm_rlhf import PaLM, PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.training.rlhf.prompts import read_prompts
from palm_rlhf.training.run.log import read_metrics
from tests.factories import evens, lengths, palm_of

EOS = 5
ROWS = [{"prompt": [1 + index] * (1 + index % 3), "answer": f"answer {index}", "id": index} for index in range(7)]


class Digits:
    """A token is a letter."""

    def encode(self, text: str) -> list[int]:
        return ["abcdefghijkl".index(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join("abcdefghijkl"[token] for token in tokens)


def tiny_palm() -> PaLM:
    return palm_of(depth=1, heads=1, dim_head=16)


def make_trainer(reward, folder=None, resume=False, prompts=ROWS, tokenizer=None, **options) -> RLHFTrainer:
    settings = {"num_steps": 3, "rollouts_per_step": 8, "minibatch_size": 8, "epochs": 1, "max_new_tokens": 6,
                "eos_token": EOS, "learning_rate": 1e-2, "save_every": 1, "sample_every": 1, "plot": False}  # fmt: skip
    extra = {name: options.pop(name) for name in ("environment",) if name in options}
    return RLHFTrainer(palm=tiny_palm(), reward_model=reward, prompts=prompts, tokenizer=tokenizer, output_dir=folder,
                       resume=resume, **extra, config=PPOConfig(**{**settings, **options}))  # fmt: skip


# rows


def test_rows_are_prompts_with_columns(tmp_path):
    """As ids, as texts and in a file: a column that a row has not is None there."""
    rows = [{"prompt": "ab", "answer": "c\u2028d", "n": 1}, {"prompt": "b", "answer": None}, {"prompt": "c", "n": [2]}]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    columns = {"answer": ["c\u2028d", None, None], "n": [1, None, [2]]}
    tokenizer = Digits()
    ids = [{**row, "prompt": tokenizer.encode(row["prompt"])} for row in rows]
    tensors = [{**row, "prompt": torch.tensor(row["prompt"])} for row in ids]
    for given in (
        {"prompts": rows},
        {"prompts": ids},
        {"prompts": tensors},
        {"prompts_path": tmp_path / "rows.jsonl"},
    ):
        found = read_prompts(12, **given, tokenizer=tokenizer)
        assert [row.tolist() for row in found.token_ids] == [[0, 1], [1], [2]]
        assert found.columns == columns
    mixed = read_prompts(12, prompts=["ab", rows[1], torch.tensor([2])], tokenizer=tokenizer)
    assert [row.tolist() for row in mixed.token_ids] == [[0, 1], [1], [2]]
    assert mixed.columns == {"answer": [None, None, None]}
    assert read_prompts(12, prompts=["ab"], tokenizer=tokenizer).columns == {}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "ab"}, r"prompt 1 has the keys \['text'\], expected 'prompt' among them"),
        ({"prompt": [{"role": "user", "content": "ab"}]}, "prompt 1 is .*expected a text or token ids; messages are"),
        ({"prompt": None}, "prompt 1 is None, expected a text or token ids"),
        ({"prompt": ""}, r"prompt 1 has the shape \(0,\)"),
        ({"prompt": [99]}, "token id 99 is outside the vocabulary"),
    ],
)
def test_rows_without_a_prompt_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        read_prompts(12, prompts=[{"prompt": "a"}, row], tokenizer=Digits())


@pytest.mark.parametrize(
    "line, message", [("[1]", r"row 2: got '\[1\]', expected an object"), ("{", "row 2: it is no JSON")]
)
def test_a_file_of_rows_names_the_row_that_is_none(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n\n' + line)
    with pytest.raises(ValueError, match=message):
        read_prompts(12, prompts_path=tmp_path / "rows.jsonl", tokenizer=Digits())


# what functions are given


@pytest.mark.parametrize("options", [{}, {"algorithm": "grpo", "num_samples": 4}], ids=str)
def test_each_response_comes_with_the_columns_of_its_prompt(options):
    """In every step, whatever the order of the prompts: each response has its own answer, ids and end."""
    heard = []

    def reward(prompts, completions, answer, id, prompt_ids, completion_ids, truncated, step, trainer_state):
        for prompt, completion, row, said, number, cut in zip(
            prompts, completions, answer, completion_ids, id, truncated, strict=True
        ):
            assert prompt.tolist() == ROWS[number]["prompt"] and row == ROWS[number]["answer"]
            assert completion.tolist() == said and cut == (said[-1] != EOS)
        assert prompt_ids == [prompt.tolist() for prompt in prompts]
        assert (trainer_state.global_step, trainer_state.max_steps) == (step - 1, 3)
        heard.append((step, id, truncated))
        return [float(number) for number in id]

    steps = list(make_trainer(reward, **options).steps())
    assert [step for step, _, _ in heard] == [1, 2, 3]
    assert [metrics["score"] for metrics in steps] == [statistics.mean(ids) for _, ids, _ in heard]
    assert len({tuple(ids) for _, ids, _ in heard}) == 3 and len({*itertools.chain(*(cut for *_, cut in heard))}) == 2
    if "num_samples" in options:
        assert all(set(Counter(ids).values()) == {4} for _, ids, _ in heard)


def test_texts_and_their_columns(tmp_path):
    rows = [{"prompt": "ab", "n": 1}, {"prompt": "c", "n": 2}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def reward(completions, n, prompts, **others):
        assert {"completion_ids", "truncated", "step"} <= others.keys()
        assert [{"ab": 1, "c": 2}[prompt] for prompt in prompts] == n
        return [float(len(text)) for text in completions]

    trainer = RLHFTrainer(
        palm=tiny_palm(), reward_model=reward, prompts_path=tmp_path / "rows.jsonl", tokenizer=Digits(),
        config=PPOConfig(num_steps=1, rollouts_per_step=8, minibatch_size=8, max_new_tokens=4, plot=False),
    )  # fmt: skip
    assert next(trainer.steps())["score"] == 4.0


def test_a_function_reads_the_messages_of_conversations():
    def reward(prompts, completions, messages, id):
        assert all(talk[-1]["role"] == "assistant" for talk in messages)
        assert [talk[0]["content"].tolist() for talk in messages] == [ROWS[number]["prompt"] for number in id]
        return [float(sum(message["role"] == "assistant" for message in talk)) for talk in messages]

    metrics = next(make_trainer(reward, environment=lambda messages: torch.tensor([3]), max_turns=2).steps())
    assert metrics["score"] == metrics["turns"]
    with pytest.raises(ValueError, match="asks for 'messages'; expected names among"):
        make_trainer(reward)


def test_what_a_function_asks_for_in_vain_is_refused_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="the reward function asks for 'label'; expected names among"):
        make_trainer(lambda prompts, completions, label: 0, tmp_path)
    with pytest.raises(ValueError, match=r"the prompts have the columns \['step'\], names under which functions"):
        make_trainer(lengths, tmp_path, prompts=[{"prompt": [1], "step": 4}])
    assert not list(tmp_path.iterdir())


def test_the_best_of_several_by_columns():
    """generate asks the rewards of the training, with the columns of its prompt."""

    def closest(prompts, completions, goal, step, truncated):
        assert set(goal) == {3} and step == 1 and len(truncated) == 64
        return [-abs(len(row) - aim) for row, aim in zip(completions, goal, strict=True)]

    rewards = {"closest": closest, "longest": lengths}
    trainer = make_trainer(rewards, prompts=[{"prompt": [1], "goal": 3}], reward_weights={"longest": 0.01})
    sampled = {"prompt": torch.tensor([1, 2]), "num_samples": 64, "max_new_tokens": 9, "columns": {"goal": 3}}
    assert len(trainer.generate(**sampled)) == 3
    longest = make_trainer(rewards, prompts=[{"prompt": [1], "goal": 3}], reward_weights={"longest": 9.0})
    assert len(longest.generate(**sampled)) == 9
    with pytest.raises(ValueError, match="asks for 'goal'"):
        trainer.generate(**{**sampled, "columns": None})


# several rewards


def picky(prompts, completions) -> list[float | None]:
    return [None if len(row) == 6 else 1.0 for row in completions]


@pytest.mark.law("PPOConfig.reward_weights")
def test_each_reward_is_logged_by_name_and_all_are_learnt_from_by_weight(tmp_path):
    heard = {"length": [], "evens": [], "picky": []}

    def hearing(name, reward):
        def asked(prompts, completions):
            heard[name] = reward(prompts, completions)
            return heard[name]

        return asked

    functions = {"length": lengths, "evens": evens, "picky": picky}
    rewards = {name: hearing(name, function) for name, function in functions.items()}
    weights = {"length": 0.25, "evens": -3.0, "picky": 0.0}
    trainer = make_trainer(rewards, tmp_path, reward_weights=weights)
    metrics = next(trainer.steps())
    said = [score for score in heard["picky"] if score is not None]
    assert 0 < len(said) < 8
    for name in ("length", "evens"):
        assert metrics[f"score/{name}"] == pytest.approx(statistics.mean(heard[name]), abs=1e-6)
        assert metrics[f"score_std/{name}"] == pytest.approx(statistics.pstdev(heard[name]), abs=1e-6)
    assert (metrics["score/picky"], metrics["score_std/picky"]) == (1.0, 0.0)
    total = [0.25 * a - 3 * b for a, b in zip(heard["length"], heard["evens"], strict=True)]
    assert metrics["score"] == pytest.approx(statistics.mean(total), abs=1e-6)
    assert metrics["score_std"] == pytest.approx(statistics.pstdev(total), abs=1e-6)
    lines = read_metrics(tmp_path / "samples.jsonl")
    assert [line["scores"]["picky"] for line in lines] == heard["picky"]
    assert [line["scores"]["length"] for line in lines] == heard["length"]
    assert [line["score"] for line in lines] == pytest.approx(total, abs=1e-6)

    def together(prompts, completions):
        return [0.25 * a - 3 * b for a, b in zip(lengths(prompts, completions), evens(prompts, completions))]

    one = make_trainer(together)
    next(one.steps())
    weights = zip(one.palm.parameters(), trainer.palm.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_reward_that_never_says_anything_is_not_logged():
    rewards = {"length": lengths, "silent": lambda prompts, completions: [None] * len(prompts)}
    metrics = next(make_trainer(rewards).steps())
    assert metrics["score"] == metrics["score/length"] and not any("silent" in name for name in metrics)
    with pytest.raises(ValueError, match="the reward returned None for all responses of step 1"):
        next(make_trainer({"silent": rewards["silent"], "seen": lengths}, reward_weights={"seen": 0.0}).steps())


def test_models_among_several_rewards():
    torch.manual_seed(3)
    model = RewardModel(tiny_palm())
    trainer = make_trainer({"model": model, "length": lengths})
    rollout = trainer.collect()
    expected = model.score(rollout.sequences).double() + rollout.sequences.response_lengths
    torch.testing.assert_close(trainer.score(rollout).scores.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.law("PPOConfig.reward_timeout")
def test_rewards_are_asked_for_as_long_as_the_config_says():
    end = threading.Event()

    def slow(prompts, completions):
        assert end.wait(900)
        return [0.0] * len(prompts)

    trainer = make_trainer({"slow": slow}, reward_timeout=0.05)
    weights = [parameter.clone() for parameter in trainer.palm.parameters()]
    with pytest.raises(TimeoutError, match=r"the reward 'slow' did not answer within reward_timeout=0\.05 seconds"):
        next(trainer.steps())
    end.set()
    assert all(torch.equal(before, now) for before, now in zip(weights, trainer.palm.parameters(), strict=True))


@pytest.mark.parametrize(
    "reward, options, message",
    [
        (lengths, {"reward_weights": {"length": 2.0}}, "for one reward without a name"),
        ({"length": lengths}, {"reward_weights": {"evens": 2.0}}, r"has \['evens'\]; expected names of rewards"),
        ({"length": lengths}, {"reward_weights": {"length": float("nan")}}, "reward_weights is .*, expected finite"),
        ({"length": lengths}, {"reward_timeout": 0.0}, "reward_timeout is 0.0, expected None or a number above 0"),
    ],
)
def test_weights_that_would_reach_nothing_are_refused(reward, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(reward, **options)


def test_a_run_with_several_rewards_and_columns_resumes_to_the_bit(tmp_path):
    def by_answer(prompts, completions, answer, step):
        return [len(row) * int(text[-1]) / step for row, text in zip(completions, answer, strict=True)]

    rewards = {"answer": by_answer, "evens": evens}
    whole = make_trainer(rewards, tmp_path / "whole", reward_weights={"evens": 2.0})
    list(whole.steps())
    next(make_trainer(rewards, tmp_path / "cut", reward_weights={"evens": 2.0}).steps())
    resumed = make_trainer(rewards, tmp_path / "cut", resume=True, reward_weights={"evens": 2.0})
    list(resumed.steps())
    parameters = zip(whole.palm.parameters(), resumed.palm.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in parameters)
    scores = [
        [[line[name] for name in ("score", "score/answer", "score_std/evens")] for line in read_metrics(folder)]
        for folder in (tmp_path / "whole/metrics.jsonl", tmp_path / "cut/metrics.jsonl")
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 3
