"""Generation from a PaLM through its cache: every token is read once."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from beartype import BeartypeConf, beartype
from torch import Tensor
from tqdm import tqdm

from palm_rlhf.model.cache import Cache
from palm_rlhf.model.captured import why_not_captured
from palm_rlhf.model.prompts import PaddedPrompts, new_token_limits, read_prompts, response_lengths, seen_tokens
from palm_rlhf.model.static_generate import generate_static, stream_static
from palm_rlhf.ops.cpu.threads import adapt
from palm_rlhf.ops.sampling import Sampling, sample, sampling_logprobs

if TYPE_CHECKING:
    import palm_rlhf.model.palm

typed = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float


@torch.no_grad()
@typed
def generate(
    palm: "palm_rlhf.model.palm.PaLM",
    seq_len: int | None = None,
    prompt: Tensor | list[Tensor] | None = None,
    *,
    max_new_tokens: int | Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    eos_token: int | None = None,
    allowed_tokens: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    return_logprobs: bool = False,
    finetune_scope: str | None = None,
    use_tqdm: bool = False,
) -> Tensor | list[Tensor] | tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """Sample responses to prompts, one or several of each; a row does not depend on the others.

    The options from `temperature` to `frequency_penalty` are the fields of `palm_rlhf.ops.sampling.Sampling`, which
    explains them.

    Args:
        seq_len: length to reach, in tokens, the prompt included; give this or `max_new_tokens`.
        prompt: `n`, `b n`, or a list of 1-d tensors of different lengths; None starts at a random token.
        max_new_tokens: the most tokens of a response, one number for all prompts, or `b`.
        eos_token: ends a response, which keeps it; an EOS in the prompt ends nothing.
        allowed_tokens: `v` bool, False for ids that are never sampled, such as those that the tokenizer lacks; see
            `palm_rlhf.model.token_ids.known_tokens`.
        num_samples: responses to each prompt, in neighbouring rows.
        generator: the random numbers; None takes the default generator of torch.
        return_logprobs: return the log-probability of each token under the distribution it was sampled from too.
        finetune_scope: the LoRA scope to apply.
        use_tqdm: show a progress bar.

    Returns:
        For a tensor prompt `(b num_samples) t`, filled with `eos_token` (and log-probability 0) after the end of a
        response, or `t` for one row; for a list a list of 1-d tensors, each cut after its EOS. The prompt is left out;
        without a prompt the whole sequence comes back. With `return_logprobs`, a pair in the same form.
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    check_options(palm.num_tokens, eos_token, allowed_tokens, num_samples)
    prompts = read_prompts(palm, prompt, generator, allowed_tokens)
    limits = new_token_limits(prompts, seq_len, max_new_tokens).repeat_interleave(num_samples)
    options = (palm, prompts, limits, sampling, eos_token, allowed_tokens, generator, finetune_scope)
    if why_not_captured(palm) is None:
        tokens, logprobs = generate_static(*options, use_tqdm=use_tqdm)
    else:
        total = int(limits.max())
        drawn = list(tqdm(_steps(*options), total=total, desc="generate", unit="tok", disable=not use_tqdm))
        tokens, logprobs = (torch.stack(parts, dim=-1) for parts in zip(*drawn, strict=True))

    if prompts.form == "list":
        lengths = response_lengths(tokens, limits, eos_token).tolist()
        cut = [[row[:n] for row, n in zip(rows, lengths, strict=True)] for rows in (tokens, logprobs)]
        return (cut[0], cut[1]) if return_logprobs else cut[0]
    if prompts.form == "none":
        first = prompts.tokens.repeat_interleave(num_samples, dim=0)
        num_allowed = palm.num_tokens if allowed_tokens is None else int(allowed_tokens.sum())
        uniform = torch.full_like(first, 1 / num_allowed, dtype=logprobs.dtype).log()
        tokens, logprobs = torch.cat((first, tokens), dim=-1), torch.cat((uniform, logprobs), dim=-1)
    elif prompts.form == "row" and num_samples == 1:
        tokens, logprobs = tokens[0], logprobs[0]
    return (tokens, logprobs) if return_logprobs else tokens


@typed
def stream(
    palm: "palm_rlhf.model.palm.PaLM",
    prompt: Tensor | list[Tensor] | None = None,
    *,
    seq_len: int | None = None,
    max_new_tokens: int | Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    eos_token: int | None = None,
    allowed_tokens: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    return_logprobs: bool = False,
    finetune_scope: str | None = None,
) -> Iterator[Tensor] | Iterator[tuple[Tensor, Tensor]]:
    """Yield the next tokens of all rows, `(b num_samples)`, one step at a time, until every response has ended.

    The options are those of `generate`. A row whose response has ended yields `eos_token` (or 0 where there is none) at
    log-probability 0. With `return_logprobs`, yield pairs of tokens and log-probabilities.
    """
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    check_options(palm.num_tokens, eos_token, allowed_tokens, num_samples)
    prompts = read_prompts(palm, prompt, generator, allowed_tokens)
    limits = new_token_limits(prompts, seq_len, max_new_tokens).repeat_interleave(num_samples)
    make_steps = stream_static if why_not_captured(palm) is None else _steps
    steps = make_steps(palm, prompts, limits, sampling, eos_token, allowed_tokens, generator, finetune_scope)
    return steps if return_logprobs else (tokens for tokens, _ in steps)


