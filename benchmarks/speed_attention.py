"""Rows of `gpu_speed.py`: attention, ours beside PyTorch's, FlexAttention and flash-attn."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from attention_work import Work, error, errors, exact, gradients, implementation, largest
from side_by_side import alternate, summary
from torch import Tensor
from utilization import peak_of

Attention = Callable[..., Tensor]


class Row(NamedTuple):
    """Attention of one shape; with `documents` so many stand in each row."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    num_queries: int
    num_keys: int
    dim: int
    documents: int = 0


ROWS = {
    "cuda": [
        Row("d64 multi-head", 2, 16, 16, 8192, 8192, 64),
        Row("d64 multi-query", 2, 16, 1, 8192, 8192, 64),
        Row("d128 multi-head", 2, 16, 16, 8192, 8192, 128),
        Row("d128 multi-query", 2, 16, 1, 8192, 8192, 128),
        Row("d64 multi-query, short", 8, 16, 1, 2048, 2048, 64),
        Row("d256 multi-query", 2, 8, 1, 4096, 4096, 256),
        Row("8 documents", 1, 16, 1, 8192, 8192, 128, 8),
        Row("decoding", 64, 16, 1, 1, 2048, 64),
    ],
    "cpu": [
        Row("d16 multi-query", 1, 2, 1, 32, 32, 16),
        Row("2 documents", 1, 2, 1, 32, 32, 16, 2),
        Row("decoding", 2, 2, 1, 1, 32, 16),
    ],
}
BACKENDS = {"SDPA, cuDNN": "CUDNN_ATTENTION", "SDPA, FlashAttention-2": "FLASH_ATTENTION"}
PARITY_LENGTH = 1024  # of the sequences that are compared with float64
REPEATS = {"cuda": 5, "cpu": 1}
ROUNDS = {"cuda": 7, "cpu": 1}


def by_backend(name: str) -> Attention:
    """PyTorch's attention by one of its kernels; keys and values are repeated for kernels that take no groups."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def function(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        k, v = (t.expand(-1, q.shape[1], -1, -1) if t.shape[1] == 1 else t for t in (k, v))
        with sdpa_kernel(getattr(SDPBackend, name)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal and q.shape[2] > 1)

    return function


def flash_attn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """The package flash-attn, whose heads stand inside the tokens."""
    from flash_attn import flash_attn_func

    return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal).transpose(1, 2)


def functions_for(row: Row, device: str) -> dict[str, Attention]:
    """What computes a row, by name; `auto` is what users get."""
    names = ("auto", "triton", "fused", "flex") if device == "cuda" else ("auto", "chunked", "fused")
    shown = {"auto": "ours, auto", "triton": "ours, Triton", "fused": "SDPA", "flex": "FlexAttention"}
    found = {shown.get(name, name): implementation(name) for name in names}
    if row.documents:
        found["SDPA, with a mask"] = found.pop("SDPA")
    elif device == "cuda":
        found |= {name: by_backend(backend) for name, backend in BACKENDS.items()} | {"flash-attn": flash_attn}
    return found


def options_of(row: Row, device: str, num_keys: int) -> dict[str, Any]:
    """The masks of a row."""
    if not row.documents:
        return {"causal": True}
    ids = torch.arange(row.documents, device=device).repeat_interleave(num_keys // row.documents)
    return {"causal": True, "document_ids": ids.expand(row.batch, -1)}


def work_of(row: Row, device: str, *, longest: int | None = None) -> Work:
    """The tensors' shapes, cut to a length for a comparison with float64."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batch, num_keys = (row.batch, row.num_keys) if longest is None else (min(row.batch, 2), min(row.num_keys, longest))
    num_queries = min(row.num_queries, num_keys)
    return Work(batch, row.heads, row.kv_heads, num_queries, num_keys, row.dim, dtype, device)


