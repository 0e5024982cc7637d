"""An adapter of PEFT in place of a model: commands open its base with it, and `sft --no-merge` writes one."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from palm_rlhf.cli import main
from palm_rlhf.commands.start_models import open_chat_model as open_to_train
from palm_rlhf.data.templates import load_template
from palm_rlhf.data.tokenizer import load_tokenizer
from palm_rlhf.evaluation.measures.model_folders import OpenedModel
from palm_rlhf.evaluation.measures.model_folders import open_chat_model as open_to_evaluate
from palm_rlhf.model.palm import PaLM
from palm_rlhf.planning.model_config import config_of_model
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.serving.served_model import load
from tests.commands.conftest import CHATML

SHORT = ["--plot", "False", "--warmup-steps", "1", "--num-epochs", "1", "--batch-size", "8", "--seq-len", "64"]


@pytest.fixture
def adapter(llama, tmp_path):
    """`adapter(name, **changes)` is the folder of an adapter of PEFT over `llama`, with changes of its settings."""

    def write(name: str = "adapter", **changes):
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(r=3, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), settings)
        torch.manual_seed(1)
        for part, parameter in model.named_parameters():
            if "lora_" in part:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        values = json.loads(file.read_text())
        assert values["base_model_name_or_path"] == str(llama)
        file.write_text(json.dumps({**values, **changes}))
        return tmp_path / name

    return write


@torch.no_grad()
def logits(model) -> torch.Tensor:
    found = model.eval()(torch.arange(40)[None])
    return found if isinstance(found, torch.Tensor) else found.logits


def test_an_adapter_is_a_model_with_tokenizer_and_template_of_its_base(llama, adapter, capsys):
    folder = adapter()
    palm, theirs = PaLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(palm), logits(theirs), rtol=0, atol=1e-4)
    assert not palm.finetune_modules and (logits(palm) - logits(PaLM.from_pretrained(llama))).abs().max() > 0.1
    for opened in (load(folder), open_to_train(str(folder)), open_to_evaluate(folder)):
        model = opened.model if isinstance(opened, OpenedModel) else opened.palm
        assert torch.equal(logits(model), logits(palm))
        assert opened.tokenizer.fingerprint == load_tokenizer(llama).fingerprint
        assert opened.template == load_template(llama)
    assert config_of_model(folder) == palm.config
    said = {}
    for name in (folder, llama):
        main(["generate", str(name), "--prompt", "The cat", "--temperature", "0", "--max-new-tokens", "12"])
        said[name] = capsys.readouterr().out
    prompt = torch.tensor([load_tokenizer(llama).encode("The cat")])
    ids = theirs.generate(prompt, max_new_tokens=12, do_sample=False, suppress_tokens=[*range(310, 320)])
    text = AutoTokenizer.from_pretrained(llama).decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    assert said[folder] == text + "\n" != said[llama]


def test_a_change_is_added_to_weights_of_fewer_bits_once(llama, adapter):
    """By the definition: the sum of the rounded weight and the exact change, rounded (to nearest, ties to even)."""
    folder = adapter()
    palm, base = (PaLM.from_pretrained(place, dtype=torch.bfloat16).state_dict() for place in (folder, llama))
    tensors = load_file(folder / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.model.layers.1.mlp.down_proj.lora_{part}.weight"] for part in "AB")
    expected = base["layers.1.ff_out.weight"].double() + 4 / 3 * (up.double() @ down.double())
    different = palm["layers.1.ff_out.weight"] != expected.bfloat16()
    assert different.float().mean() < 0.01  # where the sum in float32 lies on the other side of a tie
    assert (palm["layers.1.ff_out.weight"] != base["layers.1.ff_out.weight"]).float().mean() > 0.9


def test_the_tokenizer_and_the_template_of_an_adapter_come_first(llama, adapter):
    folder = adapter()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_template(folder).source == tokenizer.chat_template
    assert load_tokenizer(folder).eos_token == 0
    assert load(folder).turn_ends == {0, 2}  # the settings of generation are those of the base, as in transformers
    (folder / "chat_template.jinja").unlink()
    assert load_template(folder).source == CHATML and load_tokenizer(folder).eos_token == 0


def test_a_base_is_found_by_every_name_that_a_model_has(llama, adapter, tmp_path, monkeypatch):
    expected = logits(PaLM.from_pretrained(adapter()))
    (tmp_path / "bases").mkdir()
    shutil.copytree(llama, tmp_path / "bases/base")
    shutil.copytree(llama, tmp_path / "run/model")
    main(["export", str(llama), "--format", "gguf", "--type", "f32", "--output", str(tmp_path / "base.gguf")])
    monkeypatch.chdir(tmp_path / "bases")
    for number, name in enumerate(["base", "../bases/base", "../run", str(tmp_path / "base.gguf")]):
        folder = adapter(f"adapter-{number}", base_model_name_or_path=name)
        torch.testing.assert_close(logits(PaLM.from_pretrained(folder)), expected, rtol=0, atol=1e-4)
        assert load_template(folder).source == CHATML
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(PaLM.from_pretrained("adapter-1")), expected)  # from the adapter's folder


def test_an_adapter_and_its_base_may_be_on_the_hub(llama, adapter, tmp_path, monkeypatch):
    """In the cache of the hub's client, without a network; of the base, the revision that the adapter names."""
    expected = logits(PaLM.from_pretrained(adapter()))
    folder = adapter("of-the-hub", base_model_name_or_path="owner/base", revision="v2")
    for name, ref, source in (("base", "v2", llama), ("adapter", "main", folder)):
        place = tmp_path / f"hub/models--owner--{name}"
        shutil.copytree(source, place / "snapshots" / "0123abcd")
        (place / "refs").mkdir()
        (place / "refs" / ref).write_text("0123abcd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    served = load("owner/adapter")
    assert torch.equal(logits(served.palm), expected) and served.template.source == CHATML
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text().replace("v2", "v3"))
    with pytest.raises(FileNotFoundError, match="adapter of 'owner/base', and that base was not found"):
        PaLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "has no base_model_name_or_path, expected the name of the model"),
        (
            {"base_model_name_or_path": "gone"},
            r"adapter of 'gone', and that base was not found: there is no folder",
        ),
        (
            {"base_model_name_or_path": "no-one/nothing"},
            r"adapter of 'no-one/nothing', and that base was not found",
        ),
        ({"base_model_name_or_path": "."}, "which is an adapter itself; expected a model"),
        ({"base_model_name_or_path": "OTHER"}, r"another shape of .* open the adapter over that model.*OTHER"),
        ({"base_model_name_or_path": "/dev/zero"}, "adapter of '/dev/zero', and that base was not found: .* is a file"),
        ({"base_model_name_or_path": "/proc/self"}, r"/proc/self has no config.json.*adapter has the base /proc/"),
        ({"peft_type": "IA3"}, "has peft_type='IA3', which a LoRA scope cannot compute"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "transformers_modules.a.b"}}, "never executed"),
        ({"r": "many"}, "has r='many'; expected a rank"),
    ],
    ids=lambda part: part if isinstance(part, str) else None,
)
def test_an_adapter_without_its_base_is_refused_in_one_line(adapter, tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = adapter(**changes)
    monkeypatch.chdir(folder)
    PaLM(num_tokens=320, dim=16, depth=2, heads=1, dim_head=8, block="serial", norm="rms").save_pretrained("OTHER")
    with pytest.raises(SystemExit) as end:
        main(["generate", str(folder), "--prompt", "The"])
    assert re.search(message, str(end.value.code)), end.value.code


def test_an_adapter_is_no_reward_model_and_no_weights_to_load(llama, adapter):
    folder = adapter()
    for open_it in (RewardModel.from_pretrained, PaLM.from_pretrained(llama).load):
        with pytest.raises(FileNotFoundError, match="it is an adapter of PEFT, and no model"):
            open_it(folder)


def test_sft_saves_adapters_alone_where_it_is_told_to(llama, files, tmp_path, command, monkeypatch):
    """Over the base they are the model with merged weights, here and in PEFT."""
    monkeypatch.chdir(llama.parent)
    words = ["--model", llama.name, "--learning-rate", "1e-2", "--lora-r", "2", "--lora-targets", "v", "ff_out", *SHORT]
    _, said = command("sft", files["conversations"], *words, "--no-merge", "--output-dir", tmp_path / "alone")
    command("sft", files["conversations"], *words, "--output-dir", tmp_path / "merged")
    saved = tmp_path / "alone/model"
    assert "palm-rlhf chat" in said and not (saved / "config.json").exists()
    values = json.loads((saved / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == str(llama) and values["target_modules"] == ["down_proj", "v_proj"]
    monkeypatch.chdir(tmp_path)
    alone, merged = PaLM.from_pretrained("alone"), PaLM.from_pretrained("merged")
    torch.testing.assert_close(logits(alone), logits(merged), rtol=0, atol=1e-5)
    assert (logits(alone) - logits(PaLM.from_pretrained(llama))).abs().max() > 0.01
    assert load_template("alone/model").source == CHATML
    peft = pytest.importorskip("peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(saved)
    torch.testing.assert_close(logits(theirs), logits(merged), rtol=0, atol=1e-4)
    with pytest.raises(SystemExit, match="got --merge, and alone/model has adapters"):
        command("sft", files["conversations"], *words, "--model", llama, "--output-dir", "alone", "--resume")
    with pytest.raises(SystemExit, match="got --no-merge over alone, an adapter itself"):
        command("sft", files["conversations"], *words, "--model", "alone", "--output-dir", "new", "--no-merge")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "got --no-merge without adapters"),
        (["--lora-r", "2", "--lora-embeddings"], "got --no-merge with --lora-embeddings"),
        (["--lora-r", "2", "--template", "oasst"], r"got --no-merge and the chat template's tokens \["),
    ],
)
def test_adapters_alone_are_refused_where_they_would_not_be_the_model(llama, files, tmp_path, words, message):
    arguments = [
        "sft",
        files["conversations"],
        "--model",
        llama,
        "--output-dir",
        tmp_path / "run",
        "--no-merge",
        *words,
    ]
    with pytest.raises(SystemExit, match=message):
        main([str(argument) for argument in arguments])
    assert not (tmp_path / "run").exists()
