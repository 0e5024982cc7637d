"""Products with weights in fewer bits: int8 numbers with a scale for each row, and 4-bit NF4 numbers in blocks.

bitsandbytes, of the extra `quantize`, packs the weights, and has the kernels of NF4. Gradients flow to the inputs only.
"""

import logging
from functools import cache
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Quantisation: TypeAlias = Literal["int8", "int4"]
BLOCK_SIZE = 64  # weights that share a scale in 4 bits (Dettmers et al. 2023, section 3)


class Packed(NamedTuple):
    """The numbers of a weight of the shape `o i`, and their scales, float32.

    int8: `o i` int8 and `o` scales. int4: `(o i / 2) 1` uint8, two numbers each, and `(o i / 64)` scales.
    """

    numbers: Tensor
    scales: Tensor


@cache
def bitsandbytes() -> ModuleType:
    """Return the package. Raises ImportError that names the extra where it is missing."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, logger.disabled = logger.disabled, True  # it warns that kernels of the Hugging Face hub are not there
    try:
        import bitsandbytes as package
        import bitsandbytes.functional
    except ImportError as error:
        raise ImportError(
            f"weights in fewer bits need bitsandbytes, which cannot be imported ({error}); expected it to be "
            "installed: pip install 'palm-rlhf[quantize]', or keep the plain weights"
        ) from error
    finally:
        logger.disabled = before
    return package


def pack(weight: Tensor, kind: Quantisation) -> Packed:
    """Return a weight in fewer bits, `o i`; on the meta device only the shapes of its parts."""
    rows, columns = weight.shape
    if weight.is_meta:
        shape = (rows, columns) if kind == "int8" else ((rows * columns + 1) // 2, 1)
        numbers = torch.empty(shape, dtype=torch.int8 if kind == "int8" else torch.uint8, device="meta")
        num_scales = rows if kind == "int8" else -(-rows * columns // BLOCK_SIZE)
        return Packed(numbers, torch.empty(num_scales, dtype=torch.float32, device="meta"))
    functional = bitsandbytes().functional
    if kind == "int8":
        numbers, largest, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        return Packed(numbers, largest / 127)
    numbers, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=False, quant_type="nf4"
    )
    return Packed(numbers, state.absmax)


def unpack(packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight that the numbers stand for: `o i`."""
    numbers, scales = packed
    if numbers.dtype == torch.int8:
        return (numbers * scales.unsqueeze(-1)).to(dtype)
    if shape[1] % BLOCK_SIZE:  # on a CPU bitsandbytes 0.50 begins a new block with each row, and packs no such rows
        count = shape[0] * shape[1]
        rows = (1, count) if count % BLOCK_SIZE else (count // BLOCK_SIZE, BLOCK_SIZE)
        return bitsandbytes().functional.dequantize_4bit(numbers, _nf4_state(scales, rows, dtype)).view(shape)
    return bitsandbytes().functional.dequantize_4bit(numbers, _nf4_state(scales, shape, dtype))


def product(x: Tensor, packed: Packed, shape: tuple[int, int]) -> Tensor:
    """Return the product with a packed weight, in the type of x, or of autocast: `... i -> ... o`."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    numbers, scales = packed
    if kind != "cpu" and numbers.dtype == torch.uint8 and shape[1] % BLOCK_SIZE == 0:
        return bitsandbytes().matmul_4bit(x, numbers.t(), _nf4_state(scales, shape, x.dtype))  # reads packed numbers
    return _Product.apply(x, numbers, scales, shape)


class _Product(torch.autograd.Function):
    """The product with a packed weight, which is unpacked anew in the backward.

    Autograd would keep the unpacked weight for the backward, and so the whole model in its plain size. The numbers of
    int8 are exact in bfloat16 too: the scales of the rows multiply the output. In float16 such an output, up to 127
    times the plain one over the largest weight of its row, would leave the range, so the weight is unpacked there.
    """

    @staticmethod
    def forward(ctx, x, numbers, scales, shape):
        ctx.save_for_backward(numbers, scales)
        ctx.shape = shape
        if numbers.dtype == torch.int8 and x.dtype != torch.float16:
            return F.linear(x, numbers.to(x.dtype)).mul_(scales)
        return F.linear(x, unpack(Packed(numbers, scales), shape, x.dtype))

    @staticmethod
    def backward(ctx, d_out):
        numbers, scales = ctx.saved_tensors
        if numbers.dtype == torch.int8 and d_out.dtype != torch.float16:
            return (d_out * scales).to(d_out.dtype) @ numbers.to(d_out.dtype), None, None, None
        return d_out @ unpack(Packed(numbers, scales), ctx.shape, d_out.dtype), None, None, None


def _nf4_state(scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """Return the description of NF4 numbers with which bitsandbytes reads them."""
    return bitsandbytes().functional.QuantState(
        absmax=scales,
        shape=torch.Size(shape),
        code=_nf4_numbers(scales.device),
        blocksize=BLOCK_SIZE,
        quant_type="nf4",
        dtype=dtype,
    )


@cache
def _nf4_numbers(device: torch.device) -> Tensor:
    """Return the 16 numbers that 4 bits stand for, before their scale."""
    return bitsandbytes().functional.get_4bit_type("nf4", device=device)
