"""Eager calls go to the launchers themselves; only code that is traced or watched gets operators of PyTorch."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from palm_rlhf import PaLM
from palm_rlhf.ops.triton.fused_attention import attention_triton
from palm_rlhf.ops.triton.fused_cross_entropy import linear_cross_entropy_triton
from palm_rlhf.ops.triton.fused_logprobs import linear_logprobs_triton
from palm_rlhf.ops.triton.fused_rotary import rotary_split_triton
from palm_rlhf.ops.triton.fused_swiglu import swiglu_triton
from tests.factories import SERIAL

F32 = torch.float32


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def attend(q: Tensor, k: Tensor) -> Tensor:
    ids = torch.arange(20).div(7, rounding_mode="floor").expand(2, -1)
    return attention_triton(q, k, k.flip(-1), causal=True, key_mask=torch.ones(2, 20).bool(), document_ids=ids)


def decode(q: Tensor, k: Tensor) -> Tensor:
    return attention_triton(q[:, :, -1:], k, k, causal=True)


def cross_entropy(x: Tensor, weight: Tensor) -> Tensor:
    return linear_cross_entropy_triton(x, weight, torch.arange(20), torch.ones(20), 0.5, 0.1, F32)


def logprobs(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack(linear_logprobs_triton(x, weight, torch.arange(20), 0.5, F32, True))


def frozen_logprobs(x: Tensor, weight: Tensor) -> Tensor:
    return torch.stack(linear_logprobs_triton(x, weight.detach(), torch.arange(20), 0.5, F32, False))


def rotate(qkv: Tensor) -> Tensor:
    angles = torch.linspace(0, 3, 20)[None, :, None, None].expand(1, 20, 1, 16).contiguous()
    return torch.cat(rotary_split_triton(qkv, angles.cos(), angles.sin(), heads=3, kv_heads=1), dim=-2)


CALLS = {
    attend: ((2, 4, 20, 16), (2, 2, 20, 16)),
    decode: ((2, 4, 20, 16), (2, 2, 20, 16)),
    cross_entropy: ((20, 16), (70, 16)),
    logprobs: ((20, 16), (70, 16)),
    frozen_logprobs: ((20, 16), (70, 16)),
    rotate: ((2, 20, 5, 16),),
    swiglu_triton: ((3, 40), (3, 40)),
}
OPERATORS = {
    attend: {"attention_forward", "attention_backward"},
    decode: {"attention_decode"},
    cross_entropy: {"linear_cross_entropy"},
    logprobs: {"linear_logprobs", "linear_logprobs_backward"},
    frozen_logprobs: {"linear_logprobs"},
    rotate: {"rotary_split", "rotary_join"},
    swiglu_triton: {"swiglu_forward", "swiglu_backward"},
}


class Operators(TorchDispatchMode):
    """The names of our operators that are called within it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "palm_rlhf":
            self.names.add(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


def dispatched(run) -> tuple[object, set[str]]:
    """What a function returns, and our operators that PyTorch's dispatcher has run meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = run()
    names = {event.name for event in profile.events()}
    assert any(name.startswith("aten::") for name in names)
    return result, {name.partition("::")[2] for name in names if name.startswith("palm_rlhf::")}


def results_of(function, inputs: list[Tensor], needs_grad: bool) -> list[Tensor]:
    """The result, and with gradients also those."""
    if not needs_grad:
        with torch.no_grad():
            return [function(*inputs)]
    out = function(*inputs)
    d_out = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out, allow_unused=True)]


RUNS = [
    (function, needs_grad)
    for function in CALLS
    for needs_grad in (False, True)
    if not (needs_grad and function is decode)
]


@pytest.mark.parametrize(
    "function, needs_grad", RUNS, ids=lambda value: getattr(value, "__name__", f"gradients {value}")
)
def test_eager_calls_dispatch_no_operator_and_compiled_ones_do(function, needs_grad):
    """Both return the same bits."""
    inputs = leaves(*CALLS[function])
    eager, names = dispatched(lambda: results_of(function, inputs, needs_grad))
    assert names == set()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    traced, names = dispatched(lambda: results_of(compiled, inputs, needs_grad))
    assert names == {name for name in OPERATORS[function] if needs_grad or not name.endswith(("backward", "join"))}
    for got, expected in zip(traced, eager, strict=True):
        assert torch.equal(got, expected) if expected is not None else got is None


@pytest.mark.parametrize("function", [attend, cross_entropy, logprobs, frozen_logprobs, rotate, swiglu_triton])
def test_gradients_are_not_differentiated_again_in_silence(function):
    inputs = leaves(*CALLS[function])
    (gradient, *_) = torch.autograd.grad(function(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("options", [{}, SERIAL], ids=["parallel", "serial"])
def test_a_training_step_dispatches_no_operator_and_a_mode_sees_all(options, monkeypatch):
    """Gradients of both are the same bits."""
    monkeypatch.setattr("palm_rlhf.ops.devices.GPUS", {"cpu"})
    monkeypatch.setattr("palm_rlhf.ops.attention.choose", lambda *tensors, **masks: "triton")
    palm = PaLM(num_tokens=37, dim=24, depth=2, heads=3, dim_head=8, ff_mult=2, **options)
    watched, tokens = copy.deepcopy(palm), torch.randint(37, (2, 8))
    _, names = dispatched(lambda: palm(tokens, return_loss=True).backward())
    assert names == set()
    with Operators() as operators:
        watched(tokens, return_loss=True).backward()
    expected = set().union(*(OPERATORS[function] for function in (attend, cross_entropy, rotate, swiglu_triton)))
    assert operators.names == expected
    for one, other in zip(palm.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad) and one.grad.any()
