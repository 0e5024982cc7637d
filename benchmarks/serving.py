"""Tokens a second of the server for 1, 4 and 16 clients, beside `generate` of transformers on the same weights.

python benchmarks/serving.py                  # dim 512, depth 8, 64 tokens after 64; needs palm-rlhf[serve,hf]
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
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.run_server import running
from palm_rlhf.serving.served_model import ServedModel

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
        tokens = torch.tensor(prompts)
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
    prompt_len: int = 64,
    num_tokens: int = 64,
    clients: tuple[int, ...] = (1, 4, 16),
    dtype: Literal["float32", "bfloat16"] = "float32",
    rounds: int = 3,
) -> None:
    """Ask the server as so many clients at once, and transformers for the same replies in one batch.

    Args:
        dim: Width of the model.
        depth: Blocks.
        prompt_len: Tokens of each prompt, of which no two begin alike.
        num_tokens: Tokens of each reply.
        clients: How many ask at once.
        dtype: The numbers to compute with; the parity is checked in float32.
        rounds: Timed rounds.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    palm = PaLM(num_tokens=256, dim=dim, depth=depth).eval()
    with tempfile.TemporaryDirectory() as folder:
        palm.save_pretrained(folder, format="cohere")
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, config = ByteTokenizer(), EngineConfig(context=prompt_len + num_tokens, max_batch=max(clients))

    def fresh(count: int) -> list[list[int]]:
        return torch.randint(256, (count, prompt_len)).tolist()  # else their beginnings would be known

    with (
        Engine(palm, tokenizer, config) as engine,
        running(create_app(ServedModel("palm", palm, tokenizer), engine)) as url,
    ):
        require_parity(url, generation(theirs, num_tokens), fresh(max(clients)), num_tokens)
    palm, theirs = (model.to(getattr(torch, dtype)) for model in (palm, theirs))
    theirs = generation(theirs, num_tokens)
    with (
        Engine(palm, tokenizer, config) as engine,
        running(create_app(ServedModel("palm", palm, tokenizer), engine)) as url,
        multiprocessing.get_context("spawn").Pool(1) as elsewhere,  # clients are not to take the server's interpreter
    ):
        runs = {}
        for count in clients:
            asked = lambda count=count: elsewhere.apply(ask_all, (url, fresh(count), num_tokens))  # noqa: E731
            runs[f"server, {count} clients"] = asked
            runs[f"transformers, batch of {count}"] = lambda count=count: theirs(fresh(count))
        seconds = alternate(runs, rounds=rounds)
    rates = {name: num_tokens * count_of(name) / min(values) for name, values in seconds.items()}
    print("\n".join(f"{name:44}{rate:10.1f} tokens/s at best" for name, rate in rates.items()), "\n")
    ratios = {
        f"{count} clients": speedup(seconds[f"server, {count} clients"], seconds[f"transformers, batch of {count}"])
        for count in clients
    }
    one, *more = clients
    for count in more:
        per_token = [value / count for value in seconds[f"server, {count} clients"]]
        alone = [value / one for value in seconds[f"server, {one} clients"]]
        ratios[f"tokens/s of {count} clients by those of {one}"] = speedup(per_token, alone)
    title = f"{num_tokens} tokens after {prompt_len}, {dtype}, dim {dim}, depth {depth}"
    report(title, seconds, ratios, "transformers", "fastapi", "uvicorn")


def count_of(name: str) -> int:
    """The replies of a run, by its name."""
    return next(int(word) for word in name.split() if word.isdigit())


if __name__ == "__main__":
    tyro.cli(main)
