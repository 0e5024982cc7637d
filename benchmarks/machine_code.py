"""What a compiler emitted for a kernel, read from its machine code: registers, the hot loop, and a bound on its speed.

The hot loop is the shortest loop with matrix instructions: of a kernel that has one loop for whole blocks and another
with a mask, the former. A kernel without such a loop is counted from end to end.
"""

import math
import re
from typing import NamedTuple

from aot import Compiled


class Multiprocessor(NamedTuple):
    """What fits into a multiprocessor, and what it does in a cycle; `peak` is of the whole device, in TFLOP/s.

    Shared memory in bytes, of one program and of all; registers of 32 bits for each lane of a warp, and how many are
    handed out at once; operations in a cycle with matrices of bfloat16, with numbers, and special functions.
    """

    shared: int
    shared_of_all: int
    registers: int
    granule: int
    warps: int
    matrix: int
    lanes: int
    special: int
    peak: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(163 << 10, 164 << 10, 2048, 8, 64, 2048, 64, 16, 312),
    "sm_90": Multiprocessor(227 << 10, 228 << 10, 2048, 8, 64, 4096, 128, 16, 989),
    "sm_100": Multiprocessor(227 << 10, 228 << 10, 2048, 8, 64, 8192, 128, 16, 2250),
    "gfx942": Multiprocessor(64 << 10, 64 << 10, 2048, 8, 32, 2048, 64, 16, 1307),
}
SCHEDULERS, TENSOR_MEMORY = 4, 512  # of a multiprocessor: instructions in a cycle; columns, on sm_100
SASS = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
AMDGCN = re.compile(r"\t([a-z]\w*)(.*)")
LABEL = re.compile(r"^(\.L\w+):")
NVIDIA = {
    "matrix": r"HG?MMA|UTC\w*MMA",
    "special": r"MUFU",
    "arithmetic": r"F(FMA|MUL|ADD)2?\b",
    "copies": r"LDGSTS|UTMALDG",
    "spills": r"LDL|STL",
}
AMD = {
    "matrix": r"V_MFMA",
    "special": r"V_(EXP|LOG|RCP|RSQ|SQRT)_",
    "arithmetic": r"V_(?!MFMA|EXP_|LOG_|RCP_|RSQ_|SQRT_)",
    "copies": r"(BUFFER|GLOBAL)_LOAD\w*_LDS",
    "spills": r"SCRATCH_",
}


class Report(NamedTuple):
    """What a compiled kernel is made of: instructions and counts are of its hot loop, of one warp or wavefront."""

    registers: int  # of a thread
    threads: int
    shared: int  # bytes
    programs: int  # of the kernel that a multiprocessor holds at once
    matrix: str  # the kind of matrix instructions
    instructions: int
    counts: dict[str, int]  # by the keys of NVIDIA and AMD
    products: list[tuple[int, int, int]]  # rows, inner, columns of the matrices of a pass through the hot loop


def analyse(compiled: Compiled) -> Report:
    """Read a compiled kernel."""
    amd = compiled.arch.startswith("gfx")
    if amd:
        code, kinds, instruction = compiled.amdgcn, AMD, AMDGCN
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1])
        threads = compiled.metadata["num_warps"] * 64
    else:
        code, kinds, instruction = compiled.sass(), NVIDIA, SASS
        registers = int(re.search(r"REG:(\d+)", compiled.resources())[1])
        threads = int(re.search(r"\.reqntid (\d+)", compiled.ptx)[1])
    hot = hot_loop(code, instruction, kinds["matrix"])
    matrix = {re.match(r"V_MFMA|\w+", name).group() for name in hot if re.match(kinds["matrix"], name)}
    return Report(
        registers=registers,
        threads=threads,
        shared=compiled.metadata["shared"],
        programs=programs_at_once(compiled, registers, threads),
        matrix=" ".join(sorted(matrix)).replace("V_", ""),
        instructions=len(hot),
        counts={kind: sum(re.match(pattern, name) is not None for name in hot) for kind, pattern in kinds.items()},
        products=products_of_loop(compiled.asm["ttir"]),
    )


def hot_loop(code: str, instruction: re.Pattern, matrix: str) -> list[str]:
    """The names of the instructions of the hot loop, in capitals: from a label to the branch back to it.

    Behind the end of a kernel stand blocks that wait for a copy, and branch back to where it is needed: no loops.
    """
    names, labels, loops = [], {}, []
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(names)
        elif found := instruction.match(line):
            names.append(found[1].upper())
            goal = re.search(r"\.L\w+", found[2])
            if re.match(r"BRA|S_C?BRANCH", names[-1]) and goal and goal[0] in labels:
                loops.append(names[labels[goal[0]] :])
    ends = {"EXIT", "S_ENDPGM"}
    loops = [loop for loop in loops if not ends & set(loop) and any(re.match(matrix, name) for name in loop)]
    return min(loops, key=len, default=names)


def products_of_loop(ttir: str) -> list[tuple[int, int, int]]:
    """The matrix products in the loop that has the fewest, from Triton's own form: rows, inner, columns of each.

    The machine code of sm_100 does not say how large the matrices are.
    """
    open_loops, products = [], {}
    for number, line in enumerate(ttir.splitlines()):
        indent = len(line) - len(line.lstrip())
        while open_loops and indent <= open_loops[-1][0]:
            open_loops.pop()
        if "scf.for" in line:
            open_loops.append((indent, number))
        elif "tt.dot" in line and open_loops:
            sizes = re.search(r": tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x", line).groups()
            products.setdefault(open_loops[-1], []).append(tuple(map(int, sizes)))
    return min(products.values(), key=flops, default=[])


def flops(products: list[tuple[int, int, int]]) -> int:
    """Multiplications and additions of matrix products."""
    return sum(2 * math.prod(sizes) for sizes in products)


def programs_at_once(compiled: Compiled, registers: int, threads: int) -> int:
    """How many programs of a kernel a multiprocessor holds."""
    hardware = MULTIPROCESSORS[compiled.arch]
    warps = threads // (64 if compiled.arch.startswith("gfx") else 32)
    held = -(-registers // hardware.granule) * hardware.granule
    limits = [hardware.registers // held // warps, hardware.warps // warps]
    if compiled.metadata["shared"]:
        reserved = 0 if compiled.arch.startswith("gfx") else 1024  # by the driver, for each program
        limits.append(hardware.shared_of_all // (compiled.metadata["shared"] + reserved))
    if columns := compiled.metadata.get("tmem_size"):
        limits.append(TENSOR_MEMORY // columns)
    return min(limits)


def model_tflops(report: Report, arch: str) -> float | None:
    """A bound on the speed of the hot loop, TFLOP/s: its matrix products, and then the slowest of all else.

    It ranks configurations of one kernel. Programs side by side hide some of that and memory may add to it, so that
    published kernels reach some 0.6 to 0.8 of it.
    """
    if not report.counts["matrix"]:
        return None
    hardware, amd = MULTIPROCESSORS[arch], arch.startswith("gfx")
    warps = report.threads // (64 if amd else 32)
    special = report.counts["special"] * report.threads / hardware.special
    arithmetic = report.counts["arithmetic"] * report.threads / hardware.lanes
    issue = report.instructions * warps / SCHEDULERS
    others = max(special + arithmetic, issue) if amd else max(special, arithmetic, issue)  # AMD's share their lanes
    matrix = flops(report.products) / hardware.matrix
    return hardware.peak * matrix / (matrix + others)
