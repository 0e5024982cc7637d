"""The output layer with its loss: in chunks beside all logits at once, forward and backward.

python benchmarks/loss.py                     # vocabulary 50,257, dim 512, 4 x 1024 tokens, on a GPU 16 x 1024
"""

import json
import subprocess
import sys
from collections.abc import Callable

import torch
import tyro
from attention_work import peak_on_gpu
from side_by_side import alternate, speedup, summary, surroundings, table

from palm_rlhf.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LOSSES = {"in chunks": linear_cross_entropy, "all logits at once": linear_cross_entropy_reference}


def make_inputs(num_tokens: int, dim: int, batch: int, seq_len: int) -> tuple[torch.Tensor, ...]:
    """Embeddings, output weights, targets."""
    torch.manual_seed(0)
    x, weight = (torch.randn(shape, device=DEVICE) for shape in ((batch, seq_len, dim), (num_tokens, dim)))
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(num_tokens, (batch, seq_len), device=DEVICE)


def make_step(loss: Callable, inputs: tuple[torch.Tensor, ...], bfloat16: bool) -> Callable[[], list[torch.Tensor]]:
    """The gradients of one loss."""
    x, weight, targets = inputs

    def step() -> list[torch.Tensor]:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bfloat16):
            value = loss(x, weight, targets, scale=x.shape[-1] ** -0.5, z_loss=1e-4)
        return torch.autograd.grad(value, (x, weight))

    return step


def check_parity(inputs: tuple[torch.Tensor, ...]) -> None:
    """Raise AssertionError unless both have the same gradients."""
    for one, other in zip(*(make_step(loss, inputs, False)() for loss in LOSSES.values()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
    print("parity: the gradients agree to 1e-3 in float32")


def peak_megabytes(name: str, sizes: tuple[int, ...]) -> int:
    """What one step needs beyond its inputs; on a CPU in a process of its own."""
    if GPU:
        return peak_on_gpu(make_step(LOSSES[name], make_inputs(*sizes), False))
    code = (
        "import resource, loss\n"
        f"inputs = loss.make_inputs(*{sizes})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"loss.make_step(loss.LOSSES[{name!r}], inputs, False)()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=sys.path[0], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def rates(sizes: tuple[int, ...], seconds: float) -> dict[str, float]:
    """Speed of a step: its three products, and the bytes of inputs and gradients, each moved once."""
    num_tokens, dim, batch, seq_len = sizes
    numbers = 2 * (num_tokens + batch * seq_len) * dim
    return {
        "tflops": 6 * batch * seq_len * dim * num_tokens / seconds / 1e12,
        "gb_per_second": numbers * torch.float32.itemsize / seconds / 1e9,
    }


def main(
    num_tokens: int = 50257, dim: int = 512, batch: int = 16 if GPU else 4, seq_len: int = 1024, rounds: int = 5
) -> None:
    """Time both losses in float32 and in bfloat16 autocast, and measure the memory of a step of each.

    Args:
        num_tokens: Vocabulary.
        dim: Width of the embeddings.
        batch: Sequences.
        seq_len: Tokens of a sequence.
        rounds: Timed rounds.
    """
    if not GPU:
        print("no GPU: the Triton kernels cannot be timed here; these are the implementations of the CPU\n")
    sizes = (num_tokens, dim, batch, seq_len)
    # first, since a process takes over the high-water mark of the one that starts it
    peaks = {name: peak_megabytes(name, sizes) for name in LOSSES}
    inputs = make_inputs(*sizes)
    check_parity(inputs)
    runs = {
        f"{name}, {dtype}": make_step(loss, inputs, dtype == "bfloat16")
        for dtype in ("float32", "bfloat16")
        for name, loss in LOSSES.items()
    }
    seconds = alternate(runs, rounds=rounds)
    ratios = {dtype: speedup(*(seconds[f"{name}, {dtype}"] for name in LOSSES)) for dtype in ("float32", "bfloat16")}
    times = {name: summary(values) for name, values in seconds.items()}
    speeds = {name: rates(sizes, row["median"]) for name, row in times.items()}
    title = f"loss, vocabulary {num_tokens}, {batch} x {seq_len} tokens, dim {dim}"
    print(f"{title}\n\n{table(times, 'ms', 1e3)}\n\n{table(ratios, 'times as fast')}\n")
    for name, speed in speeds.items():
        print(f"{name:44}{speed['tflops']:10.3f} TFLOP/s{speed['gb_per_second']:10.1f} GB/s")
    print("\n" + "\n".join(f"{name:44}{peak:10} MB at its peak, float32" for name, peak in peaks.items()) + "\n")
    results = {"seconds": times, "speedups": ratios, "rates": speeds, "peak_megabytes": peaks}
    print(json.dumps({"benchmark": title, **surroundings(), **results}))


if __name__ == "__main__":
    tyro.cli(main)
