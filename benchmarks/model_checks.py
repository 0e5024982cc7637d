"""Checks of whole models: both blocks, a LoRA adapter for each row, weights in fewer bits, one base for all roles."""

import copy
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from attention_work import largest
from torch import Tensor

from palm_rlhf import PaLM, PPOConfig, RewardModel, RLHFTrainer

Checks = Iterator[tuple[str, bool]]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
SERIAL = {"block": "serial", "norm": "rms", "kv_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "palm": {},
    "llama3": {**SERIAL, "tie_embeddings": False, "rotary_scaling": LLAMA3},
    "qwen3": {**SERIAL, "qk_norm": True},
}
KINDS = ("int8", "int4")
SIZES = {
    "cuda": {"num_tokens": 1000, "dim": 512, "depth": 4, "heads": 8, "dim_head": 64},
    "cpu": {"num_tokens": 61, "dim": 64, "depth": 2, "heads": 4, "dim_head": 16},
}
LENGTHS = {"cuda": (257, 100), "cpu": (21, 12)}  # tokens of a text, and of a prompt
# Root mean square of an error, by that of exact numbers, after some layers, each of which rounds a few times.
MAX_ERROR = {torch.float32: 3e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}
SCOPES: dict[str, dict[str, Any]] = {  # of other ranks, scales and targets
    "one": {"r": 3, "alpha": 5},
    "two": {"r": 8, "targets": ("q", "v")},
    "three": {"r": 4, "alpha": 2, "targets": ("k", "gate", "value", "ff_out")},
}


def model(device: str, name: str, **more: Any) -> PaLM:
    """Return a model of MODELS whose choices are clear ones: norms differ from 1, and blocks add much to the stream."""
    torch.manual_seed(0)
    palm = PaLM(**{**SIZES[device], **MODELS[name], "logit_scale": 1.0, **more})
    with torch.no_grad():
        for key, parameter in palm.named_parameters():
            if "norm" in key:
                parameter.uniform_(0.5, 1.5)
            if key.endswith(("attn_out.weight", "ff_out.weight")):
                parameter.mul_(4)
    return palm.to(device)


