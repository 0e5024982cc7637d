"""GGUF files that a PaLM is written to: read back equal, and read by transformers, whatever the block."""

import resource

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from palm_rlhf.model.interop.gguf_header import GGUFHeader
from palm_rlhf.model.interop.gguf_writer import write_gguf
from palm_rlhf.model.palm import PaLM
from tests.factories import palm_of_scaled_norms

SERIAL = {"block": "serial", "norm": "rms", "logit_scale": 1.0}
LONG = {"factor": 8.0, "original_max_position_embeddings": 64}
MODELS = {
    "palm": ("command-r", {}),
    "multi-query": ("command-r", {"kv_heads": 1, "logit_scale": 0.5, "rotary_theta": 500.0}),
    "llama": ("llama", {**SERIAL, "kv_heads": 1}),
    "untied": ("llama", {**SERIAL, "tie_embeddings": False, "dim_head": 12}),
    "llama3": ("llama", {**SERIAL, "rotary_scaling": {"rope_type": "llama3", **LONG}}),
    "linear": ("llama", {**SERIAL, "rotary_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "yarn": ("qwen2", {**SERIAL, "qkv_bias": True, "rotary_scaling": {"rope_type": "yarn", **LONG}}),
    "qwen2": ("qwen2", {**SERIAL, "qkv_bias": True, "tie_embeddings": False}),
    "qwen3": ("qwen3", {**SERIAL, "qk_norm": True, "norm_eps": 1e-6}),
}


def palm_of(**fields) -> PaLM:
    """A model of 32 columns, of which q8_0 makes whole blocks; biases and norms are away from 0 and 1."""
    palm = palm_of_scaled_norms(dtype=torch.float32, **{"dim": 32, "heads": 4, "kv_heads": 2, **fields})
    for name, parameter in palm.named_parameters():
        if "bias" in name:
            parameter.data.uniform_(-1, 1)
    return palm


def written(palm: PaLM, path, type: str = "f32", **metadata) -> str:
    return write_gguf(palm, path, type=type, name="a model", tokenizer=metadata)


@pytest.mark.parametrize("name", MODELS)
def test_float32_is_read_back_to_the_bit(name, tmp_path):
    architecture, fields = MODELS[name]
    palm = palm_of(**fields)
    path = tmp_path / "model.gguf"
    assert written(palm, path) == architecture
    header = GGUFHeader(path)
    assert header.metadata["general.architecture"] == architecture
    assert (header.metadata["general.name"], header.metadata["general.file_type"]) == ("a model", 0)
    again = PaLM.from_pretrained(path)
    for key, tensor in palm.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    ours, theirs = palm.config.to_dict(), again.config.to_dict()
    assert theirs.pop("logit_scale") == pytest.approx(palm.config.output_scale, rel=1e-6)
    assert theirs == {key: value for key, value in ours.items() if key != "logit_scale"} | {
        "ff_inner_dim": palm.config.inner_dim,
        "z_loss": 0.0,
    }


def test_a_file_is_loaded_into_a_model_of_its_config(tmp_path):
    palm = palm_of(**MODELS["qwen2"][1])
    written(palm, tmp_path / "model.gguf")
    other = PaLM.from_config(palm.config)
    other.load(tmp_path / "model.gguf")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in palm.state_dict().items())
    with pytest.raises(ValueError, match=r"is of another model: .*qkv_bias=True there and False here"):
        palm_of(**MODELS["untied"][1]).load(tmp_path / "model.gguf")


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("name", ["palm", "qwen2"])
def test_matrices_of_other_types_are_those_of_the_package_gguf(type, name, tmp_path):
    palm = palm_of(**MODELS[name][1])
    written(palm, tmp_path / "model.gguf", type)
    again = PaLM.from_pretrained(tmp_path / "model.gguf").state_dict()
    kind = gguf.GGMLQuantizationType[type.upper()]
    for key, tensor in palm.state_dict().items():
        expected = tensor.numpy()
        if tensor.ndim == 2:  # quantised in rows, so that their order does not matter
            expected = gguf.dequantize(gguf.quantize(expected, kind), kind)
            assert not np.array_equal(expected, tensor.numpy())
        np.testing.assert_array_equal(again[key].numpy(), expected, err_msg=key)


def test_rows_that_q8_0_cannot_cut_into_blocks_are_f16(tmp_path):
    palm = palm_of(**SERIAL, ff_inner_dim=40)
    written(palm, tmp_path / "model.gguf", "q8_0")
    kinds = {name: tensor.type_id for name, tensor in GGUFHeader(tmp_path / "model.gguf").tensors.items()}
    f16, q8_0 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == (f16, q8_0)
    down = PaLM.from_pretrained(tmp_path / "model.gguf").layers[0].ff_out.weight
    assert torch.equal(down, palm.layers[0].ff_out.weight.half().float())


@pytest.mark.parametrize("name", ["llama", "untied", "qwen2"])
@torch.no_grad()
def test_transformers_reads_the_same_logits(name, tmp_path):
    palm = palm_of(**MODELS[name][1] | {"dim_head": 8}).eval()
    written(palm, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    tokens = torch.randint(12, (2, 50), generator=torch.Generator().manual_seed(0))
    expected = palm(tokens)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-4)


def test_a_factor_of_the_logits_goes_into_the_last_norm_of_a_serial_model(tmp_path):
    palm = palm_of(**SERIAL | {"logit_scale": 0.25, "tie_embeddings": True}).eval()
    written(palm, tmp_path / "model.gguf")
    again = PaLM.from_pretrained(tmp_path / "model.gguf").eval()
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(again(tokens), palm(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"xpos": True}, "xpos=True"),
        ({"causal": False}, "causal=False"),
        ({"block": "serial", "norm": "layer"}, "norm='layer'"),
        ({"norm": "rms"}, "norm='rms'"),
        ({"dim_head": 12}, r"heads \* dim_head = 48 \(it expects dim, 32\)"),
        ({"qk_norm": True}, "qk_norm=True with depth=2"),
        ({"depth": 64, "dim": 4, "heads": 2, "dim_head": 2}, "qk_norm=False with depth=64"),
        (SERIAL | {"rotary_scaling": {"rope_type": "yarn", **LONG, "attention_factor": 1.0}}, "attention_factor=1.0"),
        (SERIAL | {"rotary_scaling": {"rope_type": "llama3", **LONG, "low_freq_factor": 2.0}}, "low_freq_factor=1"),
        (SERIAL | {"qkv_bias": True, "dim_head": 12}, r"heads \* dim_head = 48 \(it expects dim, 32\)"),
        (SERIAL | {"qkv_bias": True, "rotary_scaling": {"rope_type": "llama3", **LONG}}, "a llama3 scaling"),
        (SERIAL | {"qk_norm": True, "rotary_scaling": {"rope_type": "llama3", **LONG}}, "a llama3 scaling"),
        ({"rotary_scaling": {"rope_type": "llama3", **LONG}}, "a llama3 scaling"),
    ],
)
def test_a_model_that_llama_cpp_does_not_compute_is_refused_by_name(fields, named, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"an older file")
    with pytest.raises(ValueError, match=f"cannot hold .*{named}"):
        written(palm_of(**fields), path)
    assert path.read_bytes() == b"an older file"


def test_adapters_are_refused_by_name(tmp_path):
    palm = palm_of()
    palm.add_finetune_params("chat")
    with pytest.raises(ValueError, match=r"the finetune scopes \['chat'\]"):
        written(palm, tmp_path / "model.gguf")


def test_a_full_disk_is_named_and_the_older_file_stays(tmp_path):
    path, limits = tmp_path / "model.gguf", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_bytes(b"an older file")
    for num_bytes in (10, 20_000):  # in the header, and in a tensor, for which numpy gives no reason
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
        try:
            with pytest.raises(OSError, match=r"model\.gguf could not be written: .*\. Make room there"):
                written(palm_of(), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == b"an older file"
        assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    written(palm_of(), tmp_path / "new" / "folder" / "model.gguf")
    assert (tmp_path / "new" / "folder" / "model.gguf").stat().st_size > 20_000


def test_a_number_that_f16_cannot_hold_is_refused_and_the_older_file_stays(tmp_path):
    palm = palm_of()
    palm.layers[1].ff_out.weight.data[0, 0] = 70_000.0
    path = tmp_path / "model.gguf"
    written(palm, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down\.weight has numbers beyond those of f16"):
        written(palm, path, "f16")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
