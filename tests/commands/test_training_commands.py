"""From text to a served model by commands alone, each on the folder that the one before it left."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from palm_rlhf.cli import main
from palm_rlhf.data.conversation import encode_prompt, end_of_turn
from palm_rlhf.data.templates import PRESETS, load_template
from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.serving.served_model import load
from palm_rlhf.training.run.log import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--plot", "False", "--warmup-steps", "1"]
ONE_EPOCH = ["--num-epochs", "1", "--batch-size", "8", "--learning-rate", "1e-3", "--log-every", "1", *SHORT]
PPO = [*SHORT, "--num-steps", "2", "--rollouts-per-step", "8", "--minibatch-size", "8", "--max-new-tokens", "6"]
FRESH = [
    *("--dim", "32", "--depth", "1", "--heads", "2", "--dim-head", "16", "--seq-len", "32", "--eval-context", "16"),
    *("--batch-size", "4", "--num-steps", "6", "--save-every", "3", "--sample-bytes", "8", *SHORT),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def fine_tuned(runs, files):
    """The folders of a run of `train` and of one of `sft` that started from it."""
    base, sft = runs / "base", runs / "sft"
    main(["train", "--data", str(files["text"]), "--output-dir", str(base), *FRESH])
    main(
        [
            "sft",
            str(files["conversations"]),
            "--model",
            str(base),
            "--output-dir",
            str(sft),
            *ONE_EPOCH,
            "--seq-len",
            "64",
        ]
    )
    return base, sft


@pytest.fixture(scope="module")
def rewarding(fine_tuned, runs, files):
    """The folder of a run of `reward`."""
    arguments = ["reward", files["rankings"], "--model", fine_tuned[1], "--output-dir", runs / "reward", *ONE_EPOCH]
    main([*map(str, arguments), "--grad-accum", "1"])
    return runs / "reward"


def weights(folder):
    return PaLM.from_pretrained(folder).state_dict()


def adapted(run, base, alone=True) -> set[str]:
    """The weights that a run by adapters changed in the model that it saved, whole or by the adapters alone."""
    assert (run / "model/adapter_config.json").exists() == alone != (run / "model/config.json").exists()
    before, after = weights(base), weights(run)
    assert after.keys() == before.keys()
    return {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}


def test_train_says_what_to_do_next_and_that_works(runs, files, command, capsys):
    where = ["--data", files["text"], "--output-dir", runs / "first run"]
    result, said = command("train", *where, *FRESH)
    assert result["steps"] == 6
    assert 0 < result["bits_per_byte"] < 10
    assert result["model"] == str(runs / "first run" / "model")
    assert re.search(r"^--- The \w+ saw the", said, re.M)  # and not the number in the line above it
    (line,) = (line for line in said.splitlines() if "palm-rlhf generate" in line)
    words = shlex.split(line[line.index("palm-rlhf") :])
    assert words[2] == str(runs / "first run")
    main([*words[1:], "--max-new-tokens", "3"])
    assert capsys.readouterr().out.endswith("\n")


def test_sft_keeps_tokenizer_and_template_and_lowers_the_loss(fine_tuned):
    base, sft = fine_tuned
    tokenizer, template = load_tokenizer(sft / "model"), load_template(sft / "model")
    assert isinstance(tokenizer, ByteTokenizer) and template == PRESETS["default"]
    assert PaLM.from_pretrained(base).num_tokens == 256
    assert PaLM.from_pretrained(sft).num_tokens == tokenizer.num_tokens == 261
    losses = [line["loss"] for line in read_metrics(sft / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]


def test_reward_ranks_and_carries_the_tokenizer_along(rewarding, fine_tuned):
    model = RewardModel.from_pretrained(rewarding)  # of the run's folder
    assert model.palm.num_tokens == 261
    assert load_tokenizer(rewarding / "model").fingerprint == load_tokenizer(fine_tuned[1] / "model").fingerprint
    assert float(model.score_std) != 1.0  # normalised over the data


def test_rlhf_improves_the_model_that_can_be_measured_and_talked_with(
    fine_tuned, rewarding, runs, files, command, monkeypatch, capsys
):
    sft, folder = fine_tuned[1], runs / "rlhf"
    options = ["--model", sft, "--reward-model", rewarding, "--output-dir", folder, *PPO, "--sample-every", "1"]
    result, said = command("rlhf", files["prompts"], *options)
    assert result["step"] == 2
    assert "2 prompts" in said  # blank lines and repetitions are none
    assert not all(torch.equal(old, new) for old, new in zip(weights(sft).values(), weights(folder).values()))
    lines = read_metrics(folder / "samples.jsonl")
    tokenizer, template = load_tokenizer(folder / "model"), load_template(folder / "model")
    prompts = [
        encode_prompt([{"role": "user", "content": f"What is {number}?"}], tokenizer, template).tolist()
        for number in (1, 2)
    ]
    assert all(line["prompt_tokens"] in prompts for line in lines)
    end = end_of_turn(tokenizer, template)
    assert all(len(line["completion_tokens"]) == 6 or line["completion_tokens"][-1] == end for line in lines)

    # what it says to do next
    (line,) = (line for line in said.splitlines() if "palm-rlhf evaluate run" in line)
    measured, _ = command(*shlex.split(line[line.index("palm-rlhf") :])[1:])
    assert [step["step"] for step in measured["win_rates"]] == [1, 2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n")))
    main(["chat", str(folder), "--max-tokens", "3", "--seed", "0"])
    capsys.readouterr()
    served = load(folder, reward_model=rewarding)
    assert served.name == "rlhf" and served.template == PRESETS["default"]


def test_a_run_too_short_for_samples_names_no_command_that_needs_them(fine_tuned, rewarding, files, tmp_path, command):
    options = ["--model", fine_tuned[1], "--reward-model", rewarding, "--output-dir", tmp_path / "run", *PPO]
    _, said = command("rlhf", files["prompts"], *options, "--num-steps", "1", "--sample-every", "2")
    assert not read_metrics(tmp_path / "run/samples.jsonl")
    assert "palm-rlhf chat" in said and "evaluate run" not in said


def test_online_dpo_learns_from_its_own_replies(fine_tuned, rewarding, files, tmp_path, command):
    options = ["--model", fine_tuned[1], "--reward-model", rewarding, "--output-dir", tmp_path / "run", *ONE_EPOCH]
    options += ["--batch-size", "1", "--grad-accum", "1", "--num-epochs", "2", "--learning-rate", "1e-2"]
    drawing = ["--num-samples", "3", "--max-new-tokens", "6", "--missing-eos-penalty", "0.1", "--sample-every", "1"]
    result, said = command("online-dpo", files["prompts"], *options, *drawing, "--held-out", "0")
    assert result["steps"] == 4 and "2 prompts, 0 held out" in said and "valid_score" not in result
    before = weights(fine_tuned[1])
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path / "run").items())
    tokenizer, template = load_tokenizer(tmp_path / "run/model"), load_template(tmp_path / "run/model")
    end, samples = end_of_turn(tokenizer, template), read_metrics(tmp_path / "run/samples.jsonl")
    assert len(samples) == 4 * 3
    assert all(len(line["completion_tokens"]) == 6 or line["completion_tokens"][-1] == end for line in samples)


def test_online_dpo_measures_replies_to_held_out_prompts(fine_tuned, rewarding, files, tmp_path, command):
    options = ["--model", fine_tuned[1], "--reward-model", rewarding, "--output-dir", tmp_path / "run", *ONE_EPOCH]
    options += ["--lora-r", "2", "--no-merge", "--loss", "ipo", "--eval-every", "2", "--max-new-tokens", "6"]
    result, said = command("online-dpo", files["preferences"], *options)
    held_out = int(re.search(r"(\d+) prompts, (\d+) held out", said)[2])
    assert 0 < held_out < 12
    assert {"valid_score", "valid_kl", "valid_eos_rate", "valid_response_length"} <= result.keys()
    assert adapted(tmp_path / "run", fine_tuned[1]) == {"layers.0.in_proj.weight", "layers.0.attn_out.weight"}


@pytest.mark.parametrize("algorithm", [["--algorithm", "grpo", "--num-samples", "4"], ["--shared-trunk", "--no-merge"]])
def test_rlhf_without_a_critic_of_its_own_by_adapters(fine_tuned, rewarding, tmp_path, files, command, algorithm):
    options = ["--model", fine_tuned[1], "--reward-model", rewarding, "--output-dir", tmp_path / "run", *PPO]
    command("rlhf", files["prompts"], *options, *algorithm, "--actor-lora-r", "2", "--learning-rate", "0.1")
    names = {"layers.0.in_proj.weight", "layers.0.attn_out.weight"}
    assert adapted(tmp_path / "run", fine_tuned[1], alone="--no-merge" in algorithm) == names


def test_rlhf_over_one_base_saves_the_model_of_rlhf_with_four(fine_tuned, files, tmp_path, command):
    sft, folder = fine_tuned[1], tmp_path / "reward"
    lora = ["--lora-r", "2", "--lora-targets", "v", "ff_out"]
    _, said = command("reward", files["rankings"], "--model", sft, "--output-dir", folder, *lora, *ONE_EPOCH)
    proposed = f"palm-rlhf rlhf PROMPTS --model {sft} --reward-model {folder} --actor-lora-r 2 --share-base\n"
    assert proposed in said.replace("'", "")  # quotes of the shell
    assert RewardModel.from_pretrained(folder).palm.finetune_modules["reward"][0].targets == ("v", "ff_out")
    options = ["--model", sft, "--reward-model", folder, *PPO, "--actor-lora-r", "2", "--learning-rate", "0.1"]
    options += ["--lora-targets", "out"]
    shared, _ = command("rlhf", files["prompts"], *options, "--output-dir", tmp_path / "one", "--share-base")
    separate, _ = command("rlhf", files["prompts"], *options, "--output-dir", tmp_path / "four")
    one, four, before = weights(tmp_path / "one"), weights(tmp_path / "four"), weights(sft)
    assert all(torch.equal(four[name], tensor) for name, tensor in one.items())
    assert {name for name in one if not torch.equal(before[name], one[name])} == {"layers.0.attn_out.weight"}
    assert all(shared[name] == separate[name] for name in ("score", "kl", "policy_loss", "value_loss"))
    with pytest.raises(SystemExit, match="got --lora-targets k without --lora-r"):
        command("reward", files["rankings"], "--model", sft, "--lora-targets", "k")
    with pytest.raises(SystemExit, match="than the base that is to be shared, expected the same weights"):
        command("rlhf", files["prompts"], *options, "--model", fine_tuned[0], "--share-base")


@pytest.mark.parametrize("lora", [[], ["--lora-r", "2", "--lora-targets", "all-linear", "--no-merge"]])
def test_dpo_moves_the_model_towards_what_was_chosen(fine_tuned, files, tmp_path, command, lora):
    options = ["--model", fine_tuned[1], "--output-dir", tmp_path / "run", *ONE_EPOCH, "--grad-accum", "1", *lora]
    result, _ = command("dpo", files["preferences"], *options, "--num-epochs", "6", "--learning-rate", "1e-2")
    assert result["valid_accuracy"] == 1.0
    changed = {name.rsplit(".", 2)[-2] for name in adapted(tmp_path / "run", fine_tuned[1], alone=bool(lora))}
    assert changed == {"in_proj", "attn_out", "ff_out"} if lora else "token_emb" in changed
    assert load_template(tmp_path / "run" / "model") == PRESETS["default"]


@pytest.mark.parametrize(
    "loss, data", [("kto", "unpaired"), ("kto", "rankings"), ("simpo", "rankings"), ("orpo", "preferences")]
)
def test_dpo_with_other_losses(fine_tuned, files, tmp_path, command, loss, data):
    options = ["--model", fine_tuned[1], "--output-dir", tmp_path / "run", *ONE_EPOCH, "--grad-accum", "1"]
    result, said = command("dpo", files[data], *options, "--loss", loss, "--num-epochs", "6", "--learning-rate", "1e-2")
    assert result["valid_accuracy"] > 0.9
    assert ("held-out replies" in said or " replies, " in said) == (loss == "kto")
    assert ("valid_z_ref" in result) == (loss == "kto") and ("valid_nll" in result) == (loss == "orpo")


def test_train_goes_on_with_a_model_of_another_tokenizer(files, tmp_path, command):
    tokenizer = HuggingFaceTokenizer.train(files["text"].read_text().splitlines(), num_tokens=300)
    start = PaLM(num_tokens=tokenizer.num_tokens, dim=32, depth=1, heads=2, dim_head=16)
    for part in (start, tokenizer, PRESETS["oasst"]):
        part.save_pretrained(tmp_path / "start")
    training = FRESH[FRESH.index("--seq-len") :]
    result, _ = command(
        "train", "--data", files["text"], "--model", tmp_path / "start", "--output-dir", tmp_path / "run", *training
    )
    assert result["steps"] == 6
    assert load_tokenizer(tmp_path / "run/model").fingerprint == tokenizer.fingerprint
    assert load_template(tmp_path / "run/model") == PRESETS["oasst"]
    assert PaLM.from_pretrained(tmp_path / "run").num_tokens == tokenizer.num_tokens


def test_resume_without_a_folder_goes_on_with_the_newest_run(files, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["train", "--data", files["text"], *FRESH]
    with pytest.raises(
        SystemExit, match=r"palm-rlhf: got --resume without --output-dir, expected a run of `train` .* in .*runs"
    ):
        command(*where, "--resume")
    first, _ = command(*where)
    resumed, said = command(*where, "--num-steps", "8", "--resume")
    assert resumed["output_dir"] == first["output_dir"]
    assert resumed["steps"] == 8
    assert f"continuing {first['output_dir']}, the newest run" in said
    assert [folder.name for folder in (tmp_path / "runs").iterdir()] == [first["output_dir"].removeprefix("runs/")]


def test_models_that_do_not_fit_are_refused_with_what_to_do(fine_tuned, rewarding, files, tmp_path, capsys):
    base, sft = fine_tuned
    PaLM(num_tokens=256, dim=16, depth=1, heads=1, dim_head=8).save_pretrained(tmp_path / "bytes")
    RewardModel(PaLM(num_tokens=256, dim=16, depth=1, heads=1, dim_head=8)).save_pretrained(tmp_path / "reward")
    (tmp_path / "run/checkpoints/step_00000003").mkdir(parents=True)
    PaLM(num_tokens=256, dim=16, depth=1, heads=1, dim_head=8).save_pretrained(
        tmp_path / "run/checkpoints/step_00000003/model"
    )
    for arguments, expected in (
        (["rlhf", files["prompts"], "--model", sft, "--reward-model", tmp_path / "reward"], "with 256 tokens"),
        (["sft", files["conversations"], "--model", rewarding], "got the reward model"),
        (["sft", files["prompts"], "--model", base], r"prompts\.txt, line 1"),
        (["sft", files["conversations"], "--model", tmp_path / "run"], "has not finished.*step_00000003/model"),
        (["dpo", files["conversations"], "--model", sft], "compare no replies"),
        (["online-dpo", files["prompts"], "--model", sft, "--reward-model", tmp_path / "reward"], "with 256 tokens"),
        (["online-dpo", files["prompts"], "--model", sft, "--reward-model", rewarding, "--held-out", "1e-9"],
         "2 records to train on and 0 held out"),
        (["dpo", files["unpaired"], "--model", sft], "compare no replies"),
        (["dpo", files["conversations"], "--model", sft, "--loss", "kto"], "got no unpaired"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in [*arguments, "--output-dir", tmp_path / "new"]])
        assert isinstance(end.value.code, str), capsys.readouterr().err
        assert re.search(expected, end.value.code), end.value.code
        assert not (tmp_path / "new").exists()


@pytest.mark.slow(9)
def test_a_hub_id_is_a_model_like_a_folder(fine_tuned, files, tmp_path):
    """Out of the cache of the hub's own client, as if it had been downloaded before."""
    commit = "0123456789" * 4
    repository = tmp_path / "cache/hub/models--owner--name"
    shutil.copytree(fine_tuned[1] / "model", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    PRESETS["oasst"].save_pretrained(repository / "snapshots" / commit)  # not the default one
    (repository / "snapshots" / commit / "tokenizer_config.json").unlink()
    ByteTokenizer(PRESETS["oasst"].special_tokens).save_pretrained(repository / "snapshots" / commit)
    arguments = ["sft", files["conversations"], "--model", "owner/name", "--output-dir", tmp_path / "run", *ONE_EPOCH]
    done = subprocess.run(
        [sys.executable, "-m", "palm_rlhf.cli", *map(str, arguments)],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] > 0
    assert load_template(tmp_path / "run/model") == PRESETS["oasst"]
    assert "<|prompter|>" in load_tokenizer(tmp_path / "run/model").special_tokens
