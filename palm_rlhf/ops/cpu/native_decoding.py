"""One decoding step through all blocks of a PaLM, in one call of the kernel in C of `csrc/decode.c`."""

import ctypes
from ctypes import c_double, c_int, c_long, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from palm_rlhf.ops.cpu.native_library import has_amx, library, num_threads

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float64: "f64"}
MAX_ROWS = 64  # for more rows, computing one product after the other is as fast
MAX_ROWS_WITH_AMX = 8  # for bfloat16 on a processor with AMX


class BlockTensors(NamedTuple):
    """The weights of one block, and its part of the cache.

    All are contiguous. The weights have one dtype, and the keys and values have one dtype.
    """

    norm: Tensor  # e
    in_proj: Tensor  # (q k v gate value) e, or in a serial block (q k v) e
    attn_out: Tensor  # e (h d)
    ff_out: Tensor  # e inner
    q_norm: Tensor | None  # h d, or of an RMSNorm d
    k_norm: Tensor | None  # hk d, or of an RMSNorm d
    keys: Tensor  # b hk capacity d
    values: Tensor
    qkv_bias: Tensor | None = None  # (q k v)
    ff_norm: Tensor | None = None  # e; of a serial block, as the next
    ff_proj: Tensor | None = None  # (gate value) e
    q_down: Tensor | None = None  # i r; the adapters of LoRA, in the order of `Target` of `csrc/decode.c`
    k_down: Tensor | None = None
    v_down: Tensor | None = None
    out_down: Tensor | None = None
    gate_down: Tensor | None = None
    value_down: Tensor | None = None
    ff_out_down: Tensor | None = None
    q_up: Tensor | None = None  # r o
    k_up: Tensor | None = None
    v_up: Tensor | None = None
    out_up: Tensor | None = None
    gate_up: Tensor | None = None
    value_up: Tensor | None = None
    ff_out_up: Tensor | None = None

    @property
    def ranks(self) -> set[int]:
        """The ranks of the adapters."""
        return {t.shape[1] for name, t in self._asdict().items() if name.endswith("_down") and t is not None}


class _Shape(ctypes.Structure):
    """`Shape` of `csrc/decode.c`."""

    _fields_ = [
        *((name, c_long) for name in ("depth", "dim", "heads", "kv_heads", "dim_head", "inner")),
        *((name, c_long) for name in ("batch", "capacity", "table_rows", "table_heads", "rank", "rms")),
        ("eps", c_double),
        ("adapter_scale", c_double),
        ("rank_factors", c_void_p),
    ]


class _Layer(ctypes.Structure):
    """`Layer` of `csrc/decode.c`, which has the fields of `BlockTensors` in their order."""

    _fields_ = [(name, c_void_p) for name in BlockTensors._fields]


def _places(blocks: list[BlockTensors]) -> list[tuple]:
    """Return the address of every tensor, and for those that the kernel copies a count of their changes.

    A tensor of another dtype than the cache is copied, so that a change of it must be noticed. `_version` is the count
    by which autograd notices changes in place; PyTorch has no public name for it.
    """
    dtype = blocks[0].keys.dtype
    return [
        (t.data_ptr(), t.dtype, t.shape, 0 if t.dtype == dtype or t.is_inference() else t._version)
        for block in blocks
        for t in block
        if t is not None
    ]


def is_faster(num_rows: int, dtype: torch.dtype) -> bool:
    """Return whether the kernel is faster than one block after the other; never for a dtype that it does not know."""
    most = MAX_ROWS_WITH_AMX if dtype == torch.bfloat16 and has_amx() else MAX_ROWS
    return num_rows <= most and dtype in DTYPES


