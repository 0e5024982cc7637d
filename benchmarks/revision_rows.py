"""The rows of `revisions.py`, and the process that times them over the package of one revision.

It reads lines from standard input, and answers each with a line of JSON. The name of a row prepares it, and the answer
has its results at a fixed seed. An empty line times the row that was prepared last. Rows use public names that few
revisions lack.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

Row = Iterator[tuple[dict[str, list], Callable[[], object]]]  # results by name, and what is timed
CLOCKS = ("elapsed", "tokens_per_second")  # metrics that measure time
CLIENTS = 8


class Size(NamedTuple):
    """The sizes of models and of what they read; lengths are in tokens."""

    trained: dict[str, Any]
    decoded: dict[str, Any]
    batch: int
    seq_len: int
    prompt: int
    reply: int
    responses: int


SIZES = {
    "usual": Size(
        trained={"num_tokens": 256, "dim": 256, "depth": 6, "heads": 4, "ff_mult": 2},
        decoded={"num_tokens": 8192, "dim": 512, "depth": 8, "heads": 8},
        batch=16,
        seq_len=256,
        prompt=32,
        reply=64,
        responses=16,
    ),
    "tiny": Size(
        trained={"num_tokens": 64, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8},
        decoded={"num_tokens": 300, "dim": 16, "depth": 1, "heads": 2, "dim_head": 8},
        batch=2,
        seq_len=8,
        prompt=3,
        reply=4,
        responses=4,
    ),
}


def training(size: Size, precision: str) -> Row:
    """Steps of AdamW, in float32 or under autocast to bfloat16."""
    from palm_rlhf import PaLM

    palm = PaLM(**size.trained)
    optimizer = torch.optim.AdamW(palm.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(palm.num_tokens, (size.batch, size.seq_len + 1))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = palm(tokens, return_loss=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    yield {"loss": [step() for _ in range(2)]}, step


def generation(size: Size, dtype: torch.dtype, **fields: Any) -> Row:
    """A reply to one prompt."""
    from palm_rlhf import PaLM

    palm = PaLM(**size.decoded, **fields).to(dtype).eval()
    prompt = torch.randint(palm.num_tokens, (size.prompt,))

    def reply() -> torch.Tensor:
        return palm.generate(prompt=prompt, max_new_tokens=size.reply)

    yield {"token": reply().tolist()}, reply


def engine(size: Size) -> Row:
    """Replies to several clients at once, without HTTP."""
    from palm_rlhf import PaLM
    from palm_rlhf.data.tokenizer import ByteTokenizer
    from palm_rlhf.serving.engine import Engine, EngineConfig
    from palm_rlhf.serving.generation import Request

    prompts = torch.randint(256, (CLIENTS, size.prompt)).tolist()
    config = EngineConfig(context=size.prompt + size.reply, max_batch=CLIENTS, prefix_memory=0)
    with Engine(PaLM(**size.decoded).eval(), ByteTokenizer(), config) as served:

        def replies() -> list[int]:
            asked = [Request(prompt, size.reply, seed=number) for number, prompt in enumerate(prompts)]
            generations = served.submit_all(asked)
            for generation in generations:
                generation.text()
            return [token for generation in generations for token in generation.tokens]

        yield {"token": replies()}, replies


def evens(prompts: list[torch.Tensor], completions: list[torch.Tensor]) -> list[float]:
    """Return the share of even tokens: a reward that costs nothing."""
    return [float((row % 2 == 0).float().mean()) for row in completions]


def rlhf(size: Size, algorithm: str) -> Row:
    """Steps of reinforcement learning: rollouts, scores and an epoch of updates, in float32."""
    from palm_rlhf import PaLM, PPOConfig, RLHFTrainer

    palm, num_samples = PaLM(**size.trained), 1 if algorithm == "ppo" else 4
    prompts = list(torch.randint(palm.num_tokens, (size.responses // num_samples, size.prompt)))
    settings = PPOConfig(
        algorithm=algorithm,
        num_samples=num_samples,
        num_steps=1_000_000,
        rollouts_per_step=size.responses,
        minibatch_size=size.responses // 2,
        max_new_tokens=size.reply // 2,
        epochs=1,
        learning_rate=1e-4,
        plot=False,
    )
    steps = RLHFTrainer(palm=palm, reward_model=evens, prompt_token_ids=prompts, config=settings).steps()
    found = [next(steps) for _ in range(2)]
    names = [name for name in found[0] if name not in CLOCKS]
    yield {name: [metrics[name] for metrics in found] for name in names}, lambda: next(steps)


LLAMA = {"block": "serial", "norm": "rms", "kv_heads": 2, "tie_embeddings": False}
ROWS: dict[str, Callable[[Size], Row]] = {
    "training-float32": partial(training, precision="float32"),
    "training-bf16": partial(training, precision="bf16"),
    "generation-float32": partial(generation, dtype=torch.float32),
    "generation-bfloat16": partial(generation, dtype=torch.bfloat16),
    "engine": engine,
    "ppo": partial(rlhf, algorithm="ppo"),
    "grpo": partial(rlhf, algorithm="grpo"),
    "llama-float32": partial(generation, dtype=torch.float32, **LLAMA),
    "llama-bfloat16": partial(generation, dtype=torch.bfloat16, **LLAMA),
}


def forget_installation() -> None:
    """Remove the finder of an editable installation, which would lend a revision the modules that it lacks."""
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]


def require_own_modules(package: Path) -> None:
    """Raise ImportError where a module of the package is not of this revision."""
    for name, module in sys.modules.items():
        if name.partition(".")[0] == "palm_rlhf" and not Path(module.__file__).is_relative_to(package):
            raise ImportError(f"{name} is {module.__file__}, expected one below {package}")


def main(package: Path, size: Size) -> None:
    """Answer lines until there are no more."""
    forget_installation()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what others print is no answer
    row: Any = None
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        if name := line.strip():
            if row is not None:
                row.close()
            try:
                torch.manual_seed(0)
                row = ROWS[name](size)
                answer["results"], run = next(row)
                require_own_modules(package)
            except Exception as error:  # of a revision without the row, above all
                answer["error"] = f"{type(error).__name__}: {error}"[:200]
        else:
            started = time.perf_counter()
            run()
            answer["seconds"] = time.perf_counter() - started
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), SIZES[sys.argv[2]])