def parity(function: Attention, row: Row, device: str) -> float:
    """The largest error of results and gradients, in parts of what the type allows."""
    work = work_of(row, device, longest=PARITY_LENGTH)
    options = options_of(row._replace(batch=work.batch), device, work.num_keys)
    tensors = work.tensors()
    if row.num_queries == 1:
        with torch.no_grad():
            truth = implementation("eager")(*(t.double() for t in tensors[:3]), **options)
            return error(function(*tensors[:3], **options), truth)
    return largest(errors(gradients(function, tensors, **options), exact(tensors, **options)).values())


def steps_of(function: Attention, tensors: list[Tensor], options: dict[str, Any], repeats: int) -> dict[str, Callable]:
    """Passes in a row, by direction, so that what is timed is not the wait for one of them."""
    plain = [t.detach() for t in tensors[:3]]

    def forward() -> None:
        with torch.no_grad():
            for _ in range(repeats):
                function(*plain, **options)

    def both() -> None:
        for _ in range(repeats):
            gradients(function, tensors, **options)

    return {"forward": forward} if tensors[0].shape[2] == 1 else {"forward": forward, "both": both}


def attention(device: str, number: int) -> Iterator[tuple[str, bool, dict[str, Any]]]:
    """The implementations of a row that are right, in turn; a last line says how near `auto` is to the best."""
    row, peak = ROWS[device][number], peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    work = work_of(row, device)
    options, tensors = options_of(row, device, row.num_keys), work.tensors()
    repeats = REPEATS[device] * (20 if row.num_queries == 1 and device == "cuda" else 1)
    runs: dict[str, Callable] = {}
    firsts: dict[str, float] = {}
    for name, function in functions_for(row, device).items():
        label = f"attention {row.name}, {name}"
        started = time.perf_counter()
        try:
            wrong = parity(function, row, device)
            steps = steps_of(function, tensors, options, repeats)
            for step in steps.values():
                step()
        except ImportError as missing:
            yield label, True, {"left out": f"not installed: {missing}"}
            continue
        except (RuntimeError, ValueError, NotImplementedError) as refusal:  # no kernel for this shape, type or GPU
            yield (
                label,
                name != "ours, auto",
                {"left out": f"does not run here: {' '.join(str(refusal).split())[:200]}"},
            )
            continue
        firsts[name] = time.perf_counter() - started
        allowed = 1 if name in ("ours, Triton", "chunked") else 4  # others round their gradients more than once
        if not wrong <= allowed:  # it may be NaN
            yield label, not name.startswith("ours"), {"left out": f"not right: {wrong:.1f} of what is allowed"}
            continue
        runs |= {f"{name}|{direction}": step for direction, step in steps.items()}
    seconds = alternate(runs, rounds=ROUNDS[device])
    medians: dict[str, dict[str, float]] = {}
    for key, values in seconds.items():
        name, direction = key.split("|")
        spread = summary([value / repeats for value in values])
        medians.setdefault(direction, {})[name] = spread["median"]
        flops = work.flops(direction) / (row.documents or 1)  # about: a document sees its own keys alone
        figures: dict[str, Any] = {f"us {part}": round(value * 1e6, 1) for part, value in spread.items()}
        if row.num_queries == 1:
            rate = work.moved("decode") / spread["median"]
            figures |= {"GB/s": rate / 1e9, "of bandwidth": rate / peak.bandwidth if peak else None}
        else:
            figures |= {"TFLOP/s": flops / spread["median"] / 1e12}
        yield f"attention {row.name}, {direction}, {name}", True, figures | {"first s": firsts[name]}
    for direction, found in medians.items():
        others = [value for name, value in found.items() if name != "ours, auto"]
        if "ours, auto" in found and others:
            ratio = min(others) / found["ours, auto"]
            yield f"attention {row.name}, {direction}, auto beside the best", True, {"times as fast": ratio}


def prepare(device: str, number: int) -> None:
    """Each implementation of a row once, whose compilation stays in the caches of torch.compile and Triton."""
    row = ROWS[device][number]
    options, tensors = options_of(row, device, row.num_keys), work_of(row, device).tensors()
    for function in functions_for(row, device).values():
        try:
            for step in steps_of(function, tensors, options, 1).values():
                step()
        except (ImportError, RuntimeError, ValueError, NotImplementedError):  # which the measurement reports
            continue