def why_not(
    blocks: list[BlockTensors], dtype: torch.dtype, cache_shape: tuple[int, int, int], cache_dtype: torch.dtype
) -> str | None:
    """Return why the kernel cannot compute with these blocks, or None if it can.

    Args:
        blocks: the tensors of each block.
        dtype: the dtype that all weights must have.
        cache_shape: `b hk d`, the sizes that all keys and values must have.
        cache_dtype: the dtype that all keys and values must have.
    """
    caches = [t for block in blocks for t in (block.keys, block.values)]
    named = [item for block in blocks for item in block._asdict().items()]
    weights = [t for name, t in named if t is not None and name not in ("keys", "values")]
    ranks = set().union(*(block.ranks for block in blocks))
    if not all(t.is_contiguous() for t in (*weights, *caches)):
        return "a tensor is not contiguous"
    if {t.dtype for t in weights} != {dtype}:
        return "a weight has another dtype than the model"
    if {(*t.shape[:2], t.shape[3], t.dtype) for t in caches} != {(*cache_shape, cache_dtype)}:
        return "a part of the cache has another shape or dtype than expected"
    return None if len(ranks) <= 1 else "the adapters have different ranks"


class NativeDecoder:
    """The kernel together with the tensors of given blocks, which it keeps alive; it takes one token per row.

    The kernel reads the tensors in place, except for weights of another dtype than the cache, which are converted once.
    """

    def __init__(self, blocks: list[BlockTensors], heads: int, eps: float, adapter_scale: float, *, rms: bool):
        first = blocks[0]
        batch, kv_heads, capacity, dim_head = first.keys.shape
        dim, inner = first.ff_out.shape
        rank = max((rank for block in blocks for rank in block.ranks), default=0)
        self.places, dtype = _places(blocks), first.keys.dtype
        self.blocks = [BlockTensors._make(t if t is None else t.to(dtype) for t in block) for block in blocks]
        pointers = [_Layer(*(None if t is None else t.data_ptr() for t in block)) for block in self.blocks]
        self.layers = (_Layer * len(blocks))(*pointers)
        self.shape = _Shape(len(blocks), dim, heads, kv_heads, dim_head, inner, batch, capacity)
        self.shape.rank, self.shape.eps, self.shape.adapter_scale, self.shape.rms = rank, eps, adapter_scale, rms
        self.function = getattr(library(), f"decode_{DTYPES[dtype]}")
        self.function.restype = None
        self.function.argtypes = [*(c_void_p,) * 8, c_int]
        self.dtype = torch.promote_types(dtype, torch.float32)
        self._allocate_scratch(num_threads())

    def _allocate_scratch(self, threads: int) -> None:
        scratch_numbers = library().decode_scratch
        scratch_numbers.restype = c_long
        size = scratch_numbers(ctypes.byref(self.shape), c_int(threads))
        self.scratch, self.threads = torch.empty(size, dtype=self.dtype, device="cpu"), threads

    def reads(self, blocks: list[BlockTensors], adapter_scales: set[float]) -> bool:
        """Return whether the kernel still reads these blocks: weights and caches may have moved or changed dtype."""
        return _places(blocks) == self.places and adapter_scales == {self.shape.adapter_scale}

    def __reduce__(self):
        return type(None), ()  # a copy of a cache starts without a kernel, whose addresses are those of the original

    def step(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        first: Tensor,
        lengths: Tensor,
        rank_factors: Tensor | None = None,
    ) -> Tensor:
        """Take the next token of each row through the blocks, and write its keys and values to the cache.

        Args:
            x: `b 1 e`, the embeddings of the tokens.
            tables: cosines and sines, `b|1 (h + hk)|1 1 d`, float32 or wider.
            first: `b`, int64, the first position of the cache that the row sees, after its padding.
            lengths: `b`, int64, how many positions of the cache are in use.
            rank_factors: `b 1 r`, factors of the low-rank units of the adapters for each row; None is 1.

        Returns:
            `b 1 e`.
        """
        threads = num_threads()
        if threads > self.threads:  # `threads.adapt` changes their number with the load of the machine
            self._allocate_scratch(threads)
        cos, sin = (table.contiguous() for table in tables)
        wide = x.to(self.dtype, copy=True, memory_format=torch.contiguous_format)
        self.shape.table_rows, self.shape.table_heads = cos.shape[:2]
        factors = None if rank_factors is None else rank_factors.to(self.dtype).contiguous()
        self.shape.rank_factors = None if factors is None else factors.data_ptr()
        pointers = [t.data_ptr() for t in (cos, sin, first, lengths, wide, self.scratch)]
        self.function(ctypes.byref(self.shape), self.layers, *pointers, threads)
        return wide.to(x.dtype)
