"""Small kernels, written by hand."""

import numpy as np
import torch

from .device import Device

KERNEL = """
.version 8.8
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
    .reg .pred %p<99>;
    .reg .b16 %rs<99>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
    mov.u32 %r0, %tid.x;
    {pointers}
    {body}
    ret;
}}
"""


def run(body: str, *tensors, threads: int = 32, shared: int = 1024, grid=(1, 1, 1), device: Device | None = None):
    """Execute PTX. %r0 is the thread; %rd0, %rd1, ... point to tensors, %rd10, %rd11, ... to its element of these."""
    parameters, pointers = [], []
    for i, tensor in enumerate(tensors):
        parameters.append(f".param .u64 .ptr .global .align 1 kernel_param_{i}")
        pointers.append(f"ld.param.b64 %rd{i}, [kernel_param_{i}];")
        pointers.append(f"mad.wide.u32 %rd{10 + i}, %r0, {tensor.element_size()}, %rd{i};")
    ptx = KERNEL.format(parameters=", ".join(parameters), threads=threads, pointers=" ".join(pointers), body=body)
    (device or Device()).launch(ptx, grid, shared, list(tensors))


def bits(values, dtype=torch.int32) -> torch.Tensor:
    """Whole numbers of any size, cut to those bits, as a tensor."""
    width = torch.iinfo(dtype).bits
    wrapped = [(value + (1 << width - 1)) % (1 << width) - (1 << width - 1) for value in values]
    return torch.tensor(wrapped, dtype=dtype)


def compute(instruction: str, *columns, result: str = "b32") -> list[int]:
    """`instruction` of every row of the columns, 32-bit numbers, as unsigned numbers."""
    threads = -(-len(columns[0]) // 32) * 32
    inputs = [bits([*column, *[1] * (threads - len(column))]) for column in columns]
    out = torch.empty(threads, dtype={"b16": torch.int16, "b32": torch.int32, "b64": torch.int64}[result])
    loads = "".join(f"ld.global.b32 {{ %r{i + 1} }}, [ %rd{10 + i} + 0 ];" for i in range(len(inputs)))
    operands = ", ".join(f"%r{i + 1}" for i in range(len(inputs)))
    prefix = {"b16": "%rs", "b32": "%r", "b64": "%rd"}[result]
    body = f"{loads} {instruction.replace('ABC', operands).replace('TO', f'{prefix}50')};"
    run(f"{body} st.global.{result} [%rd{10 + len(inputs)}], {prefix}50;", *inputs, out, threads=threads)
    return [int(x) % (1 << 8 * out.element_size()) for x in out[: len(columns[0])]]


def floats(values) -> list[int]:
    """float32 -> its bits."""
    return [int(x) for x in np.array(values, np.float32).view(np.uint32)]
