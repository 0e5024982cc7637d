"""A training step of PaLM beside one of the PyPI package palm-rlhf-pytorch, on the same weights and tokens.

python benchmarks/training_step.py            # dim 512, depth 8, 4 x 1024 tokens; needs the extra palm-rlhf[bench]
"""

import warnings
from collections.abc import Callable

import torch
import tyro
from side_by_side import alternate, report, speedup
from torch import nn

from palm_rlhf import PaLM


def make_step(model: nn.Module, tokens: torch.Tensor, bfloat16: bool) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW, as both projects' training scripts do them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bfloat16):
            loss = model(tokens, return_loss=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    return step


def check_parity(ours: PaLM, theirs: nn.Module, tokens: torch.Tensor) -> None:
    """Raise AssertionError unless both compute the same logits."""
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-4)
    print(f"parity: the logits of {tuple(tokens.shape)} tokens agree to 1e-4 in float32")


def main(dim: int = 512, depth: int = 8, batch: int = 4, seq_len: int = 1024, rounds: int = 7) -> None:
    """Time a step of ours in bfloat16 autocast, and of palm-rlhf-pytorch in float32 and under the same autocast.

    Args:
        dim: Width of the model.
        depth: Blocks.
        batch: Sequences in a step.
        seq_len: Tokens of a sequence.
        rounds: Timed rounds.
    """
    from palm_rlhf_pytorch import PaLM as TheirPaLM

    warnings.filterwarnings("ignore", category=FutureWarning)  # their use of torch.backends.cuda.sdp_kernel
    torch.manual_seed(0)
    tokens = torch.randint(256, (batch, seq_len))
    theirs = TheirPaLM(num_tokens=256, dim=dim, depth=depth, flash_attn=True)
    check_parity(PaLM.from_palm_rlhf_pytorch(theirs.state_dict()), theirs, tokens[:, :128])

    ours, bf16, f32 = "palm-rlhf, bfloat16", "palm-rlhf-pytorch, bfloat16", "palm-rlhf-pytorch, float32"
    runs = {
        ours: make_step(PaLM(num_tokens=256, dim=dim, depth=depth), tokens, bfloat16=True),
        bf16: make_step(theirs, tokens, bfloat16=True),
        f32: make_step(theirs, tokens, bfloat16=False),
    }
    seconds = alternate(runs, rounds=rounds)
    ratios = {f"than {name}": speedup(seconds[ours], seconds[name]) for name in (bf16, f32)}
    title = f"training step, dim {dim}, depth {depth}, {batch} x {seq_len} tokens"
    report(title, seconds, ratios, "palm-rlhf-pytorch")


if __name__ == "__main__":
    tyro.cli(main)