@torch.no_grad()
def _steps(
    palm: "palm_rlhf.model.palm.PaLM",
    prompts: PaddedPrompts,
    limits: Tensor,
    sampling: Sampling,
    eos_token: int | None,
    allowed_tokens: Tensor | None,
    generator: torch.Generator | None,
    finetune_scope: str | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tokens of a step and their log-probabilities; `limits` has one entry for each row to sample."""
    allowed_tokens = None if allowed_tokens is None else allowed_tokens.to(palm.device)
    capacity = prompts.tokens.shape[1] + int(limits.max())
    cache = palm.make_cache(len(prompts.tokens), capacity, left_padding=prompts.left_padding)
    logits = next_logits(palm, prompts.tokens, cache, finetune_scope)
    history = _History(prompts, sampling, palm.num_tokens)
    rows = torch.arange(len(limits), device=palm.device)  # those still running
    if len(limits) > len(prompts.tokens):
        copies = rows // (len(limits) // len(prompts.tokens))
        cache.select(copies)
        history.select(copies)
        logits = logits[copies]

    fill = 0 if eos_token is None else eos_token
    for step in range(1, int(limits.max()) + 1):
        adapt(palm.device.type)
        logprobs = sampling_logprobs(
            logits, sampling, seen=history.seen, counts=history.counts, allowed_tokens=allowed_tokens
        )
        new = sample(logprobs, generator)
        chosen = logprobs.gather(-1, new.unsqueeze(-1)).squeeze(-1)
        tokens, logprobs = new.clone(), chosen  # the caller may write to them
        if len(rows) < len(limits):
            tokens = torch.full_like(limits, fill).index_copy_(0, rows, new)
            logprobs = chosen.new_zeros(len(limits)).index_copy_(0, rows, chosen)
        yield tokens, logprobs

        running = limits[rows] > step
        if eos_token is not None:
            running &= new != eos_token
        if not running.all():
            if not running.any():
                return
            kept = running.nonzero().squeeze(-1)
            cache.select(kept)
            history.select(kept)
            rows, new = rows[kept], new[kept]
        history.add(new)
        logits = next_logits(palm, new.unsqueeze(-1), cache, finetune_scope)


class _History:
    """The tokens that each row has so far, where a penalty asks for them."""

    def __init__(self, prompts: PaddedPrompts, sampling: Sampling, num_tokens: int):
        self.seen = self.counts = None  # `b v` each: whether prompt or response has a token, how often the response has
        if sampling.repetition_penalty != 1.0:
            self.seen = seen_tokens(prompts, num_tokens)
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(len(prompts.tokens), num_tokens, dtype=torch.int32, device=prompts.tokens.device)

    def select(self, rows: Tensor) -> None:
        """Keep only the given rows, in the given order: `b'`, integer."""
        self.seen = None if self.seen is None else self.seen[rows]
        self.counts = None if self.counts is None else self.counts[rows]

    def add(self, tokens: Tensor) -> None:
        """Note the next token of each row: `b`."""
        if self.seen is not None:
            self.seen.scatter_(-1, tokens.unsqueeze(-1), True)
        if self.counts is not None:
            self.counts.scatter_add_(-1, tokens.unsqueeze(-1), torch.ones_like(self.counts[:, :1]))


def next_logits(palm: "palm_rlhf.model.palm.PaLM", tokens: Tensor, cache: Cache, finetune_scope: str | None) -> Tensor:
    """Read tokens into the cache and return the logits after the last of each row: `b i -> b v`."""
    embeds = palm(tokens, cache=cache, return_only_embedding=True, finetune_scope=finetune_scope)
    return palm.to_logits(embeds[:, -1])


def check_options(num_tokens: int, eos_token: int | None, allowed_tokens: Tensor | None, num_samples: int) -> None:
    """Raise ValueError for an EOS outside the vocabulary, a wrong mask over it, or fewer than one sample."""
    if num_samples < 1:
        raise ValueError(f"got num_samples={num_samples}, expected at least 1")
    if eos_token is not None and not 0 <= eos_token < num_tokens:
        raise ValueError(f"got eos_token={eos_token}, expected 0 to {num_tokens - 1}")
    if allowed_tokens is None:
        return
    if allowed_tokens.dtype != torch.bool or allowed_tokens.shape != (num_tokens,):
        raise ValueError(
            f"allowed_tokens is {allowed_tokens.dtype} of the shape {tuple(allowed_tokens.shape)}; expected torch.bool "
            f"of ({num_tokens},), one for each token of the model"
        )
    if not allowed_tokens.any():
        raise ValueError("allowed_tokens is False everywhere; expected at least one token that may be sampled")
