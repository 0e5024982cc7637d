"""The table of choices that `auto` reads, measured: `python benchmarks/attention.py --write-table`.

For each kind of work on the grid, all implementations that can run are compared, timed in turn, and ranked. Of whole
sequences two times count, forward alone and forward with backward, since one choice holds for both: the best
implementation is the one whose worse ratio to the fastest is smallest.
"""

import datetime
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from attention_work import Work, gradients
from side_by_side import surroundings
from torch import Tensor

from palm_rlhf.ops.attention import attention, choose, why_not
from palm_rlhf.ops.attention_choices import (
    PACKAGED,
    ChoiceTable,
    current_table,
    generation_of,
    group_of,
    use_table,
)

MARGIN = 1.05  # by which `auto` may be slower than the best
AGREEMENT = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # in parts of the largest number
TOKENS = 16384  # of a batch of whole sequences on a GPU
MAX_CHUNKED = 2048  # keys, beyond which `chunked` is not worth its time on a GPU
UNITS = {1: "microseconds, forward", 2: "microseconds, forward and both passes"}
Step = Callable[[], object]


class Cell(NamedTuple):
    """One cell of the grid: a kind of work and its mask."""

    work: Work
    mask: str

    @property
    def pass_name(self) -> str:
        """The name of the table for it."""
        if self.work.num_queries == 1:
            return "decode"
        return "sequence" if self.work.num_queries == self.work.num_keys else "extend"

    def masks(self) -> dict[str, Tensor]:
        """Up to an eighth of padding on the left, or eight documents; of a cache, up to a half that is not filled."""
        batch, length, device = self.work.batch, self.work.num_keys, self.work.device
        columns = torch.arange(length, device=device).expand(batch, length)
        rows = torch.arange(1, batch + 1, device=device).unsqueeze(-1)
        if self.mask == "none":
            return {}
        if self.mask == "documents":
            return {"document_ids": (columns * 8 // length).contiguous()}
        if self.pass_name == "decode":
            return {"key_mask": columns < length - rows * length // (2 * batch)}
        return {"key_mask": columns >= rows * length // (8 * batch)}

    def row(self, times: dict[str, list[float]]) -> dict[str, object]:
        """The row of the table, from the seconds of each implementation."""
        work, ranking = self.work, rank(times)
        return {
            "pass": self.pass_name,
            "mask": self.mask,
            "dtype": str(work.dtype).removeprefix("torch."),
            "dim": work.dim,
            "group": group_of(work.heads, work.kv_heads),
            "batch": work.batch,
            "length": work.num_keys,
            "ranking": ranking,
            "unit": UNITS[len(times[ranking[0]])],
            "figures": {name: [round(1e6 * seconds, 1) for seconds in times[name]] for name in ranking},
            "source": "measured",
        }


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """How many times as long as the fastest each implementation takes, in its worse direction."""
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    return {name: max(t / best for t, best in zip(row, fastest, strict=True)) for name, row in times.items()}


def rank(times: dict[str, list[float]]) -> list[str]:
    """The implementations, best first."""
    worse = ratios(times)
    return sorted(times, key=worse.__getitem__)


def grid(device: str) -> Iterator[Cell]:
    """The cells that are measured, those that compile FlexAttention last."""
    if device == "cpu":
        for mask in ("none", "padding", "documents"):
            yield Cell(Work(2, 4, 1, 128, 128, 32, torch.float32, "cpu"), mask)
        for queries, mask in ((16, "none"), (1, "none"), (1, "padding")):
            yield Cell(Work(2, 4, 1, queries, 128, 32, torch.float32, "cpu"), mask)
        return

    def whole(dim: int, heads: int, kv_heads: int, length: int, dtype: torch.dtype = torch.bfloat16) -> Work:
        return Work(TOKENS // length, heads, kv_heads, length, length, dim, dtype, device)

    for batch, dim, heads, kv_heads, length in (
        *((batch, 64, 16, kv_heads, 2048) for kv_heads in (1, 16) for batch in (1, 64)),
        *((batch, 128, 16, 16, 2048) for batch in (1, 64)),
        (1, 64, 16, 1, 8192),
    ):
        for mask in ("none", "padding"):
            yield Cell(Work(batch, heads, kv_heads, 1, length, dim, torch.bfloat16, device), mask)
    for dim, kv_heads in ((64, 16), (64, 1), (128, 16), (128, 1)):
        for length in (1024, 2048, 8192):
            yield Cell(whole(dim, 16, kv_heads, length), "none")
    yield Cell(whole(64, 16, 1, 256), "none")
    yield Cell(whole(128, 16, 4, 2048), "none")
    yield Cell(whole(256, 8, 1, 2048), "none")
    yield Cell(whole(256, 8, 1, 4096), "none")
    yield Cell(whole(64, 16, 1, 2048, torch.float32), "none")
    for dim, kv_heads, mask in ((64, 1, "none"), (128, 16, "none"), (64, 1, "padding")):
        yield Cell(Work(8, 16, kv_heads, 128, 2048, dim, torch.bfloat16, device), mask)
    for dim, kv_heads, length, mask in (
        (128, 1, 8192, "documents"),
        (64, 1, 2048, "documents"),
        (64, 1, 2048, "padding"),
        (128, 16, 2048, "documents"),
        (128, 16, 2048, "padding"),
        (64, 1, 8192, "documents"),
    ):
        yield Cell(whole(dim, 16, kv_heads, length), mask)


def candidates(cell: Cell, tensors: list[Tensor]) -> Iterator[str]:
    """The implementations that can compute a cell, and are worth their time."""
    on_gpu = cell.work.device != "cpu"
    for name in ("fused", "chunked", "flex", "triton"):
        if name == "chunked" and on_gpu and (cell.mask == "none" or cell.work.num_keys > MAX_CHUNKED):
            continue
        if name == "flex" and cell.pass_name != "sequence":
            continue
        if why_not(name, *tensors[:3]) is None:
            yield name


def passes(name: str, cell: Cell, tensors: list[Tensor], masks: dict[str, Tensor]) -> list[Step]:
    """Forward, and of whole sequences, forward and backward."""

    def function(*inputs: Tensor, **options: Tensor) -> Tensor:
        return attention(*inputs, causal=True, **options, implementation=name)

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(*tensors[:3], **masks)]

    if cell.pass_name != "sequence":
        return [forward]
    return [forward, lambda: gradients(function, tensors, **masks)]


def agree(got: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether results are the same but for rounding."""
    allowed = AGREEMENT[got[0].dtype]
    return all(
        bool((a.float() - b.float()).abs().max() <= allowed * b.float().abs().max().clamp(min=0.1))
        for a, b in zip(got, expected, strict=True)
    )


def timer(step: Step, pass_name: str, device: str) -> Callable[[], float]:
    """A function that returns the seconds of one call: on a GPU those of the GPU, and of a new query in a graph."""
    if device == "cpu":

        def on_cpu() -> float:
            started = time.perf_counter()
            step()
            return time.perf_counter() - started

        return on_cpu
    calls, run = 20 if pass_name == "decode" else 5, step
    if pass_name == "decode":  # as generation runs it, without Python
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                step()
        run = graph.replay
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_gpu() -> float:
        start.record()
        for _ in range(1 if pass_name == "decode" else calls):
            run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / calls

    return on_gpu


def measure(cell: Cell, rounds: int) -> tuple[dict[str, list[float]], list[str]]:
    """The seconds of each implementation in each direction, and what went wrong."""
    tensors, masks = cell.work.tensors(), cell.masks()
    timers, problems, expected = {}, [], None
    for name in candidates(cell, tensors):
        steps = passes(name, cell, tensors, masks)
        try:
            results = [step() for step in steps]
            if expected is None:
                expected = results
            if not all(map(agree, results, expected)):
                problems.append(f"{name} disagrees with {next(iter(timers))}")
                continue
            timers[name] = [timer(step, cell.pass_name, cell.work.device) for step in steps]
        except (RuntimeError, ValueError) as error:  # out of memory, a compiler that fails
            problems.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    samples = {name: [[] for _ in directions] for name, directions in timers.items()}
    for round_ in range(rounds + 1):
        for name, directions in timers.items():
            for seconds, timed in zip(samples[name], directions, strict=True):
                taken = timed()
                if round_:
                    seconds.append(taken)
    return {name: [statistics.median(s) for s in directions] for name, directions in samples.items()}, problems


def describe(row: dict[str, object]) -> str:
    """A row as text: the work, and the figures of each implementation, best first."""
    work = f"{row['pass']:8} {row['mask']:9} {row['dtype']:8} d {row['dim']:3} {row['group']:11}"
    figures = (f"{name} {' / '.join(f'{x:.0f}' for x in row['figures'][name])}" for name in row["ranking"])
    return f"{work} batch {row['batch']:2} n {row['length']:4}: {', '.join(figures)}"


def write_table(output: Path | None, budget: float, rounds: int = 5) -> int:
    """Measure the entry of this device, write it into a table, and return 1 if `auto` is slower than the best allows.

    Args:
        output: The table to write; an entry of another device in it stays. None is the table of the package.
        budget: Seconds, after which no further cell is measured.
        rounds: Timed rounds.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and output is None:
        raise SystemExit(
            "--write-table on a CPU measures a tiny grid, and another choice changes the bits of runs that go on: "
            "give --output to write it elsewhere"
        )
    path, started = output or PACKAGED, time.perf_counter()
    generation = generation_of(torch.device(device, 0) if device == "cuda" else torch.device(device))
    measured, failed = [], False
    for cell in grid(device):
        if time.perf_counter() - started > budget:
            print(f"left out, for the time is up: {cell}")
            continue
        times, problems = measure(cell, rounds)
        failed |= any("disagrees" in problem for problem in problems)
        print(*(f"  {problem}" for problem in problems), sep="\n", end="\n" if problems else "")
        if times:
            measured.append((cell, times, cell.row(times)))
            print(describe(measured[-1][2]), flush=True)
    table = with_entry(path, generation, [row for _, _, row in measured])
    use_table(table)
    choices = []
    for cell, times, row in measured:
        tensors = cell.work.tensors()[:3]
        name = choose(*tensors, causal=True, **cell.masks())
        choices.append({"auto": name, "slower": round(ratios(times)[name], 3) if name in times else None})
        if name not in times or ratios(times)[name] > MARGIN:
            failed = True
            print(f"auto is more than 5% slower than the best: {name}, {choices[-1]['slower']}, {describe(row)}")
    close = sum(choice["slower"] is not None and choice["slower"] <= MARGIN for choice in choices)
    print(f"auto within 5% of the best in {close} of {len(choices)} rows; {time.perf_counter() - started:.0f} seconds")
    report = {"benchmark": "attention choices", **surroundings("triton"), "generation": generation}
    report |= {"failed": failed, "choices": choices, "entry": table.entries[generation]}
    try:
        part = path.with_name(f"{path.name}.part")
        part.write_text(table.to_json(), encoding="utf-8")
        part.replace(path)
        print(f"{path} has the entry {generation}")
    except OSError as error:  # the package may not be writable: the entry is in the last line as well
        print(f"not written: {error}")
    print(json.dumps(report))
    return int(failed)


def with_entry(path: Path, generation: str, rows: list[dict[str, object]]) -> ChoiceTable:
    """The table in a file, or else the present one, with a new entry for a generation, whose defaults stay."""
    table = ChoiceTable.load(path) if path.is_file() else current_table()
    about = surroundings("triton")
    entry = {
        "how": "measured" if rows else "by default",
        "card": about["device"],
        "torch": about["torch"],
        "triton": about["triton"],
        "date": datetime.date.today().isoformat(),
        "defaults": table.entries[table.entry_of(generation)]["defaults"],
        "rows": rows,
    }
    return ChoiceTable({**table.entries, generation: entry})
