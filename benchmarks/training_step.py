"""A training step of PaLM beside those of other packages, on models of one shape.

python benchmarks/training_step.py              # on a CPU: dim 512, depth 8, 4 x 1024 tokens, beside palm-rlhf-pytorch,
                                                # on the same weights; needs the extra palm-rlhf[bench]
python benchmarks/training_step.py --gpu 139M   # on a GPU: 139M parameters, 16 x 1024 tokens, eager and compiled, and
                                                # through our trainer, beside what is installed of transformers and
                                                # palm-rlhf-pytorch; tokens/s, MFU and peak memory; also --gpu 1B
"""

import gc
import json
import sys
from typing import Literal

import torch
import tyro
from side_by_side import alternate, report, speedup, surroundings
from torch import nn
from training_models import SIZES, Size, make_step, make_theirs, parity_errors, rows
from utilization import mfu, peak_of, time_in_a_row, training_flops

from palm_rlhf import PaLM
from palm_rlhf.model.config import PaLMConfig

NO_GPU = 3


def check_parity(theirs: nn.Module, tokens: torch.Tensor) -> None:
    """Raise AssertionError unless ours computes the same logits from the same weights."""
    with torch.no_grad():
        ours = PaLM.from_palm_rlhf_pytorch(theirs.state_dict())
        torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-4)
    print(f"parity: the logits of {tuple(tokens.shape)} tokens agree to 1e-4 in float32")


def on_cpu(config: PaLMConfig, batch: int, seq_len: int, rounds: int) -> None:
    """Time a step of ours in bfloat16 autocast, and of palm-rlhf-pytorch in float32 and under the same autocast."""
    tokens = torch.randint(config.num_tokens, (batch, seq_len))
    theirs = make_theirs(config)
    check_parity(theirs, tokens[:, :128])
    ours, bf16, f32 = "palm-rlhf, bfloat16", "palm-rlhf-pytorch, bfloat16", "palm-rlhf-pytorch, float32"
    runs = {
        ours: make_step(PaLM.from_config(config), tokens, bfloat16=True),
        bf16: make_step(theirs, tokens, bfloat16=True),
        f32: make_step(theirs, tokens, bfloat16=False),
    }
    seconds = alternate(runs, rounds=rounds)
    ratios = {f"than {name}": speedup(seconds[ours], seconds[name]) for name in (bf16, f32)}
    title = f"training step, dim {config.dim}, depth {config.depth}, {batch} x {seq_len} tokens"
    report(title, seconds, ratios, "palm-rlhf-pytorch")


def measure(size: Size, device: str, num_steps: int) -> list[dict[str, object]]:
    """A line for each row of `training_models.rows` whose package is installed, one model in memory at a time."""
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in PaLM.from_config(size.config).parameters())
    whole, half = (training_flops(size.config, num_parameters, size.seq_len, causal=c) for c in (False, True))
    peak = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    lines: list[dict[str, object]] = []
    for name, make in rows(size, device).items():
        try:
            timing = time_in_a_row(make(), num_steps=num_steps)
        except ImportError as error:
            print(f"{name:32} left out: {error}", flush=True)
            continue
        rate = size.batch * size.seq_len / timing.seconds
        line = {"name": name, "tokens_per_second": rate, "mfu": mfu(rate, whole, peak)}
        line |= {"mfu_causal": mfu(rate, half, peak), "first_step_seconds": timing.first_seconds}
        lines.append(line | {"peak_gigabytes": timing.peak_gigabytes})
        shown = [f"{lines[-1][key]:.2f}" if lines[-1][key] is not None else "-" for key in list(line)[2:]]
        memory = "-" if timing.peak_gigabytes is None else f"{timing.peak_gigabytes:.1f}"
        print(f"{name:32}{rate:12.0f}{''.join(f'{text:>12}' for text in [*shown, memory])}", flush=True)
        gc.collect()
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
    return lines


def on_gpu(size: Size, title: str, num_steps: int, device: str = "cuda") -> None:
    """Time the steps of all rows in bfloat16 autocast, after a check that the packages compute the same logits."""
    for name, error in parity_errors(size.config).items():
        print(f"parity: logits of two blocks of our weights by {name} differ by {error:.1e} in float32 on the CPU")
        if not error <= 1e-2:  # it may be NaN
            sys.exit(f"training_step.py: {name} computes something else, so no time is measured")
    print(f"\n{title}\n{'':32}{'tokens/s':>12}{'MFU':>12}{'MFU causal':>12}{'first step':>12}{'peak GB':>12}")
    lines = measure(size, device, num_steps)
    print(json.dumps({"benchmark": title, **surroundings(), "rows": lines}))


def main(
    gpu: Literal["139M", "1B"] | None = None,
    dim: int = 512,
    depth: int = 8,
    batch: int = 4,
    seq_len: int = 1024,
    rounds: int = 7,
    num_steps: int = 10,
) -> None:
    """Time training steps on a CPU, or with `--gpu` on a GPU.

    MFU is that of the PaLM paper's appendix B, which counts all scores of attention; "MFU causal" counts the half that
    a causal model needs.

    Args:
        gpu: The size of the models on a GPU. By default the CPU is timed.
        dim: Width of the model, on a CPU.
        depth: Blocks, on a CPU.
        batch: Sequences in a step, on a CPU.
        seq_len: Tokens of a sequence, on a CPU.
        rounds: Timed rounds, on a CPU.
        num_steps: Steps in a row, on a GPU, three times over.
    """
    torch.manual_seed(0)
    if gpu is None:
        on_cpu(PaLMConfig(num_tokens=256, dim=dim, depth=depth), batch, seq_len, rounds)
        return
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none, so nothing was timed")
        sys.exit(NO_GPU)
    size = SIZES[gpu]
    on_gpu(size, f"training step, {gpu} parameters, {size.batch} x {size.seq_len} tokens, bfloat16 autocast", num_steps)


if __name__ == "__main__":
    tyro.cli(main)
