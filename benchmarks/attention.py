"""Attention: the fused kernels beside PyTorch's and the eager definition, forward, backward, both, and decoding.

python benchmarks/attention.py                # on a GPU n from 1k to 16k; on a CPU what runs there, on a smaller grid
python benchmarks/attention.py --write-table  # measures which implementation is fastest where, for `auto` to take

Ends with a line of JSON, and draws the speeds.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attention_table
import torch
import tyro
from attention_work import Work, errors, exact, gradients, implementation, largest, peak_on_gpu
from side_by_side import alternate, speedup, summary, surroundings

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
IMPLEMENTATIONS = ("triton", "fused", "eager") if GPU else ("chunked", "fused", "eager")
LENGTHS = (1024, 2048, 4096, 8192, 16384) if GPU else (256, 512, 1024)
TOKENS = 16384 if GPU else 1024  # of a batch, whatever its length
MAX_EAGER = 4096**2  # pairs of a query and a key, which it holds in memory
DIRECTIONS = ("forward", "backward", "both", "decode")


def work(direction: str, length: int, dim: int, heads: int, kv_heads: int) -> Work:
    """A batch of as many tokens for every length; of decoding, one new token each."""
    dtype = torch.bfloat16 if GPU else torch.float32
    queries = 1 if direction == "decode" else length
    return Work(max(1, TOKENS // length), heads, kv_heads, queries, length, dim, dtype, DEVICE)


def make_step(name: str, work: Work, direction: str) -> Callable[[], object]:
    """One pass in a direction: `backward` repeats the gradients of a forward made before."""
    function, tensors = implementation(name), work.tensors()
    *inputs, d_out = tensors
    if direction in ("forward", "decode"):

        def step() -> torch.Tensor:
            with torch.no_grad():
                return function(*inputs, causal=True)

        return step
    if direction == "both":
        return lambda: gradients(function, tensors, causal=True)
    out = function(*inputs, causal=True)
    return lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True)


def check_parity(dims: tuple[int, ...], heads: int, kv_heads: int) -> None:
    """Raise AssertionError unless all have the results and gradients of the definition in float64."""
    for dim in dims:
        tensors = work("both", LENGTHS[0], dim, heads, kv_heads)._replace(batch=1).tensors()
        truth = exact(tensors, causal=True)
        for name in IMPLEMENTATIONS:
            found = errors(gradients(implementation(name), tensors, causal=True), truth)
            # Others round their gradients more than once.
            assert largest(found.values()) <= (1 if name in ("triton", "eager") else 4), f"{name}, d {dim}: {found}"
    print(f"parity: results and gradients of {', '.join(IMPLEMENTATIONS)} agree with float64")


def peak_megabytes(name: str, work: Work, direction: str) -> int:
    """What a pass needs beyond its inputs; on a CPU in a process of its own."""
    if not GPU:
        code = (
            "import resource, torch, attention\n"
            "from attention_work import Work\n"
            f"step = attention.make_step({name!r}, Work(*{tuple(work[:-2])}, {work.dtype}, 'cpu'), {direction!r})\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "step()\n"
            "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1])
    return peak_on_gpu(make_step(name, work, direction))


def repeat(step: Callable[[], object], times: int) -> Callable[[], None]:
    """Calls in a row, so that what is timed is not the wait for one of them."""

    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def measure(work: Work, direction: str, rounds: int, memory: bool) -> list[dict[str, object]]:
    """A line for each implementation: time of a pass, speed, memory, and how many times as fast the first one is."""
    names = [name for name in IMPLEMENTATIONS if name != "eager" or work.num_queries * work.num_keys <= MAX_EAGER]
    times = (100 if direction == "decode" else 5) if GPU else 1
    steps = {name: repeat(make_step(name, work, direction), times) for name in names}
    seconds = {name: [s / times for s in values] for name, values in alternate(steps, rounds=rounds).items()}
    del steps
    lines = []
    for name in names:
        times_of = summary(seconds[name])
        lines.append(
            {
                "implementation": name,
                "direction": direction,
                "n": work.num_keys,
                "d": work.dim,
                "batch": work.batch,
                "seconds": times_of,
                "tflops": work.flops(direction) / times_of["median"] / 1e12,
                "gb_per_second": work.moved(direction) / times_of["median"] / 1e9,
                "peak_megabytes": peak_megabytes(name, work, direction) if memory else None,
                "first_is_faster": speedup(seconds[names[0]], seconds[name]),
            }
        )
    return lines


def table(lines: list[dict[str, object]]) -> str:
    """The lines as text."""
    rows = [f"{'':34}{'ms':>9}{'p20':>9}{'p80':>9}{'TFLOP/s':>10}{'GB/s':>9}{'peak MB':>9}{'ratio':>8}"]
    for line in lines:
        seconds = (f"{line['seconds'][key] * 1e3:9.3f}" for key in ("median", "p20", "p80"))
        name = f"{line['direction']:9} n {line['n']:5} d {line['d']:3} {line['implementation']}"
        memory = "" if line["peak_megabytes"] is None else line["peak_megabytes"]
        rates = f"{line['tflops']:10.3f}{line['gb_per_second']:9.1f}{memory:>9}"
        rows.append(f"{name:34}{''.join(seconds)}{rates}{line['first_is_faster']['median']:8.2f}")
    return "\n".join(rows)


def draw(lines: list[dict[str, object]], device: str, path: Path) -> None:
    """Speed by length: a row of panels for each d, a column for each direction."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"the plot needs matplotlib ({error}): pip install palm-rlhf[plot], or --plot None"
        ) from error
    dims = sorted({line["d"] for line in lines})
    figure = Figure(figsize=(4 * len(DIRECTIONS), 3 * len(dims)), layout="constrained")
    panels = figure.subplots(len(dims), len(DIRECTIONS), squeeze=False)
    for dim, row in zip(dims, panels, strict=True):
        for direction, panel in zip(DIRECTIONS, row, strict=True):
            unit = "gb_per_second" if direction == "decode" else "tflops"
            for name in IMPLEMENTATIONS:
                key = (name, direction, dim)
                points = [x for x in lines if (x["implementation"], x["direction"], x["d"]) == key]
                panel.plot([x["n"] for x in points], [x[unit] for x in points], marker="o", label=name)
            panel.set(title=f"{direction}, d {dim}", xlabel="n", ylabel={"tflops": "TFLOP/s"}.get(unit, "GB/s"))
            panel.set_xscale("log", base=2)
            panel.set_ylim(bottom=0)
            panel.legend()
    figure.suptitle(f"causal attention on {device}")
    figure.savefig(path)


