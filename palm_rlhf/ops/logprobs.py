"""Log-probabilities of tokens: which logits predict which tokens, and the output layer fused with its log-softmax.

This is the only place where tokens and logits are shifted against each other.

The fused form, `linear_logprobs`, works in chunks of tokens, so that the logits of a whole batch are never in memory.
The gradient of a log-probability depends on the loss, which is known only in the backward; so the backward computes
the logits of each chunk again. If the weight is frozen, as it is beside LoRA adapters, this is not needed: the forward
then computes the gradient of x as well, up to one factor for each token. Top-k and top-p are applied once, in the
forward, which keeps for the backward where the distribution of each token was cut off.
"""

from collections.abc import Iterator
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.ops.cross_entropy import CHUNK, product_dtype
from palm_rlhf.ops.devices import why_not_triton
from palm_rlhf.ops.nucleus import Cut, find_cut, truncates
from palm_rlhf.ops.sampling import truncated_logits

HIDDEN = -1e30  # the logit of a token that is cut off: finite, so that its probability 0 times it is 0 and not NaN
MAX_REPEATED_DIM = 768  # above this width, a CPU takes longer to compute a logit again than to keep it in memory


def next_token_pairs(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs of a language model and, one position later, its targets: `b n -> b (n-1)`, twice."""
    return tokens[:, :-1], tokens[:, 1:]


def target_mask(
    *, loss_mask: Tensor | None = None, key_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor | None:
    """Return which targets count: those in the loss mask that follow a real token of the same document.

    loss_mask, key_mask and document_ids: `b n` -> `b (n-1)`, or None where all count
    """
    masks = []
    if loss_mask is not None:
        masks.append(loss_mask[:, 1:])
    if key_mask is not None:  # the output at padding predicts nothing
        masks.append(key_mask[:, :-1] & key_mask[:, 1:])
    if document_ids is not None:
        masks.append(document_ids[:, :-1] == document_ids[:, 1:])
    return reduce(torch.logical_and, masks) if masks else None


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability of each token under the logits at the same place.

    logits: `... v`, tokens: `...` -> `...`, float32 or wider
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)


def distribution_entropy(logits: Tensor, *, needs_grad: bool = False) -> Tensor:
    """Return the entropy of each distribution in nats; it carries a gradient only if `needs_grad`.

    logits: `... v`, some of them -inf -> `...`
    """
    with torch.set_grad_enabled(needs_grad and torch.is_grad_enabled()):
        logprobs = logits.log_softmax(dim=-1)
        logprobs = logprobs.masked_fill(logprobs == -torch.inf, 0.0)  # 0 log 0 is 0, and its gradient must not be NaN
        return -(logprobs.exp() * logprobs).sum(dim=-1)


def linear_logprobs_reference(
    x: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    scale: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    entropy_needs_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each token and the entropy in nats, with all logits in memory.

    The logits are `x @ weight.T * scale`. Top-k and top-p never cut off a token of `tokens`. The entropy carries a
    gradient only if `entropy_needs_grad`.

    x: `... e`, weight: `v e`, tokens: `...` -> `...`, twice, float32 or wider
    """
    logits = truncated_logits(F.linear(x, weight) * scale, top_k=top_k, top_p=top_p, always=tokens)
    return token_logprobs(logits, tokens), distribution_entropy(logits, needs_grad=entropy_needs_grad)


def chunks_are_faster(x: Tensor, weight: Tensor, *, entropy_needs_grad: bool = False) -> bool:
    """Return whether `linear_logprobs` is at least as fast as with all logits in memory, and uses less memory.

    The answer does not depend on whether gradients are wanted, so that log-probabilities computed with and without
    gradients are equal to the bit.

    x: `... e`, weight: `v e`
    """
    if why_not_triton(x, weight) is None:
        return True
    num_tokens, dim = weight.shape
    many = num_tokens >= 4 * dim and x.numel() // dim * num_tokens > CHUNK
    repeats = weight.requires_grad or entropy_needs_grad
    return many and not (repeats and dim > MAX_REPEATED_DIM) and not torch.compiler.is_compiling()


def linear_logprobs(
    x: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    scale: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    entropy_needs_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return what `linear_logprobs_reference` returns, computed in chunks of tokens.

    `torch.compile` gets the reference, which it fuses itself, except where the Triton kernels can run.

    x: `... e`, weight: `v e`, tokens: `...` -> `...`, twice
    """
    use_triton = why_not_triton(x, weight) is None and not truncates(top_k, top_p)
    if torch.compiler.is_compiling() and not use_triton:
        return linear_logprobs_reference(
            x, weight, tokens, scale=scale, top_k=top_k, top_p=top_p, entropy_needs_grad=entropy_needs_grad
        )
    rows = x.flatten(0, -2), weight, tokens.flatten(), scale, product_dtype(x, weight), entropy_needs_grad
    if use_triton:
        from palm_rlhf.ops.triton.fused_logprobs import linear_logprobs_triton

        logprobs, entropy = linear_logprobs_triton(*rows)
    else:
        logprobs, entropy = _LinearLogprobs.apply(*rows, top_k, top_p, torch.is_grad_enabled())
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


class _LinearLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies; x: `n e`, weight: `v e`, tokens: `n`.

    `with_gradients` is the grad mode of the caller, which autograd switches off inside of `forward`.
    """

    @staticmethod
    def forward(ctx, x, weight, tokens, scale, dtype, entropy_needs_grad, top_k, top_p, with_gradients):
        wide = torch.promote_types(dtype, torch.float32)
        cuts = []
        logprobs, entropy, log_z = (x.new_empty(len(x), dtype=wide) for _ in range(3))
        ctx.ahead = with_gradients and ctx.needs_input_grad[:2] == (True, False) and not entropy_needs_grad
        d_x = torch.empty_like(x) if ctx.ahead else None
        matrix = weight.to(dtype)
        for rows, token, logits in _chunks(x, matrix, tokens, scale, wide):
            if truncates(top_k, top_p):
                cuts.append(find_cut(logits, top_k=top_k, top_p=top_p))
                _hide_(logits, cuts[-1], token)
            log_z[rows] = logits.logsumexp(dim=-1)
            all_logprobs = logits.sub_(log_z[rows, None])
            logprobs[rows] = all_logprobs.gather(-1, token).squeeze(-1)
            probs = all_logprobs.exp()
            entropy[rows] = -torch.linalg.vecdot(probs, all_logprobs)
            if d_x is not None:  # d log p_t / d logit v = [v = t] - p_v
                d_logits = probs.mul_(-scale).scatter_add_(-1, token, token.new_full(token.shape, scale, dtype=wide))
                d_x[rows] = _product(d_logits.to(dtype), matrix)
        if not entropy_needs_grad:
            ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.dtype = scale, dtype
        cut = map(torch.cat, zip(*cuts))
        ctx.save_for_backward(*((d_x,) if ctx.ahead else (x, weight, tokens, log_z, entropy, *cut)))
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logprobs, d_entropy):
        if ctx.ahead:
            (d_x,) = ctx.saved_tensors
            return d_x * d_logprobs.unsqueeze(-1).to(d_x.dtype), *(None,) * 8
        x, weight, tokens, log_z, entropy, *cut = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        d_x = torch.empty_like(x) if needs_x else None
        d_weight = torch.zeros_like(weight, dtype=log_z.dtype) if needs_weight else None
        d_logprobs = torch.zeros_like(log_z) if d_logprobs is None else d_logprobs
        matrix = weight.to(ctx.dtype)
        for rows, token, logits in _chunks(x, matrix, tokens, ctx.scale, log_z.dtype):
            if cut:
                _hide_(logits, Cut(*(part[rows] for part in cut)), token)
            slope = (d_logprobs[rows] * ctx.scale).unsqueeze(-1)
            all_logprobs = logits.sub_(log_z[rows, None])
            if d_entropy is None:
                d_logits = all_logprobs.exp_().mul_(-slope)
            else:  # d entropy / d logit v = -p_v (log p_v + entropy)
                pull = (d_entropy[rows] * ctx.scale).unsqueeze(-1)
                d_logits = all_logprobs.exp().mul_(all_logprobs.add_(entropy[rows, None]).mul_(-pull).sub_(slope))
            d_logits = d_logits.scatter_add_(-1, token, slope).to(ctx.dtype)
            if d_x is not None:
                d_x[rows] = _product(d_logits, matrix)
            if d_weight is not None:
                part = x[rows].to(ctx.dtype)
                if part.dtype == d_weight.dtype:
                    d_weight.addmm_(d_logits.mT, part)
                else:
                    d_weight += _product(d_logits.mT, part)
        return d_x, None if d_weight is None else d_weight.to(weight.dtype), *(None,) * 7


def _hide_(logits: Tensor, cut: Cut, token: Tensor) -> None:
    """Hide the logits that are cut off, except that of the token itself; logits: `n v`, token: `n 1`."""
    logits.masked_fill_(cut.keeps(logits).scatter_(-1, token, True).logical_not_(), HIDDEN)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in their own dtype, also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _chunks(
    x: Tensor, matrix: Tensor, tokens: Tensor, scale: float, wide: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a slice of some rows at a time, the tokens of these rows, `n 1`, and their logits, `n v`."""
    size = max(CHUNK // len(matrix), 1)
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        logits = _product(x[rows].to(matrix.dtype), matrix.mT).to(wide).mul_(scale)
        yield rows, tokens[rows, None], logits
