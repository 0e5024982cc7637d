"""Rows of `gpu_speed.py`: generation, the engine of the server, and steps of PPO and GRPO."""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from model_checks import without_graphs
from side_by_side import alternate, summary
from torch import Tensor
from training_models import make_hugging_face
from utilization import peak_of

from palm_rlhf import PaLM, PPOConfig, RewardModel, RLHFTrainer
from palm_rlhf.model.captured import why_not_captured
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.quantised.quantised_model import weights_bytes
from palm_rlhf.policy.rollout import ResponseSampling, collect
from palm_rlhf.training.run.optimizer import forward_precision

Rows = Iterator[tuple[str, bool, dict[str, Any]]]
PROMPT, NEW = {"cuda": 128, "cpu": 4}, {"cuda": (32, 256), "cpu": (2, 20)}  # tokens; of a short and a long reply
PARITY_TOKENS = {"cuda": 32, "cpu": 6}
THEIR_TOKENS = {"cuda": 32, "cpu": 3}
ROLLOUTS = {"cuda": (128, 128, 64), "cpu": (4, 4, 4)}  # responses, their tokens, tokens of a prompt
REPLIES = {"cuda": (128, 64), "cpu": (6, 4)}  # tokens of a reply of the engine, and of a prompt
RLHF = ("ppo", "grpo", "ppo, one base", "ppo, four bases")
LORA_R = 16  # of the adapters where there is a base
ROUNDS = {"cuda": 3, "cpu": 1}
SAME = 0.95  # of greedy tokens: where two are equally likely, another order of sums may take the other
MAX_KL = 0.1  # nats per response, at the start of a run, where only rounding tells the policy from its reference


def bytes_of_a_token(palm: PaLM, batch: int, num_keys: float) -> float:
    """What a decoding step has to read: all weights once, and the keys and values of every row."""
    config = palm.config
    numbers = 2 * config.depth * config.kv_heads * config.dim_head * num_keys * batch
    return weights_bytes(palm) + numbers * palm.dtype.itemsize


def generation(device: str, config: PaLMConfig, title: str, batch: int) -> Rows:
    """Sampling from bfloat16 weights, a token at a time: the time of a token, and the share of the memory's rate."""
    with torch.device(device):  # a CPU would take long to draw the weights
        palm = PaLM.from_config(config).eval()
    prompt = torch.randint(config.num_tokens, (batch, PROMPT[device]), device=device)
    name = f"generation {title}, batch {batch}"

    def ours(num_tokens: int, **options: Any) -> Tensor:
        return palm.generate(prompt=prompt, max_new_tokens=num_tokens, **options)

    ours(2, temperature=0)
    with_graphs = ours(PARITY_TOKENS[device], temperature=0)
    with without_graphs():
        same = float((with_graphs == ours(PARITY_TOKENS[device], temperature=0)).float().mean())
    yield f"{name}, parity", same >= SAME, {"greedy tokens that are the same without CUDA graphs": same}

    palm = palm.to(torch.bfloat16)
    short, long = NEW[device]
    started = time.perf_counter()
    for _ in range(2):  # a step is captured when it comes again
        ours(long)
    first = time.perf_counter() - started
    captured = why_not_captured(palm)
    yield from timed(
        name, {"short": lambda: ours(short), "long": lambda: ours(long)}, palm, batch, device, first, captured
    )

    if config.dim >= 2048:
        return  # the beginning would cost more than the figure is worth
    try:
        their_model = make_hugging_face(config, palm.float()).to(device, torch.bfloat16).eval()
    except ImportError as missing:
        yield f"{name}, transformers", True, {"left out": f"not installed: {missing}"}
        return
    count = THEIR_TOKENS[device]
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": True, "pad_token_id": 0}
    theirs = lambda: their_model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)  # noqa: E731
    seconds = summary(alternate({"theirs": theirs}, rounds=ROUNDS[device])["theirs"])
    figures = {"tokens/s": batch * count / seconds["median"], "ms a token": seconds["median"] / count * 1e3}
    yield f"{name}, transformers", True, figures


def timed(
    name: str,
    runs: dict[str, Callable],
    palm: PaLM,
    batch: int,
    device: str,
    first: float | None,
    why_not: str | None,
) -> Rows:
    """The time of a token, from the difference of a long and a short reply, which read the same prompt."""
    short, long = NEW[device]
    seconds = alternate(runs, rounds=ROUNDS[device])
    spread = summary([(b - a) / (long - short) for a, b in zip(seconds["short"], seconds["long"], strict=True)])
    peak = peak_of(torch.cuda.get_device_name()) if device == "cuda" else None
    read = bytes_of_a_token(palm, batch, PROMPT[device] + (short + long) / 2)
    figures: dict[str, Any] = {f"ms a token {part}": value * 1e3 for part, value in spread.items()}
    rate = 1 / spread["median"] if spread["median"] > 0 else None  # short replies on a busy CPU may take longer
    figures |= {"tokens/s": rate and batch * rate, "whole call tokens/s": batch * long / min(seconds["long"])}
    figures |= {"of bandwidth": rate and read * rate / peak.bandwidth if peak else None}
    figures |= {"peak GB": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None}
    yield name, True, figures | {"first two calls s": first, "no CUDA graphs because": why_not}


