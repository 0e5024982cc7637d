"""Tokens a second for several clients at once, beside `generate` for all of them in one batch.

python benchmarks/serving.py                  # the server, beside transformers; needs palm-rlhf[serve,hf]
python benchmarks/serving.py --beside palm --clients 1 16 64    # the engine without HTTP, beside PaLM.generate
python benchmarks/serving.py --beside palm --clients 1 16 64 --device cuda --dtype bfloat16 --dim 768 --depth 12 \\
    --heads 12 --vocabulary 50304 --num-tokens 128
"""

import asyncio
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Literal

import torch
import tyro
from side_by_side import alternate, report, speedup
from torch import Tensor, nn

from palm_rlhf import PaLM
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.generation import Request

Fresh = Callable[[int], list[list[int]]]  # so many prompts that have not been asked before
GREEDY = {"temperature": 0, "logprobs": 0, "stream": True, "stream_options": {"include_usage": True}}


def ask_all(url: str, prompts: list[list[int]], num_tokens: int) -> list[int]:
    """Tokens that each of so many clients at once is sent, by a stream."""
    import httpx

    async def ask(client: httpx.AsyncClient, prompt: list[int]) -> int:
        body = {"model": "palm", "prompt": prompt, "max_tokens": num_tokens, **GREEDY}
        async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
            reply.raise_for_status()
            lines = [line async for line in reply.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]", lines[-1]
        return json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"]

    async def ask_together() -> list[int]:
        async with httpx.AsyncClient(timeout=600, verify=False) as client:  # certificates take time to load
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    return asyncio.run(ask_together())


def generation(model: nn.Module, num_tokens: int) -> Callable[[list[list[int]]], Tensor]:
    """What transformers says to prompts of one length, greedily, all in one batch."""

    def generate(prompts: list[list[int]]) -> Tensor:
        tokens = torch.tensor(prompts, device=model.device)
        options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, tokens.shape[1] :]

    return generate


def require_parity(url: str, generate: Callable, prompts: list[list[int]], num_tokens: int) -> None:
    """AssertionError unless the server, asked all at once, says what transformers does."""
    import httpx

    body = {"model": "palm", "prompt": prompts, "max_tokens": num_tokens, "temperature": 0, "logprobs": 0}
    choices = httpx.post(f"{url}/v1/completions", json=body, timeout=600).json()["choices"]
    ours = [[token_id(name) for name in choice["logprobs"]["tokens"]] for choice in choices]
    assert ours == generate(prompts).tolist(), "the greedy replies differ"
    print(f"parity: {len(prompts)} greedy replies of {num_tokens} tokens are the same")


def token_id(name: str) -> int:
    """The byte that a token is, by how it is shown."""
    return int(name[-2:], 16) if name.startswith("bytes:") else ord(name)


def main(
    dim: int = 512,
    depth: int = 8,
    heads: int = 8,
    vocabulary: int = 256,
    prompt_len: int = 64,
    num_tokens: int = 64,
    clients: tuple[int, ...] = (1, 4, 16),
    beside: Literal["transformers", "palm"] = "transformers",
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 3,
) -> None:
    """Ask as so many clients at once, and for the same number of replies in one batch of `generate`.

    Args:
        dim: Width of the model.
        depth: Blocks.
        heads: Heads of queries.
        vocabulary: Ids of the model, of which the bytes are the first; larger ones cost time and are not said.
        prompt_len: Tokens of each prompt, of which no two begin alike.
        num_tokens: Tokens of each reply.
        clients: How many ask at once.
        beside: The server beside `generate` of transformers, or the engine without HTTP beside `PaLM.generate`.
        device: Where to compute, such as cpu or cuda.
        dtype: The numbers to compute with; the parity is checked in float32.
        rounds: Timed rounds, after one that warms up.
    """
    torch.manual_seed(0)
    palm = PaLM(num_tokens=vocabulary, dim=dim, depth=depth, heads=heads).eval().to(device)
    config = EngineConfig(context=prompt_len + num_tokens, max_batch=max(clients))

    def fresh(count: int) -> list[list[int]]:
        return torch.randint(256, (count, prompt_len)).tolist()  # else their beginnings would be known

    title = f"{num_tokens} tokens after {prompt_len}, {dtype}, dim {dim}, depth {depth}, vocabulary {vocabulary}"
    if beside == "palm":
        seconds = time_engine(palm, config, fresh, num_tokens, clients, getattr(torch, dtype), rounds)
        packages: tuple[str, ...] = ()
    else:
        seconds = time_server(palm, config, fresh, num_tokens, clients, getattr(torch, dtype), rounds)
        packages = "transformers", "fastapi", "uvicorn"
    rates = {name: num_tokens * count_of(name) / min(values) for name, values in seconds.items()}
    print("\n".join(f"{name:44}{rate:10.1f} tokens/s at best" for name, rate in rates.items()), "\n")
    report(title, seconds, ratios_of(seconds), *packages)


