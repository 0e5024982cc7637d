"""Cohere folders of Hugging Face: transformers and PaLM compute the same logits, whichever of the two wrote them."""

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM

from palm_rlhf.model.palm import PaLM

NUM_TOKENS = 31
shapes = st.fixed_dictionaries(
    {
        "dim": st.sampled_from([16, 32]),
        "depth": st.integers(1, 2),
        "heads": st.just(4),
        "kv_heads": st.sampled_from([1, 2, 4]),  # multi-query, grouped-query, multi-head
        "dim_head": st.sampled_from([4, 8, 10]),  # of which 4 heads make up the width or do not
        "ff_inner_dim": st.sampled_from([24, 40]),
        "rotary_theta": st.sampled_from([100.0, 10_000.0, 8e6]),
        "logit_scale": st.sampled_from([0.2, 0.5]),
        "norm_eps": st.sampled_from([1e-5, 1e-2]),
        "qk_norm": st.booleans(),
    }
)
sharding = st.sampled_from(["5GB", "6KB"])
seeds = st.integers(0, 999)
GROUPED = {
    "dim": 32,
    "depth": 2,
    "heads": 4,
    "kv_heads": 2,
    "dim_head": 8,
    "ff_inner_dim": 40,
    "rotary_theta": 1000.0,
    "logit_scale": 0.5,
    "norm_eps": 1e-4,
    "qk_norm": True,
}


@torch.no_grad()
def randomised(model: nn.Module, seed: int) -> nn.Module:
    """Weights of which none is like another: the norms too, which start at 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter.normal_(0, 0.5 if "emb" in name else 2 * parameter.shape[-1] ** -0.5, generator=generator)
        if "norm" in name:
            parameter.div_(2).add_(1)
    return model.eval()


def cohere(seed: int, **numbers) -> CohereForCausalLM:
    """A model of transformers, of a PaLM's numbers."""
    config = CohereConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=numbers["dim"],
        intermediate_size=numbers["ff_inner_dim"],
        num_hidden_layers=numbers["depth"],
        num_attention_heads=numbers["heads"],
        num_key_value_heads=numbers["kv_heads"],
        head_dim=numbers["dim_head"],
        rope_theta=numbers["rotary_theta"],
        logit_scale=numbers["logit_scale"],
        layer_norm_eps=numbers["norm_eps"],
        use_qk_norm=numbers["qk_norm"],
        max_position_embeddings=128,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return randomised(CohereForCausalLM(config), seed)


def palm_of(seed: int, **numbers) -> PaLM:
    return randomised(PaLM(num_tokens=NUM_TOKENS, max_seq_len=128, **numbers), seed)


def tokens(seed: int = 0, length: int = 40) -> Tensor:
    return torch.randint(NUM_TOKENS, (3, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def assert_same_logits(palm: PaLM, model: nn.Module, seed: int = 0) -> None:
    logits = model(tokens(seed)).logits
    assert logits.dtype == torch.float32 and 0.1 < logits.std() < 10
    torch.testing.assert_close(palm(tokens(seed)), logits, rtol=0, atol=1e-5)


def edit_config(folder: Path, remove: tuple[str, ...] = (), **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name in remove:
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@settings(max_examples=30)
@given(shapes, sharding, seeds)
def test_a_cohere_folder_opens_as_a_palm(tmp_path_factory, numbers, max_shard_size, seed):
    folder, model = tmp_path_factory.mktemp("cohere"), cohere(seed, **numbers)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    palm = PaLM.from_pretrained(folder).eval()
    assert_same_logits(palm, model, seed)
    assert {name: getattr(palm.config, name) for name in numbers} == numbers
    assert (palm.config.z_loss, palm.config.max_seq_len) == (0.0, 128)
    assert all(parameter.requires_grad for parameter in palm.parameters())


@settings(max_examples=30)
@given(shapes, sharding, seeds)
def test_a_palm_opens_as_a_cohere_model(tmp_path_factory, numbers, max_shard_size, seed):
    folder, palm = tmp_path_factory.mktemp("cohere"), palm_of(seed, **numbers)
    palm.save_pretrained(folder, format="cohere", max_shard_size=max_shard_size)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model) is CohereForCausalLM
    assert_same_logits(palm, model, seed)
    back = PaLM.from_pretrained(folder)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in palm.state_dict().items())
    assert {name: getattr(back.config, name) for name in numbers} == numbers


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("way", ["in", "out"])
def test_64_greedy_tokens_are_the_same(tmp_path, way, kv_heads, qk_norm):
    numbers = {**GROUPED, "kv_heads": kv_heads, "qk_norm": qk_norm}
    if way == "in":
        model = cohere(1, **numbers)
        model.save_pretrained(tmp_path)
        palm = PaLM.from_pretrained(tmp_path)
    else:
        palm = palm_of(1, **numbers)
        palm.save_pretrained(tmp_path, format="cohere")
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = tokens(2, 9)
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False)[:, 9:]
    ours = palm.generate(None, prompt, max_new_tokens=64, temperature=0.0)
    assert ours.shape == (3, 64)
    assert torch.equal(ours, theirs)
    assert len(ours.unique()) > 3  # and not one token again and again


