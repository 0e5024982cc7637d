"""How much of a GPU a training step uses: peaks of GPUs, operations of a step, and the time of steps in a row."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from palm_rlhf.model.config import PaLMConfig


class Peak(NamedTuple):
    """What a GPU can do at most, by its vendor's data sheet."""

    flops: float
    """FLOP/s of dense bfloat16 products with float32 sums."""
    bandwidth: float
    """Bytes/s of its memory."""


# NVIDIA's data sheets, by a part of the name that `torch.cuda.get_device_name` returns; the first that fits counts.
PEAKS = {
    "B200": Peak(2250e12, 8.0e12),
    "H200": Peak(989e12, 4.8e12),
    "H100 PCIe": Peak(756e12, 2.0e12),
    "H100 NVL": Peak(835e12, 3.9e12),
    "H100": Peak(989e12, 3.35e12),
    "A100-SXM4-40GB": Peak(312e12, 1.555e12),
    "A100-PCIE-40GB": Peak(312e12, 1.555e12),
    "A100 80GB PCIe": Peak(312e12, 1.935e12),
    "A100": Peak(312e12, 2.039e12),
    "L40S": Peak(362e12, 0.864e12),
    "RTX 4090": Peak(165e12, 1.008e12),
}


def peak_of(device_name: str) -> Peak | None:
    """The peak of a GPU by its name; None for a GPU that is not in the table."""
    return next((peak for part, peak in PEAKS.items() if part in device_name), None)


def training_flops(config: PaLMConfig, num_parameters: int, seq_len: int, *, causal: bool = False) -> float:
    """Operations of a training step for each token: 6 N + 12 L H Q T (Chowdhery et al. 2022, appendix B).

    The paper counts all T x T scores. With `causal` only the half that a causal model needs counts.
    """
    scores = 12 * config.depth * config.heads * config.dim_head * seq_len
    return 6 * num_parameters + (scores / 2 if causal else scores)


def mfu(tokens_per_second: float, flops_per_token: float, peak: Peak | None) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B), from 0 to 1; None where the peak is not known."""
    return None if peak is None else tokens_per_second * flops_per_token / peak.flops


class Timing(NamedTuple):
    """The time of a step, and the memory that it took."""

    first_seconds: float
    """Of the first step, in which kernels and models are compiled."""
    seconds: float
    """Of one step: the median of several series of steps."""
    peak_gigabytes: float | None
    """Most memory of the GPU that tensors took at once, from the second step on; None on a CPU."""


def time_in_a_row(step: Callable[[], object], *, num_steps: int, series: int = 3) -> Timing:
    """Time series of steps without a pause between them, so that a GPU need not wait for Python."""
    on_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if on_gpu else lambda: None

    def seconds_of(count: int) -> float:
        wait()
        started = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        return (time.perf_counter() - started) / count

    first = seconds_of(1)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds_of(2)  # warm-up
    seconds = statistics.median(seconds_of(num_steps) for _ in range(series))
    return Timing(first, seconds, torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None)
