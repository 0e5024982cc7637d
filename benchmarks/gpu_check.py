"""Fused attention on a GPU: is it exact at real sizes, does it keep its laws, are its bits the same every time?

python benchmarks/gpu_check.py                # all checks, then timings beside PyTorch's and published ones
python benchmarks/gpu_check.py --device cpu   # the same checks of the CPU's attention, at small sizes; in Triton's
                                              # interpreter, where TRITON_INTERPRET=1 is set, of the kernels

Exits with 0 where every check passes, 1 where one fails, 3 where there is no GPU to check.
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import tyro
from attention_work import TOLERANCE, Work, errors, exact, gradients, implementation
from side_by_side import alternate, surroundings

from palm_rlhf.ops.attention_reference import attention_reference
from palm_rlhf.ops.devices import available_implementations

NO_GPU = 3
DTYPES = {"cuda": (torch.float32, torch.float16, torch.bfloat16), "cpu": (torch.float32,)}
SIZES = {  # queries, keys, heads, key heads, d
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
MASKS = ("", "keys", "padding", "documents")
MAX_RATIO = (2, 3, 3, 3)  # of root mean square errors, to those of the eager definition: out and gradients
EAGER_FROM = 17  # queries; shorter, an error is chance
ROUNDS = {"cuda": 20, "cpu": 2}
# TFLOP/s of causal attention of 8k tokens, d 128, 16-bit, on an H100 (Shah et al. 2024, FlashAttention-3).
PUBLISHED = {"forward": {"Triton": 369, "FlashAttention-3": 602}, "both": {"FlashAttention-2": 308}}


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


def accuracy(function: Callable, device: str) -> Iterator[tuple[str, bool]]:
    """The definition in float64 within what each type allows, and not far from the eager definition in that type."""
    for dtype in DTYPES[device]:
        for size in SIZES[device]:
            for kind in MASKS:
                work = Work(2, size[2], size[3], size[0], size[1], size[4], dtype, device)
                options = {"causal": True, **masks_of(kind, 2, work.num_keys, device)}
                tensors = work.tensors()
                truth, got = exact(tensors, **options), gradients(function, tensors, **options)
                worst = max(errors(got, truth).values())
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


def laws(function: Callable, device: str) -> Iterator[tuple[str, bool]]:
    """What holds for any attention, to the last bit where it says so."""
    length = 2048 if device == "cuda" else 90
    for dtype in DTYPES[device]:
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


def repetitions(function: Callable, device: str, times: int) -> Iterator[tuple[str, bool]]:
    """The same bits every time: programs that run side by side must not race."""
    length = 2048 if device == "cuda" else 40
    for dim in (64, 128):
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


def step_of(function: Callable, tensors: list[torch.Tensor], direction: str) -> Callable[[], object]:
    """One pass."""
    if direction == "both":
        return lambda: gradients(function, tensors, causal=True)
    return lambda: function(*(t.detach() for t in tensors[:3]), causal=True)


def timings(function: Callable, device: str) -> list[dict[str, object]]:
    """Speeds beside PyTorch's fused attention, with what others published for an H100."""
    length, batch = (8192, 2) if device == "cuda" else (64, 1)
    lines = []
    for dim in (64, 128):
        work = Work(batch, 16, 16, length, length, dim, torch.bfloat16, device)
        tensors = work.tensors()
        for direction in ("forward", "both"):
            steps = {
                "ours": step_of(function, tensors, direction),
                "PyTorch": step_of(implementation("fused"), tensors, direction),
            }
            medians = {name: statistics.median(s) for name, s in alternate(steps, rounds=ROUNDS[device]).items()}
            speeds = {name: work.flops(direction) / seconds / 1e12 for name, seconds in medians.items()}
            published = PUBLISHED[direction] if dim == 128 and device == "cuda" else {}
            lines.append({"direction": direction, "n": length, "d": dim, "tflops": speeds, "published": published})
    return lines


def run_checks(function: Callable, device: str, repeats: int) -> list[str]:
    """Print every check, and the names of those that fail."""
    failed = []
    for checks in (accuracy(function, device), laws(function, device), repetitions(function, device, repeats)):
        for name, passed in checks:
            print(f"{'passed' if passed else 'FAILED'}  {name}", flush=True)
            if not passed:
                failed.append(name)
    return failed


def main(device: Literal["cuda", "cpu"] = "cuda", repeats: int = 1000) -> None:
    """Check fused attention on a GPU, or the attention of the CPU at small sizes, and time it.

    Args:
        device: Where.
        repeats: How often the bits of a result are compared.
    """
    if device == "cuda" and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none, so nothing was checked; --device cpu checks the CPU's")
        sys.exit(NO_GPU)
    refusal = available_implementations(device)["triton"]
    if device == "cuda" and refusal is not None:
        print(f"FAILED  the kernels cannot run here: {refusal}")
        sys.exit(1)
    name = "triton" if refusal is None else "chunked"
    function = implementation(name)
    print(f"{name} attention on {device}\n")
    failed = run_checks(function, device, repeats)
    interpreted = name == "triton" and device == "cpu"  # its time is no speed
    lines = [] if interpreted else timings(function, device)
    print()
    for line in lines:
        speeds = {**line["tflops"], **{f"{who}, published": speed for who, speed in line["published"].items()}}
        text = ", ".join(f"{who} {speed:.1f}" for who, speed in speeds.items())
        print(f"{line['direction']:8} n {line['n']} d {line['d']:3}  TFLOP/s: {text}")
    print(
        json.dumps({"check": "attention", "implementation": name, "failed": failed, **surroundings(), "timings": lines})
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    tyro.cli(main)
