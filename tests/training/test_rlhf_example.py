"""examples/rlhf.py as a user runs it, and what it says of its numbers."""

import importlib
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
import tyro

from palm_rlhf.cli import main
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rollout import ResponseSampling
from palm_rlhf.training.ranked_data import Ranking

SMALL = [
    *("--held-out", "6", "--num-ranked", "4", "--measure-every", "2", "--model.dim", "48", "--model.depth", "1"),
    *("--model.heads", "2", "--model.dim-head", "16", "--pretraining.num-steps", "60", "--reward.batch-size", "8"),
    *("--fine-tuning.num-steps", "40", "--reward.num-epochs", "1", "--ppo.num-steps", "4"),
    *(
        "--ppo.rollouts-per-step",
        "8",
        "--ppo.minibatch-size",
        "8",
        "--ppo.max-new-tokens",
        "16",
        "--ppo.sample-every",
        "2",
    ),
]
NUMBERS = {"gold_before", "gold_after", "gold_stderr", "proxy_before", "proxy_after", "kl", "seconds"}
NUMBERS |= {"win_rate", "win_rate_low", "win_rate_high"}


@pytest.fixture(scope="module")
def example(root):
    """The example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "examples")
        yield importlib.import_module("rlhf")


@pytest.fixture(scope="module")
def summary(example):
    """Its other half, which says what came of it."""
    return importlib.import_module("rlhf_report")


@pytest.fixture(scope="module")
def stages(example):
    """The stages that it shares with the recipe of pretrained models."""
    return importlib.import_module("rlhf_stages")


@pytest.fixture
def measurement(summary):
    """`measurement(gold, proxy)`: what was measured of as many prompts, an answer to each."""

    def build(gold, proxy):
        gold, proxy = (torch.tensor(numbers).unsqueeze(-1) for numbers in (gold, proxy))
        return summary.Measurement([[f"answer {index}"] for index in range(len(gold))], gold, proxy, gold * 0 + 3)

    return build


def run(root, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, str(root / "examples/rlhf.py"), *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow(18)
def test_the_whole_recipe_runs_and_leaves_what_it_made(root, tmp_path, capsys):
    done = run(root, "--seed", "1", "--output-dir", tmp_path / "run", *SMALL)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == NUMBERS
    assert 0 <= result["win_rate"] <= 1
    assert all(f"{stage}. " in done.stderr for stage in range(1, 6))
    assert all(word in done.stderr for word in ("win rate", "95% interval", "over-optimised", "before:", "step 2:"))

    # what it says to do next
    (line,) = (line for line in done.stderr.splitlines() if "palm-rlhf evaluate run" in line)
    main(shlex.split(line[line.index("palm-rlhf") :])[1:])
    win_rates = json.loads(capsys.readouterr().out.splitlines()[-1])["win_rates"]
    assert [step["step"] for step in win_rates] == [2, 4]

    policy = PaLM.from_pretrained(tmp_path / "run/policy")
    assert policy.num_tokens == 256
    RewardModel.from_pretrained(tmp_path / "run/reward_model")
    assert (tmp_path / "run/rlhf.png").read_bytes().startswith(b"\x89PNG")
    samples = (tmp_path / "run/ppo/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [1, 2, 3, 4]


@pytest.mark.slow(17)
def test_a_limit_of_time_stops_it_and_resuming_goes_on_from_the_stage_that_it_came_to(example, tmp_path, capsys):
    def result(*options):
        tyro.cli(example.main, args=["--output-dir", str(tmp_path), *SMALL, *options])
        said = capsys.readouterr()
        return json.loads(said.out.splitlines()[-1]), said.err

    limit = ("--max-seconds", "0.001")
    early, said = result(*limit)
    assert (early["stopped_early"], early["stage"]) == ("max_seconds", "pretraining")
    assert "stopped early, after step 1 of 60" in said and "2. fine-tuning" not in said
    whole, said = result("--resume")
    assert set(whole) == NUMBERS
    assert all(f"{stage}. " in said for stage in range(1, 6))

    early, said = result("--resume", *limit, "--reward.num-epochs", "2")
    assert (early["stopped_early"], early["stage"]) == ("max_seconds", "reward model")
    assert "1. to 3. are done" in said and "2. fine-tuning" not in said and "5. PPO" not in said
    early, said = result("--resume", *limit, "--ppo.num-steps", "6")
    assert (early["stopped_early"], set(early)) == ("max_seconds", {*NUMBERS, "stopped_early"})
    assert "stopped early, after step 5 of 6" in said
    more, _ = result("--resume", "--ppo.num-steps", "6")
    assert set(more) == NUMBERS
    steps = [json.loads(line)["step"] for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_help_comes_from_the_configs_and_a_used_folder_is_one_clear_line(root, tmp_path):
    shown = run(root, "--help")
    assert shown.returncode == 0
    for flag in ("--seed", "--output-dir", "--model.dim", "--fine-tuning.num-steps", "--reward.loss", "--ppo.kl-coef"):
        assert flag in shown.stdout
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "pretraining/metrics.jsonl").write_text('{"step": 1}\n')
    refused = run(root, "--output-dir", tmp_path, *SMALL)
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.splitlines()[-1].startswith("rlhf.py: ")
    assert "earlier run" in refused.stderr


def test_the_dialogues_are_in_the_package_each_once_and_a_turn_on_one_line(example):
    conversations = example.read_conversations()
    assert len(conversations) == len(set(conversations)) > 500
    assert ("What is AI?", "AI is the field of science which concerns itself with building hardware and software that "
            "replicates the functions of the human mind.") in conversations  # fmt: skip
    assert all("\n" not in text for turns in conversations for text in turns)


def test_the_annotator_ranks_friendly_first_and_has_no_choice_between_equals(example):
    annotator = example.Annotator()
    hostile, plain, friendly = annotator.score(["I hate you.", "It is a table.", "I love you, that is great!"])
    assert -1 <= hostile < plain == 0 < friendly <= 1

    palm = PaLM(num_tokens=256, dim=16, depth=1, heads=1, dim_head=8)
    with torch.no_grad():  # it says colons, brackets, spaces and ends of turns, all of them as likely
        for parameter in palm.layers.parameters():
            parameter.zero_()
        palm.token_emb.weight.zero_()
        palm.token_emb.weight[[*b":)( \n"]] = torch.linspace(-9, 9, 16)
    sampling = ResponseSampling(max_new_tokens=3, eos_token=example.END_OF_TURN)
    rankings = annotator.rank(palm, ["hello", "bye"], sampling, 300, 0)
    for prompt in ("hello", "bye"):
        rows = [ranking for ranking in rankings if bytes(ranking.prompt.tolist()).decode() == f"{prompt}\n"]
        texts = [
            [bytes(answer.tolist()).decode().removesuffix("\n") for answer in ranking.responses] for ranking in rows
        ]
        for answers in texts:
            gold = annotator.score(answers)
            assert gold == sorted(set(gold), reverse=True)
        assert (texts[0][0].strip(), texts[0][-1].strip()) == ("(:", ":(")
        gold = annotator.score(texts[0])
        assert set(gold) == set(annotator.score([":)", ":(", "(:", "):", "::"]))
        # an answer that it likes as another is in a later ranking, and each is in one
        assert len(texts) > 1
        said = [answer for answers in texts for answer in answers]
        assert len(said) == len(set(said))
        assert all(set(annotator.score(answers)) <= set(gold) for answers in texts)
    short = ResponseSampling(max_new_tokens=1, eos_token=example.END_OF_TURN)
    assert annotator.rank(palm, ["hello"], short, 100, 0) == []


def test_no_prompt_is_in_both_parts_of_the_rankings(stages):
    prompts = [0, 1, 1, 1, *range(2, 20)]  # the first tenth of the 22 ends between two rankings of the prompt 1
    rankings = [Ranking(torch.tensor([prompt]), [torch.tensor([1]), torch.tensor([2])]) for prompt in prompts]
    train, valid = stages.split(rankings)
    assert [int(ranking.prompt) for ranking in valid] == [0, 1]
    assert [int(ranking.prompt) for ranking in train] == list(range(2, 20))


def test_standard_errors_take_prompts_as_clusters(summary):
    x = torch.tensor([[1.0, 3.0], [4.0, 4.0], [6.0, 6.0]])  # means 2, 4, 6: deviation 2
    mean, stderr = summary.mean_and_stderr(x)
    assert mean == pytest.approx(4)
    assert stderr == pytest.approx(2 / 3**0.5)
    assert summary.mean_and_stderr(x.repeat(1, 50)) == pytest.approx((mean, stderr))


def test_over_optimisation_is_gold_that_falls_beyond_chance_while_the_proxy_rises(summary, measurement):
    start = measurement([0.0, 0.1, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0])
    best = measurement([0.6, 0.7, 0.8, 0.6], [1.0, 1.0, 1.0, 1.0])
    fallen = [0.3, 0.4, 0.4, 0.2]
    assert summary.over_optimisation([start, best]) is None
    assert "gold score fell by 0.350" in summary.over_optimisation([start, best, measurement(fallen, [2.0] * 4)])
    assert summary.over_optimisation([start, best, measurement(fallen, [0.5] * 4)]) is None  # both fell
    noise = measurement([1.1, 0.1, 1.2, 0.2], [2.0] * 4)  # 0.025 less, give or take 0.3
    assert summary.over_optimisation([start, best, noise]) is None


def test_the_report_gives_the_gain_its_standard_error_and_the_win_rate(summary, measurement, capsys):
    before = measurement([0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0])
    after = measurement([0.4, 0.0, 0.6, 0.2], [1.0, 1.0, 1.0, 1.0])
    result = summary.report(list("abcd"), [before, after])
    assert (result["gold_before"], result["gold_after"]) == (0.125, 0.3)
    assert result["gold_stderr"] == pytest.approx(torch.tensor([0.4, 0.0, 0.6, -0.3]).std().item() / 2, abs=1e-4)
    assert result["win_rate"] == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert (result["proxy_before"], result["proxy_after"], result["kl"]) == (0.0, 1.0, 3.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a -> answer 0 -> answer 0" in captured.err


def test_seeds_run_in_turn_make_a_table_and_one_that_was_run_is_only_read(root, tmp_path):
    command = [sys.executable, str(root / "benchmarks/rlhf_seeds.py"), "--output-dir", str(tmp_path), "--seeds"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    numbers = {"gold_before": 0.05, "gold_stderr": 0.04, "kl": 7.26}
    numbers |= {"win_rate": 0.7, "win_rate_low": 0.652, "win_rate_high": 0.748}
    for seed, after in ((4, 0.25), (7, 0.12)):  # gains of 5 and of less than 2 standard errors
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "result.json").write_text(json.dumps({**numbers, "gold_after": after}))
    done = subprocess.run([*command, "4", "7"], env=environment, capture_output=True, text=True, check=True)
    assert "| 4 | 0.050 | 0.250 | 0.200 ± 0.040 | 7.3 | 70.0%, 65.2 to 74.8 |\n| 7 | 0.050 | 0.120 |" in done.stdout
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["seeds"], last["gained_2_standard_errors"]) == (2, 1)

    options = [*SMALL, "--max-seconds", "0.001"]
    ended = subprocess.run([*command, "4", "1", *options], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "1. pretraining" in ended.stderr and "seed 1 was ended early" in ended.stderr.splitlines()[-1]
    assert (tmp_path / "1/pretraining").is_dir() and not (tmp_path / "1/result.json").exists()
