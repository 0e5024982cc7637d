"""Sampling from a PaLM through its cache: every token is read once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from beartype import beartype
from torch import Tensor
from tqdm import tqdm

from palm_rlhf.model.cache import Cache
from palm_rlhf.ops.cpu.threads import adapt
from palm_rlhf.ops.sampling import sample, sampling_logprobs


@dataclass
class Prompts:
    """Prompts as one block of tokens, padded on the left, and the form in which the answer is wanted."""

    tokens: Tensor  # b n
    lengths: Tensor  # b
    form: str  # "none", "row", "rows" or "list"

    @property
    def left_padding(self) -> Tensor:
        return self.tokens.shape[1] - self.lengths


@torch.no_grad()
@beartype
def generate(
    palm,
    seq_len: int | None = None,
    prompt: Tensor | list[Tensor] | None = None,
    *,
    max_new_tokens: int | Tensor | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    min_p: float | int | None = None,
    repetition_penalty: float | int = 1.0,
    eos_token: int | None = None,
    allowed_tokens: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    return_logprobs: bool = False,
    finetune_scope: str | None = None,
    use_tqdm: bool = False,
) -> Tensor | list[Tensor] | tuple:
    """Sample continuations of prompts, several of each if asked; each row is what it would be alone.

    Args:
        seq_len: length to reach, in tokens, the prompt included; or else
        max_new_tokens: length to add, one for all prompts, or `b` for each its own.
        prompt: `n`, `b n`, or a list of 1-d tensors of different lengths; None starts at a random token.
        temperature: divides the logits; 0 is greedy.
        top_k, top_p, min_p: see `palm_rlhf.ops.sampling`.
        repetition_penalty: above 1 makes tokens of the prompt and of the answer less likely.
        eos_token: ends a row, and is kept; looked for in new tokens only.
        allowed_tokens: `v` bool, False for ids that are never sampled, such as those that the tokenizer lacks; see
            `palm_rlhf.model.token_ids.known_tokens`.
        num_samples: rows drawn for each prompt, next to each other.
        return_logprobs: also the log-probability of each token under the distribution it was sampled from.

    Returns:
        A tensor prompt gives `(b num_samples) t`, filled with `eos_token` (and log-probability 0) after a row's end, or
        `t` for one row; a list gives a list of 1-d tensors, each cut after its EOS. The prompt is left out; without one
        the whole sequence comes back. With `return_logprobs`, a pair in the same form.
    """
    check_options(temperature, top_k, top_p, min_p, repetition_penalty, eos_token, num_samples, palm.num_tokens)
    check_allowed_tokens(allowed_tokens, palm.num_tokens)
    prompts = read_prompts(palm, prompt, generator, allowed_tokens)
    limits = new_token_limits(prompts, seq_len, max_new_tokens).repeat_interleave(num_samples)
    steps = stream(
        palm,
        prompts,
        seq_len=seq_len,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        eos_token=eos_token,
        allowed_tokens=allowed_tokens,
        num_samples=num_samples,
        generator=generator,
        return_logprobs=True,
        finetune_scope=finetune_scope,
    )
    steps = list(tqdm(steps, total=int(limits.max()), desc="generate", unit="tok", disable=not use_tqdm))
    tokens, logprobs = (torch.stack(parts, dim=-1) for parts in zip(*steps, strict=True))

    if prompts.form == "list":
        lengths = answer_lengths(tokens, limits, eos_token).tolist()
        tokens, logprobs = (
            [row[:length] for row, length in zip(rows, lengths, strict=True)] for rows in (tokens, logprobs)
        )
    elif prompts.form == "none":
        first = prompts.tokens.repeat_interleave(num_samples, dim=0)
        num_allowed = palm.num_tokens if allowed_tokens is None else int(allowed_tokens.sum())
        uniform = torch.full_like(first, 1 / num_allowed, dtype=logprobs.dtype).log()
        tokens, logprobs = torch.cat((first, tokens), dim=-1), torch.cat((uniform, logprobs), dim=-1)
    elif prompts.form == "row" and num_samples == 1:
        tokens, logprobs = tokens[0], logprobs[0]
    return (tokens, logprobs) if return_logprobs else tokens


@torch.no_grad()
@beartype
def stream(
    palm,
    prompt: Tensor | list[Tensor] | Prompts | None = None,
    *,
    seq_len: int | None = None,
    max_new_tokens: int | Tensor | None = None,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    min_p: float | int | None = None,
    repetition_penalty: float | int = 1.0,
    eos_token: int | None = None,
    allowed_tokens: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    return_logprobs: bool = False,
    finetune_scope: str | None = None,
) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
    """Yield the next tokens of all rows, `(b num_samples)`, one step at a time, until every row has ended.

    The options are those of `generate`. A row that has ended yields `eos_token` (or 0 where there is none) at
    log-probability 0. With `return_logprobs`, yields pairs.
    """
    check_options(temperature, top_k, top_p, min_p, repetition_penalty, eos_token, num_samples, palm.num_tokens)
    check_allowed_tokens(allowed_tokens, palm.num_tokens)
    prompts = prompt if isinstance(prompt, Prompts) else read_prompts(palm, prompt, generator, allowed_tokens)
    allowed_tokens = None if allowed_tokens is None else allowed_tokens.to(palm.device)
    limits = new_token_limits(prompts, seq_len, max_new_tokens).repeat_interleave(num_samples)
    capacity = prompts.tokens.shape[1] + int(limits.max())
    cache = palm.make_cache(len(prompts.tokens), capacity, left_padding=prompts.left_padding)

    logits = next_logits(palm, prompts.tokens, cache, finetune_scope)
    seen = seen_tokens(prompts, palm.num_tokens) if repetition_penalty != 1.0 else None
    rows = torch.arange(len(limits), device=palm.device)  # those still running
    if num_samples > 1:
        copies = rows // num_samples
        cache.select(copies)
        logits, seen = logits[copies], None if seen is None else seen[copies]

    fill = 0 if eos_token is None else eos_token
    for step in range(1, int(limits.max()) + 1):
        adapt(palm.device.type)
        logprobs = sampling_logprobs(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seen=seen,
            allowed_tokens=allowed_tokens,
        )
        new = sample(logprobs, generator)
        chosen = logprobs.gather(-1, new.unsqueeze(-1)).squeeze(-1)
        tokens, logprobs = new.clone(), chosen  # whoever gets them may write to them
        if len(rows) < len(limits):
            tokens = torch.full_like(limits, fill).index_copy_(0, rows, new)
            logprobs = chosen.new_zeros(len(limits)).index_copy_(0, rows, chosen)
        yield (tokens, logprobs) if return_logprobs else tokens

        running = limits[rows] > step
        if eos_token is not None:
            running &= new != eos_token
        if not running.all():
            if not running.any():
                return
            kept = running.nonzero().squeeze(-1)
            cache.select(kept)
            rows, new, seen = rows[kept], new[kept], None if seen is None else seen[kept]
        if seen is not None:
            seen.scatter_(-1, new.unsqueeze(-1), True)
        logits = next_logits(palm, new.unsqueeze(-1), cache, finetune_scope)


def next_logits(palm, tokens: Tensor, cache: Cache, finetune_scope: str | None) -> Tensor:
    """Read tokens into the cache and return what follows the last of each row: `b i -> b v`."""
    embeds = palm(tokens, cache=cache, return_only_embedding=True, finetune_scope=finetune_scope)
    return palm.to_logits(embeds[:, -1])


@contextmanager
def evaluating(module):
    """Dropout and the like are off inside, and as they were after, in every part of a module."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def switch_off_dropout(module):
    """Set the rate of every dropout in a module to 0, for good, and return the module."""
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return module


