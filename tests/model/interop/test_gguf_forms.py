"""GGUF files as people share them: models in several files, old names of metadata, several types in one file."""

import dataclasses
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from palm_rlhf.data.tokenizer import load_tokenizer
from palm_rlhf.model.interop.gguf_dtype import generation_dtype
from palm_rlhf.model.interop.gguf_file import GGUFFile
from palm_rlhf.model.palm import PaLM
from tests.model.interop.gguf_files import hugging_face_model, write_gguf
from tests.model.interop.test_gguf_file import assert_same_logits
from tests.model.interop.test_gguf_refusals import TOKENIZER


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> list[Path]:
    """A model in three files by the package gguf, and the same in one, the last of the list."""
    folder, model = tmp_path_factory.mktemp("parts"), hugging_face_model("llama", num_hidden_layers=1)
    write_gguf(folder / "model.gguf", model, "llama", "Q8_0", others=TOKENIZER, split_max_tensors=5)
    whole = write_gguf(folder / "whole.gguf", model, "llama", "Q8_0", others=TOKENIZER)
    return [*sorted(folder.glob("model-*")), whole]


def test_a_model_in_several_files_is_opened_by_the_first(parts):
    first, *_, whole = parts
    assert first.name == "model-00001-of-00003.gguf" and len(parts) == 4
    ours, theirs = PaLM.from_pretrained(first), PaLM.from_pretrained(whole)
    assert ours.config == theirs.config
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())
    assert load_tokenizer(first).fingerprint == load_tokenizer(whole).fingerprint
    assert generation_dtype(first, "cpu") == generation_dtype(whole, "cpu")


def change(path: Path, before: bytes, after: bytes) -> None:
    assert before in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(before, after, 1))


def uint16(name: str, value: int) -> bytes:
    return name.encode() + (2).to_bytes(4, "little") + value.to_bytes(2, "little")


# What is done to copies of the three files, which one is opened, and the error.
PARTS = {
    "the second": (lambda files: None, 1, r"'?split\.no'? 1, expected the first part, .*\*-00001-of-00003\.gguf"),
    "another name": (lambda files: files[0].rename(files[0].with_name("a.gguf")), "a.gguf", r"named as .*\*-00001-of-"),
    "one is missing": (lambda files: files[2].unlink(), 0, r"has no model-00003-of-00003\.gguf; expected all 3 parts"),
    "one twice": (
        lambda files: shutil.copy(files[1], files[2]),
        0,
        r"has split\.no and split\.count \(1, 3\), expected",
    ),
    "a tensor twice": (
        lambda files: (shutil.copy(files[1], files[2]), change(files[2], uint16("split.no", 1), uint16("split.no", 2))),
        0,
        "model-00003-of-00003.gguf has '.*', as a part before it",
    ),
    "another number of tensors": (
        lambda files: change(files[0], b"split.tensors.count\5\0\0\0\x0c", b"split.tensors.count\5\0\0\0\x0d"),
        0,
        "have 12 tensors, expected 13",
    ),
    "one is cut": (
        lambda files: files[1].write_bytes(files[1].read_bytes()[:-40]),
        0,
        "00002-of-00003.gguf ends before",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_do_not_fit_are_refused_by_name(case, parts, tmp_path):
    files = [Path(shutil.copy(part, tmp_path)) for part in parts[:3]]
    spoil, opened, message = PARTS[case]
    spoil(files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        PaLM.from_pretrained(tmp_path / opened if isinstance(opened, str) else files[opened])


def test_a_part_that_is_replaced_while_the_model_is_read_is_noticed(parts, tmp_path):
    files = [Path(shutil.copy(part, tmp_path)) for part in parts[:3]]
    opened = GGUFFile(files[0])
    opened.require_unchanged()
    files[2].write_bytes(files[2].read_bytes() + b"x")
    with pytest.raises(ValueError, match="was written to while it was read"):
        opened.require_unchanged()


SCALINGS = {
    "before YaRN": {"rope.scale_linear": 4.0},
    "without a type": {"rope.scaling.factor": 4.0},
    "both names": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0, "rope.scale_linear": 2.0},
}


@pytest.mark.parametrize("case", SCALINGS)
def test_a_linear_scaling_is_computed_by_all_its_names(case, tmp_path):
    model = hugging_face_model("llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0})
    palm = PaLM.from_pretrained(write_gguf(tmp_path / "model.gguf", model, "llama", values=SCALINGS[case]))
    assert dataclasses.asdict(palm.config.rotary_scaling)["factor"] == 4.0
    assert_same_logits(palm, model, 3e-5)


@pytest.mark.parametrize(
    "values",
    [
        {"rope.scaling.type": "linear"},
        {"rope.scaling.factor": 0.0},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0, "rope.scaling.yarn_ext_factor": 1.0},
    ],
)
def test_a_scaling_by_nothing_is_none(values, tmp_path):
    model = hugging_face_model("llama", num_hidden_layers=1)
    palm = PaLM.from_pretrained(write_gguf(tmp_path / "model.gguf", model, "llama", values=values))
    assert palm.config.rotary_scaling is None


def test_metadata_that_files_leave_out_have_the_defaults_of_llama_cpp(tmp_path):
    """A model without grouped heads, and theta 10,000."""
    model = hugging_face_model("llama", num_key_value_heads=4)
    left_out = ("rope.freq_base", "rope.dimension_count", "attention.head_count_kv", "vocab_size")
    values = {"expert_count": 0, "expert_used_count": 0, "rope.scaling.finetuned": False}
    values |= {"tensor_data_layout": "Meta AI original pth"}
    path = write_gguf(tmp_path / "model.gguf", model, "llama", left_out=left_out, values=values)
    assert_same_logits(PaLM.from_pretrained(path), model, 3e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_several_types_in_one_file_are_read_as_transformers_reads_them(architecture, tmp_path):
    """As in files of Q4_K_M, which have Q6_K for some matrices."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 8}
    sizes |= {"vocab_size": 40, "head_dim": 32} if architecture == "llama" else {"vocab_size": 40}
    model = hugging_face_model(architecture, tie_word_embeddings=False, **sizes)
    rng, raw = np.random.default_rng(0), {}
    for name, rows, kind in (
        ("blk.0.attn_q.weight", 256, "Q4_K"),
        ("blk.0.attn_k.weight", 64, "Q5_K"),
        ("blk.0.attn_v.weight", 64, "Q6_K"),
        ("blk.0.ffn_down.weight", 256, "Q3_K"),
        ("output.weight", 40, "Q2_K"),
    ):
        kind = gguf.GGMLQuantizationType[kind]
        data = rng.integers(0, 256, gguf.quant_shape_to_byte_shape((rows, 256), kind), dtype=np.uint8)
        raw[name] = (with_small_scales(data, kind), kind)
    path = write_gguf(tmp_path / "model.gguf", model, architecture, "Q8_0", raw=raw)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    assert_same_logits(PaLM.from_pretrained(path), theirs)


def with_small_scales(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random blocks with the float16 scales 0.001 where the type has them: at their start, or at their end."""
    blocks = data.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    places = {"Q2_K": (-4, -2), "Q3_K": (-2,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (-2,)}[kind.name]
    for place in places:
        size = blocks.shape[1]
        blocks[:, place % size : place % size + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
    return blocks.reshape(data.shape)
