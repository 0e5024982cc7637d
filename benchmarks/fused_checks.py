"""Checks of what is fused beside attention: the losses of the output layer, rotary embeddings, and SwiGLU."""

from collections.abc import Iterator

import torch
from attention_work import TOLERANCE, largest

from palm_rlhf.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from palm_rlhf.ops.logprobs import linear_logprobs, linear_logprobs_reference
from palm_rlhf.ops.rotary import rotary_split, rotary_tables, rotate
from palm_rlhf.ops.swiglu import swiglu

SIZES = {  # tokens, width, vocabulary
    "cuda": [(300, 64, 5000), (1000, 768, 50304), (17, 514, 77)],
    "cpu": [(30, 16, 50)],
}
# In parts of a type's tolerance for attention, whose sums are shorter than one over a vocabulary.
MAX_ERROR = {torch.float32: 4.0, torch.float16: 2.0, torch.bfloat16: 2.0}


def off(got: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest error, in parts of what the type allows of the largest exact number."""
    allowed = TOLERANCE[dtype] * truth.abs().max().clamp(min=1e-6)
    return float(((got.double() - truth).abs().max() / allowed).detach())


def compared(name: str, pairs: list[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> tuple[str, bool]:
    """A check of tensors against exact ones."""
    worst = largest(off(got, truth, dtype) for got, truth in pairs)
    return f"{name}: {worst:.2f} of what is allowed", worst <= MAX_ERROR[dtype]


def with_gradients(loss: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """A loss and its gradients."""
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def losses(device: str, dtype: torch.dtype) -> Iterator[tuple[str, bool]]:
    """The loss and the log-probabilities of the output layer, with their gradients, beside float64."""
    for num_tokens, dim, vocabulary in SIZES[device]:
        generator = torch.Generator().manual_seed(dim)
        x, weight = (
            torch.randn(n, dim, generator=generator).to(device, dtype).requires_grad_()
            for n in (num_tokens, vocabulary)
        )
        exact = tuple(t.detach().double().requires_grad_() for t in (x, weight))
        tokens = torch.randint(vocabulary, (num_tokens,), generator=generator).to(device)
        counts = torch.rand(num_tokens, generator=generator).to(device)
        options = {"z_loss": 1e-2, "scale": dim**-0.5}
        got = linear_cross_entropy(x, weight, tokens, weights=counts, **options)
        truth = linear_cross_entropy_reference(*exact, tokens, weights=counts.double(), **options)
        pairs = list(zip(with_gradients(got, (x, weight)), with_gradients(truth, exact), strict=True))
        yield compared(f"loss {dtype} {num_tokens} x {dim}, vocabulary {vocabulary}", pairs, dtype)

        said = [
            sum((counts * t).sum() for t in function(*inputs, tokens, scale=dim**-0.5, entropy_needs_grad=True))
            for function, inputs in ((linear_logprobs, (x, weight)), (linear_logprobs_reference, exact))
        ]
        pairs = list(zip(with_gradients(said[0], (x, weight)), with_gradients(said[1], exact), strict=True))
        yield compared(f"logprobs {dtype} {num_tokens} x {dim}, vocabulary {vocabulary}", pairs, dtype)


def layers(device: str, dtype: torch.dtype) -> Iterator[tuple[str, bool]]:
    """SwiGLU and the rotary split of queries, keys and values, with their gradients, beside float64."""
    for num_tokens, dim, _ in SIZES[device]:
        generator = torch.Generator().manual_seed(num_tokens)
        drawn = torch.randn(2, num_tokens, 2 * dim, generator=generator).to(device, dtype)
        results = []
        for hidden in (drawn.clone().requires_grad_(), drawn.double().requires_grad_()):
            gate, value = hidden.chunk(2, dim=-1)
            ours = hidden.dtype == dtype
            out = swiglu(gate, value) if ours else gate / (1 + (-gate).exp()) * value
            results.append([out.detach(), *torch.autograd.grad(out, hidden, torch.ones_like(out))])
        yield compared(f"swiglu {dtype} {num_tokens} x {dim}", list(zip(*results, strict=True)), dtype)

    drawn = torch.randn(2, 50, 8, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    tables = [t.unsqueeze(-2) for t in rotary_tables(torch.arange(50, device=device)[None], 64)]
    qkv, exact = drawn.clone().requires_grad_(), drawn.double().requires_grad_()
    parts = rotary_split(qkv, *tables, heads=4, kv_heads=2)
    turned = rotate(exact[:, :, :6], *(t.double() for t in tables))
    truth = [turned[:, :, :4], turned[:, :, 4:], exact[:, :, 6:]]
    (d_qkv,) = torch.autograd.grad(parts, qkv, parts)
    (d_exact,) = torch.autograd.grad(truth, exact, truth)
    pairs = [*zip(parts, truth, strict=True), (d_qkv, d_exact)]
    yield compared(f"rotary {dtype}", [(a.reshape(b.shape), b) for a, b in pairs], dtype)
