"""Kernels compiled ahead of time, for GPUs that need not be there: what a launcher launches, and what it compiles to.

    launches = record(lambda: forward(q, k, v, True, None, None), "sm_90")    # q, k, v may be on the device "meta"
    compiled = build(launches[0], "sm_90")
    compiled.ptx, compiled.sass(), compiled.metadata["shared"]

Types, tiles and options are those of the real launch, and so is what Triton's compiler is told of the arguments: which
are divisible by 16 (without that it drops asynchronous copies), which are 1, and which are None and so no parameter.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise ImportError("TRITON_INTERPRET is set, and leaves nothing to compile; unset it for this process")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from palm_rlhf.ops.triton import tiles

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_90": 132, "sm_100": 148, "gfx942": 304}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Launch(NamedTuple):
    """One launch of a kernel: its arguments in order and by name, with the constants; options such as num_warps."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, object]
    options: dict[str, object]


class Compiled(NamedTuple):
    """What became of a launch: its constants, and Triton's results.

    `asm` holds the texts of every stage: `ttgir`, `ptx` and `cubin` for NVIDIA, `amdgcn` for AMD.
    """

    arch: str
    constants: dict[str, object]
    metadata: dict[str, object]
    asm: dict[str, str | bytes]

    @property
    def ptx(self) -> str:
        return self.asm["ptx"]

    @property
    def amdgcn(self) -> str:
        return self.asm["amdgcn"]

    def sass(self) -> str:
        """The machine code of an NVIDIA GPU, disassembled."""
        return self._inspect("nvdisasm", "--print-code")

    def resources(self) -> str:
        """Registers, stack, shared and local memory of the machine code of an NVIDIA GPU."""
        return self._inspect("cuobjdump", "--dump-resource-usage")

    def _inspect(self, tool: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.asm["cubin"])
            file.flush()
            done = subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True)
        return done.stdout


def record(run: Callable[[], object], arch: str) -> list[Launch]:
    """The launches that `run` would make on such a GPU, in order; none is executed, so the results are empty."""
    launches = []

    def note(kernel: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **named: object) -> None:
        bound = dict(zip(kernel.arg_names, args, strict=False))
        bound |= {name: value for name, value in named.items() if name in kernel.arg_names}
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        arguments = {name: bound[name] for name in kernel.arg_names}
        launches.append(Launch(kernel, grid(arguments) if callable(grid) else grid, arguments, options))

    here = patch.object(tiles, "properties", lambda device: (arch, MULTIPROCESSORS[arch]))
    with here, patch.object(JITFunction, "run", note):
        run()
    return launches


def target(arch: str) -> GPUTarget:
    """Triton's name for an architecture: `sm_90`, `gfx942`."""
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def build(launch: Launch, arch: str) -> Compiled:
    """Compile the kernel of a launch, for its arguments; results are kept in Triton's cache."""
    kernel, options = launch.kernel, {"enable_fp_fusion": True, **launch.options}
    gpu = SimpleNamespace(
        get_current_device=lambda: arch,  # by which Triton keeps what it has compiled
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target(arch),
    )
    with patch.dict(vars(driver)):
        driver.set_active(gpu)
        compiled = kernel.run(**launch.arguments, **options, grid=launch.grid, warmup=True)
    constants = {p.name: launch.arguments[p.name] for p in kernel.params if p.is_constexpr}
    return Compiled(arch, constants, compiled.metadata._asdict(), dict(compiled.asm))
