"""Top-p beside no truncation: drawing tokens, and the log-probabilities of an update with their gradients.

python benchmarks/top_p.py                                   # 64 rows at a vocabulary of 32768
python benchmarks/top_p.py --num-tokens 50257 --rows 512
"""

import itertools
import json
import os
import resource
from collections.abc import Callable

import torch
import tyro
from side_by_side import alternate, speedup, summary, surroundings, table

from palm_rlhf import PaLM
from palm_rlhf.ops.sampling import Sampling, keep_top_p, sample, sampling_logprobs
from palm_rlhf.policy.sequences import action_logprobs

SPREADS = {"peaked": 8.0, "flat": 0.3}  # standard deviations of the logits
WAYS = {"plain": {}, "top-p": {"top_p": 0.9}}


def make_run(task: str, kind: str, way: str, num_tokens: int, dim: int, rows: int) -> Callable[[], object]:
    """One task, by one way, on one kind of distribution."""
    torch.manual_seed(0)
    spread, options = SPREADS[kind], WAYS[way]
    if task == "draw":
        logits = torch.randn(rows, num_tokens).mul_(spread)

        @torch.no_grad()
        def draw() -> torch.Tensor:
            return sample(sampling_logprobs(logits, Sampling(**options)))

        return draw
    palm = PaLM(num_tokens=num_tokens, dim=dim, depth=1)
    embeds, tokens = torch.randn(1, rows, dim).mul_(spread).requires_grad_(), torch.randint(num_tokens, (1, rows))

    def update() -> None:
        action_logprobs(palm, embeds, tokens, **options).logprobs.sum().backward()
        embeds.grad = palm.token_emb.weight.grad = None

    return update


def check_parity(num_tokens: int) -> None:
    """Raise AssertionError unless the tokens that stay are those of a stable sort in float64."""
    torch.manual_seed(0)
    for kind, spread in SPREADS.items():
        logits = torch.randn(4, num_tokens, dtype=torch.float64) * spread
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(dim=-1)
        stays = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, probs.cumsum(dim=-1) - probs < 0.9)
        assert torch.equal(keep_top_p(logits, 0.9) > -torch.inf, stays), kind
        print(f"parity: {kind}, {stays.sum().item() // 4} of {num_tokens} tokens stay, those of a stable sort")


def peak_megabytes(name: tuple[str, ...], sizes: tuple[int, ...]) -> int:
    """What one run needs beyond its inputs, as the system counts it, in a process of its own."""
    readable, writable = os.pipe()
    if os.fork() == 0:
        try:
            run = make_run(*name, *sizes)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            run()
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            os.write(writable, str(grown // 1024).encode())
        finally:
            os._exit(0)
    os.wait()
    os.close(writable)
    with os.fdopen(readable) as answer:
        return int(answer.read())


def main(num_tokens: int = 32768, dim: int = 512, rows: int = 64, rounds: int = 5) -> None:
    """Time both tasks on peaked and flat distributions, with top-p at 0.9 and without, and measure their memory.

    Args:
        num_tokens: Size of the vocabulary.
        dim: Width of the model.
        rows: Tokens drawn together, or the actions of a minibatch.
        rounds: Timed rounds.
    """
    sizes = (num_tokens, dim, rows)
    # first: a process that has computed with several threads cannot be forked
    names = {", ".join(name): name for name in itertools.product(("draw", "update"), SPREADS, WAYS)}
    peaks = {label: peak_megabytes(name, sizes) for label, name in names.items()}
    check_parity(num_tokens)
    seconds = alternate({label: make_run(*name, *sizes) for label, name in names.items()}, rounds=rounds)
    tasks = [label.removesuffix(", plain") for label in names if label.endswith(", plain")]
    costs = {task: speedup(seconds[f"{task}, plain"], seconds[f"{task}, top-p"]) for task in tasks}
    memory = {task: peaks[f"{task}, top-p"] / max(peaks[f"{task}, plain"], 1) for task in tasks}
    times = {name: summary(values) for name, values in seconds.items()}
    title = f"top-p, vocabulary {num_tokens}, {rows} rows, dim {dim}"
    print(f"{title}\n\n{table(times, 'ms', 1e3)}\n\n{table(costs, 'times as long as without')}\n")
    for task, ratio in memory.items():
        print(f"{task:44}{ratio:10.2f} times the memory, {peaks[f'{task}, top-p']} MB")
    results = {"seconds": times, "cost": costs, "memory": memory, "peak_megabytes": peaks}
    print("\n" + json.dumps({"benchmark": title, **surroundings(), **results}))


if __name__ == "__main__":
    tyro.cli(main)
