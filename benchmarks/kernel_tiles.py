"""Tiles of the attention kernels, chosen by measurement: which are the fastest on this GPU, as entries of the tables.

python benchmarks/kernel_tiles.py                                    # on a GPU, in about four minutes
TRITON_INTERPRET=1 python benchmarks/kernel_tiles.py --device cpu    # in Triton's interpreter: whether it runs

All candidates are compiled first, side by side. Each is then held against the definition in float64, and timed if it
is right. Ends with the entries for `palm_rlhf/ops/triton/attention_*.py`, and a line of JSON.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from types import ModuleType
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
import tyro

try:
    import triton
except ImportError:
    sys.exit("kernel_tiles.py: it needs Triton, to run the kernels: pip install 'palm-rlhf[triton]'")
from attention_work import TOLERANCE, Work, exact
from side_by_side import surroundings

from palm_rlhf.ops.triton import attention_backward, attention_decode, attention_forward, attention_keys_backward
from palm_rlhf.ops.triton.attention_backward import backward
from palm_rlhf.ops.triton.attention_decode import decode
from palm_rlhf.ops.triton.attention_forward import forward
from palm_rlhf.ops.triton.tiles import Tile, Tiles, architecture

NO_GPU = 3
GAIN = 0.02  # of the time, from which on calls with a mask get a tile of their own


class Table(NamedTuple):
    """Where the launcher of a kernel looks up its tile, by architecture; a second table has exceptions under masks."""

    module: ModuleType
    name: str
    masked_name: str = ""

    @property
    def tiles(self) -> Tiles:
        """The tiles of calls without a mask, and of those with one that are no exception."""
        return getattr(self.module, self.name)

    @property
    def masked(self) -> Tiles:
        """The exceptions."""
        return getattr(self.module, self.masked_name) if self.masked_name else {}


TABLES = {
    "forward": Table(attention_forward, "TILES", "MASKED_TILES"),
    "keys": Table(attention_keys_backward, "KEY_TILES", "MASKED_KEY_TILES"),
    "queries": Table(attention_backward, "QUERY_TILES"),
    "decode": Table(attention_decode, "TILES"),
}
# Rows x columns, warps, stages. The tile of today is always tried too.
CANDIDATES = {
    ("forward", 64): ["64x64 4 3", "64x64 4 4", "128x64 4 3", "128x64 8 3", "128x128 8 3", "64x128 4 3", "128x128 4 2"],
    ("forward", 128): ["128x128 8 3", "128x128 8 2", "128x64 8 3", "128x64 8 4", "64x64 4 3", "64x128 4 2"],
    ("forward", 256): ["128x64 8 2", "128x32 8 3", "64x64 4 2", "64x32 4 3", "128x32 8 4", "64x64 8 2"],
    ("keys", 64): ["64x64 4 3", "128x64 4 2", "64x128 8 3", "128x128 8 2", "64x64 4 2", "32x128 8 3"],
    ("keys", 128): ["64x128 8 3", "64x128 8 2", "64x64 4 2", "64x64 4 3", "32x128 8 3", "32x64 4 3"],
    ("keys", 256): ["32x128 8 2", "64x64 4 2", "64x128 8 1", "32x64 4 3", "32x64 8 3", "64x64 8 2"],
    ("queries", 64): ["64x64 4 3", "128x64 4 3", "128x64 8 3", "128x128 8 3", "64x64 4 2", "64x128 4 2"],
    ("queries", 128): ["128x64 8 3", "128x64 8 2", "64x64 4 3", "64x64 4 2", "128x128 8 2", "64x32 4 3"],
    ("queries", 256): ["128x32 8 3", "128x32 8 2", "64x64 4 2", "128x64 8 1", "64x32 4 3", "64x32 8 2"],
    ("decode", 64): ["16x64 4 3", "16x64 4 4", "16x128 4 2", "16x128 4 3", "16x64 2 3", "16x32 2 4"],
    ("decode", 128): ["16x64 4 3", "16x64 4 4", "16x128 4 2", "16x128 8 3", "16x32 2 4", "16x64 2 3"],
    ("decode", 256): ["16x32 4 3", "16x64 4 2", "16x64 4 3", "16x64 8 2", "16x32 4 4", "16x16 2 4"],
}


class Job(NamedTuple):
    """A tile for a kernel, for calls with 8 documents in a row (decoding: with padding at the left) or without."""

    kernel: str
    dim: int
    masked: bool
    tile: Tile


class Size(NamedTuple):
    """Of the tensors: decoding has `decode_batch` rows with one new token each, training `batch` whole sequences."""

    batch: int
    decode_batch: int
    length: int
    heads: int
    kv_heads: int


SIZES = {"cuda": Size(2, 64, 8192, 16, 4), "cpu": Size(1, 2, 96, 2, 1)}
CHECKED = {
    "cuda": 1024,
    "cpu": 96,
}  # the length at which results are held against float64; multiples of 16 compile alike
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float16}  # the interpreter has no bfloat16 arithmetic


def jobs(kernels: tuple[str, ...], dims: tuple[int, ...], arch: str, limit: int) -> list[Job]:
    """All tiles to try, of each kernel first the one of today and then `limit` others; dimension by dimension."""
    found = []
    for dim in dims:
        for kernel in kernels:
            table = TABLES[kernel]
            for masked in (False, True):
                today = (table.tiles[arch] | (table.masked.get(arch, {}) if masked else {}))[dim]
                others = [Tile(*map(int, text.replace("x", " ").split())) for text in CANDIDATES[kernel, dim]]
                tiles = dict.fromkeys((today, *others))
                found += [Job(kernel, dim, masked, tile) for tile in list(tiles)[: limit + 1]]
    return found


@contextmanager
def using(job: Job, arch: str) -> Iterator[None]:
    """Launch the kernel of a job with its tile, within the context."""
    table = TABLES[job.kernel]
    with ExitStack() as stack:
        stack.enter_context(patch.dict(table.tiles[arch], {job.dim: job.tile}))
        if job.masked and arch in table.masked:
            stack.enter_context(patch.dict(table.masked[arch], {job.dim: job.tile}))
        yield


def masks_of(job: Job, work: Work) -> dict[str, torch.Tensor]:
    """Options of the calls of a job."""
    positions = torch.arange(work.num_keys, device=work.device).expand(work.batch, -1)
    if not job.masked:
        return {}
    if job.kernel == "decode":
        return {"key_mask": (positions >= work.num_keys // 8).contiguous()}
    return {"document_ids": (positions * 8 // work.num_keys).contiguous()}


def work_of(job: Job, size: Size, length: int, device: str) -> Work:
    """The tensors of a job."""
    batch, queries = (size.decode_batch, 1) if job.kernel == "decode" else (size.batch, length)
    return Work(batch, size.heads, size.kv_heads, queries, length, job.dim, DTYPES[device], device)


def step_of(job: Job, work: Work) -> tuple[Callable[[], tuple[torch.Tensor, ...]], list[torch.Tensor], dict]:
    """The launches of a job, with the tensors and masks that they work on; of the backward without its forward."""
    tensors, options = work.tensors(), masks_of(job, work)
    q, k, v, d_out = (t.detach() for t in tensors)
    masks = options.get("key_mask"), options.get("document_ids")
    if job.kernel == "decode":
        return lambda: (decode(q, k, v, True, masks[0]),), tensors, options
    if job.kernel == "forward":
        return lambda: (forward(q, k, v, True, *masks)[0],), tensors, options
    out, lse = forward(q, k, v, True, *masks)
    return lambda: backward(d_out, q, k, v, out, lse, True, *masks), tensors, options


def is_right(job: Job, size: Size, device: str) -> bool:
    """Whether the results are those of the definition in float64, within what their type allows."""
    run, tensors, options = step_of(job, work_of(job, size, CHECKED[device], device))
    truth = exact(tensors, causal=True, **options)
    got = run()
    return agree(got, truth[:1] if len(got) == 1 else truth[1:])


def agree(got: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> bool:
    """Whether results differ from the truth by no more than their type allows."""
    for ours, exactly in zip(got, truth, strict=True):
        allowed = TOLERANCE[ours.dtype] * exactly.abs().max().clamp(min=0.1)
        if not (ours.double() - exactly).abs().max() <= allowed:  # a NaN is none of these
            return False
    return True


def attempt(job: Job, size: Size, device: str, timed: bool) -> tuple[float, str]:
    """Milliseconds of a job, and why it has none: compiler or GPU refuse it, or its results are wrong."""
    arch = architecture(torch.device(device))
    try:
        with using(job, arch):
            if not is_right(job, size, device):
                return float("inf"), "wrong results"
            if not timed:
                return float("inf"), ""
            run, *_ = step_of(job, work_of(job, size, size.length, device))
            return milliseconds(run, device), ""
    except Exception as error:  # of many kinds: of the compiler, its assembler, and the driver
        return float("inf"), f"{type(error).__name__}: {error}".splitlines()[0][:80]


def milliseconds(run: Callable[[], object], device: str) -> float:
    """The median time of a step."""
    if device == "cuda":
        return triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds) * 1e3


def compile_all(todo: list[Job], size: Size, processes: int, seconds: float) -> list[Job]:
    """Run each job once, side by side, so that Triton's cache holds the kernels; return the jobs that were in time."""
    done = []
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    pending = {pool.submit(attempt, job, size, "cuda", False): job for job in todo}
    try:
        for finished in as_completed(pending, timeout=seconds):
            done.append(pending[finished])
    except TimeoutError:
        print(f"{len(todo) - len(done)} tiles were not compiled in {seconds:.0f} s, and are left out")
    pool.shutdown(wait=False, cancel_futures=True)
    return [job for job in todo if job in done]


