"""The numeric type in which a model from a GGUF file generates, unless another is asked for."""

import pytest
import torch

from palm_rlhf.model.interop import gguf_dtype
from palm_rlhf.model.interop.gguf_dtype import generation_dtype
from palm_rlhf.serving.served_model import load
from tests.model.interop.gguf_files import hugging_face_model, write_gguf


@pytest.fixture
def has_bfloat16(monkeypatch):
    """`has_bfloat16(False)`: the processor does not compute in bfloat16."""
    return lambda value: monkeypatch.setattr(gguf_dtype, "computes_bfloat16", lambda device: value)


@pytest.mark.parametrize(
    "kind, hardware, expected",
    [("Q8_0", True, torch.bfloat16), ("F16", True, torch.bfloat16), ("Q8_0", False, None), ("F32", True, None)],
)
def test_fewer_bits_are_computed_in_bfloat16_where_the_device_does(tmp_path, has_bfloat16, kind, hardware, expected):
    has_bfloat16(hardware)
    path = write_gguf(tmp_path / "model.gguf", hugging_face_model("llama", vocab_size=300), "llama", kind)
    assert generation_dtype(path, "cpu") == expected
    assert load(path, template="plain").palm.dtype == (expected or torch.float32)
    assert load(path, template="plain", dtype=torch.float32).palm.dtype == torch.float32


def test_a_folder_keeps_its_type(tmp_path, has_bfloat16):
    has_bfloat16(True)
    assert generation_dtype(tmp_path, "cpu") is None