def read_prompts(
    palm,
    prompt: Tensor | list[Tensor] | None,
    generator: torch.Generator | None,
    allowed_tokens: Tensor | None = None,
) -> Prompts:
    """Check prompts and lay them out as one block, padded on the left."""
    device = palm.device
    if prompt is None:
        draw = "cpu" if generator is None else generator.device
        ids = torch.arange(palm.num_tokens) if allowed_tokens is None else allowed_tokens.cpu().nonzero().squeeze(-1)
        first = ids[torch.randint(len(ids), (1, 1), generator=generator, device=draw).cpu()].to(device)
        return Prompts(first, torch.ones(1, dtype=torch.long, device=device), "none")
    form = "list" if isinstance(prompt, list) else {1: "row", 2: "rows"}.get(prompt.ndim)
    if form is None or (form == "list" and any(row.ndim != 1 for row in prompt)):
        raise ValueError("a prompt has the wrong number of axes; expected `n`, `b n`, or a list of 1-d tensors")
    prompt_rows = [prompt] if form == "row" else list(prompt)
    if not prompt_rows or any(len(row) == 0 for row in prompt_rows):
        raise ValueError("got an empty prompt; expected at least one token in each row (None starts at a random one)")
    lengths = torch.tensor([len(row) for row in prompt_rows], device=device)
    tokens = torch.zeros(len(prompt_rows), int(lengths.max()), dtype=torch.long, device=device)
    for block_row, row in zip(tokens, prompt_rows, strict=True):
        check_token_ids(row, palm.num_tokens)
        block_row[len(block_row) - len(row) :] = row
    return Prompts(tokens, lengths, form)


