"""The next token through all blocks of a PaLM in one call of a kernel in C; `csrc/decode.c` is the kernel."""

import ctypes
from ctypes import c_double, c_int, c_long, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf.ops.cpu.native_library import has_amx, library, num_threads

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float64: "f64"}
MAX_ROWS = 64  # beyond, one product after the other is as fast
MAX_ROWS_WITH_AMX = 8  # of bfloat16


class BlockTensors(NamedTuple):
    """What one block reads, and its part of the cache, all contiguous: weights of one dtype, keys and values of one."""

    norm: Tensor  # e
    in_proj: Tensor  # (q k v gate value) e
    attn_out: Tensor  # e (h d)
    ff_out: Tensor  # e inner
    q_norm: Tensor | None  # h d
    k_norm: Tensor | None  # hk d
    keys: Tensor  # b hk capacity d
    values: Tensor
    q_down: Tensor | None = None  # i r, of the adapters, all or none
    k_down: Tensor | None = None
    v_down: Tensor | None = None
    out_down: Tensor | None = None
    q_up: Tensor | None = None  # r o
    k_up: Tensor | None = None
    v_up: Tensor | None = None
    out_up: Tensor | None = None


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, c_long) for name in ("depth", "dim", "heads", "kv_heads", "dim_head", "inner")),
        *((name, c_long) for name in ("batch", "capacity", "table_rows", "table_heads", "rank")),
        ("eps", c_double),
        ("adapter_scale", c_double),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in BlockTensors._fields]


def _places(blocks: list[BlockTensors]) -> list[tuple]:
    """Where everything is, and how often it was changed if it is not read there but copied."""
    dtype = blocks[0].keys.dtype
    return [
        (t.data_ptr(), t.dtype, t.shape, 0 if t.dtype == dtype or t.is_inference() else t._version)
        for block in blocks
        for t in block
        if t is not None
    ]


def max_rows(dtype: torch.dtype) -> int:
    """How many rows at once the kernel is good for; none of a type that it does not know."""
    if dtype not in DTYPES:
        return 0
    return MAX_ROWS_WITH_AMX if dtype == torch.bfloat16 and has_amx() else MAX_ROWS


def fit(
    blocks: list[BlockTensors], dtype: torch.dtype, cache_shape: tuple[int, int, int], cache_dtype: torch.dtype
) -> bool:
    """Whether all are of the types, sizes and memory order that the kernel counts on; cache_shape: `b hk d`."""
    caches = [t for block in blocks for t in (block.keys, block.values)]
    weights = [t for block in blocks for t in block._replace(keys=None, values=None) if t is not None]
    ranks = {block.q_down.shape[1] for block in blocks if block.q_down is not None}
    return (
        all(t.is_contiguous() for t in (*weights, *caches))
        and {t.dtype for t in weights} == {dtype}
        and {(*t.shape[:2], t.shape[3], t.dtype) for t in caches} == {(*cache_shape, cache_dtype)}
        and len(ranks) <= 1
    )


class NativeDecoder:
    """One token a row through given blocks, whose tensors are kept alive.

    They are read where they lie, but weights of another dtype than the cache's are copied into that one now.
    """

    def __init__(self, blocks: list[BlockTensors], heads: int, eps: float, adapter_scale: float):
        first = blocks[0]
        batch, kv_heads, capacity, dim_head = first.keys.shape
        dim, inner = first.ff_out.shape
        rank = 0 if first.q_down is None else first.q_down.shape[1]
        self.places, dtype = _places(blocks), first.keys.dtype
        self.blocks = [BlockTensors(*(t if t is None else t.to(dtype) for t in block)) for block in blocks]
        pointers = [_Layer(*(None if t is None else t.data_ptr() for t in block)) for block in self.blocks]
        self.layers = (_Layer * len(blocks))(*pointers)
        self.shape = _Shape(len(blocks), dim, heads, kv_heads, dim_head, inner, batch, capacity)
        self.shape.rank, self.shape.eps, self.shape.adapter_scale = rank, eps, adapter_scale
        self.function = getattr(library(), f"decode_{DTYPES[dtype]}")
        self.function.restype = None
        self.function.argtypes = [*(c_void_p,) * 8, c_int]
        self.dtype = torch.promote_types(dtype, torch.float32)
        self._make_room(num_threads())

    def _make_room(self, threads: int) -> None:
        library().decode_scratch.restype = c_long
        size = library().decode_scratch(ctypes.byref(self.shape), c_int(threads))
        self.scratch, self.threads = torch.empty(size, dtype=self.dtype, device="cpu"), threads

    def reads(self, blocks: list[BlockTensors], adapter_scales: set[float]) -> bool:
        """Whether these are what it reads: weights are given other memory or types, and so are the rows of a cache."""
        return _places(blocks) == self.places and adapter_scales == {self.shape.adapter_scale}

    def __reduce__(self):
        return type(None), ()  # a copy of a cache makes a kernel of its own

    def step(self, x: Tensor, tables: tuple[Tensor, Tensor], first: Tensor, lengths: Tensor) -> Tensor:
        """Read the next token of each row into the cache, and through the blocks.

        `lengths` counts the tokens that the cache holds of a row, which sees those from `first` on.

        x: `b 1 e`, tables: at least float32, `b|1 (h + hk)|1 1 d`, first and lengths: `b` int64 -> `b 1 e`
        """
        threads = num_threads()
        if threads > self.threads:  # their number follows the load of the machine
            self._make_room(threads)
        cos, sin = (table.contiguous() for table in tables)
        wide = x.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        self.shape.table_rows, self.shape.table_heads = cos.shape[:2]
        pointers = [t.data_ptr() for t in (cos, sin, first, lengths, wide, self.scratch)]
        self.function(ctypes.byref(self.shape), self.layers, *pointers, threads)
        return wide.to(x.dtype)