def time_server(
    palm: PaLM,
    config: EngineConfig,
    fresh: Fresh,
    num_tokens: int,
    clients: tuple[int, ...],
    dtype: torch.dtype,
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of the server and of transformers, by the number of clients."""
    from transformers import AutoModelForCausalLM

    from palm_rlhf.serving.http.app import create_app
    from palm_rlhf.serving.http.run_server import running
    from palm_rlhf.serving.served_model import ServedModel

    tokenizer = ByteTokenizer()
    with tempfile.TemporaryDirectory() as folder:
        palm.save_pretrained(folder, format="cohere")
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(palm.device)
    with (
        Engine(palm, tokenizer, config) as engine,
        running(create_app(ServedModel("palm", palm, tokenizer), engine)) as url,
    ):
        require_parity(url, generation(theirs, num_tokens), fresh(max(clients)), num_tokens)
    palm, theirs = (model.to(dtype) for model in (palm, theirs))
    generate = generation(theirs, num_tokens)
    with (
        Engine(palm, tokenizer, config) as engine,
        running(create_app(ServedModel("palm", palm, tokenizer), engine)) as url,
        multiprocessing.get_context("spawn").Pool(1) as elsewhere,  # clients are not to take the server's interpreter
    ):
        runs: dict[str, Callable[[], object]] = {}
        for count in clients:
            runs[f"server, {count} clients"] = lambda count=count: elsewhere.apply(
                ask_all, (url, fresh(count), num_tokens)
            )
            runs[f"transformers, batch of {count}"] = lambda count=count: generate(fresh(count))
        return alternate(runs, rounds=rounds)


def time_engine(
    palm: PaLM,
    config: EngineConfig,
    fresh: Fresh,
    num_tokens: int,
    clients: tuple[int, ...],
    dtype: torch.dtype,
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of the engine and of `PaLM.generate`, by the number of clients."""
    tokenizer, device = ByteTokenizer(), palm.device
    allowed = known_tokens(tokenizer, palm.num_tokens)

    def ask(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
        replies = engine.submit_all([Request(prompt, num_tokens, temperature=0) for prompt in prompts])
        for reply in replies:
            reply.text()
        return [reply.tokens for reply in replies]

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        tokens = torch.tensor(prompts, device=device)
        return palm.generate(prompt=tokens, max_new_tokens=num_tokens, temperature=0, allowed_tokens=allowed).tolist()

    with Engine(palm, tokenizer, config) as engine:
        prompts = fresh(max(clients))
        assert ask(engine, prompts) == generate(prompts), "the greedy replies differ"
        print(f"parity: {len(prompts)} greedy replies of {num_tokens} tokens are the same")
    palm = palm.to(dtype)
    with Engine(palm, tokenizer, config) as engine:
        runs: dict[str, Callable[[], object]] = {}
        for count in clients:
            runs[f"engine, {count} clients"] = lambda count=count: ask(engine, fresh(count))
            runs[f"generate, batch of {count}"] = lambda count=count: generate(fresh(count))
        return alternate(runs, rounds=rounds)


def ratios_of(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Ours by theirs for each number of clients, and the tokens a second of several clients by those of the fewest."""
    ours, theirs = list(seconds)[::2], list(seconds)[1::2]
    ratios = {name.split(", ")[1]: speedup(seconds[name], seconds[other]) for name, other in zip(ours, theirs)}
    one = count_of(ours[0])
    for name in ours[1:]:
        per_token, alone = ([value / count_of(run) for value in seconds[run]] for run in (name, ours[0]))
        ratios[f"tokens/s of {count_of(name)} clients by those of {one}"] = speedup(per_token, alone)
    return ratios


def count_of(name: str) -> int:
    """The replies of a run, by its name."""
    return next(int(word) for word in name.split() if word.isdigit())


if __name__ == "__main__":
    tyro.cli(main)