def entries(times: dict[Job, float], arch: str) -> dict[str, dict[int, Tile]]:
    """The fastest tiles by table and dimension; under masks only where that gains more than noise."""
    found: dict[str, dict[int, Tile]] = {}
    for kernel, dim in dict.fromkeys((job.kernel, job.dim) for job in times):
        plain, masked = (
            {job.tile: t for job, t in times.items() if job[:3] == (kernel, dim, m) and t < float("inf")}
            for m in (False, True)
        )
        if not plain:
            continue
        table, best = TABLES[kernel], min(plain, key=plain.__getitem__)
        file = table.module.__name__.split(".")[-1]
        found.setdefault(f"{file}.{table.name}", {})[dim] = best
        if masked and table.masked_name:
            own = min(masked, key=masked.__getitem__)
            if masked[own] < (1 - GAIN) * masked.get(best, float("inf")):
                found.setdefault(f"{file}.{table.masked_name}", {})[dim] = own
    return found


def main(
    device: Literal["cuda", "cpu"] = "cuda",
    kernels: tuple[str, ...] = tuple(TABLES),
    dims: tuple[int, ...] = (64, 128, 256),
    candidates: int = 6,
    seconds: float = 230,
    processes: int = os.cpu_count() or 1,
) -> None:
    """Measure tiles of the attention kernels, and print the fastest.

    Args:
        device: Where; on a CPU in Triton's interpreter, at small sizes.
        kernels: Of forward, keys, queries and decode.
        dims: Of a head, at which the tables have entries.
        candidates: How many tiles to try beside the one of today, for each kernel, dimension and kind of call.
        seconds: How long it may take; half of it at most to compile. What is not done by then is left out.
        processes: How many compile side by side, on a GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none, so nothing was measured; --device cpu tries the script")
        sys.exit(NO_GPU)
    started, arch, size = time.monotonic(), architecture(torch.device(device)), SIZES[device]
    todo = jobs(kernels, dims, arch, candidates)
    if device == "cuda":
        todo = compile_all(todo, size, processes, seconds / 2)
    times: dict[Job, float] = {}
    for job in todo:
        if time.monotonic() - started > seconds:
            print(f"time is up: {len(todo) - len(times)} tiles were not measured")
            break
        times[job], reason = attempt(job, size, device, True)
        kind = "masked" if job.masked else "plain"
        tile = "x".join(map(str, job.tile))
        print(f"{job.kernel:8} d{job.dim:<4}{kind:7}{tile:12}{times[job]:10.3f} ms  {reason}".rstrip(), flush=True)
    found = entries(times, arch)
    print()
    for name, by_dim in found.items():
        tiles = ", ".join(f"{dim}: Tile{tuple(tile)}" for dim, tile in by_dim.items())
        print(f'{name}: "{arch}": {{{tiles}}}')
    measured = [[*job[:3], list(job.tile), t] for job, t in times.items() if t < float("inf")]
    print(json.dumps({"arch": arch, "entries": found, "milliseconds": measured, **surroundings("triton")}))
    sys.exit(not measured)


if __name__ == "__main__":
    tyro.cli(main)