@pytest.mark.parametrize("max_shard_size", ["5GB", "3KB"])
def test_bfloat16_stays_bfloat16_both_ways(tmp_path, max_shard_size):
    model = cohere(1, **GROUPED).bfloat16()
    model.save_pretrained(tmp_path / "in", max_shard_size=max_shard_size)
    palm = PaLM.from_pretrained(tmp_path / "in")
    assert {parameter.dtype for parameter in palm.parameters()} == {torch.bfloat16}
    unrounded = AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype=torch.float32)
    assert_same_logits(PaLM.from_pretrained(tmp_path / "in", dtype=torch.float32), unrounded)
    palm.save_pretrained(tmp_path / "out", format="cohere", max_shard_size=max_shard_size)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in back.parameters()} == {torch.bfloat16}
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 77.0},
        {"rope_theta": 77.0, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0},
        {"rope_theta": 77, "rope_scaling": {"type": "default"}},
    ],
)
def test_the_base_of_the_rotary_is_read_from_where_transformers_4_and_5_write_it(tmp_path, rope):
    model = cohere(1, **{**GROUPED, "rotary_theta": 77.0})
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, remove=("rope_parameters", "rope_theta", "rope_scaling"), **rope)
    assert_same_logits(PaLM.from_pretrained(tmp_path), model)


def test_what_a_folder_may_leave_out(tmp_path):
    """As the first ones of the hub do, which were written before some of the names were."""
    numbers = {**GROUPED, "kv_heads": 4, "qk_norm": False, "logit_scale": 0.0625, "norm_eps": 1e-5}
    model = cohere(1, **numbers)
    model.save_pretrained(tmp_path)
    optional = "num_key_value_heads head_dim logit_scale layer_norm_eps use_qk_norm attention_bias tie_word_embeddings"
    edit_config(tmp_path, remove=(*optional.split(), "hidden_act", "architectures"), model_max_length=4096)
    palm = PaLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(palm(tokens()), model(tokens()).logits, rtol=0, atol=1e-5)
    assert palm.config.max_seq_len == 4096


def test_what_is_written_is_what_transformers_4_and_5_and_others_read(tmp_path):
    palm = palm_of(1, **{**GROUPED, "logit_scale": None}).bfloat16()
    palm.save_pretrained(tmp_path, format="cohere")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["CohereForCausalLM"] and config["model_type"] == "cohere"
    assert config["rope_theta"] == 1000.0
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1000.0}
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["logit_scale"] == 32**-0.5  # the paper's, written out
    assert config["tie_word_embeddings"] is True and config["attention_bias"] is False
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
    stored = load_file(tmp_path / "model.safetensors")
    layer = {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "self_attn.q_norm": (4, 8),
        "self_attn.k_norm": (2, 8),
        "mlp.gate_proj": (40, 32),
        "mlp.up_proj": (40, 32),
        "mlp.down_proj": (32, 40),
        "input_layernorm": (32,),
    }
    expected = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (NUM_TOKENS, 32), "model.norm.weight": (32,)}
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == expected


