"""Which implementation of an operation runs where, and why not.

PyTorch's own operations run everywhere. Kernels in C (`ops/cpu`) and in Triton (`ops/triton`) take their place where
they can. Throughout `ops` an implementation answers two questions: `why_not` returns the reason why it cannot compute
the given tensors here, or None if it can; `is_faster` says, where it can, whether it is worth it.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from beartype import beartype
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from palm_rlhf.ops.cpu import native_library

GPUS = {"cuda"}  # the device type of ROCm as well
TRITON_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def why_not_native(*tensors: Tensor) -> str | None:
    """Return why kernels in C cannot compute with these tensors here, or None if they can.

    The kernels read tensors by their addresses. Without tensors the answer is for this machine.
    """
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return "a tensor is not on the CPU"
        if type(tensor) not in (Tensor, Parameter):
            return "a tensor is of a subclass, which may keep its numbers elsewhere"
        if tensor.stride(-1) != 1:
            return "the last axis of a tensor is not dense in memory"
    return native_library.why_not()


def why_not_triton(*tensors: Tensor) -> str | None:
    """Return why Triton kernels do not compute with these tensors, or None if they do.

    They do so on GPUs only; on a CPU, Triton's interpreter is for tests.
    """
    for tensor in tensors:
        if tensor.device.type not in GPUS:
            return "a tensor is not on a GPU"
        if tensor.dtype not in TRITON_DTYPES:
            return "a tensor is neither float32, float16 nor bfloat16"
    return why_not_triton_on(tensors[0].device.type)


def why_not_triton_on(device_type: str) -> str | None:
    """Return why Triton kernels cannot run on a type of device, or None if they can."""
    return _find_why_not_triton_on(device_type)


# torch.compile may not trace the function above, which imports Triton, but takes its result for a constant. This is
# what `torch.compiler.assume_constant_result` does; that function imports the whole compiler, which takes a second.
why_not_triton_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions can have any attribute


@cache
def _find_why_not_triton_on(device_type: str) -> str | None:
    try:
        from palm_rlhf.ops.triton import versions
    except ImportError as error:
        return str(error)
    if (reason := versions.explain_fault("kernels", versions.INSTALLED)) is not None:
        return reason  # without the import below, which may fail in such a version
    from palm_rlhf.ops.triton.tiles import why_not

    return why_not(device_type)


def triton_version() -> str | None:
    """Return the version of Triton, or None where it is not installed."""
    try:
        from palm_rlhf.ops.triton import versions
    except ImportError:
        return None
    return versions.INSTALLED


def triton_faults() -> list[str]:
    """Return what is wrong with the installed version of Triton on the GPU here, or beside this NumPy."""
    try:
        from palm_rlhf.ops.triton import versions
    except ImportError:
        return []
    is_nvidia = torch.version.cuda is not None and torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if is_nvidia else (0, 0)
    situation: dict[str, Any] = {"capability": capability, "numpy": np.__version__}
    found = (versions.explain_fault(part, versions.INSTALLED, **situation) for part in versions.PARTS)
    return [reason for reason in found if reason is not None]


def why_not_flex_on(device_type: str) -> str | None:
    """Return why FlexAttention cannot run on a type of device, or None if it can.

    torch.compile writes its kernels: in Triton for a GPU, in C++ for a CPU, where it has no gradients.
    """
    return _find_why_not_flex_on(device_type)


why_not_flex_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above


@cache
def _find_why_not_flex_on(device_type: str) -> str | None:
    if device_type in GPUS:
        return "Triton, which torch.compile needs, is not installed" if find_spec("triton") is None else None
    if device_type != "cpu":
        return f"it runs on CUDA, ROCm and CPUs, not on {device_type}"
    if sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "on a CPU it needs Linux and AVX2"
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return "there is no C++ compiler"
    return None


@beartype
def available_implementations(device_type: str = "cpu") -> dict[str, str | None]:
    """Return, for each implementation of attention, why it cannot run on a type of device, or None if it can."""
    return {
        "eager": None,
        "fused": None,
        "chunked": None,
        "flex": why_not_flex_on(device_type),
        "triton": why_not_triton_on(device_type),
    }


@beartype
def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # PyTorch has no public function for this; where it lacks the private ones, float32 is taken
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False


class _NoNormalNumbers(TorchFunctionMode):
    """Leaves tensors as they are where they would be filled with normal numbers."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, torch.nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Make tensors on the meta device in the block, such as a model of which only the shapes are wanted.

    Normal numbers are not drawn: on that device they have no values, and for them PyTorch would import its compiler,
    which takes two seconds.
    """
    with torch.device("meta"), _NoNormalNumbers():
        yield