def tokens_of(device: str, *shape: int, seed: int = 1) -> Tensor:
    """Return random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES[device]["num_tokens"], shape, generator=generator).to(device)


def error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the largest of the errors of tensors, each the root mean square by that of the exact numbers."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, truth, strict=True)]
    return largest(float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-12)) for a, b in pairs)


def compared(name: str, got: Sequence[Tensor], truth: Sequence[Tensor], allowed: float) -> tuple[str, bool]:
    """Return the check of tensors against exact ones."""
    found = error(got, truth)
    return f"{name}: error {found:.1e}, allowed {allowed:.0e}", found <= allowed


def loss_and_gradients(palm: PaLM, tokens: Tensor) -> list[Tensor]:
    """Return the loss and its gradients by all parameters that have one."""
    loss = palm(tokens, return_loss=True)
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in palm.parameters() if p.requires_grad])]


@contextmanager
def without_graphs() -> Iterator[None]:
    """A block in which no step is captured as a CUDA graph."""
    before = os.environ.get("PALM_RLHF_CUDA_GRAPHS")
    os.environ["PALM_RLHF_CUDA_GRAPHS"] = "0"
    try:
        yield
    finally:
        os.environ.pop("PALM_RLHF_CUDA_GRAPHS")
        if before is not None:
            os.environ["PALM_RLHF_CUDA_GRAPHS"] = before


def blocks(device: str, dtype: torch.dtype, name: str) -> Checks:
    """Logits, loss, gradients and steps through the cache beside float64 and eager attention, and greedy tokens."""
    palm = model(device, name).to(dtype)
    exact = PaLM.from_config(palm.config).to(device, torch.float64)
    exact.load_state_dict(palm.state_dict())
    length, start = LENGTHS[device]
    tokens, allowed = tokens_of(device, 2, length), MAX_ERROR[dtype]
    label = f"block {name} {dtype}"
    with torch.no_grad():
        truth = exact(tokens)
        yield compared(f"{label} logits", [palm(tokens)], [truth], allowed)
        cache = palm.make_cache(2, length)
        parts = [palm(tokens[:, :start], cache=cache)]
        parts += [palm(tokens[:, place : place + 1], cache=cache) for place in range(start, length)]
        yield compared(f"{label} steps through the cache", [torch.cat(parts, dim=1)], [truth], allowed)
    got = loss_and_gradients(palm.train(), tokens)
    yield compared(f"{label} loss and gradients", got, loss_and_gradients(exact.train(), tokens), allowed)
    if dtype == torch.float32:
        palm.eval()
        yield f"{label} greedy tokens", greedy_is_right(palm, exact.eval(), tokens[:, :start])


@torch.no_grad()
def greedy_is_right(palm: PaLM, exact: PaLM, prompt: Tensor) -> bool:
    """Return whether replies by CUDA graphs and without are equal, and of tokens that are best for the exact model."""
    replies = [palm.generate(prompt=prompt, max_new_tokens=24, temperature=0) for _ in range(3)]
    with without_graphs():
        replies.append(palm.generate(prompt=prompt, max_new_tokens=24, temperature=0))
    logits = exact(torch.cat((prompt, replies[0]), dim=1))[:, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(-1, replies[0].unsqueeze(-1))[..., 0]
    return all(torch.equal(reply, replies[0]) for reply in replies) and bool((logits.amax(-1) - chosen).max() < 1e-3)


def with_scopes(device: str, name: str, only: str | None = "", **more: Any) -> PaLM:
    """Return a model with the adapters of SCOPES; or with one of them merged into its weights, or none."""
    palm = model(device, name, **more).eval()
    torch.manual_seed(3)
    for scope, options in SCOPES.items():
        for parameter in palm.add_finetune_params(scope, **options).parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    if only != "":
        if only is not None:
            palm.merge_finetune_params(only)
        for scope in list(palm.finetune_modules):
            palm.remove_finetune_params(scope)
    return palm


@torch.no_grad()
def adapters(device: str, dtype: torch.dtype, name: str) -> Checks:
    """Rows of one forward, and replies of one batch of the engine, each with the numbers of its own merged model."""
    from palm_rlhf.serving.engine.row_adapters import RowAdapters

    scopes: list[str | None] = [None, *SCOPES, None, *SCOPES]
    palm, label = with_scopes(device, name).to(dtype), f"adapters {name} {dtype}"
    tokens = tokens_of(device, len(scopes), LENGTHS[device][1])
    merged = {scope: with_scopes(device, name, scope).to(dtype).double() for scope in (None, *SCOPES)}
    got = palm(tokens, finetune_scope=RowAdapters(palm).of(scopes))
    truth = torch.cat([merged[scope](tokens[row : row + 1]) for row, scope in enumerate(scopes)])
    yield compared(f"{label} one forward of mixed rows", [got], [truth], MAX_ERROR[dtype])
    if dtype == torch.float32:
        yield from served_adapters(palm, {scope: exact.float() for scope, exact in merged.items()}, scopes, label)


def served_adapters(palm: PaLM, merged: dict[str | None, PaLM], scopes: list[str | None], label: str) -> Checks:
    """The tokens of the engine for rows of several adapters are those of `generate` of the merged models."""
    from palm_rlhf.data.tokenizer import ByteTokenizer
    from palm_rlhf.serving.engine import Engine, EngineConfig
    from palm_rlhf.serving.generation import Request

    device, count = palm.device.type, 24
    options = {"max_new_tokens": count, "temperature": 0, "allowed_tokens": bytes_of(palm)}
    prompts = [tokens_of(device, 5 + row, seed=row) for row in range(len(scopes))]
    alone = [
        merged[scope].generate(prompt=prompt, **options).tolist() for scope, prompt in zip(scopes, prompts, strict=True)
    ]
    asked = [
        Request(prompt.tolist(), count, temperature=0, adapter=scope)
        for scope, prompt in zip(scopes, prompts, strict=True)
    ]
    with Engine(palm, ByteTokenizer(), EngineConfig(context=count + 20, max_batch=len(scopes))) as engine:
        for _ in range(2):  # a step is captured when it comes again
            replies = engine.submit_all(asked)
            for reply in replies:
                reply.text()
        step = engine._scheduler.batch.slots.static_step
        captured = 0 if step is None else len(step.graphs.graphs)
    yield f"{label} replies of one batch", [reply.tokens for reply in replies] == alone
    if device == "cuda":
        yield f"{label} steps of mixed rows as CUDA graphs: {captured}", captured > 0


def bytes_of(palm: PaLM) -> Tensor:
    """Return the tokens that the byte tokenizer of the engine knows, of those of a model: `v` bool."""
    from palm_rlhf.data.tokenizer import ByteTokenizer
    from palm_rlhf.model.token_ids import known_tokens

    return known_tokens(ByteTokenizer(), palm.num_tokens)


def fewer_bits(device: str, dtype: torch.dtype, kind: str) -> Checks:
    """Weights within half a step of the plain ones; products, gradients of adapters and tokens of the same weights."""
    label = f"bits {kind} {dtype}"
    palm = model(device, "llama3").to(dtype)
    before = [getattr(layer, name).weight.detach() for layer in palm.layers for name in layer.matrices()]
    palm.quantize_(kind)
    plain = copy.deepcopy(palm)
    plain.dequantize_()
    after = [getattr(layer, name).weight.detach() for layer in plain.layers for name in layer.matrices()]
    worst = largest(steps_apart(a, b, kind) for a, b in zip(before, after, strict=True))
    rounding = 2 * 127 * (torch.finfo(torch.float16).eps + torch.finfo(dtype).eps) / 2  # before packing, and after
    yield f"{label} weights: {worst:.3f} half steps apart", worst <= 1 + rounding
    tokens = tokens_of(device, 2, LENGTHS[device][0])
    for parameter in palm.add_finetune_params("adapter", 4).parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    plain.add_finetune_params("adapter", 4)
    plain.finetune_modules.load_state_dict(palm.finetune_modules.state_dict())
    found = []
    for one in (palm, plain.double()):
        loss = one(tokens, return_loss=True, finetune_scope="adapter")
        found.append([loss.detach(), *torch.autograd.grad(loss, one.finetune_parameters("adapter"))])
    yield compared(f"{label} loss and gradients of adapters", *found, MAX_ERROR[dtype])
    if dtype == torch.float32:
        yield f"{label} greedy tokens", greedy_is_right(palm.eval(), plain.eval(), tokens[:, : LENGTHS[device][1]])


def steps_apart(plain: Tensor, packed: Tensor, kind: str) -> float:
    """Return the largest distance of packed numbers from the plain ones, in halves of the widest step of the kind.

    The numbers of int8 are 1/127 of the largest of a row apart. The first two of NF4, -1 and -0.6962, are 0.3038 of
    the largest of a block of 64 apart, and all others less (Dettmers et al. 2023, appendix E).
    """
    rows = plain.double() if kind == "int8" else plain.double().reshape(-1, 64)
    step = (1 / 127 if kind == "int8" else 0.30381) * rows.abs().amax(-1, keepdim=True)
    return float(((packed.double().view_as(rows) - rows).abs() / (step / 2)).max())


def one_base(device: str, name: str) -> Checks:
    """Two steps of PPO over one base have the metrics and weights of four models, in less memory on a GPU."""
    found = []
    for shared in (True, False):
        if device == "cuda":
            gc.collect()  # of the first run's models
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        palm = model(device, name)
        torch.manual_seed(4)
        reward_model = RewardModel(palm, use_lora=True, lora_r=4, share_base=shared)
        settings = PPOConfig(
            num_steps=2,
            rollouts_per_step=8,
            minibatch_size=4,
            epochs=1,
            max_new_tokens=8,
            learning_rate=1e-3,
            kl_coef=0.2,
            actor_lora_r=4,
            share_base=shared,
            plot=False,
        )
        trainer = RLHFTrainer(
            palm=palm,
            reward_model=reward_model,
            critic=reward_model,
            reference=None if shared else copy.deepcopy(palm),
            prompt_token_ids=list(tokens_of(device, 8, 6)),
            config=settings,
        )
        metrics = list(trainer.steps())
        numbers = [line[key] for line in metrics for key in sorted(line) if key not in ("elapsed", "tokens_per_second")]
        weights = [p.detach().clone() for p in trainer.actor_critic.parameters() if p.requires_grad]
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        found.append((torch.tensor(numbers, dtype=torch.float64), weights, peak))
        num_bytes = sum(p.nbytes for p in palm.palm_parameters())
        del trainer, reward_model, palm
    (ours, our_weights, our_peak), (theirs, their_weights, their_peak) = found
    yield f"one base {name} metrics of PPO", torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    yield compared(f"one base {name} weights after PPO", our_weights, their_weights, 1e-3)
    if device == "cuda":
        saved = (their_peak - our_peak) / num_bytes
        yield f"one base {name} saves {saved:.2f} bases of memory", saved > 2.5