def engine(device: str, config: PaLMConfig, title: str, clients: int) -> Rows:
    """Replies to so many requests at once, without HTTP, beside `generate` of as many rows."""
    try:
        from serving import time_engine

        from palm_rlhf.serving.engine import EngineConfig
    except ImportError as missing:
        yield f"engine {title}, {clients} clients", True, {"left out": f"not installed: {missing}"}
        return
    num_tokens, prompt_length = REPLIES[device]
    palm = PaLM.from_config(config).eval().to(device)
    settings = EngineConfig(context=num_tokens + prompt_length, max_batch=clients)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def fresh(count: int) -> list[list[int]]:
        return torch.randint(256, (count, prompt_length)).tolist()

    found = time_engine(palm, settings, fresh, num_tokens, (clients,), dtype, ROUNDS[device])
    medians = {name: summary(values)["median"] for name, values in found.items()}
    for name, median in medians.items():
        yield f"engine {title}, {name}", True, {"tokens/s": clients * num_tokens / median}
    share = medians[f"generate, batch of {clients}"] / medians[f"engine, {clients} clients"]
    yield f"engine {title}, {clients} clients beside generate", True, {"times as fast": share}


def evens(prompts: list[Tensor], completions: list[Tensor]) -> list[float]:
    """The share of even tokens: a reward that costs nothing."""
    return [float((row % 2 == 0).float().mean()) for row in completions]


def trainer_of(device: str, config: PaLMConfig, kind: str) -> RLHFTrainer:
    """A trainer of one of RLHF: of all weights, or of adapters beside a reward model that has them too."""
    num_responses, num_tokens, prompt_length = ROLLOUTS[device]
    algorithm, _, bases = kind.partition(", ")
    num_samples = 1 if algorithm == "ppo" else 4
    settings = PPOConfig(
        algorithm=algorithm,
        num_samples=num_samples,
        num_steps=1_000_000,
        rollouts_per_step=num_responses,
        rollout_batch_size=num_responses,
        minibatch_size=max(2, num_responses // 4),
        max_new_tokens=num_tokens,
        epochs=1,
        shared_trunk=kind == "ppo",
        actor_lora_r=LORA_R if bases else 0,
        share_base=bases == "one base",
        precision="bf16" if device == "cuda" else "float32",
        plot=False,
    )
    prompts = list(torch.randint(config.num_tokens, (num_responses // num_samples, prompt_length)))
    palm, models = PaLM.from_config(config), {"reward_model": evens}
    if bases:
        reward_model = RewardModel(palm, use_lora=True, lora_r=LORA_R, share_base=settings.share_base)
        models = {"reward_model": reward_model, "critic": reward_model}
        models["reference"] = None if settings.share_base else copy.deepcopy(palm)
    return RLHFTrainer(palm=palm, prompt_token_ids=prompts, config=settings, **models)


def rlhf(device: str, config: PaLMConfig, title: str, kind: str) -> Rows:
    """The rollouts of a step, and the whole step, of one epoch."""
    num_responses, num_tokens, _ = ROLLOUTS[device]
    trainer = trainer_of(device, config, kind)
    settings, steps = trainer.config, trainer.steps()
    policy, scope = trainer.actor_critic.palm, trainer.actor_critic.actor_scope
    rows = [prompt.to(trainer.run.device) for prompt in trainer.prompts]
    sizes = {"num_samples": settings.num_samples, "batch_size": num_responses}
    precision = forward_precision(settings.precision, trainer.run.device)

    def rollouts() -> None:
        with precision():
            sampling = ResponseSampling(max_new_tokens=num_tokens)
            collect(policy, rows, sampling, finetune_scope=scope, **sizes)

    started = time.perf_counter()
    metrics = next(steps)
    first = time.perf_counter() - started
    kl = metrics.get("kl", 0.0)
    yield f"{kind} {title}, parity", abs(kl) < MAX_KL, {"nats of KL to the reference at the start": kl}
    seconds = alternate({"rollouts": rollouts, "whole step": lambda: next(steps)}, rounds=ROUNDS[device])
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    shape = f"{num_responses} responses of {num_tokens} tokens"
    for name, values in seconds.items():
        spread = summary(values)
        figures = {f"s {part}": value for part, value in spread.items()}
        figures["tokens/s"] = num_responses * num_tokens / spread["median"]
        yield f"{kind} {title}, {shape}, {name}", True, figures | {"first s": first, "peak GB": peak}
