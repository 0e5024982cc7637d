"""Shared by the Triton kernels: the version they need, the GPU that they are tuned for, and tiles of rows."""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from palm_rlhf.ops.triton.versions import INSTALLED, explain_fault, find_fault

if find_fault("descriptors", INSTALLED) is None:
    from triton.tools.tensor_descriptor import TensorDescriptor as TensorDescriptor
else:
    TensorDescriptor = None
POINTERS_TO_ONE_ROW = find_fault("descriptors of one row", INSTALLED, capability=(9, 0)) is not None

LOG2_E = math.log2(math.e)
OLDEST_CUDA = (8, 0)
TMA_ARCHITECTURES = ("sm_90", "sm_100")  # they copy a whole block to shared memory with one instruction


class Tile(NamedTuple):
    """The shape of the work of one program: rows and columns of a tile, warps that share it, blocks in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2

    def options(self) -> dict[str, int]:
        """Return the keywords of a launch."""
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        return dict(zip(names, self, strict=True))


Tiles = dict[str, dict[int, Tile]]  # by architecture, and by the largest head dimension that a tile is for
# Tensor cores do not compute float32 products at full precision, so these are unrolled, and large tiles spill.
FLOAT32_TILES = {
    "cuda": {64: Tile(16, 32, 4), 128: Tile(16, 32, 8), 256: Tile(16, 16, 8)},
    "hip": {64: Tile(32, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}


def why_not(device_type: str) -> str | None:
    """Return why Triton kernels cannot run on a type of device, or None if they can."""
    if device_type == "cuda":
        capability = (0, 0)
        if torch.version.cuda and torch.cuda.is_available():
            capability = torch.cuda.get_device_capability()
            if capability < OLDEST_CUDA:
                name, needed = torch.cuda.get_device_name(), ".".join(map(str, OLDEST_CUDA))
                return f"{name} has not the compute capability {needed}"
        return explain_fault("kernels", INSTALLED, capability=capability)
    if device_type == "cpu":
        if not INTERPRETED:
            return "on a CPU it runs in Triton's interpreter alone, with TRITON_INTERPRET=1"
        return explain_fault("interpreter", INSTALLED, numpy=np.__version__)
    return f"it runs on CUDA and ROCm, not on {device_type}"


@cache
def properties(device: torch.device) -> tuple[str, int]:
    """Return the architecture that tiles are tuned for, and the number of its multiprocessors.

    The architecture is sm_80, sm_90, sm_100, sm_86 (with less shared memory) or gfx942.
    """
    if device.type != "cuda":
        return "sm_80", 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if torch.version.hip:
        return "gfx942", processors
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return f"sm_{major}0", processors
    return "sm_80" if (major, minor) in ((8, 0), (8, 7)) else "sm_86", processors


def architecture(device: torch.device) -> str:
    """Return the architecture that tiles are tuned for."""
    return properties(device)[0]


def multiprocessors(device: torch.device) -> int:
    """Return how many programs run at the same time."""
    return properties(device)[1]


def tile_for(tiles: Tiles, x: torch.Tensor, exceptions: Tiles | None = None) -> Tile:
    """Return the tile for x, `... d`, from a table by architecture and largest d, in which exceptions come first."""
    if x.dtype == torch.float32 and x.device.type == "cuda":
        by_dim = FLOAT32_TILES["hip" if torch.version.hip else "cuda"]
    else:
        arch = architecture(x.device)
        by_dim = tiles[arch]
        if exceptions is not None and arch in exceptions:
            by_dim = by_dim | exceptions[arch]
    for dim, tile in by_dim.items():
        if x.shape[-1] <= dim:
            return tile
    raise ValueError(f"heads have {x.shape[-1]} dimensions; expected up to {max(by_dim)}")


@cache
def block_dim(dim: int) -> int:
    """Return the width of a tile with rows of `dim` numbers."""
    return max(16, triton.next_power_of_2(dim))


def describe(x: torch.Tensor, block: tuple[int, ...]) -> "TensorDescriptor | None":
    """Return a descriptor of x, by which a GPU with TMA copies whole blocks, or None if x or the GPU is not suited."""
    if TensorDescriptor is None or architecture(x.device) not in TMA_ARCHITECTURES:
        return None
    strides = [stride if size > 1 else x.shape[-1] for size, stride in zip(x.shape[:-1], x.stride(), strict=False)]
    aligned = all(stride * x.element_size() % 16 == 0 < stride for stride in strides)
    if x.element_size() != 2 or not x.numel() or (POINTERS_TO_ONE_ROW and x.shape[-2] == 1 < block[-2]):
        return None
    if not aligned or x.data_ptr() % 16 or x.stride(-1) != 1:
        return None
    return TensorDescriptor(x, list(x.shape), [*strides, 1], list(block))


HERE = nullcontext()


def on(device: torch.device) -> AbstractContextManager:
    """Return a context in which Triton launches kernels on this device: it launches on the current one."""
    is_other = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if is_other else HERE


def precision(dtype: torch.dtype) -> str:
    """Return the precision of products: that of the inputs, or TF32 if PyTorch may use it for float32."""
    fast = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if fast else "ieee"


@triton.jit
def load_rows(ptr, offsets, inside, CHECK: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Load rows of DIM numbers at the given offsets: `rows BLOCK_DIM`. With CHECK, rows that are not `inside` are 0."""
    dims = tl.arange(0, BLOCK_DIM)
    pointers = ptr + offsets[:, None] + dims[None, :]
    if DIM < BLOCK_DIM:
        rows = tl.load(pointers, mask=inside[:, None] & (dims < DIM)[None, :], other=0.0)
    elif CHECK:
        rows = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def load_block(
    source, batch, head, stride, start, count, CHECK: tl.constexpr,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load rows of one head from `start` on: by a descriptor of `b h n d` with TMA, else by a pointer to the head."""
    if TMA:
        block = source.load([batch, head, start, 0]).reshape(BLOCK, BLOCK_DIM)
    else:
        rows = start + tl.arange(0, BLOCK)
        block = load_rows(source, rows * stride, rows < count, CHECK, DIM, BLOCK_DIM)
    return block


@triton.jit
def load_tile(
    source, start, batch, first_head, stride, stride_head, num_queries,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_M: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load rows from `start` on, row = query * group + head; rows after the last query hold any numbers."""
    if TMA:
        tile = source.load([batch, start // GROUP, first_head + start % GROUP, 0]).reshape(BLOCK_M, BLOCK_DIM)
    else:
        rows = start + tl.arange(0, BLOCK_M)
        query = tl.minimum(rows // GROUP, num_queries - 1)
        offsets = query * stride + rows % GROUP * stride_head
        tile = load_rows(source, offsets, query < num_queries, False, DIM, BLOCK_DIM)
    return tile


@triton.jit
def store_rows(ptr, offsets, inside, rows, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Store those rows of DIM numbers, `rows BLOCK_DIM`, that are `inside`, at the given offsets."""
    dims = tl.arange(0, BLOCK_DIM)
    mask = inside[:, None] & (dims < DIM)[None, :]
    tl.store(ptr + offsets[:, None] + dims[None, :], rows.to(ptr.dtype.element_ty), mask=mask)


INTERPRETED = not isinstance(store_rows, triton.JITFunction)  # TRITON_INTERPRET=1, set before Triton is imported
