"""The output layer fused with log-probabilities of tokens and entropies, for GPUs, in chunks of tokens.

The backward computes the logits of each chunk again, since the gradient of a log-probability is known only then. If
the weight is frozen, as beside LoRA adapters, the forward computes the gradient of x instead, up to a factor for each
token.
"""

import torch
from torch import Tensor

from palm_rlhf.ops.triton.fused_cross_entropy import Gradients, chunks, differentiate_, statistics
from palm_rlhf.ops.triton.operators import Operator


def _backward(d_logprobs, d_entropy, x, weight, tokens, log_z, entropy, scale, dtype, needs_x, needs_weight):
    gradients, tokens = Gradients(x, weight, needs_x, needs_weight), tokens.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        matrix = weight.to(dtype)
        for rows, part, logits in chunks(x, matrix):
            slopes = {"d_logprobs": d_logprobs[rows], "log_z": log_z[rows]}
            if d_entropy is not None:
                slopes |= {"d_entropy": d_entropy[rows], "entropy": entropy[rows]}
            d_logits = differentiate_(logits, tokens[rows], len(weight), scale, **slopes)
            gradients.add(rows, d_logits, part, matrix)
    return gradients.result()


def _fake_backward(d_logprobs, d_entropy, x, weight, tokens, log_z, entropy, scale, dtype, needs_x, needs_weight):
    return Gradients(x, weight, needs_x, needs_weight).result()


backward_operator = Operator(
    "linear_logprobs_backward",
    "(Tensor d_logprobs, Tensor? d_entropy, Tensor x, Tensor weight, Tensor tokens, Tensor log_z, Tensor entropy, "
    "float scale, ScalarType dtype, bool needs_x, bool needs_weight) -> (Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _forward(x, weight, tokens, scale, dtype, ahead):
    """Return log-probabilities, entropies, log Z, and if `ahead` the derivatives of log-probabilities by x."""
    logprobs, entropy, log_z, d_x = results = _empty_results(x, weight, tokens, scale, dtype, ahead)
    tokens = tokens.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        matrix = weight.to(dtype)
        for rows, _, logits in chunks(x, matrix):
            logprobs[rows], log_z[rows], found_entropy = statistics(
                logits, tokens[rows], len(weight), scale, with_entropy=True
            )
            assert found_entropy is not None  # since it was asked for
            entropy[rows] = found_entropy
            if ahead:
                slopes = {"d_logprobs": torch.ones_like(log_z[rows]), "log_z": log_z[rows]}
                d_x[rows] = differentiate_(logits, tokens[rows], len(weight), scale, **slopes) @ matrix
    return results


def _empty_results(x, weight, tokens, scale, dtype, ahead):
    logprobs, entropy, log_z = (x.new_empty(len(x), dtype=torch.float32) for _ in range(3))
    return logprobs, entropy, log_z, x.new_empty(x.shape if ahead else 0)


def _save(ctx, inputs, output):
    x, weight, tokens, ctx.scale, ctx.dtype, ctx.ahead = inputs
    _, entropy, log_z, d_x = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((d_x,) if ctx.ahead else (x, weight, tokens, log_z, entropy)))


def _gradients(ctx, d_logprobs, d_entropy, *_):
    if ctx.ahead:
        (d_x,) = ctx.saved_tensors
        d_x = None if d_logprobs is None else d_x * d_logprobs.unsqueeze(-1).to(d_x.dtype)
        return d_x, None, None, None, None, None
    *tensors, log_z, entropy = ctx.saved_tensors
    d_logprobs = torch.zeros_like(log_z) if d_logprobs is None else d_logprobs.contiguous()
    d_entropy = None if d_entropy is None else d_entropy.contiguous()
    needs = ctx.needs_input_grad[:2]
    found = backward_operator(d_logprobs, d_entropy, *tensors, log_z, entropy, ctx.scale, ctx.dtype, *needs)
    return *(d if need else None for d, need in zip(found, needs, strict=True)), None, None, None, None


logprobs_operator = Operator(
    "linear_logprobs",
    "(Tensor x, Tensor weight, Tensor tokens, float scale, ScalarType dtype, bool ahead) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _empty_results,
    save=_save,
    gradients=_gradients,
    num_results=2,  # log Z and the derivatives are for the backward
)


def linear_logprobs_triton(
    x: Tensor, weight: Tensor, tokens: Tensor, scale: float, dtype: torch.dtype, entropy_needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each token and the entropy in nats, of the logits `x @ weight.T * scale`.

    x: `n e`, weight: `v e`, tokens: `n` -> `n`, twice, float32
    """
    ahead = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad and not entropy_needs_grad
    logprobs, entropy = logprobs_operator(x, weight, tokens, scale, dtype, ahead)
    return logprobs, entropy if entropy_needs_grad else entropy.detach()
