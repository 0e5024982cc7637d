"""Adapters of PEFT: PEFT and PaLM compute the same logits with them, whichever of the two wrote them."""

import json
import math
import os
import pickle
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from palm_rlhf.model.palm import PaLM

NUM_TOKENS = 31
SIZES = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 6},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {
    "default": {},  # PEFT's own targets of a model type
    "alpha": {"r": 4, "lora_alpha": 6, "target_modules": ALL},
    "all-linear": {"r": 3, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["k_proj", "down_proj"]},
    "one-layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": ALL, "exclude_modules": ["model.layers.0.self_attn.q_proj", "o_proj"]},
    "expression": {"target_modules": r".*\.(0\.self_attn\.k_proj|1\.mlp\.(gate|down)_proj)"},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        "rank_pattern": {"k_proj": 5, "model.layers.1.mlp.down_proj": 1},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 16},
    },
}
# Every type of model, and every setting, which the two kinds of block share out.
CASES = [(kind, name) for kind in KINDS for name in ("default", "alpha") if (kind, name) != ("cohere", "default")]
CASES += [("llama", "one-layer"), ("llama", "expression"), ("llama", "patterns"), ("cohere", "patterns")]
CASES += [("cohere", "all-linear"), ("cohere", "rslora"), ("cohere", "excluded")]


@torch.no_grad()
def randomised(model: nn.Module, seed: int, only: str = "") -> nn.Module:
    """Weights of which none is like another: PEFT's own B is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if only in name:
            parameter.normal_(0, 0.7 * parameter.shape[-1] ** -0.5, generator=generator)
            if "norm" in name:
                parameter.div_(2).add_(1)
    return model.eval()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A small random model of each type, as transformers saves it."""
    found = {}
    for kind, options in KINDS.items():
        config = AutoConfig.for_model(kind, **{**SIZES, **options})
        found[kind] = tmp_path_factory.mktemp("bases") / kind
        randomised(AutoModelForCausalLM.from_config(config), 1).save_pretrained(found[kind])
    return found


@pytest.fixture
def adapter(bases, tmp_path):
    """Writes an adapter of PEFT, and returns its folder and the logits that PEFT computes with it."""

    def write(kind: str, **settings) -> tuple:
        model = AutoModelForCausalLM.from_pretrained(bases[kind])
        model = randomised(get_peft_model(model, LoraConfig(**settings)), 2, "lora_")
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(model)

    return write


def tokens() -> Tensor:
    return torch.randint(NUM_TOKENS, (3, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module, scope: str | None = None) -> Tensor:
    if isinstance(model, PaLM):
        return model(tokens(), finetune_scope=scope)
    return model(tokens()).logits


@pytest.mark.parametrize("kind, name", CASES)
def test_an_adapter_of_peft_gives_the_logits_of_peft_and_goes_back_to_it(bases, adapter, tmp_path, kind, name):
    folder, expected = adapter(kind, **SETTINGS[name])
    palm = PaLM.from_pretrained(bases[kind]).eval()
    base = logits(palm)
    assert not torch.allclose(expected, base, atol=1e-2)
    palm.load_adapter(folder, "theirs")
    torch.testing.assert_close(logits(palm, "theirs"), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(palm), base)

    palm.save_adapter(tmp_path / "back", "theirs", base=str(bases[kind]))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[kind]), tmp_path / "back").eval()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)

    palm.merge_finetune_params("theirs")
    torch.testing.assert_close(logits(palm), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen2", "cohere"])
@pytest.mark.parametrize("targets", [("q", "k", "v", "out"), ("k", "ff_out")], ids="-".join)
def test_a_scope_of_ours_gives_peft_our_logits(bases, tmp_path, kind, targets):
    palm = PaLM.from_pretrained(bases[kind]).eval()
    randomised(palm.add_finetune_params("mine", 3, alpha=2.5, targets=targets), 5)
    palm.save_adapter(tmp_path, "mine")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases[kind]), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(palm, "mine"), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), logits(palm), atol=1e-2)
    # and back, to the bit
    opened = PaLM.from_pretrained(bases[kind]).eval()
    opened.load_adapter(tmp_path)
    assert torch.equal(logits(opened, "default"), logits(palm, "mine"))


