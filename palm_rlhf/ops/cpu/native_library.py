"""Kernels in C for CPUs: compiled once by the machine's own compiler, when they are first used.

Where there is none, `refusal()` says so, and PyTorch's operations do the work. The environment variable
PALM_RLHF_NATIVE=0 leaves them out.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = (os.environ.get("CC", ""), "gcc", "cc")
# Sums are reordered where a loop says so, and nowhere else: no -ffast-math.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
SECONDS = 120  # for the compiler, which needs some
OPENMP = ("libgomp", "libiomp5", "libomp")
PROCESS = os.getpid()


def default_cache_dir() -> Path:
    """The folder `PALM_RLHF_CACHE` names, else `~/.cache/palm_rlhf`."""
    return Path(os.environ.get("PALM_RLHF_CACHE") or "~/.cache/palm_rlhf").expanduser()


def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot run."""
    return _load()[0]


def refusal() -> str | None:
    """Why the kernels cannot run on this machine, or None where they can."""
    return _load()[1]


def num_threads() -> int:
    """The threads that a kernel may use: PyTorch's, but one in a process that was forked, where the others are gone."""
    import torch

    return torch.get_num_threads() if os.getpid() == PROCESS else 1


def readable(*tensors) -> bool:
    """Whether kernels may read these by their addresses: on a CPU, the last axis dense, of no class of their own."""
    from torch import Tensor
    from torch.nn import Parameter

    return all(type(t) in (Tensor, Parameter) and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)


def has_amx() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in tiles, as PyTorch's products do then."""
    import torch

    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return _open(_compiled()), None
    except _LeftOut as error:
        logger.info("no kernels in C: %s", error)
        return None, str(error)
    except _Refused as error:
        reason = str(error)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:  # no home, text that is no text
        reason = f"{type(error).__name__}: {error}"
    logger.warning("the kernels in C cannot be used, and PyTorch's operations are slower: %s", reason)
    return None, reason


class _Refused(Exception):
    pass


class _LeftOut(_Refused):
    """Nothing is wrong: they are not wanted, or not for this system."""


def _compiled() -> Path:
    """The shared library in the cache folder, made now if it is not there."""
    if os.environ.get("PALM_RLHF_NATIVE") == "0":
        raise _LeftOut("PALM_RLHF_NATIVE is 0")
    if sys.platform != "linux":
        raise _LeftOut(f"they are compiled on Linux only, and this is {sys.platform}")
    compiler = next((path for name in COMPILERS if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise _Refused("no C compiler was found: install gcc, or name one in CC")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True)
    machine = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    sources = sorted(SOURCES.iterdir())
    made_of = (*FLAGS, machine, version.stdout, _processor(), *(path.read_text("utf-8") for path in sources))
    name = f"native-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.so"
    folder = default_cache_dir()
    if not (folder / name).exists():
        _compile([compiler, *FLAGS, machine], [path for path in sources if path.suffix == ".c"], folder, name)
    if (folder / name).stat().st_uid != os.geteuid():
        raise _Refused(f"{folder / name} belongs to another user: set PALM_RLHF_CACHE to a folder of your own")
    return folder / name


def _processor() -> str:
    """What the compiler tunes for: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))


def _compile(command: list[str], sources: list[Path], folder: Path, name: str) -> None:
    """Compile into a new file and rename it: whoever else looks sees all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    # A warning, which is shown where nobody has asked for logs: the first run here waits for it.
    logger.warning("compiling the kernels in C for this processor, once, into %s", folder / name)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [f"{scratch}/{source.stem}.o" for source in sources]
        steps = [[*command, "-c", str(source), "-o", built] for source, built in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, steps))
        # Linked without OpenMP's runtime: there shall be one, PyTorch's, whose threads are already there.
        _run([command[0], "-shared", *objects, "-lm", "-o", f"{scratch}/{name}"])
        os.replace(f"{scratch}/{name}", folder / name)


def _run(step: list[str]) -> None:
    done = subprocess.run(step, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise _Refused(f"{' '.join(step)} failed: {done.stderr.strip()[-500:]}")


def _open(path: Path) -> ctypes.CDLL:
    import torch  # noqa: F401 (it loads OpenMP's runtime)

    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if ".so" in line}
    runtime = next((found for found in sorted(loaded) if Path(found).name.startswith(OPENMP)), None)
    if runtime is None:
        raise _Refused("PyTorch runs without OpenMP here")
    ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))
