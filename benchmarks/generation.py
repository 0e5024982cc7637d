"""Generation by PaLM, with its cache, beside that of the PyPI package palm-rlhf-pytorch, on the same weights.

python benchmarks/generation.py               # 256 tokens after 128; needs the extra palm-rlhf[bench]
"""

import warnings
from collections.abc import Callable

import torch
import tyro
from side_by_side import alternate, report, speedup
from torch import nn

from palm_rlhf import PaLM


def same_choices(ours: PaLM, theirs: nn.Module, prompt: torch.Tensor, num_tokens: int) -> None:
    """Raise AssertionError unless both, in float32, rate our greedy continuation the same at every step."""
    answer = ours.generate(prompt=prompt, max_new_tokens=num_tokens, temperature=0)
    sequence = torch.cat((prompt, answer), dim=-1)
    with torch.no_grad():
        expected = theirs(sequence)[:, prompt.shape[1] - 1 : -1].argmax(dim=-1)
    assert torch.equal(answer, expected), "the greedy continuations differ"
    print(f"parity: {num_tokens} greedy tokens are the same")


def main(
    dim: int = 512, depth: int = 8, batch: int = 1, prompt_len: int = 128, num_tokens: int = 256, rounds: int = 3
) -> None:
    """Time the sampling of `num_tokens` tokens in float32, and with the weights in bfloat16.

    Args:
        dim: Width of the model.
        depth: Blocks.
        batch: Rows sampled together.
        prompt_len: Tokens of the prompt.
        num_tokens: Tokens sampled after it.
        rounds: Timed rounds.
    """
    from palm_rlhf_pytorch import PaLM as TheirPaLM

    warnings.filterwarnings("ignore", category=FutureWarning)  # their use of torch.backends.cuda.sdp_kernel
    torch.manual_seed(0)
    prompt = torch.randint(256, (batch, prompt_len))
    theirs = TheirPaLM(num_tokens=256, dim=dim, depth=depth, flash_attn=True).eval()
    ours = PaLM.from_palm_rlhf_pytorch(theirs.state_dict()).eval()
    same_choices(ours, theirs, prompt, 32)

    def generate(model: nn.Module) -> Callable[[], torch.Tensor]:
        return lambda: model.generate(prompt_len + num_tokens, prompt)

    low = PaLM.from_palm_rlhf_pytorch(theirs.state_dict()).to(torch.bfloat16).eval()
    their_low = TheirPaLM(num_tokens=256, dim=dim, depth=depth, flash_attn=True).to(torch.bfloat16).eval()
    models = {
        "palm-rlhf, float32": ours,
        "palm-rlhf, bfloat16 weights": low,
        "palm-rlhf-pytorch, float32": theirs,
        "palm-rlhf-pytorch, bfloat16 weights": their_low,
    }
    seconds = alternate({name: generate(model) for name, model in models.items()}, rounds=rounds)
    ratios = {
        label: speedup(seconds[mine], seconds[other])
        for label, mine, other in [
            ("float32", "palm-rlhf, float32", "palm-rlhf-pytorch, float32"),
            ("bfloat16 weights", "palm-rlhf, bfloat16 weights", "palm-rlhf-pytorch, bfloat16 weights"),
            ("ours bfloat16, theirs float32", "palm-rlhf, bfloat16 weights", "palm-rlhf-pytorch, float32"),
        ]
    }
    title = f"{num_tokens} tokens after {prompt_len}, batch {batch}, dim {dim}, depth {depth}"
    report(title, seconds, ratios, "palm-rlhf-pytorch")


if __name__ == "__main__":
    tyro.cli(main)
