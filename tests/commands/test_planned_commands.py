"""The command lines that `palm-rlhf plan` prints run as they are; PPO over one base in fewer bits, end to end."""

import shlex

import pytest
import torch

from palm_rlhf import PaLM, PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.cli import main
from palm_rlhf.commands.start_models import open_chat_model
from palm_rlhf.commands.training_data import read_prompt_rows
from tests.factories import SERIAL

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e '.[quantize]'")

STEPS = ["--plot", "False", "--warmup-steps", "1"]
EPOCH = [*STEPS, "--num-epochs", "1", "--learning-rate", "1e-2"]
PPO = {"num_steps": 2, "rollouts_per_step": 4, "minibatch_size": 4, "max_new_tokens": 4, "epochs": 2, "save_every": 1,
       "learning_rate": 0.03, "kl_coef": 0.2, "warmup_steps": 1, "actor_lora_r": 2, "share_base": True,
       "plot": False}  # fmt: skip
SIZES = ["--lora-r", "2", "--quantize", "int8", "--batch-size", "4", "--gradient-checkpointing", "True"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a serial model of bytes."""
    folder = tmp_path_factory.mktemp("models") / "serial"
    torch.manual_seed(5)
    PaLM(num_tokens=256, dim=64, depth=1, heads=2, dim_head=32, max_seq_len=256, **SERIAL).save_pretrained(folder)
    return folder


@pytest.fixture
def planned(command):
    """`planned(task, model, ...)` is the command line that a plan prints, as words."""

    def words(task, model, *options):
        numbers, _ = command("plan", model, "--task", task, "--seq-len", "128", "--new-tokens", "4", *options)
        name, *rest = shlex.split(numbers["command"])
        assert name == "palm-rlhf" and numbers["fits"]
        return rest

    return words


def filled_in(words, **files):
    return [str(files.get(word, word)) for word in words]


@pytest.mark.parametrize("task, data", [("sft", "conversations"), ("dpo", "preferences")])
def test_planned_fine_tuning_runs(model, files, tmp_path, planned, command, task, data):
    words = filled_in(planned(task, model, *SIZES, "--lora-targets", "q", "ff_out"), **{data.upper(): files[data]})
    assert words[0] == task and {"--lora-r", "--quantize", "--gradient-checkpointing", "ff_out"} <= {*words}
    result, _ = command(*words, "--output-dir", tmp_path, *EPOCH)
    saved, start = PaLM.from_pretrained(result["model"]), PaLM.from_pretrained(model)
    start.quantize_("int8")
    same = [torch.equal(saved.state_dict()[name], tensor) for name, tensor in start.state_dict().items()]
    assert saved.config.gradient_checkpointing and not saved.finetune_modules
    assert 0 < sum(same[1:]) < len(same) - 1  # adapters are merged into the weights that int8 numbers stand for


def test_planned_ppo_over_one_base_runs_with_the_planned_reward_model(model, files, tmp_path, planned, command):
    words = filled_in(planned("reward", model, *SIZES), RANKINGS=files["rankings"])
    command(*words, "--output-dir", tmp_path / "reward", *EPOCH)
    names = {"PROMPTS": files["prompts"], "REWARD_MODEL": tmp_path / "reward"}
    words = filled_in(planned("ppo", model, *SIZES, "--share-base", "True"), **names)
    assert {"--share-base", "--quantize", "--gradient-checkpointing", "--micro-batch-size"} <= {*words}
    result, _ = command(*words, "--output-dir", tmp_path / "run", *STEPS, "--num-steps", "1", "--rollouts-per-step", 4)
    assert result["step"] == 1 and PaLM.from_pretrained(result["model"]).config.gradient_checkpointing


@pytest.mark.parametrize("options", [[], ["--quantize", "int4"], ["--lora-r", "2", "--num-adapters", "2"]])
def test_the_server_knows_the_planned_options(model, planned, tmp_path, options):
    words = planned("serve", model, *options)
    assert words.count("--lora") == ("--num-adapters" in options) * 2 and ("--quantize" in words) == ("int4" in options)
    words[1] = str(tmp_path / "none")  # all options are read before the model is
    with pytest.raises(SystemExit, match=r"there is no folder .*none"):
        main([*words, "--port", "0"])


def as_options(settings):
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in settings.items())
    return [word for name, value in pairs for word in ([name] if value is True else [name, str(value)])]


def test_ppo_over_one_base_in_fewer_bits_is_that_of_four_models_resumes_and_talks(
    model, files, tmp_path, command, capsys
):
    train = [*EPOCH, "--lora-r", "2", "--batch-size", "8", "--precision", "float32"]
    command("reward", files["rankings"], "--model", model, "--output-dir", tmp_path / "reward", *train)
    arguments = ["rlhf", files["prompts"], "--model", model, "--reward-model", tmp_path / "reward", *as_options(PPO)]
    arguments += ["--quantize", "int8", "--output-dir", tmp_path / "run"]
    result, _ = command(*arguments)

    policy = open_chat_model(model)
    policy.palm.quantize_("int8")
    judge = RewardModel.from_pretrained(tmp_path / "reward/model")
    judge.palm.quantize_("int8")
    trainer = RLHFTrainer(
        palm=policy.palm,
        reward_model=judge,
        critic=judge,
        prompts=read_prompt_rows(files["prompts"], policy, with_columns=False),
        tokenizer=policy.tokenizer,
        config=PPOConfig(**{**PPO, "share_base": False, "eos_token": policy.end_of_turn}),
    )
    *_, expected = trainer.steps()
    for name in ("score", "kl", "policy_loss", "value_loss", "grad_norm", "response_length"):
        if name in expected:
            assert result[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    assert abs(result["kl"]) > 1e-4

    kept = PaLM.from_pretrained(result["model"]).state_dict()
    (tmp_path / "run/checkpoints/step_00000002").rename(tmp_path / "gone")  # as if it had been killed before it
    again, _ = command(*arguments, "--resume")
    resumed = PaLM.from_pretrained(again["model"]).state_dict()
    assert again["score"] == result["score"] and all(torch.equal(kept[name], resumed[name]) for name in kept)
    main(["chat", again["output_dir"], "--once", "Hello", "--max-tokens", "3", "--temperature", "0"])
    assert capsys.readouterr().out
