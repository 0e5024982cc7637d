"""Generation by PaLM, with its cache, beside that of the PyPI package palm-rlhf-pytorch, on the same weights.

python benchmarks/generation.py               # 256 tokens after 128; needs the extra palm-rlhf[bench]
python benchmarks/generation.py --gpu 139M    # on a GPU, with CUDA graphs and without, for 1 and 64 rows, and rollouts;
                                              # also --gpu 1B
"""

import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Literal

import torch
import tyro
from side_by_side import alternate, report, speedup, surroundings
from torch import nn
from training_models import SIZES
from utilization import peak_of

from palm_rlhf import PaLM
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.policy.rollout import ResponseSampling, collect

NO_GPU = 3
GRAPHS = {"CUDA graphs": "1", "no graphs": "0"}  # values of PALM_RLHF_CUDA_GRAPHS
ROLLOUTS = 128  # of as many tokens, after prompts of as many


def same_choices(ours: PaLM, theirs: nn.Module, prompt: torch.Tensor, num_tokens: int) -> None:
    """Raise AssertionError unless both, in float32, rate our greedy continuation the same at every step."""
    answer = ours.generate(prompt=prompt, max_new_tokens=num_tokens, temperature=0)
    sequence = torch.cat((prompt, answer), dim=-1)
    with torch.no_grad():
        expected = theirs(sequence)[:, prompt.shape[1] - 1 : -1].argmax(dim=-1)
    assert torch.equal(answer, expected), "the greedy continuations differ"
    print(f"parity: {num_tokens} greedy tokens are the same")


def step_bytes(palm: PaLM, batch: int, length: int) -> int:
    """The bytes that a step reads at least: all weights once, and keys and values of `length` tokens for each row."""
    c = palm.config
    weights = sum(parameter.nbytes for parameter in palm.parameters())
    return weights + 2 * batch * length * c.depth * c.kv_heads * c.dim_head * palm.dtype.itemsize


def same_tokens(config: PaLMConfig, device: str) -> None:
    """Raise AssertionError unless two blocks in float32 draw the same tokens with CUDA graphs and without."""
    palm = PaLM(num_tokens=config.num_tokens, dim=config.dim, depth=2, heads=config.heads, dim_head=config.dim_head)
    prompts = [torch.randint(config.num_tokens, (length,)) for length in (5, 17)]
    found = []
    for value in GRAPHS.values():
        os.environ["PALM_RLHF_CUDA_GRAPHS"] = value
        generator = torch.Generator(device).manual_seed(0)
        answers = palm.to(device).generate(prompt=prompts, max_new_tokens=40, generator=generator)
        found.append([answer.tolist() for answer in answers])
    assert found[0] == found[1], "CUDA graphs draw other tokens"
    print("parity: 40 tokens of two prompts, drawn in float32, are the same with CUDA graphs and without")


def seconds_of(run: Callable[[], object], rounds: int) -> float:
    """The median time of a run after two others, in the second of which graphs are captured."""
    seconds = []
    for _ in range(rounds + 2):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def on_gpu(
    config: PaLMConfig, title: str, *, prompt_len: int, num_tokens: int, rounds: int, device: str = "cuda"
) -> list[dict[str, object]]:
    """Time generation in bfloat16 and rollouts of wide weights under autocast, with CUDA graphs and without."""
    same_tokens(config, device)
    peak = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    palm = PaLM.from_config(config).to(device, torch.bfloat16).eval()
    rows: list[dict[str, object]] = []
    print(f"\n{title}\n{'':32}{'ms a token':>12}{'tokens/s':>12}{'bandwidth':>12}")
    for batch in (1, 64):
        prompt = torch.randint(config.num_tokens, (batch, prompt_len), device=device)
        read = step_bytes(palm, batch, prompt_len + num_tokens // 2)
        for name, value in GRAPHS.items():
            os.environ["PALM_RLHF_CUDA_GRAPHS"] = value
            seconds = seconds_of(lambda prompt=prompt: palm.generate(prompt_len + num_tokens, prompt), rounds)
            share = None if peak is None else read * num_tokens / seconds / peak.bandwidth
            rows.append(
                {
                    "name": f"{batch} rows, {name}",
                    "milliseconds_per_token": 1e3 * seconds / num_tokens,
                    "tokens_per_second": batch * num_tokens / seconds,
                    "bandwidth_share": share,
                }
            )
            shown = f"{1e3 * seconds / num_tokens:12.2f}{batch * num_tokens / seconds:12.0f}"
            print(f"{rows[-1]['name']:32}{shown}{'-' if share is None else f'{share:.2f}':>12}", flush=True)
    palm.float()
    gc.collect()
    prompts = list(torch.randint(config.num_tokens, (ROLLOUTS, min(ROLLOUTS, prompt_len)), device=device))
    sampling = ResponseSampling(max_new_tokens=min(ROLLOUTS, num_tokens))

    def roll_out() -> None:
        with torch.autocast(device, torch.bfloat16):
            collect(palm, prompts, sampling, batch_size=len(prompts))

    for name, value in GRAPHS.items():
        os.environ["PALM_RLHF_CUDA_GRAPHS"] = value
        rows.append({"name": f"rollouts, {name}", "seconds": seconds_of(roll_out, rounds)})
        told = f"{len(prompts)} rollouts of {sampling.max_new_tokens} tokens"
        print(f"{told}, {name}: {rows[-1]['seconds']:.3f} s", flush=True)
    return rows


def main(
    gpu: Literal["139M", "1B"] | None = None,
    dim: int = 512,
    depth: int = 8,
    batch: int = 1,
    prompt_len: int = 128,
    num_tokens: int = 256,
    rounds: int = 3,
) -> None:
    """Time the sampling of `num_tokens` tokens in float32, and with the weights in bfloat16, or with `--gpu` on a GPU.

    A GPU's share of bandwidth counts the weights once a step and the keys and values of all rows, by the data sheet.

    Args:
        gpu: The size of the model on a GPU. By default the CPU is timed.
        dim: Width of the model, on a CPU.
        depth: Blocks, on a CPU.
        batch: Rows sampled together, on a CPU.
        prompt_len: Tokens of the prompt.
        num_tokens: Tokens sampled after it.
        rounds: Timed rounds.
    """
    torch.manual_seed(0)
    if gpu is not None:
        if not torch.cuda.is_available():
            print(f"no GPU: torch {torch.__version__} sees none, so nothing was timed")
            sys.exit(NO_GPU)
        title = f"generation, {gpu} parameters, bfloat16, {num_tokens} tokens after {prompt_len}"
        config = SIZES[gpu].config
        rows = on_gpu(config, title, prompt_len=prompt_len, num_tokens=num_tokens, rounds=rounds)
        print(json.dumps({"benchmark": title, **surroundings("triton"), "rows": rows}))
        return
    from palm_rlhf_pytorch import PaLM as TheirPaLM

    warnings.filterwarnings("ignore", category=FutureWarning)  # their use of torch.backends.cuda.sdp_kernel
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
