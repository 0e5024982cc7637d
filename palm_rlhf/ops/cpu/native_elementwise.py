"""SwiGLU, RMSNorm and rotary positions on a CPU, each in one pass, by the kernels in C of `csrc/elementwise.c`."""

import ctypes
from ctypes import c_double, c_float, c_int, c_long, c_void_p

import torch
from torch import Tensor

from palm_rlhf.ops.cpu.native_library import library, num_threads
from palm_rlhf.ops.devices import why_not_native

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
ROWS = 32  # of RMSNorm, whose gradients of the weight are added up before those of all rows: `ROWS` in C


class _Rotation(ctypes.Structure):
    """`Rotation` of `csrc/elementwise.c`."""

    _fields_ = [
        *((name, c_long) for name in ("batch", "length", "heads", "dim")),
        *((f"{name}_strides", c_long * 3) for name in ("x", "out")),
        *((name, c_long) for name in ("table_batch_stride", "table_head_stride", "table_position_stride")),
        ("sign", c_float),
    ]


def why_not_swiglu(*tensors: Tensor) -> str | None:
    """Return why the kernels of SwiGLU cannot compute with these tensors, or None if they can."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "a tensor is not contiguous"
    if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
        return "the tensors are of several dtypes"
    return _why_not(*tensors)


def why_not_rms_norm(x: Tensor, weight: Tensor) -> str | None:
    """Return why the kernels of RMSNorm cannot compute with these tensors, or None if they can."""
    if weight.dtype not in DTYPES:
        return "the weight is neither float32 nor bfloat16"
    return _why_not(x, weight)


def why_not_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    """Return why `rotate_native` cannot compute with these tensors, or None if it can; its tables are float32."""
    if not cos.dtype == sin.dtype == torch.float32:
        return "the tables are not float32"
    if cos.stride() != sin.stride():
        return "the two tables have different strides"
    return _why_not(x, cos, sin)


def _why_not(x: Tensor, *others: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile does not trace kernels in C"
    if x.dtype not in DTYPES:
        return "a tensor is neither float32 nor bfloat16"
    if not x.numel():
        return "a tensor is empty"
    return why_not_native(x, *others)


def swiglu_native(gate: Tensor, value: Tensor) -> Tensor:
    """Return silu(gate) * value, both `... d` and contiguous."""
    out = torch.empty_like(gate)
    _call("swiglu", gate, (gate, value, out), gate.numel())
    return out


def swiglu_backward_native_(d_hidden: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of gate and value, the latter in the memory of `d_hidden`, and the hidden units: `... d`."""
    d_gate, hidden = torch.empty_like(d_hidden), torch.empty_like(d_hidden)
    _call("swiglu_backward", gate, (d_hidden, gate, value, d_gate, d_hidden, hidden), gate.numel())
    return d_gate, d_hidden, hidden


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis: contiguous `... d`, `d` -> `... d`."""
    out = torch.empty_like(x)
    _call("rms_norm", x, (x, weight.float(), out, c_double(eps)), *_rows(x))
    return out


def rms_norm_backward_native(
    d_out: Tensor, x: Tensor, weight: Tensor, eps: float, *, of_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x, and unless `of_weight` is False, of the weight: `... d`, `d`."""
    num_rows, dim = _rows(x)
    d_x, parts = torch.empty_like(x), None
    if of_weight:
        parts = torch.empty(-(-num_rows // ROWS), dim, dtype=torch.float32, device=x.device)
    _call("rms_norm_backward", x, (d_out.contiguous(), x, weight.float(), d_x, parts, c_double(eps)), num_rows, dim)
    return d_x, None if parts is None else parts.sum(dim=0).to(weight.dtype)


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def rotate_native(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, out: Tensor | None = None) -> Tensor:
    """Return what `rotary.rotate` returns.

    Args:
        x: `b n h d`.
        cos: `b|1 n h|1 d`, float32.
        sin: of the shape and strides of `cos`.
        inverse: turn back, by the negative angles.
        out: `b n h d`, a tensor to write to, instead of a new one.
    """
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