def main(
    lengths: tuple[int, ...] = LENGTHS,
    dims: tuple[int, ...] = (64, 128),
    heads: int = 16 if GPU else 8,
    kv_heads: int = 16 if GPU else 1,
    rounds: int = 20 if GPU else 5,
    memory: bool = True,
    plot: Path | None = Path("attention.png"),
    write_table: bool = False,
    output: Path | None = None,
    budget: float = 180,
) -> None:
    """Check that all implementations agree, time them in turn, and print a table and a last line of JSON.

    With --write-table, measure instead the table of choices of this device, by which `auto` goes, and exit with 1 if
    `auto` would be over 5% slower than the best implementation in any row.

    Args:
        lengths: Tokens of a sequence.
        dims: Dimensions of a head.
        heads: Query heads.
        kv_heads: Key heads.
        rounds: Timed rounds.
        memory: Measure the peak memory of a forward and backward of the longest sequences.
        plot: Where to draw the speeds.
        write_table: Measure the table of choices of this device.
        output: With --write-table, the table to write; None is that of the package, which a CPU does not overwrite.
        budget: With --write-table, seconds after which no further row is measured.
    """
    if write_table:
        raise SystemExit(attention_table.write_table(output, budget))
    if not GPU:
        print("no GPU: the Triton kernels cannot be timed here; these are the implementations of the CPU, in float32\n")
    check_parity(dims, heads, kv_heads)
    lines = []
    for direction in DIRECTIONS:
        for dim in dims:
            for length in lengths:
                largest = memory and direction == "both" and length == max(lengths)
                lines += measure(work(direction, length, dim, heads, kv_heads), direction, rounds, largest)
    about = surroundings()
    if plot is not None:
        draw(lines, about["device"], plot)
    print(
        f"\n{heads} heads, {kv_heads} of keys, causal; ratio: times as fast {IMPLEMENTATIONS[0]} is\n\n{table(lines)}\n"
    )
    print(json.dumps({"benchmark": "attention", **about, "heads": heads, "kv_heads": kv_heads, "results": lines}))


if __name__ == "__main__":
    tyro.cli(main)
