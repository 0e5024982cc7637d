"""What the compiler makes of every kernel, in its default configurations, for GPUs that need not be there.

python benchmarks/kernels_static.py           # exits with 1 where a kernel fails the gate
python benchmarks/kernels_static.py --record  # keeps today's counts of instructions in kernels_static.json

Numbers are bfloat16, attention is causal, 8 query heads share a key head. Nothing here is a measured speed.
"""

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import tyro

try:
    import triton
except ImportError:
    sys.exit("kernels_static.py: it needs Triton, to compile the kernels: pip install 'palm-rlhf[triton]'")
from aot import ARCHITECTURES, Compiled, Launch, build, record
from machine_code import MULTIPROCESSORS, Report, analyse, model_tflops

from palm_rlhf.ops.triton.attention_backward import backward
from palm_rlhf.ops.triton.attention_decode import decode
from palm_rlhf.ops.triton.attention_forward import forward
from palm_rlhf.ops.triton.fused_cross_entropy import linear_cross_entropy_triton
from palm_rlhf.ops.triton.fused_logprobs import linear_logprobs_triton
from palm_rlhf.ops.triton.fused_rotary import rotary_split_triton
from palm_rlhf.ops.triton.fused_swiglu import swiglu_triton

FIGURES = Path(__file__).with_suffix(".json")
VERSION = ".".join(triton.__version__.split(".")[:2])
TOLERANCE = 0.05  # of the recorded count of instructions
MATRIX_INSTRUCTIONS = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
FEWEST_ROWS = 64  # that the instructions of sm_90 and sm_100 multiply; fewer go to the HMMA of old
COLUMNS = "kernel arch config registers programs spills mma copies instructions shared model_tflops gate".split()


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Leaves in bfloat16, of which only the form matters."""
    return [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def attend(dim: int, with_key_mask: bool = False, with_documents: bool = False) -> None:
    """Attention, forward and backward, and a decoded token."""
    q, k = (torch.empty(2, heads, 8192, dim, dtype=torch.bfloat16, device="meta") for heads in (16, 2))
    key_mask = torch.empty(2, 8192, dtype=torch.bool, device="meta") if with_key_mask else None
    ids = torch.empty(2, 8192, dtype=torch.long, device="meta") if with_documents else None
    out, lse = forward(q, k, k, True, key_mask, ids)
    backward(out, q, k, k, out, lse, True, key_mask, ids)
    decode(q[:, :, -1:], k, k, True, key_mask)


def cross_entropy() -> None:
    """The output layer with its loss, forward and backward."""
    x, weight = tensors((128, 64), (16384, 64))
    targets, counts = torch.zeros(128, dtype=torch.long), torch.ones(128)
    linear_cross_entropy_triton(x, weight, targets, counts, 1.0, 1e-4, torch.bfloat16).backward()


def logprobs() -> None:
    """The output layer with log-probabilities and entropies, forward and backward."""
    x, weight = tensors((128, 64), (16384, 64))
    said, entropy = linear_logprobs_triton(x, weight, torch.zeros(128, dtype=torch.long), 1.0, torch.bfloat16, True)
    (said + entropy).sum().backward()


def swiglu() -> None:
    """SwiGLU of the halves of a projection, forward and backward."""
    (projected,) = tensors((256, 2 * 2048))
    swiglu_triton(*projected.chunk(2, dim=-1)).sum().backward()


def rotary() -> None:
    """The split of a projection into rotated queries and keys, forward and backward."""
    (qkv,), angles = tensors((2, 256, 20, 64)), torch.zeros(1, 256, 1, 64)
    sum(t.sum() for t in rotary_split_triton(qkv, angles, angles, heads=16, kv_heads=2)).backward()


OPERATIONS: dict[str, Callable[[], None]] = {
    **{f"attention d{dim}": partial(attend, dim) for dim in (64, 128, 256)},
    **{f"masked attention d{dim}": partial(attend, dim, True, True) for dim in (64, 128)},
    "cross_entropy": cross_entropy,
    "logprobs": logprobs,
    "swiglu": swiglu,
    "rotary": rotary,
}


def name_of(operation: str, launch: Launch) -> str:
    """`attention d64 forward`; of a launch for one of two gradients also which: `attention d256 keys backward d_k`."""
    gradients = [name for name in ("D_K", "D_V") if launch.arguments.get(name)]
    one = gradients[0].lower() if len(gradients) == 1 else ""
    return f"{operation} {launch.kernel.__name__.removesuffix('_kernel').replace('_', ' ')} {one}".strip()


def config_of(compiled: Compiled) -> str:
    """Rows x columns of a tile, warps and stages."""
    tile = "x".join(str(compiled.constants[name]) for name in ("BLOCK_M", "BLOCK_N") if name in compiled.constants)
    return f"{tile} w{compiled.metadata['num_warps']} s{compiled.metadata['num_stages']}".strip()


def launches_of(operation: str, arch: str) -> dict[str, Launch]:
    """The launches of an operation by name, each once; of a masked one, those that a mask changes."""
    launches = record(OPERATIONS[operation], arch)
    if operation.startswith("masked"):
        launches = [launch for launch in launches if "key_mask_ptr" in launch.arguments]
    return {name_of(operation, launch): launch for launch in launches}


def failures(report: Report, arch: str, recorded: int | None) -> list[str]:
    """Why a kernel is refused; without a recorded count of instructions, that is not judged."""
    found, counts = [], report.counts
    if counts["spills"]:
        found.append(f"{counts['spills']} spills in the hot loop")
    if report.shared > MULTIPROCESSORS[arch].shared:
        found.append(f"{report.shared >> 10} KB shared, above {MULTIPROCESSORS[arch].shared >> 10}")
    if report.products:
        few = arch.startswith("sm") and min(rows for rows, _, _ in report.products) < FEWEST_ROWS
        expected = "HMMA" if few else MATRIX_INSTRUCTIONS[arch]
        if report.matrix != expected:
            found.append(f"matrix instructions are {report.matrix or 'absent'}, not {expected}")
        if arch.startswith("sm") and not counts["copies"]:
            found.append("no asynchronous copies")
    if recorded is not None and abs(report.instructions / recorded - 1) > TOLERANCE:
        found.append(f"{report.instructions} instructions, {recorded} recorded")
    return found


def row(name: str, arch: str, compiled: Compiled, recorded: int | None) -> dict[str, object]:
    """A line of the table; registers are of a thread, programs of a multiprocessor, counts of the hot loop."""
    report = analyse(compiled)
    tflops = model_tflops(report, arch)
    return {
        "kernel": name,
        "arch": arch,
        "config": config_of(compiled),
        "registers": report.registers,
        "programs": report.programs,
        "spills": report.counts["spills"],
        "mma": report.matrix,
        "copies": report.counts["copies"],
        "instructions": report.instructions,
        "shared": report.shared,
        "model_tflops": None if tflops is None else round(tflops),
        "gate": "; ".join(failures(report, arch, recorded)) or "passed",
    }


def examine(operation: str, arch: str, name: str, recorded: int | None) -> dict[str, object]:
    """Compile and judge one kernel."""
    return row(name, arch, build(launches_of(operation, arch)[name], arch), recorded)


def table(rows: list[dict[str, object]]) -> str:
    """The rows as a table in Markdown."""
    cells = [[("" if line[column] is None else str(line[column])) for column in COLUMNS] for line in rows]
    widths = [max(map(len, column)) for column in zip(COLUMNS, *cells, strict=True)]
    lines = [COLUMNS, ["-" * width for width in widths], *cells]
    aligned = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def figures() -> dict[str, dict[str, int]]:
    """The recorded counts of instructions, by version of Triton and by kernel and architecture."""
    return json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else {}


def keep_figures(rows: list[dict[str, object]]) -> None:
    """Record the counts of instructions of these rows."""
    counts = {f"{line['kernel']} {line['arch']}": line["instructions"] for line in rows}
    known = figures()
    merged = {**known, VERSION: dict(sorted({**known.get(VERSION, {}), **counts}.items()))}
    unfinished = FIGURES.with_suffix(".tmp")
    unfinished.write_text(json.dumps(dict(sorted(merged.items())), indent=1) + "\n", encoding="utf-8")
    unfinished.replace(FIGURES)


def main(
    archs: tuple[str, ...] = ARCHITECTURES,
    operations: tuple[str, ...] = tuple(OPERATIONS),
    processes: int = 2,
    record: bool = False,
) -> None:
    """Print the table of all kernels and a last line of JSON.

    Args:
        archs: Architectures to compile for.
        operations: Operations whose kernels are compiled.
        processes: How many compile side by side.
        record: Keep the counts of instructions, which the gate then compares with.
    """
    recorded = {} if record else figures().get(VERSION, {})
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = [
            pool.submit(examine, operation, arch, name, recorded.get(f"{name} {arch}"))
            for operation in operations
            for arch in archs
            for name in launches_of(operation, arch)
        ]
        rows = sorted((job.result() for job in pending), key=lambda line: line["kernel"])
    if record:
        keep_figures(rows)
    if VERSION not in figures():
        print(f"no counts of instructions are recorded for Triton {VERSION}, so they are not judged; see --record")
    print(f"Triton {triton.__version__}\n\n{table(rows)}\n")
    print(json.dumps(rows))
    sys.exit(any(line["gate"] != "passed" for line in rows))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tyro.cli(main)
