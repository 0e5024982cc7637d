"""What a call of each fused operation costs in Python, without its kernels: eager, and as an operator of PyTorch.

python benchmarks/launch_cost.py   # no GPU needed

Nothing is computed: launches do nothing, so what remains is the Python of this package and of PyTorch. Triton's own
launch comes on top of both.
"""

import os
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
import tyro
from side_by_side import report, speedup
from torch import Tensor
from triton.runtime.jit import JITFunction

from palm_rlhf.ops.triton import operators
from palm_rlhf.ops.triton.fused_attention import attention_triton
from palm_rlhf.ops.triton.fused_cross_entropy import linear_cross_entropy_triton
from palm_rlhf.ops.triton.fused_logprobs import linear_logprobs_triton
from palm_rlhf.ops.triton.fused_rotary import rotary_split_triton
from palm_rlhf.ops.triton.fused_swiglu import swiglu_triton


def calls() -> dict[str, tuple[Callable[..., object], list[Tensor]]]:
    """Each operation, with the tensors that gradients are wanted for."""
    bf16 = torch.bfloat16
    q, k, v = (torch.zeros(1, heads, 64, 64, dtype=bf16) for heads in (8, 2, 2))
    x, weight = torch.zeros(16, 64, dtype=bf16), torch.zeros(64, 64, dtype=bf16)
    tokens, counts, angles = torch.zeros(16, dtype=torch.long), torch.ones(16), torch.zeros(1, 16, 1, 64)
    gate, value, qkv = torch.zeros(16, 64, dtype=bf16), torch.zeros(16, 64, dtype=bf16), torch.zeros(1, 16, 12, 64)
    return {
        "attention": (lambda q, k, v: attention_triton(q, k, v, causal=True), [q, k, v]),
        "decode": (lambda q, k, v: attention_triton(q[:, :, -1:], k, v, causal=True), [q, k, v]),
        "rotary": (lambda qkv: rotary_split_triton(qkv, angles, angles, heads=8, kv_heads=2)[0], [qkv]),
        "swiglu": (swiglu_triton, [gate, value]),
        "cross_entropy": (lambda x, w: linear_cross_entropy_triton(x, w, tokens, counts, 1.0, 0.0, bf16), [x, weight]),
        "logprobs": (lambda x, w: linear_logprobs_triton(x, w, tokens, 1.0, bf16, False)[0], [x, weight]),
    }


def forward(function: Callable[..., object], tensors: list[Tensor]) -> object:
    """Call without gradients."""
    with torch.no_grad():
        return function(*tensors)


def both(function: Callable[..., Tensor], tensors: list[Tensor]) -> object:
    """Call forward and backward."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True)


def repeat(run: Callable[[], object], times: int, as_operator: bool) -> Callable[[], None]:
    """A run of many calls, eager, or as though a mode watched them."""

    def many() -> None:
        with patch.object(operators, "is_watched", lambda x: True) if as_operator else patch.dict({}):
            for _ in range(times):
                run()

    return many


def alternate(runs: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, list[float]]:
    """Seconds of the processor that each run takes, in turn: of this thread alone, whatever else is at work."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.thread_time()
            run()
            seconds[name].append(time.thread_time() - started)
    return seconds


def main(times: int = 100, rounds: int = 21) -> None:
    """Print the time of a call, ratios, and a last line of JSON.

    Args:
        times: Calls in a round.
        rounds: Rounds, in each of which every operation is timed in every way.
    """
    torch.set_num_threads(1)
    runs: dict[str, Callable[[], None]] = {}
    for name, (function, tensors) in calls().items():
        for kind, call in (("forward", forward), ("both", both)):
            if (name, kind) != ("decode", "both"):
                for way in ("eager", "operator"):
                    run = lambda call=call, function=function, tensors=tensors: call(function, tensors)  # noqa: E731
                    runs[f"{name} {kind}, {way}"] = repeat(run, times, way == "operator")
    with patch.object(JITFunction, "run", lambda *args, **kwargs: None):
        seconds = {name: [s / times for s in found] for name, found in alternate(runs, rounds=rounds).items()}
    ratios = {
        name.removesuffix(", eager"): speedup(seconds[name], seconds[name.replace("eager", "operator")])
        for name in seconds
        if name.endswith("eager")
    }
    report("cost of a call in Python", seconds, ratios, "triton")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tyro.cli(main)
