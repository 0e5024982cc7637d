"""GGUF files: a PaLM computes the logits of the model of transformers that the file was made from."""

import dataclasses
import math
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from palm_rlhf.model.interop.gguf_header import GGUFHeader
from palm_rlhf.model.palm import PaLM
from tests.model.interop.gguf_files import SIZES, hugging_face_model, write_gguf

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


def tokens(length: int = 60) -> Tensor:
    return torch.randint(SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_same_logits(palm: PaLM, model: PreTrainedModel, tolerance: float = 1e-4) -> None:
    expected = model(tokens()).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(palm.eval()(tokens()), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_logits_are_those_of_transformers_which_reads_the_same_file(architecture, kind, tied, tmp_path):
    model = hugging_face_model(architecture, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "model.gguf", model, architecture, kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    palm = PaLM.from_pretrained(path)
    assert palm.dtype == torch.float32
    assert palm.config.tie_embeddings == tied
    assert_same_logits(palm, theirs)
    if kind == "F32":
        assert_same_logits(palm, model, 3e-5)


def test_logits_of_qwen3_are_those_of_the_model_that_the_file_was_made_from(tmp_path):
    model = hugging_face_model("qwen3", head_dim=16, tie_word_embeddings=False)
    palm = PaLM.from_pretrained(write_gguf(tmp_path / "model.gguf", model, "qwen3"))
    assert (palm.config.qk_norm, palm.config.dim_head) == (True, 16)
    assert_same_logits(palm, model, 3e-5)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_logits_of_command_r_are_those_of_the_model_that_the_file_was_made_from(qk_norm, tmp_path):
    model = hugging_face_model("command-r", use_qk_norm=qk_norm, logit_scale=0.3)
    palm = PaLM.from_pretrained(write_gguf(tmp_path / "model.gguf", model, "command-r"))
    assert palm.config.block == "parallel"
    assert_same_logits(palm, model, 3e-5)


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_rotary_scaling_of_the_metadata_is_computed(architecture, kind, tmp_path):
    rope = {**SCALINGS[kind], "rope_theta": 500.0}
    model = hugging_face_model(architecture, rope_parameters=rope)
    values = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = 32
    palm = PaLM.from_pretrained(write_gguf(tmp_path / "model.gguf", model, architecture, values=values))
    assert palm.config.rotary_scaling is not None
    assert_same_logits(palm, model)


def llama3_divisors(factor: float, theta: float, context: int, dim_head: int) -> np.ndarray:
    """What llama.cpp's converter writes to rope_freqs.weight, after Meta's code for Llama 3.1."""
    divisors = []
    for pair in range(dim_head // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / dim_head)
        if wavelength < context / 4:
            divisors.append(1.0)
        elif wavelength > context / 1:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_the_scaling_of_llama_3_is_found_from_its_divisors(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 200_000.0}
    model = hugging_face_model("llama", rope_parameters=rope)
    divisors = llama3_divisors(8.0, 200_000.0, 8192, 8)
    assert len(set(divisors.tolist())) > 2
    path = write_gguf(tmp_path / "model.gguf", model, "llama", tensors={"rope_freqs.weight": divisors})
    palm = PaLM.from_pretrained(path)
    assert dataclasses.asdict(palm.config.rotary_scaling) == {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
        **{name: value for name, value in rope.items() if name != "rope_theta"},
    }
    assert_same_logits(palm, model, 3e-5)
    other = write_gguf(tmp_path / "other.gguf", model, "llama", tensors={"rope_freqs.weight": divisors**2})
    with pytest.raises(ValueError, match=r"rope_freqs\.weight other than that of Llama 3\.1"):
        PaLM.from_pretrained(other)


TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


@pytest.mark.parametrize("kind", TYPES)
def test_weights_of_every_type_are_those_of_the_package_gguf_in_the_dtype_asked_for(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    model = hugging_face_model("qwen2", hidden_size=256, num_attention_heads=8, vocab_size=24, num_hidden_layers=1)
    rows = gguf.quant_shape_to_byte_shape((24, 256), kind)
    data = np.random.default_rng(0).integers(0, 64, rows, dtype=np.uint8)  # whose float16 scales are finite
    path = write_gguf(tmp_path / "model.gguf", model, "qwen2", raw={"token_embd.weight": (data, kind)})
    expected = torch.from_numpy(gguf.dequantize(data, kind).copy())
    for dtype in (None, torch.bfloat16):
        palm = PaLM.from_pretrained(path, dtype=dtype)
        assert {parameter.dtype for parameter in palm.parameters()} == {dtype or torch.float32}
        torch.testing.assert_close(palm.token_emb.weight.data, expected.to(palm.dtype), rtol=0, atol=0)


def first_blocks(source: Path, path: Path, num_blocks: int) -> Path:
    """Copy a file with its first blocks and without its tokenizer, which transformers reads for half a minute."""
    header, contents = GGUFHeader(source), np.memmap(source, np.uint8, "r")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in header.metadata.items():
        if key.startswith("llama."):
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(key, num_blocks if key == "llama.block_count" else value)
    for name, tensor in header.tensors.items():
        block = re.match(r"blk\.(\d+)\.", name)
        if block is None or int(block[1]) < num_blocks:
            kind = gguf.GGMLQuantizationType(tensor.type_id)
            rows = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            data = contents[tensor.start : tensor.start + math.prod(rows)].reshape(rows)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_logits_of_blocks_of_smollm2_are_those_of_transformers(smollm2_file, tmp_path):
    """Real weights, in Q4_1 and Q8_0."""
    path = first_blocks(smollm2_file, tmp_path / "model.gguf", 2)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    palm = PaLM.from_pretrained(path)
    assert (palm.config.depth, palm.num_tokens, palm.config.rotary_theta) == (2, 49152, 100_000.0)
    assert_same_logits(palm, theirs)
