"""Checks of attention: exact within what a type allows, its laws, the same bits every time, decoding, `auto`."""

from collections.abc import Callable, Iterator

import torch
from attention_work import TOLERANCE, Work, error, errors, exact, gradients, implementation, largest

from palm_rlhf.ops.attention import choose
from palm_rlhf.ops.attention_reference import attention_reference

Checks = Iterator[tuple[str, bool]]  # what was checked, and whether it passed
Size = tuple[int, int, int, int, int]  # queries, keys, heads, key heads, d

SIZES: dict[str, list[Size]] = {
    "cuda": [
        (1, 1, 1, 1, 32),
        (17, 17, 3, 1, 64),
        (129, 129, 8, 8, 128),
        (1000, 1000, 5, 1, 80),
        (2048, 2048, 8, 2, 64),
        (2048, 2048, 6, 3, 128),
        (300, 3000, 4, 1, 256),
        (4097, 4097, 2, 1, 64),
    ],
    "cpu": [(1, 1, 1, 1, 32), (17, 17, 3, 1, 64), (40, 70, 4, 2, 32)],
}
DECODED = {  # batch, keys, heads, key heads, d
    "cuda": [(64, 2048, 16, 1, 64), (8, 4000, 16, 16, 128), (1, 8192, 16, 2, 128), (3, 700, 8, 1, 256)],
    "cpu": [(3, 70, 4, 1, 32)],
}
CHOSEN = {  # batch, queries, keys, heads, key heads, d; what users run
    "cuda": [
        (8, 2048, 2048, 16, 1, 64),
        (2, 4096, 4096, 16, 16, 64),
        (2, 4096, 4096, 16, 16, 128),
        (2, 4096, 4096, 8, 1, 256),
        (2, 64, 2048, 16, 1, 64),
        (64, 1, 2048, 16, 1, 64),
    ],
    "cpu": [(2, 60, 60, 4, 1, 32), (2, 3, 60, 4, 1, 32), (2, 1, 60, 4, 1, 32)],
}
MASKS = ("", "keys", "padding", "documents")
MAX_RATIO = (2, 3, 3, 3)  # of root mean square errors, to those of the eager definition: out and gradients
EAGER_FROM = 17  # queries; shorter, an error is chance


def masks_of(kind: str, batch: int, num_keys: int, device: str) -> dict[str, torch.Tensor]:
    """Options of one kind of mask."""
    generator = torch.Generator().manual_seed(num_keys)
    if kind == "keys":
        return {"key_mask": (torch.rand(batch, num_keys, generator=generator) < 0.7).to(device)}
    if kind == "padding":
        start = torch.randint(num_keys, (batch, 1), generator=generator)
        return {"key_mask": (torch.arange(num_keys) >= start).to(device)}
    if kind == "documents":
        return {"document_ids": torch.randint(4, (batch, num_keys), generator=generator).sort(dim=-1).values.to(device)}
    return {}


def accuracy(function: Callable, device: str, dtype: torch.dtype, size: Size) -> Checks:
    """The definition in float64 within what the type allows, and not far from the eager definition in that type."""
    for kind in MASKS:
        work = Work(2, size[2], size[3], size[0], size[1], size[4], dtype, device)
        options = {"causal": True, **masks_of(kind, 2, work.num_keys, device)}
        tensors = work.tensors()
        truth, got = exact(tensors, **options), gradients(function, tensors, **options)
        worst = largest(errors(got, truth).values())
        eager = gradients(attention_reference, tensors, **options)
        near = work.num_queries < EAGER_FROM or all(
            rms(a, t) <= ratio * rms(e, t) for a, e, t, ratio in zip(got, eager, truth, MAX_RATIO, strict=True)
        )
        # With one key d_q is 0, the difference of two equal sums; a CPU adds them up in different orders.
        allowed = 4 if device == "cpu" and work.num_keys == 1 else 1
        name = f"accuracy {dtype} {size} {kind}: {worst:.2f} of what is allowed"
        yield name + ("" if near else ", but far from the eager definition"), worst <= allowed and near


def rms(x: torch.Tensor, truth: torch.Tensor) -> float:
    """The root mean square error."""
    return float((x.double() - truth).square().mean().sqrt())