def test_only_modules_with_adapters_take_memory(bases, adapter):
    folder, _ = adapter("llama", r=2, target_modules=["q_proj", "v_proj"])
    palm = PaLM.from_pretrained(bases["llama"], dtype=torch.bfloat16)
    palm.load_adapter(folder, "theirs")
    assert {name.split(".")[-2] for name in palm.state_dict() if "finetune" in name} == {"q", "v"}
    assert palm.finetune_modules["theirs"][0].q.A.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in palm.palm_parameters())


def test_a_scope_of_another_folder_of_ours_is_added(bases, tmp_path):
    palm = PaLM.from_pretrained(bases["llama"]).eval()
    for seed, scope in enumerate(("one", "two")):
        randomised(palm.add_finetune_params(scope, 2 + seed, alpha=3), seed)
    palm.save_pretrained(tmp_path / "both")
    opened = PaLM.from_pretrained(bases["llama"]).eval()
    opened.load_adapter(tmp_path / "both", "two")
    assert torch.equal(logits(opened, "two"), logits(palm, "two"))
    with pytest.raises(ValueError, match=r"has the finetune scopes \['one', 'two'\]; expected one, or one of the name"):
        opened.load_adapter(tmp_path / "both", "three")
    palm.remove_finetune_params("one")
    palm.save_pretrained(tmp_path / "single")
    opened.load_adapter(tmp_path / "single", "three")
    assert torch.equal(logits(opened, "three"), logits(palm, "two"))
    other = PaLM.from_pretrained(bases["qwen3"])
    with pytest.raises(ValueError, match="is of another model"):
        other.load_adapter(tmp_path / "single")
    assert not other.finetune_modules


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora=True"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "lora-bias": ({"lora_bias": True}, "lora_bias=True"),
    "saved-modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "no place for adapters of embeddings"),
    "output": ({"target_modules": ["q_proj", "lm_head"]}, "no place for adapters of embeddings and output layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_plain_lora_is_refused_by_name(bases, adapter, name):
    settings, message = REFUSED[name]
    folder, _ = adapter("qwen2", **{"target_modules": ["q_proj"], **settings})
    unchanged(bases, folder, message)


CONFIGS = {
    "another-method": ({"peft_type": "IA3"}, "peft_type='IA3'"),
    "no-method": ({"peft_type": None}, "peft_type=None"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
    "replicated": ({"layer_replication": [[0, 1]]}, "layer_replication"),
    "rank": ({"r": "4"}, "r='4'; expected a rank of at least 1"),
    "infinite": ({"lora_alpha": math.inf}, "lora_alpha=inf; expected a number"),
    "other-rank": ({"r": 3}, "another shape of"),
    "targets": ({"target_modules": [1]}, "expected names of modules"),
    "more-targets": ({"target_modules": ["q_proj", "v_proj"]}, r"lacks .*v_proj"),
    "pattern": ({"alpha_pattern": {"(a+)+$": 3}}, "without regular expressions"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_or_foreign_settings_are_refused(bases, adapter, name):
    change, message = CONFIGS[name]
    folder, _ = adapter("llama", target_modules=["q_proj"])
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    unchanged(bases, folder, message)


def test_damaged_files_are_refused_and_a_pickle_is_never_opened(bases, adapter, tmp_path):
    folder, _ = adapter("llama", target_modules=["q_proj", "down_proj"])
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole, tensors = weights.read_bytes(), load_file(weights)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"

    weights.write_bytes(whole[:-40])
    unchanged(bases, folder, "cannot be read")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    unchanged(bases, folder, f"lacks {name}")
    foreign = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, foreign: tensors[name].clone()}, weights)
    unchanged(bases, folder, "has the unexpected .*layers.7")
    save_file({**tensors, name: torch.full_like(tensors[name], math.nan)}, weights)
    unchanged(bases, folder, "other than finite numbers")
    save_file({**tensors, name: tensors[name].to(torch.int32)}, weights)
    unchanged(bases, folder, "other than finite numbers")

    class Trap:
        def __reduce__(self):
            return (tmp_path / "executed").touch, ()

    weights.unlink()
    unchanged(bases, folder, "has no adapter_model.safetensors", FileNotFoundError)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    unchanged(bases, folder, "pickles, which are never opened")
    assert not (tmp_path / "executed").exists()
    weights.write_bytes(whole)
    config.write_text(config.read_text()[:-30])
    unchanged(bases, folder, "adapter_config.json cannot be read")
    config.unlink()
    unchanged(bases, folder, "has no adapter_config.json", FileNotFoundError)


def test_an_adapter_of_another_base_is_refused_and_another_name_is_not(bases, adapter, tmp_path):
    folder, expected = adapter("llama", target_modules=["q_proj"])
    config = folder / "adapter_config.json"
    values = json.loads(config.read_text())
    assert values["base_model_name_or_path"] == str(bases["llama"])
    narrow = PaLM(num_tokens=NUM_TOKENS, dim=16, depth=2, heads=4, dim_head=6, kv_heads=2, block="serial", norm="rms")
    with pytest.raises(ValueError, match=f"another shape of .*trained on {str(bases['llama'])!r}"):
        narrow.load_adapter(folder)
    shallow = PaLM(num_tokens=NUM_TOKENS, dim=24, depth=1, heads=4, dim_head=6, kv_heads=2, block="serial", norm="rms")
    with pytest.raises(ValueError, match=r"has the unexpected .*layers\.1"):
        shallow.load_adapter(folder)
    assert not narrow.finetune_modules and not shallow.finetune_modules

    moved = shutil.copytree(bases["llama"], tmp_path / "moved")
    config.write_text(json.dumps({**values, "base_model_name_or_path": None}))
    palm = PaLM.from_pretrained(moved).eval()
    palm.load_adapter(folder)
    torch.testing.assert_close(logits(palm, "default"), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="finetune scope 'default' is there already"):
        palm.load_adapter(folder)


def unchanged(bases, folder, message: str, error: type[Exception] = ValueError) -> None:
    """Loading raises the error, and the model has no new scope, the weights of before, and can still be trained."""
    palm = PaLM.from_pretrained(bases["qwen2" if "qwen2" in (folder / "README.md").read_text() else "llama"])
    before = {name: tensor.clone() for name, tensor in palm.state_dict().items()}
    with pytest.raises(error, match=message):
        palm.load_adapter(folder)
    assert palm.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in palm.state_dict().items())
    assert all(parameter.requires_grad for parameter in palm.parameters())


def test_a_saved_adapter_replaces_the_one_before_as_a_whole(bases, tmp_path, monkeypatch):
    """A writer that stops between any two of its steps leaves the old adapter or the new one."""
    palm = PaLM.from_pretrained(bases["llama"]).eval()
    for scope, options in (("old", {"r": 2}), ("new", {"r": 3, "alpha": 7, "targets": ("v", "gate")})):
        randomised(palm.add_finetune_params(scope, **options), len(scope))
    expected = {scope: logits(palm, scope) for scope in ("old", "new")}
    from palm_rlhf.model import weights_writer

    found, steps = set(), 0
    while True:
        folder = tmp_path / f"{steps}"
        palm.save_adapter(folder, "old")
        (folder / "README.md").write_text("stays")
        left = iter(range(steps))

        def replace(source, target, left=left, move=os.replace):
            if next(left, None) is None:
                raise KeyboardInterrupt
            move(source, target)

        monkeypatch.setattr(weights_writer.os, "replace", replace)
        monkeypatch.setattr(weights_writer.os, "rename", replace)
        stopped = False
        try:
            palm.save_adapter(folder, "new")
        except KeyboardInterrupt:
            stopped = True
        monkeypatch.undo()
        opened = PaLM.from_pretrained(bases["llama"]).eval()
        opened.load_adapter(folder)
        (name,) = (name for name, wanted in expected.items() if torch.equal(logits(opened, "default"), wanted))
        found.add(name)
        assert (folder / "README.md").read_text() == "stays"
        if not stopped:
            break
        palm.save_adapter(folder, "new")  # the next writer finishes the work
        assert {file.name for file in folder.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        steps += 1
    assert found == {"old", "new"} and steps == 3
