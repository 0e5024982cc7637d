"""Folders of LLaMA and its kin: transformers and PaLM compute the same logits, whichever of the two wrote them."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.reward_model import RewardModel

NUM_TOKENS = 31
TYPES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = {
    "vocab_size": NUM_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
    "rope_theta": 1000.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def transformer(model_type: str, seed: int = 1, **values) -> nn.Module:
    """A model of transformers with weights of which none is like another, norms and biases included."""
    own = {"sliding_window": None} if model_type == "mistral" else {}
    numbers = (
        SIZES | ({} if model_type == "qwen2" else {"head_dim": 6}) | own | copy.deepcopy(values)
    )  # it adds to dicts
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **numbers)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.5 if "bias" in name else parameter.shape[-1] ** -0.5, generator=generator)
            if "norm" in name:
                parameter.div_(2).add_(1)
    return model


def tokens(seed: int = 0, length: int = 40) -> Tensor:
    return torch.randint(NUM_TOKENS, (3, length), generator=torch.Generator().manual_seed(seed))


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name in remove:
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@torch.no_grad()
def assert_same_logits(palm: PaLM, model: nn.Module) -> None:
    logits = model(tokens()).logits
    assert logits.dtype == torch.float32 and 0.1 < logits.std() < 10
    torch.testing.assert_close(palm.eval()(tokens()), logits, rtol=0, atol=1e-5)


ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8},
    "yarn of DeepSeek": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "yarn of one factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.8,
    },
}
settings_of_models = st.fixed_dictionaries(
    {
        "num_key_value_heads": st.sampled_from([1, 2, 4]),  # multi-query, grouped-query, multi-head
        "head_dim": st.sampled_from([6, 8, 12]),  # of which 4 heads make up the width or do not
        "rms_norm_eps": st.sampled_from([1e-6, 1e-1]),
        "rope_theta": st.sampled_from([100.0, 1e6]),
        "rope_scaling": st.sampled_from(list(ROPES.values())),
        "tie_word_embeddings": st.booleans(),
    }
)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(TYPES), settings_of_models, st.sampled_from(["5GB", "6KB"]), st.integers(0, 99))
def test_a_folder_opens_as_a_palm_and_is_written_back(tmp_path_factory, model_type, values, shard_size, seed):
    model = transformer(model_type, seed, **values)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder / "theirs", max_shard_size=shard_size)
    palm = PaLM.from_pretrained(folder / "theirs")
    assert_same_logits(palm, model)
    assert (palm.config.z_loss, palm.config.max_seq_len) == (0.0, 128)
    assert palm.config.tie_embeddings == values["tie_word_embeddings"] == (not hasattr(palm, "lm_head"))

    palm.save_pretrained(folder / "ours", format=model_type, max_shard_size=shard_size)
    back = AutoModelForCausalLM.from_pretrained(folder / "ours").eval()
    assert type(back) is type(model)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert_same_logits(palm, back)
    assert PaLM.from_pretrained(folder / "ours").config == palm.config


@pytest.mark.parametrize(
    "model_type, rope", [("llama", "llama3"), ("mistral", "default"), ("qwen2", "yarn"), ("qwen3", "linear")]
)
def test_64_greedy_tokens_are_the_same(tmp_path, model_type, rope):
    model = transformer(model_type, 2, rope_scaling=ROPES[rope], rope_theta=1000.0)
    model.save_pretrained(tmp_path)
    palm, prompt = PaLM.from_pretrained(tmp_path), tokens(2, 9)
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)[:, 9:]
    ours = palm.generate(None, prompt, max_new_tokens=64, temperature=0.0)
    assert ours.shape == (3, 64) and torch.equal(ours, theirs)
    assert len(ours.unique()) > 3  # and not one token again and again


@pytest.mark.parametrize("model_type", TYPES)
def test_bfloat16_in_shards_stays_bfloat16_both_ways(tmp_path, model_type):
    model = transformer(model_type).bfloat16()
    model.save_pretrained(tmp_path / "in", max_shard_size="3KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").is_file()
    palm = PaLM.from_pretrained(tmp_path / "in")
    assert {parameter.dtype for parameter in palm.parameters()} == {torch.bfloat16}
    unrounded = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32).eval()
    assert_same_logits(PaLM.from_pretrained(tmp_path / "in", dtype=torch.float32), unrounded)
    palm.save_pretrained(tmp_path / "out", format="hf", max_shard_size="3KB")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor) and tensor.dtype == torch.bfloat16, name


@pytest.mark.parametrize("stated, expected", [("bfloat16", torch.bfloat16), (None, torch.float32), (7, torch.float32)])
@pytest.mark.parametrize("wide", ["norm", "lm_head", "embed_tokens"])
def test_a_folder_of_several_types_opens_in_one(tmp_path, stated, expected, wide):
    """Some keep the norms or the output layer in float32 beside bfloat16."""
    model = transformer("llama").bfloat16()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: rows.float() * 1.001 if wide in name else rows for name, rows in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    edit_config(tmp_path, remove=("dtype",), torch_dtype=stated)
    palm = PaLM.from_pretrained(tmp_path).eval()
    assert {parameter.dtype for parameter in palm.parameters()} == {expected}
    with torch.no_grad():
        torch.testing.assert_close(palm(tokens()), PaLM.from_pretrained(tmp_path, dtype=expected)(tokens()))
    edit_config(tmp_path, remove=("torch_dtype",))
    unrounded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_same_logits(PaLM.from_pretrained(tmp_path, dtype=torch.float32), unrounded)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 77.0, "rope_scaling": {"rope_type": None, "type": "linear", "factor": 2.0}},
        {"rope_theta": 77.0, "rope_scaling": {"rope_type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_theta": 77.0, "rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 77.0},
    ],
)
def test_the_rotary_is_read_from_where_transformers_4_and_5_write_it(tmp_path, rope):
    model = transformer("llama", rope_theta=77.0, rope_scaling=ROPES["linear"] | {"factor": 2.0})
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, remove=("rope_parameters", "rope_theta", "rope_scaling"), **rope)
    assert_same_logits(PaLM.from_pretrained(tmp_path), model)


def test_the_context_of_pretraining_is_found_where_the_scaling_does_not_have_it(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    model = transformer("qwen2", rope_scaling=yarn, max_position_embeddings=16)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, rope_parameters=yarn | {"rope_theta": 1000.0})
    palm = PaLM.from_pretrained(tmp_path)
    assert palm.config.rotary_scaling.original_max_position_embeddings == 16
    assert_same_logits(palm, model)
    both = yarn | {"rope_theta": 1000.0, "original_max_position_embeddings": 99}
    edit_config(tmp_path, rope_parameters=both, original_max_position_embeddings=16)  # which transformers prefers
    assert_same_logits(PaLM.from_pretrained(tmp_path), model)


def test_settings_that_the_first_folders_of_the_hub_leave_out(tmp_path):
    model = transformer("llama", num_key_value_heads=4, head_dim=8, rope_theta=10_000.0, rms_norm_eps=1e-6)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e-3)  # so that the epsilon matters
    model.save_pretrained(tmp_path)
    optional = "num_key_value_heads head_dim rms_norm_eps tie_word_embeddings hidden_act architectures rope_parameters"
    edit_config(tmp_path, remove=(*optional.split(), "attention_bias", "mlp_bias", "rope_theta"))
    file = tmp_path / "model.safetensors"
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file({**load_file(file), **frequencies}, file)  # as transformers wrote them up to 4.31
    assert_same_logits(PaLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "model_type, width, default",
    [("mistral", {}, 8), ("qwen2", {}, 32), ("qwen3", {"head_dim": 6}, 32), ("qwen3", {"head_dim": 128}, 32)],
)
def test_settings_that_a_folder_leaves_out_have_the_defaults_of_their_architecture(
    tmp_path, model_type, width, default
):
    sizes = {"num_attention_heads": default, "num_key_value_heads": default, "hidden_size": default * 4} | width
    model = transformer(model_type, **sizes, **({"head_dim": 4} if model_type == "mistral" else {}))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, remove=("num_key_value_heads", *(["head_dim"] if width != {"head_dim": 6} else [])))
    assert_same_logits(PaLM.from_pretrained(tmp_path), model)
    edit_config(tmp_path, num_attention_heads=2 * default, head_dim=model.config.hidden_size // default // 2)
    if model_type != "qwen3":
        with pytest.raises(ValueError, match="another shape"):  # and not as many as there are heads
            PaLM.from_pretrained(tmp_path)


def test_what_is_written_is_what_transformers_4_and_5_and_others_read(tmp_path):
    model = transformer("llama", rope_scaling=ROPES["llama3"], tie_word_embeddings=True).bfloat16()
    model.save_pretrained(tmp_path / "theirs")
    PaLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours", format="llama")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["rope_theta"] == 1000.0 and config["rope_scaling"] == ROPES["llama3"]
    assert config["rope_parameters"] == {**ROPES["llama3"], "rope_theta": 1000.0}
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True and config["attention_bias"] is config["mlp_bias"] is False
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    for name in (*same, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "hidden_act"):
        assert config[name] == theirs[name], name
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    assert stored[0].keys() == stored[1].keys() and "lm_head.weight" not in stored[0]


# Models that were made here


def palm_of(seed: int = 1, **options) -> PaLM:
    """A PaLM with LLaMA's block, and weights of which none is like another."""
    torch.manual_seed(seed)
    sizes = {"num_tokens": NUM_TOKENS, "dim": 32, "depth": 2, "heads": 4, "kv_heads": 2, "dim_head": 6}
    serial = {"block": "serial", "norm": "rms", "ff_inner_dim": 40, "max_seq_len": 128}
    palm = PaLM(**{**sizes, **serial, **options})
    with torch.no_grad():
        for name, parameter in palm.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn(parameter.shape) / 2 + ("norm" in name))
    return palm.eval()