def test_command_r_itself_has_the_parameters_of_a_palm(tmp_path):
    """The defaults of CohereConfig are the numbers of Command R, 35 billion parameters."""
    with torch.device("meta"):
        model = CohereForCausalLM(CohereConfig(num_hidden_layers=40))
        config = model.config
        palm = PaLM(
            num_tokens=config.vocab_size,
            dim=config.hidden_size,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            dim_head=config.hidden_size // config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            ff_inner_dim=config.intermediate_size,
        )
    count = sum(parameter.numel() for parameter in palm.parameters())
    assert count == sum(parameter.numel() for parameter in model.parameters())
    assert 34.9e9 < count < 35.1e9


# Mutants of the three subtle steps of the way: these tests would see them


def halves_to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of our order in theirs, by an index."""
    d = weight.shape[0] // heads if weight.shape[0] > heads else weight.shape[1]
    order = [i // 2 + (i % 2) * (d // 2) for i in range(d)]
    return weight.reshape(heads, d, -1)[:, order].reshape(weight.shape)


def leave_the_queries_and_keys_as_they_are(layer: nn.Module) -> None:
    layer.in_proj.weight[:32] = halves_to_pairs(layer.in_proj.weight[:32].clone(), 4)
    layer.in_proj.weight[32:48] = halves_to_pairs(layer.in_proj.weight[32:48].clone(), 2)


def permute_the_other_way(layer: nn.Module) -> None:
    for _ in range(2):  # back to their order, and once more
        leave_the_queries_and_keys_as_they_are(layer)


def leave_the_norms_as_they_are(layer: nn.Module) -> None:
    layer.q_norm.weight.copy_(halves_to_pairs(layer.q_norm.weight.clone(), 4))
    layer.k_norm.weight.copy_(halves_to_pairs(layer.k_norm.weight.clone(), 2))


def permute_the_values_too(layer: nn.Module) -> None:
    layer.in_proj.weight[48:64] = halves_to_pairs(layer.in_proj.weight[48:64].clone(), 2)


def swap_the_gate_and_the_value(layer: nn.Module) -> None:
    layer.in_proj.weight[64:] = layer.in_proj.weight[64:].clone().roll(40, dims=0)


@pytest.mark.parametrize(
    "mutate",
    [
        leave_the_queries_and_keys_as_they_are,
        permute_the_other_way,
        leave_the_norms_as_they_are,
        permute_the_values_too,
        swap_the_gate_and_the_value,
    ],
)
def test_a_mutant_is_seen(tmp_path, mutate):
    model = cohere(1, **GROUPED)
    model.save_pretrained(tmp_path)
    palm = PaLM.from_pretrained(tmp_path)
    assert_same_logits(palm, model)
    with torch.no_grad():
        for layer in palm.layers:
            mutate(layer)
        assert (palm(tokens()) - model(tokens()).logits).abs().max() > 0.01


def test_a_palm_of_pairs_is_the_folder_itself(tmp_path):
    """What is written has, row for row, what an index that turns halves into pairs says."""
    palm = palm_of(1, **GROUPED)
    palm.save_pretrained(tmp_path, format="cohere")
    stored, layer = load_file(tmp_path / "model.safetensors"), palm.layers[1]
    q, k, v, gate, value = layer.in_proj.weight.split([32, 16, 16, 40, 40])
    for name, rows in {
        "self_attn.q_proj": halves_to_pairs(q, 4),
        "self_attn.k_proj": halves_to_pairs(k, 2),
        "self_attn.v_proj": v,
        "self_attn.q_norm": halves_to_pairs(layer.q_norm.weight, 4),
        "self_attn.k_norm": halves_to_pairs(layer.k_norm.weight, 2),
        "mlp.gate_proj": gate,
        "mlp.up_proj": value,
    }.items():
        assert torch.equal(stored[f"model.layers.1.{name}.weight"], rows), name


# What the one cannot hold, and the other cannot compute


@pytest.mark.parametrize("option, message", [({"xpos": True}, "xpos=True"), ({"causal": False}, "causal=False")])
def test_what_a_cohere_folder_cannot_hold_is_refused_by_name(tmp_path, option, message):
    with pytest.raises(ValueError, match=rf'format="cohere" cannot hold {message}.*; format="palm" can'):
        palm_of(1, **GROUPED, **option).save_pretrained(tmp_path / "new", format="cohere")
    assert list(tmp_path.iterdir()) == []


def test_unmerged_scopes_are_refused_by_name_and_merged_ones_are_written(tmp_path):
    palm = palm_of(1, **GROUPED)
    for parameter in palm.add_finetune_params("mine", 2).parameters():
        nn.init.normal_(parameter)
    with pytest.raises(ValueError, match=r"the finetune scopes \['mine'\] \(call palm\.merge_finetune_params"):
        palm.save_pretrained(tmp_path / "new", format="cohere")
    assert list(tmp_path.iterdir()) == []
    palm.merge_finetune_params("mine")
    palm.save_pretrained(tmp_path, format="cohere")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits
        torch.testing.assert_close(palm(tokens()), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"attention_bias": True}, "attention_bias=True, not False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', not 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False, not True"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "the rope type='longrope', not"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "the rope type='dynamic', not"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, not 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}, not None"),
        ({"architectures": ["CohereModel"]}, "architectures=['CohereModel'], not ['CohereForCausalLM']"),
        (
            {"hidden_act": "gelu", "attention_bias": True},
            "attention_bias=True, not False, hidden_act='gelu', not 'silu'",
        ),
    ],
)
def test_what_a_palm_cannot_compute_is_refused_by_name(tmp_path, change, message):
    cohere(1, **GROUPED).save_pretrained(tmp_path)
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=rf"config\.json has .*{re.escape(message)}.*a PaLM cannot compute that"):
        PaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rope_theta"]
)
def test_numbers_that_are_not_there_are_named(tmp_path, name):
    palm_of(1, **GROUPED).save_pretrained(tmp_path, format="cohere")
    edit_config(tmp_path, remove=(name, *(("rope_parameters",) if name == "rope_theta" else ())))
    with pytest.raises(ValueError, match=rf"config\.json lacks {name}; expected all the numbers"):
        PaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logit_scale": None}, "lacks logit_scale"),
        ({"layer_norm_eps": None}, "lacks layer_norm_eps"),
        ({"num_key_value_heads": 3}, "heads=4 is not divisible by kv_heads=3"),
        ({"num_attention_heads": 0}, "heads is 0"),
        ({"head_dim": 7}, "dim_head is 7; expected an even number"),
        ({"rope_theta": "big", "rope_parameters": None}, "lacks rope_theta"),
        ({"rope_parameters": [1]}, r"the rope type=\[1\], not"),
    ],
)
def test_numbers_that_make_no_model_are_refused(tmp_path, change, message):
    palm_of(1, **GROUPED).save_pretrained(tmp_path, format="cohere")
    edit_config(tmp_path, **change)
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        PaLM.from_pretrained(tmp_path)


def test_an_output_layer_of_its_own_is_refused_and_a_copy_of_the_embeddings_is_none(tmp_path):
    palm = palm_of(1, **GROUPED)
    palm.save_pretrained(tmp_path, format="cohere")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    assert torch.equal(PaLM.from_pretrained(tmp_path)(tokens()), palm(tokens()))
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"has a lm_head\.weight of its own; expected the embeddings"):
        PaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("bias", ["self_attn.q_proj.bias", "mlp.gate_proj.bias", "input_layernorm.bias"])
def test_a_bias_in_the_file_is_refused_by_name(tmp_path, bias):
    palm_of(1, **GROUPED).save_pretrained(tmp_path, format="cohere")
    file, name = tmp_path / "model.safetensors", f"model.layers.0.{bias}"
    save_file({**load_file(file), name: torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=f"has the unexpected {re.escape(name)}"):
        PaLM.from_pretrained(tmp_path)


def test_a_tensor_of_another_shape_is_refused_under_its_own_name(tmp_path):
    palm_of(1, **GROUPED).save_pretrained(tmp_path, format="cohere")
    edit_config(tmp_path, num_key_value_heads=4)
    message = r"another shape of model\.layers\.0\.self_attn\.k_norm\.weight \(and 5 others\): \(2, 8\), not \(4, 8\)"
    with pytest.raises(ValueError, match=message):
        PaLM.from_pretrained(tmp_path)
