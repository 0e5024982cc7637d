"""SwiGLU and rotary positions on a CPU by kernels in C, each in one pass; `csrc/elementwise.c` has them."""

import ctypes
from ctypes import c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from palm_rlhf.ops.cpu.native_library import library, num_threads, readable

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Rotation(ctypes.Structure):
    _fields_ = [
        *((name, c_long) for name in ("batch", "length", "heads", "dim")),
        *((f"{name}_strides", c_long * 3) for name in ("x", "out")),
        *((name, c_long) for name in ("table_batch_stride", "table_head_stride", "table_position_stride")),
        ("sign", c_float),
    ]


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels compute these: all of one dtype on a CPU, float32 or bfloat16, the last axis dense."""
    if torch.compiler.is_compiling():
        return False
    dtypes = {t.dtype for t in tensors}
    fit = len(dtypes) == 1 and dtypes <= set(DTYPES) and readable(*tensors)
    return fit and tensors[0].numel() > 0 and library() is not None


def can_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate_native` computes these: its tables are float32, whatever x is."""
    return cos.dtype == torch.float32 and cos.stride() == sin.stride() and takes(x) and takes(cos, sin)


def swiglu_native(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, both `... d` and contiguous."""
    out = torch.empty_like(gate)
    _call("swiglu", gate, (gate, value, out), gate.numel())
    return out


def swiglu_backward_native_(d_hidden: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the gate, that of the value, written over `d_hidden`, and the hidden units: all `... d`."""
    d_gate, hidden = torch.empty_like(d_hidden), torch.empty_like(d_hidden)
    _call("swiglu_backward", gate, (d_hidden, gate, value, d_gate, d_hidden, hidden), gate.numel())
    return d_gate, d_hidden, hidden


def rotate_native(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, out: Tensor | None = None) -> Tensor:
    """`rotary.rotate` of `b n h d`, tables float32 `b|1 n h|1 d`; `inverse` turns back, `out` is where to write."""
    batch, length, heads, dim = x.shape
    out = x.new_empty(x.shape) if out is None else out
    strides = ((c_long * 3)(*t.stride()[:3]) for t in (x, out))
    of_tables = [0 if size == 1 else stride for size, stride in zip(cos.shape, cos.stride(), strict=True)]
    shape = _Rotation(batch, length, heads, dim, *strides, of_tables[0], of_tables[2], of_tables[1], 1 - 2 * inverse)
    _call("rotate", x, (ctypes.byref(shape), x, cos, sin, out))
    return out


def _call(name: str, like: Tensor, arguments: tuple, *counts: int) -> None:
    pointers = [c_void_p(t.data_ptr()) if isinstance(t, Tensor) else t for t in arguments]
    numbers = [*(c_long(count) for count in counts), c_int(num_threads())]
    getattr(library(), f"{name}_{DTYPES[like.dtype]}")(*pointers, *numbers)
