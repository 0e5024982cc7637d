"""The library of kernels in C, compiled once by the machine's own compiler, when a kernel is first used.

Where it cannot be compiled, `why_not()` says why, and PyTorch's operations do the work. The environment variable
PALM_RLHF_NATIVE=0 switches the kernels off. This module does not import torch until a kernel is used.
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
# Not -ffast-math: only the loops that are marked for it may add up in another order.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
SECONDS = 120  # the longest that one run of the compiler may take
OPENMP = ("libgomp", "libiomp5", "libomp")
PROCESS = os.getpid()


def default_cache_dir() -> Path:
    """Return the folder that `PALM_RLHF_CACHE` names, else `~/.cache/palm_rlhf`."""
    return Path(os.environ.get("PALM_RLHF_CACHE") or "~/.cache/palm_rlhf").expanduser()


def why_not() -> str | None:
    """Return why kernels in C cannot run on this machine, or None if they can."""
    return _load()[1]


def library() -> ctypes.CDLL:
    """Return the compiled kernels. Raises RuntimeError where `why_not()` returns a reason."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(f"kernels in C cannot run here: {reason}; ask why_not() first")
    return loaded


def num_threads() -> int:
    """Return how many threads a kernel may use: as many as PyTorch, but 1 in a forked process.

    A fork copies only one thread of OpenMP's pool, and a kernel that waited for the others would never end.
    """
    import torch

    return torch.get_num_threads() if os.getpid() == PROCESS else 1


def has_amx() -> bool:
    """Return whether the processor multiplies matrices of bfloat16 in tiles (AMX), which PyTorch's products use.

    PyTorch has no public name for this question; a version without the private one counts as a processor without AMX.
    """
    import torch

    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the library, or the reason why there is none."""
    try:
        return _open(_compiled()), None
    except _SwitchedOff as error:
        logger.info("no kernels in C: %s", error)
        return None, str(error)
    except _Unusable as error:
        reason = str(error)
    # also without a home folder (RuntimeError), and where the compiler writes no text (ValueError)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = f"{type(error).__name__}: {error}"
    logger.warning("the kernels in C cannot be used, and PyTorch's operations are slower: %s", reason)
    return None, reason


class _Unusable(Exception):
    """The kernels cannot be compiled or loaded, which the user is warned of."""


class _SwitchedOff(Exception):
    """The user does not want the kernels, or they are not for this system, which needs no warning."""


def _compiled() -> Path:
    """Return the shared library in the cache folder, after compiling it if it is not there."""
    if os.environ.get("PALM_RLHF_NATIVE") == "0":
        raise _SwitchedOff("PALM_RLHF_NATIVE is 0")
    if sys.platform != "linux":
        raise _SwitchedOff(f"they are compiled on Linux only, and this is {sys.platform}")
    compiler = next((path for name in COMPILERS if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise _Unusable("no C compiler was found: install gcc, or name one in CC")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True)
    machine = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    sources = sorted(SOURCES.iterdir())
    made_of = (*FLAGS, machine, version.stdout, _processor(), *(path.read_text("utf-8") for path in sources))
    name = f"native-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.so"
    folder = default_cache_dir()
    if not (folder / name).exists():
        _compile([compiler, *FLAGS, machine], [path for path in sources if path.suffix == ".c"], folder, name)
    if (folder / name).stat().st_uid != os.geteuid():
        raise _Unusable(f"{folder / name} belongs to another user: set PALM_RLHF_CACHE to a folder of your own")
    return folder / name


def _processor() -> str:
    """Describe the processor that the compiler tunes for: machines of several kinds may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kept)}))


def _compile(command: list[str], sources: list[Path], folder: Path, name: str) -> None:
    """Compile to a new file and rename it, so that other processes see a complete file or none."""
    folder.mkdir(parents=True, exist_ok=True)
    # A warning, which is shown without any logging set up: the first run on a machine waits for the compiler.
    logger.warning("compiling the kernels in C for this processor, once, into %s", folder / name)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [f"{scratch}/{source.stem}.o" for source in sources]
        steps = [[*command, "-c", str(source), "-o", built] for source, built in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(_run, steps))
        # Linked without an OpenMP runtime: the kernels use the one of PyTorch, whose threads are already running.
        _run([command[0], "-shared", *objects, "-lm", "-o", f"{scratch}/{name}"])
        os.replace(f"{scratch}/{name}", folder / name)


def _run(step: list[str]) -> None:
    done = subprocess.run(step, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise _Unusable(f"{' '.join(step)} failed: {done.stderr.strip()[-500:]}")


def _open(path: Path) -> ctypes.CDLL:
    """Load the library beside PyTorch's OpenMP runtime, whose names must be visible to it."""
    import torch  # noqa: F401 (it loads the OpenMP runtime)

    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines() if ".so" in line}
    runtime = next((found for found in sorted(loaded) if Path(found).name.startswith(OPENMP)), None)
    if runtime is None:
        raise _Unusable("PyTorch runs without OpenMP here")
    ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))