def laws(function: Callable, device: str, dtype: torch.dtype) -> Checks:
    """What holds for any attention, to the last bit where it says so."""
    length = 2048 if device == "cuda" else 90
    work = Work(2, 8, 2, length, length, 64, dtype, device)
    *inputs, d_out = work.tensors()
    q, k, v = (t.detach() for t in inputs)
    out, d_q, _, d_v = gradients(function, [*inputs, d_out], causal=True)

    cut = length // 3
    new_k, new_v = k.clone(), v.clone()
    new_k[:, :, cut:], new_v[:, :, cut:] = 7, -7
    changed = [q.requires_grad_(), new_k.requires_grad_(), new_v.requires_grad_()]
    later = gradients(function, [*changed, d_out], causal=True)
    same = torch.equal(later[0][:, :, :cut], out[:, :, :cut]) and torch.equal(later[1][:, :, :cut], d_q[:, :, :cut])
    yield f"law {dtype}: the future changes no bit of the past", same

    padded = [padding_changed(function, inputs, d_out, pads) for pads in (3, 150)]
    if device == "cuda":
        yield f"law {dtype}: the length of the padding changes no bit", all(map(torch.equal, *padded))
    else:  # the products of a CPU add up in an order that depends on how many there are
        near = [torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*padded, strict=True)]
        yield f"law {dtype}: the length of the padding does not matter", all(near)

    tolerance = TOLERANCE[dtype]
    with torch.no_grad():
        last = function(q[:, :, -1:], k, v, causal=True)
        near = torch.allclose(last.float(), out[:, :, -1:].float(), rtol=tolerance, atol=tolerance)
        yield f"law {dtype}: decoding is the end of the prefill", near

    expected = d_out.double().unflatten(1, (2, 4)).sum(dim=(2, 3))
    excess = (d_v.double().sum(dim=2) - expected).abs().max() / d_v.double().abs().sum(dim=2).max()
    yield f"law {dtype}: d_v sums to d_out", bool(excess <= tolerance)


def padding_changed(
    function: Callable, inputs: list[torch.Tensor], d_out: torch.Tensor, pads: int
) -> tuple[torch.Tensor, ...]:
    """out and gradients of the real tokens with large numbers behind them, which the mask leaves out."""
    fill = [3.0, 1e4, 1e4, 0.0]
    grown = [
        torch.cat((t.detach(), torch.full_like(t[:, :, :1], value).expand(-1, -1, pads, -1)), dim=2)
        for t, value in zip((*inputs, d_out), fill, strict=True)
    ]
    (batch, _, length, _), device = d_out.shape, d_out.device
    key_mask = (torch.arange(length + pads, device=device) < length).expand(batch, -1)
    tensors = [*(t.requires_grad_() for t in grown[:3]), grown[3]]
    return tuple(t[:, :, :length] for t in gradients(function, tensors, causal=True, key_mask=key_mask))


def repetitions(function: Callable, device: str, dim: int, times: int) -> Checks:
    """The same bits every time: programs that run side by side must not race."""
    length = 2048 if device == "cuda" else 40
    tensors = Work(2, 16, 2, length, length, dim, torch.bfloat16, device).tensors()
    first = gradients(function, tensors, causal=True)
    same = all(
        all(map(torch.equal, gradients(function, tensors, causal=True), first)) for _ in range(times)
    )  # one that differs ends it
    yield f"bits d {dim}: {times} times forward and backward", same
    q, k, v, _ = Work(4, 16, 1, 1, 8 * length, dim, torch.bfloat16, device).tensors()
    with torch.no_grad():
        last = function(q, k, v, causal=True)
        same = all(torch.equal(function(q, k, v, causal=True), last) for _ in range(times))
    yield f"bits d {dim}: {times} times a decoded token", same


def decoding(function: Callable, device: str, dtype: torch.dtype, size: Size) -> Checks:
    """One new query a row, over a long cache."""
    batch, num_keys, heads, kv_heads, dim = size
    for kind in ("", "padding"):
        *inputs, _ = Work(batch, heads, kv_heads, 1, num_keys, dim, dtype, device).tensors()
        options = {"causal": True, **masks_of(kind, batch, num_keys, device)}
        with torch.no_grad():
            truth = attention_reference(*(t.double() for t in inputs), **options)
            worst = error(function(*inputs, **options), truth)
        yield f"decode {dtype} {size} {kind}: {worst:.2f} of what is allowed", worst <= 1


def choices(device: str) -> Checks:
    """What `auto` takes for work that users have, which has to be right as well."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for batch, num_queries, num_keys, heads, kv_heads, dim in CHOSEN[device]:
        *inputs, _ = Work(batch, heads, kv_heads, num_queries, num_keys, dim, dtype, device).tensors()
        for kind in ("", "padding", "documents") if num_queries > 1 else ("", "padding"):
            options = {"causal": True, **masks_of(kind, batch, num_keys, device)}
            name = choose(*inputs, **options)
            with torch.no_grad():
                got = implementation("auto")(*inputs, **options)
                truth = attention_reference(*(t.float() for t in inputs), **options)
                # `fused` rounds more than once
                worst = error(got, truth) / (1 if name in ("triton", "chunked", "eager") else 4)
            shape = f"{batch} x {num_queries} queries of {num_keys} keys, {heads}/{kv_heads} heads, d {dim}"
            yield f"auto {shape} {kind or 'causal'}: {name}, {worst:.2f} of what is allowed", worst <= 1