@beartype
def check_token_ids(tokens: Tensor, num_tokens: int) -> None:
    """Raise ValueError unless every id of an integer tensor of any shape lies in the vocabulary."""
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"token ids are {tokens.dtype}; expected integers, such as torch.int64")
    if tokens.numel():
        low, high = (int(t) for t in tokens.aminmax())
        if low < 0 or high >= num_tokens:
            bad = low if low < 0 else high
            raise ValueError(
                f"token id {bad} is outside the vocabulary; expected 0 to {num_tokens - 1} (num_tokens={num_tokens}): "
                "was the text encoded with this model's tokenizer?"
            )


def check_allowed_tokens(allowed_tokens: Tensor | None, num_tokens: int) -> None:
    """Raise ValueError for what is no mask over the vocabulary, or allows nothing."""
    if allowed_tokens is None:
        return
    if allowed_tokens.dtype != torch.bool or allowed_tokens.shape != (num_tokens,):
        raise ValueError(
            f"allowed_tokens is {allowed_tokens.dtype} of the shape {tuple(allowed_tokens.shape)}; expected torch.bool "
            f"of ({num_tokens},), one for each token of the model"
        )
    if not allowed_tokens.any():
        raise ValueError("allowed_tokens is False everywhere; expected at least one token that may be sampled")


def new_token_limits(prompts: Prompts, seq_len: int | None, max_new_tokens: int | Tensor | None) -> Tensor:
    """How many tokens each prompt may be given: `b`."""
    if (seq_len is None) == (max_new_tokens is None):
        raise ValueError(f"got seq_len={seq_len} and max_new_tokens={max_new_tokens}; expected exactly one of them")
    if max_new_tokens is not None:
        limits = torch.as_tensor(max_new_tokens, device=prompts.lengths.device)
        if limits.shape not in ((), prompts.lengths.shape) or limits.min() < 1:
            raise ValueError(
                f"max_new_tokens is {max_new_tokens}; expected at least 1, as one number or for each of the "
                f"{len(prompts.lengths)} prompts"
            )
        return limits.expand_as(prompts.lengths)
    longest = int(prompts.lengths.max())
    if seq_len <= longest:
        raise ValueError(
            f"seq_len={seq_len} counts the prompt, which has {longest} tokens already; "
            "expected more, or max_new_tokens to count new tokens alone"
        )
    return seq_len - prompts.lengths


def answer_lengths(tokens: Tensor, limits: Tensor, eos_token: int | None) -> Tensor:
    """Tokens of each answer, its EOS included: `b t -> b`."""
    if eos_token is None:
        return limits
    is_eos = tokens == eos_token
    first = torch.where(is_eos.any(dim=-1), is_eos.int().argmax(dim=-1) + 1, tokens.shape[-1])
    return torch.minimum(first, limits)


def seen_tokens(prompts: Prompts, num_tokens: int) -> Tensor:
    """Which tokens stand in each prompt: `b v`."""
    seen = torch.zeros(len(prompts.tokens), num_tokens, dtype=torch.bool, device=prompts.tokens.device)
    columns = torch.arange(prompts.tokens.shape[1], device=prompts.tokens.device)
    pads = columns < prompts.left_padding.unsqueeze(-1)
    # a pad repeats the row's last token, which is seen anyway
    return seen.scatter_(-1, torch.where(pads, prompts.tokens[:, -1:], prompts.tokens), True)


def check_options(temperature, top_k, top_p, min_p, repetition_penalty, eos_token, num_samples, num_tokens) -> None:
    """Raise ValueError for an option outside its range."""
    for name, value, fine, expected in (
        ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "0 < top_p <= 1"),
        ("min_p", min_p, min_p is None or 0 <= min_p <= 1, "0 <= min_p <= 1"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0 (1 is none)"),
        ("eos_token", eos_token, eos_token is None or 0 <= eos_token < num_tokens, f"0 to {num_tokens - 1}"),
        ("num_samples", num_samples, num_samples >= 1, "at least 1"),
    ):
        if not fine:
            raise ValueError(f"{name} is {value}; expected {expected}")
