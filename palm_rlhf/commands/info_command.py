"""The command ``palm-rlhf info``: versions, devices and kernels."""

import platform

import torch

from palm_rlhf import __version__
from palm_rlhf.ops.devices import available_implementations, triton_faults, triton_version, why_not_native

NO_TRITON = "not installed (GPU builds of torch include it); only the GPU kernels need it"


def devices() -> list[str]:
    """Return one line for each device that torch can use here."""
    found = [f"cpu: {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        major, minor = properties.major, properties.minor
        memory = properties.total_memory / 2**30
        found.append(f"cuda:{index}: {properties.name}, compute capability {major}.{minor}, {memory:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps: Apple GPU")
    return found


def usable(refusal: str | None) -> str:
    """Return the status of a kernel, with the reason if it is refused."""
    return "usable" if refusal is None else f"refused, {refusal}"


def attention_implementations() -> list[str]:
    """Return one line for each implementation of attention on each device type here, with its status."""
    return [
        f"{name} on {device}: {usable(reason)}"
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
        for name, reason in available_implementations(device).items()
    ]


def info() -> None:
    """Print the versions and devices in use, and which kernels and kinds of attention can run here or why not."""
    rows: dict[str, list[str]] = {
        "palm-rlhf": [__version__],
        "python": [f"{platform.python_version()} on {platform.system()} {platform.machine()}"],
        "torch": [torch.__version__],
        "triton": [triton_version() or NO_TRITON, *triton_faults()],
        "devices": devices(),
        "native": [f"C kernels: {usable(why_not_native())}"],
        "attention": attention_implementations(),
    }
    for name, lines in rows.items():
        for label, line in zip((name, *[""] * len(lines)), lines):
            print(f"{label:<11}{line}")
