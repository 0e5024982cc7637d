"""Which tensors the fused GPU kernels take; attention chooses among more, and says why, in `attention.py`."""

import torch
from torch import Tensor

from palm_rlhf.ops.attention import available_implementations

DEVICES = {"cuda"}  # ROCm calls itself so as well
DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def uses_triton(*tensors: Tensor) -> bool:
    """Whether kernels in Triton take these tensors: all on a GPU that can run them, in types they compute in."""
    if not all(t.device.type in DEVICES and t.dtype in DTYPES for t in tensors):
        return False
    return available_implementations(tensors[0].device.type)["triton"] is None
