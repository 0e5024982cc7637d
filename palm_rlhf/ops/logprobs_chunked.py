"""The output layer with the log-probabilities of tokens and the entropies, in chunks of tokens.

The logits of a whole batch are never held. How far a log-probability counts is known only in the backward, which
computes the logits of a chunk again. Not so where the weight is frozen, as beside adapters: the gradient by x is then
made on the way, up to a factor for each token. What top-k and top-p leave out is found once: the backward knows where
each token's distribution was cut off.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.ops.cross_entropy_chunked import CHUNK, product_dtype
from palm_rlhf.ops.devices import uses_triton
from palm_rlhf.ops.logprobs import distribution_entropy, token_logprobs
from palm_rlhf.ops.nucleus import Cut, find_cut, truncates
from palm_rlhf.ops.sampling import truncated_logits

HIDDEN = -1e30  # the logit of what is left out: its exponential is 0, also times itself
MAX_REPEATED_DIM = 768  # above, a logit takes longer to compute again on a CPU than to hold


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
    """The log-probability of each token and the entropy in nats, of the logits `x @ weight.T * scale`, all at once.

    Top-k and top-p leave tokens out, but never the token whose log-probability is asked for. The entropy carries a
    gradient only where asked.

    x: `... e`, weight: `v e`, tokens: `...` -> `...`, twice, float32 or wider
    """
    logits = truncated_logits(F.linear(x, weight) * scale, top_k=top_k, top_p=top_p, always=tokens)
    return token_logprobs(logits, tokens), distribution_entropy(logits, needs_grad=entropy_needs_grad)


def chunks_pay(x: Tensor, weight: Tensor, *, entropy_needs_grad: bool = False) -> bool:
    """Whether `linear_logprobs` saves memory at no loss of speed, against all logits at once.

    The answer is the same with and without gradients, so that the log-probabilities are.

    x: `... e`, weight: `v e`
    """
    if uses_triton(x, weight):
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
    """The same, chunk by chunk; without Triton `torch.compile` gets the reference, which it fuses itself.

    x: `... e`, weight: `v e`, tokens: `...` -> `...`, twice
    """
    triton = uses_triton(x, weight) and not truncates(top_k, top_p)
    if torch.compiler.is_compiling() and not triton:
        options = {"top_k": top_k, "top_p": top_p, "entropy_needs_grad": entropy_needs_grad}
        return linear_logprobs_reference(x, weight, tokens, scale=scale, **options)
    rows = x.flatten(0, -2), weight, tokens.flatten(), scale, product_dtype(x, weight), entropy_needs_grad
    if triton:
        from palm_rlhf.ops.triton.fused_logprobs import linear_logprobs_triton

        logprobs, entropy = linear_logprobs_triton(*rows)
    else:
        logprobs, entropy = _LinearLogprobs.apply(*rows, top_k, top_p, torch.is_grad_enabled())
    return logprobs.view(tokens.shape), entropy.view(tokens.shape)


class _LinearLogprobs(torch.autograd.Function):
    """Log-probabilities and entropies; x: `n e`, weight: `v e`, tokens: `n`."""

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
            if ctx.ahead:  # d log p_t / d logit v = [v = t] - p_v
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
            if needs_x:
                d_x[rows] = _product(d_logits, matrix)
            if needs_weight:
                part = x[rows].to(ctx.dtype)
                if part.dtype == d_weight.dtype:
                    d_weight.addmm_(d_logits.mT, part)
                else:
                    d_weight += _product(d_logits.mT, part)
        return d_x, d_weight.to(weight.dtype) if needs_weight else None, *(None,) * 7


def _hide_(logits: Tensor, cut: Cut, token: Tensor) -> None:
    """Take what was cut off out of a distribution, but for the token itself: logits `n v`, token `n 1`."""
    logits.masked_fill_(cut.keeps(logits).scatter_(-1, token, True).logical_not_(), HIDDEN)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in their own type, also under autocast."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _chunks(x: Tensor, matrix: Tensor, tokens: Tensor, scale: float, wide: torch.dtype):
    """Some rows at a time: which, their tokens `n 1`, and their logits `n v`."""
    size = max(CHUNK // len(matrix), 1)
    for first in range(0, len(x), size):
        rows = slice(first, first + size)
        logits = _product(x[rows].to(matrix.dtype), matrix.mT).to(wide).mul_(scale)
        yield rows, tokens[rows, None], logits
