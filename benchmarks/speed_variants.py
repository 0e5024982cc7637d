"""Rows of `gpu_speed.py`: a LoRA adapter for each row of a batch, and weights in fewer bits."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from side_by_side import alternate, summary
from speed_decoding import NEW, PARITY_TOKENS, PROMPT, REPLIES, ROUNDS, SAME, timed

from palm_rlhf import PaLM
from palm_rlhf.model.captured import why_not_captured
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.quantised.quantised_model import weights_bytes

Rows = Iterator[tuple[str, bool, dict[str, Any]]]
NUM_ADAPTERS, RANK = 4, 16


def with_adapters(config: PaLMConfig, device: str) -> PaLM:
    """Return a model with some LoRA scopes that change its choices."""
    with torch.device(device):
        palm = PaLM.from_config(config).eval()
    for number in range(NUM_ADAPTERS):
        for parameter in palm.add_finetune_params(f"adapter {number}", RANK).parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return palm


def adapters(device: str, config: PaLMConfig, title: str, clients: int) -> Rows:
    """Replies to so many requests at once: of the base alone, all under one adapter, and under different ones."""
    name = f"adapters {title}, {clients} clients"
    try:
        from palm_rlhf.data.tokenizer import ByteTokenizer
        from palm_rlhf.model.token_ids import known_tokens
        from palm_rlhf.serving.engine import Engine, EngineConfig
        from palm_rlhf.serving.generation import Request
    except ImportError as missing:
        yield name, True, {"left out": f"not installed: {missing}"}
        return
    num_tokens, prompt_length = REPLIES[device]
    palm, tokenizer = with_adapters(config, device), ByteTokenizer()
    settings = EngineConfig(context=num_tokens + prompt_length, max_batch=clients, prefix_memory=0)
    scopes = list(palm.finetune_modules)
    mixes = {
        "no adapter": [None] * clients,
        "one adapter": [scopes[0]] * clients,
        f"{len(scopes)} adapters and none, mixed": [[*scopes, None][row % (len(scopes) + 1)] for row in range(clients)],
    }

    def ask(engine: Engine, mix: list[str | None], prompts: list[list[int]], count: int) -> list[list[int]]:
        pairs = zip(prompts, mix, strict=True)
        replies = engine.submit_all([Request(prompt, count, temperature=0, adapter=scope) for prompt, scope in pairs])
        for reply in replies:
            reply.text()
        return [reply.tokens for reply in replies]

    def fresh() -> list[list[int]]:
        return torch.randint(256, (clients, prompt_length)).tolist()

    prompts, count, mixed = fresh(), PARITY_TOKENS[device], [*mixes.values()][-1]
    options = {"max_new_tokens": count, "temperature": 0, "allowed_tokens": known_tokens(tokenizer, palm.num_tokens)}
    with Engine(palm, tokenizer, settings) as engine:
        found = torch.tensor(ask(engine, mixed, prompts, count))
    alone = [
        palm.generate(prompt=torch.tensor(prompt, device=device), finetune_scope=scope, **options).cpu()
        for prompt, scope in zip(prompts, mixed, strict=True)
    ]
    same = float((found == torch.stack(alone)).float().mean())
    yield f"{name}, parity", same >= SAME, {"greedy tokens that are the same, one adapter at a time": same}

    palm = palm.to(torch.bfloat16 if device == "cuda" else torch.float32)
    with Engine(palm, tokenizer, settings) as engine:
        runs = {kind: lambda mix=mix: ask(engine, mix, fresh(), num_tokens) for kind, mix in mixes.items()}
        seconds = alternate(runs, rounds=ROUNDS[device], warmup=2)  # a step is captured when it comes again
        why_not = why_not_captured(palm)
    base = summary(seconds["no adapter"])["median"]
    for kind, values in seconds.items():
        median = summary(values)["median"]
        figures = {"tokens/s": clients * num_tokens / median, "times the time of none": median / base}
        yield f"{name}, {kind}", True, figures | {"no CUDA graphs because": why_not}


def fewer_bits(device: str, config: PaLMConfig, title: str, kind: str) -> Rows:
    """A reply from weights in bfloat16 and fewer bits: the time of a token, and the memory of the weights."""
    name = f"bits {title}, {kind}"
    with torch.device(device):
        palm = PaLM.from_config(config).eval()
    plain_bytes = weights_bytes(palm) / 2  # in bfloat16
    try:
        palm.quantize_(kind)
    except ImportError as missing:
        yield name, True, {"left out": f"not installed: {missing}"}
        return
    prompt = torch.randint(config.num_tokens, (1, PROMPT[device]), device=device)
    plain = copy.deepcopy(palm)
    plain.dequantize_()
    options = {"prompt": prompt, "max_new_tokens": PARITY_TOKENS[device], "temperature": 0}
    same = float((palm.generate(**options) == plain.generate(**options)).float().mean())
    yield f"{name}, parity", same >= SAME, {"greedy tokens that are the same, of the plain weights": same}
    del plain
    palm = palm.to(torch.bfloat16)
    short, long = NEW[device]
    runs = {
        length: lambda count=count: palm.generate(prompt=prompt, max_new_tokens=count)
        for length, count in (("short", short), ("long", long))
    }
    ((_, passed, figures),) = timed(name, runs, palm, 1, device, None, why_not_captured(palm))
    yield name, passed, figures | {"weights, of bfloat16's": weights_bytes(palm) / plain_bytes}