@pytest.mark.parametrize(
    "options, class_name",
    [
        ({}, "LlamaForCausalLM"),
        ({"dim": 30}, "MistralForCausalLM"),  # LlamaConfig wants the heads to divide the width
        ({"qkv_bias": True, "tie_embeddings": False}, "Qwen2ForCausalLM"),
        ({"qk_norm": True, "rotary_scaling": ROPES["yarn"]}, "Qwen3ForCausalLM"),
        ({"block": "parallel", "norm": "layer", "rotary_scaling": ROPES["llama3"]}, "CohereForCausalLM"),
        ({"block": "parallel", "norm": "layer", "rotary_scaling": ROPES["yarn"]}, "CohereForCausalLM"),
    ],
)
def test_hf_takes_the_architecture_that_computes_the_same(tmp_path, options, class_name):
    palm = palm_of(**options)
    assert palm.config.output_scale == palm.config.dim**-0.5  # which the scale of the last norm takes up
    palm.save_pretrained(tmp_path, format="hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(model).__name__ == class_name
    with torch.no_grad():
        assert palm(tokens()).std() > 0.1
        torch.testing.assert_close(palm(tokens()), model(tokens()).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(PaLM.from_pretrained(tmp_path)(tokens()), palm(tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "format, options, message",
    [
        ("llama", {"norm": "layer"}, "norm='layer' (the format is of models with norm='rms')"),
        ("llama", {"block": "parallel"}, "block='parallel' (the format is of models with block='serial')"),
        ("llama", {"qkv_bias": True}, "qkv_bias=True"),
        ("llama", {"dim": 30}, "dim=30, which is no multiple of heads=4 (take format='mistral')"),
        ("mistral", {"qk_norm": True}, "qk_norm=True"),
        ("qwen2", {}, "qkv_bias=False (the format is of models with qkv_bias=True)"),
        ("qwen3", {"qk_norm": True, "qkv_bias": True}, "qkv_bias=True"),
        ("cohere", {}, "block='serial' (the format is of models with block='parallel') and norm='rms'"),
        ("cohere", {"block": "parallel", "norm": "layer", "tie_embeddings": False}, "tie_embeddings=False"),
        ("llama", {"causal": False}, "causal=False"),
        ("qwen3", {"xpos": True, "qk_norm": True}, "xpos=True"),
    ],
)
def test_options_that_a_format_cannot_hold_are_refused_by_name(tmp_path, format, options, message):
    with pytest.raises(ValueError, match=rf'format="{format}" cannot hold {re.escape(message)}.*; format="palm" can'):
        palm_of(**options).save_pretrained(tmp_path / "new", format=format)
    assert list(tmp_path.iterdir()) == []


def test_options_that_no_format_holds_are_named_for_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r'format="llama" cannot hold norm=\'layer\''):
        palm_of(norm="layer").save_pretrained(tmp_path, format="hf")
    palm = palm_of(tie_embeddings=False)
    palm.add_finetune_params("mine", 2)
    with pytest.raises(ValueError, match=r'format="llama" cannot hold the finetune scopes \[\'mine\'\]'):
        palm.save_pretrained(tmp_path, format="hf")


@pytest.mark.parametrize("model_type", TYPES)
def test_adapters_a_reward_model_and_our_own_folder_hold_such_a_model(tmp_path, model_type):
    transformer(model_type).save_pretrained(tmp_path / "theirs")
    palm = PaLM.from_pretrained(tmp_path / "theirs")
    palm.save_pretrained(tmp_path / "ours")
    again = PaLM.from_pretrained(tmp_path / "ours")
    assert again.config == palm.config and torch.equal(again(tokens()), palm(tokens()))

    fresh = PaLM.from_config(palm.config).load(tmp_path / "theirs")
    assert torch.equal(fresh(tokens()), palm(tokens()))

    model = RewardModel(palm, use_lora=True).eval()
    for parameter in model.palm.finetune_parameters("reward"):
        nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "reward")
    back = RewardModel.from_pretrained(tmp_path / "reward").eval()
    assert torch.equal(back(tokens()), model(tokens())) and len(set(model(tokens()).tolist())) == 3


# Mutants of the subtle steps: these tests would see them


def order_of_the_gate(layer: nn.Module) -> None:
    layer.ff_proj.weight.copy_(layer.ff_proj.weight.roll(40, dims=0))


def order_of_the_heads(layer: nn.Module) -> None:
    q = layer.in_proj.weight[:24].unflatten(0, (4, 2, 3)).transpose(1, 2)  # as if the rotary turned neighbours
    layer.in_proj.weight[:24] = q.reshape(24, 32)


def keys_and_values(layer: nn.Module) -> None:
    layer.in_proj.weight[24:] = layer.in_proj.weight[24:].roll(12, dims=0)


def swapped_norms(layer: nn.Module) -> None:
    layer.norm, layer.ff_norm = layer.ff_norm, layer.norm


def swapped_norms_of_heads(layer: nn.Module) -> None:
    layer.q_norm, layer.k_norm = layer.k_norm, layer.q_norm


def norms_of_heads_left_at_one(layer: nn.Module) -> None:
    layer.q_norm.weight.fill_(1)


def no_bias(layer: nn.Module) -> None:
    layer.in_proj.bias.zero_()


def no_bias_of_values(layer: nn.Module) -> None:
    layer.in_proj.bias[-12:] = 0


MUTANTS = {
    "llama": [order_of_the_gate, order_of_the_heads, keys_and_values, swapped_norms],
    "qwen2": [no_bias, no_bias_of_values],
    "qwen3": [swapped_norms_of_heads, norms_of_heads_left_at_one],
}


@pytest.mark.parametrize("model_type, mutate", [(kind, mutate) for kind in MUTANTS for mutate in MUTANTS[kind]])
def test_a_mutant_of_the_weights_is_seen(tmp_path, model_type, mutate):
    model = transformer(model_type, head_dim=6)
    model.save_pretrained(tmp_path)
    palm = PaLM.from_pretrained(tmp_path)
    assert_same_logits(palm, model)
    with torch.no_grad():
        for layer in palm.layers:
            mutate(layer)
        assert (palm(tokens()) - model(tokens()).logits).abs().max() > 0.01


@pytest.mark.parametrize("changes", [{"rope_parameters": {"rope_theta": 10_000.0}}, {"rms_norm_eps": 1e-6}])
def test_a_default_in_place_of_a_number_is_seen(tmp_path, changes):
    model = transformer("llama", rms_norm_eps=1e-1)
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with torch.no_grad():
        assert (PaLM.from_pretrained(tmp_path)(tokens()) - model(tokens()).logits).abs().max() > 0.01


# Models that a PaLM cannot compute


@pytest.mark.parametrize(
    "model_type, change, message",
    [
        ("llama", {"attention_bias": True}, "attention_bias=True, not False"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True, not False"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True, not False"),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act='gelu_pytorch_tanh', not 'silu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, not 1"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}, not None"),
        ("llama", {"architectures": ["LlamaModel"]}, "architectures=['LlamaModel'], not ['LlamaForCausalLM']"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=True, not False"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types=['full_attention', 'sliding_attention'], not ['full_attention']",
        ),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "the rope type='dynamic', not one of"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "longrope"}}, "the rope type='longrope', not"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "the rope type={'full_attention'"),
        ("llama", {"rope_parameters": {"mrope_section": [1, 1, 1]}}, "the rope settings={'mrope_section': [1, 1, 1]}"),
        (
            "llama",
            {"rope_parameters": ROPES["yarn"] | {"truncate": False}},
            "truncate=False, not True",
        ),
        # settings of other architectures, which transformers ignores here
        ("llama", {"no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers=[1, 1, 1, 0], not None"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved=True, not False"),
        ("mistral", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0, not None"),
        ("llama", {"residual_multiplier": 0.2}, "residual_multiplier=0.2, not 1"),
        ("qwen2", {"logit_scale": 0.5, "use_qk_norm": True}, "logit_scale=0.5, not 1, use_qk_norm=True, not False"),
        ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings='false', not one of (True, False)"),
        ("qwen3", {"layer_types": 3}, "layer_types=3, not ['full_attention']"),
        ("qwen3", {"layer_types": [{}]}, "layer_types=[{}], not ['full_attention']"),
    ],
)
def test_settings_that_a_palm_lacks_are_refused_by_name(tmp_path, model_type, change, message):
    transformer(model_type).save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=rf"config\.json has .*{re.escape(message)}.*a PaLM cannot compute that"):
        PaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("window", [{"sliding_window": 64}, {}])
