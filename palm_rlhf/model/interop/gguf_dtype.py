"""The numeric type in which a model from a GGUF file generates."""

from pathlib import Path

import torch
from beartype import beartype

from palm_rlhf.model.interop.gguf_header import is_gguf
from palm_rlhf.model.interop.gguf_parts import read_whole_header
from palm_rlhf.model.interop.peft_base import weights_of
from palm_rlhf.ops.devices import computes_bfloat16

FLOAT32 = 0  # the id of this type of tensors


@beartype
def generation_dtype(path: Path, device: str | torch.device) -> torch.dtype | None:
    """Return bfloat16 for a GGUF file with weights of fewer than 32 bits, where the device computes in it; else None.

    The same holds for an adapter of PEFT whose base is such a file.

    None is the type of the weights, which is float32 for GGUF files. Rounding weights of 4 bits to bfloat16 changes
    them far less than the quantisation did. SmolLM2 takes 24 ms of one core of an AMD EPYC (AVX512_BF16) for a token in
    bfloat16 and 40 in float32, and half the time and memory for a prompt; processors without such products emulate
    bfloat16, more slowly than they compute in float32.
    """
    path = weights_of(path)
    if not is_gguf(path) or not computes_bfloat16(torch.device(device)):
        return None
    has_fewer_bits = any(tensor.type_id != FLOAT32 for tensor in read_whole_header(path).tensors.values())
    return torch.bfloat16 if has_fewer_bits else None