def test_a_sliding_window_is_refused_and_the_way_around_it_is_named(tmp_path, window):
    transformer("mistral").save_pretrained(tmp_path)
    edit_config(tmp_path, remove=("sliding_window",), **window)
    size = window.get("sliding_window", 4096)
    with pytest.raises(ValueError, match=rf"sliding_window={size}, expected null.* set sliding_window to null and"):
        PaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": None}, "lacks hidden_size; expected all the numbers of a llama model"),
        ({"rms_norm_eps": "small"}, "lacks rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_parameters": ROPES["yarn"] | {"mscale": "1", "mscale_all_dim": 1}}, "lacks mscale"),
        ({"rope_parameters": ROPES["llama3"] | {"low_freq_factor": 9.0}}, "low_freq_factor=9.0"),
        ({"num_key_value_heads": 3}, "heads=4 is not divisible by kv_heads=3"),
        ({"head_dim": "wide"}, "lacks head_dim"),
        ({"num_key_value_heads": 0}, "kv_heads is 0; expected at least 1"),
        ({"num_key_value_heads": True}, "lacks num_key_value_heads"),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps=nan, expected finite numbers"),
        ({"max_position_embeddings": 10**400}, "has max_position_embeddings=1000"),
        ({"rope_parameters": {"rope_theta": float("inf")}}, "has rope_theta=inf, expected finite numbers"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "has rope_theta=1000"),
        ({"rope_parameters": ROPES["linear"] | {"factor": float("inf")}}, "has factor=inf, expected finite numbers"),
        ({"rope_parameters": ROPES["yarn"] | {"rope_theta": 1}}, "rotary_theta is 1; expected above 1 with yarn"),
        ({"num_hidden_layers": 10**9}, "has num_hidden_layers=1000000000, and there are 21 tensors"),
    ],
)
def test_numbers_that_make_no_model_are_refused(tmp_path, change, message):
    transformer("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=rf"config\.json .*{re.escape(message)}"):
        PaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type, reason", [("gpt_neox", "two norms in parallel"), ("mixtral", "mixture of exp")])
def test_an_architecture_for_which_people_look_is_refused_with_the_reason(tmp_path, model_type, reason):
    transformer("llama").save_pretrained(tmp_path)
    edit_config(tmp_path, model_type=model_type)
    known = re.escape("['cohere', 'llama', 'mistral', 'qwen2', 'qwen3']")
    with pytest.raises(ValueError, match=rf"'{model_type}', which a PaLM cannot compute: .*{reason}.*{known}"):
        PaLM.from_pretrained(tmp_path)


def test_an_output_layer_is_that_of_the_config(tmp_path):
    model = transformer("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight, expected an output layer of its own.*tie_word_emb"):
        PaLM.from_pretrained(tmp_path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert not PaLM.from_pretrained(tmp_path).config.tie_embeddings
    edit_config(tmp_path, tie_word_embeddings=True)
    palm = PaLM.from_pretrained(tmp_path)
    assert palm.config.tie_embeddings
    assert_same_logits(palm, model)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(ValueError, match=r"has a lm_head\.weight of its own; expected the embeddings, since tie_word"):
        PaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight"])
def test_a_tensor_that_the_config_does_not_have_is_refused_by_name(tmp_path, name):
    transformer("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(24)}, file)
    with pytest.raises(ValueError, match=f"has the unexpected {re.escape(name)}"):
        PaLM.from_pretrained(tmp_path)


def test_a_folder_without_weights_or_with_pickles_is_refused(tmp_path):
    transformer("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*pickles, which are never opened"):
        PaLM.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors, nor model\.safetensors\.index\.json"):
        PaLM.from_pretrained(tmp_path)
