"""The kernels beside attention: in the interpreter, each part in a process of its own, and who may run them."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from palm_rlhf.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from palm_rlhf.ops.devices import why_not_triton
from palm_rlhf.ops.logprobs import chunks_are_faster, linear_logprobs, linear_logprobs_reference
from palm_rlhf.ops.rotary import rotary_split, rotary_tables
from palm_rlhf.ops.swiglu import swiglu

TYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.slow(38)
@pytest.mark.parametrize("name", ["test_fused_accuracy.py", "test_fused_laws.py", "test_eager_calls.py"])
def test_in_a_process(interpreted, name):
    interpreted(name)


def layer(dtype=torch.bfloat16, *, device="cuda", n=6, num_tokens=50) -> tuple[torch.Tensor, ...]:
    """Embeddings, output weights, tokens, as forms without content."""
    x, weight = (torch.empty(shape, dtype=dtype, device=device) for shape in ((n, 32), (num_tokens, 32)))
    return x, weight, torch.empty(n, dtype=torch.long, device=device)


def test_a_gpu_takes_them_for_what_they_can_compute():
    with FakeTensorMode():
        for dtype in TYPES:
            x, weight, _ = layer(dtype)
            assert why_not_triton(x, weight) is None and chunks_are_faster(x, weight)
            assert "float32" in why_not_triton(x, weight.double()) and "GPU" in why_not_triton(x.cpu(), weight)
            assert "GPU" in why_not_triton(*layer(dtype, device="cpu")[:2])
        assert "float32" in why_not_triton(*layer(torch.float64)[:2])


def test_each_operation_takes_them():
    with FakeTensorMode():
        x, weight, tokens = layer()
        assert linear_cross_entropy(x, weight, tokens, z_loss=1e-4).dtype == torch.float32
        said, entropy = linear_logprobs(x, weight, tokens)
        assert said.dtype == entropy.dtype == torch.float32 and said.shape == entropy.shape == (6,)
        gate, value = (torch.empty(2, 3, 8, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        assert swiglu(gate, value).shape == (2, 3, 8)
        qkv, angles = torch.empty(2, 5, 7, 16, device="cuda"), torch.empty(1, 5, 1, 16, device="cuda")
        parts = rotary_split(qkv, angles, angles, heads=3, kv_heads=2)
        assert [part.shape for part in parts] == [(2, 5, 3, 16), (2, 5, 2, 16), (2, 5, 2, 16)]
        assert all(part.device.type == "cuda" and part.is_contiguous() for part in parts)


@pytest.mark.parametrize(
    "function, operator", [(linear_cross_entropy, "linear_cross_entropy"), (linear_logprobs, "linear_logprobs")]
)
def test_a_compiled_graph_takes_the_output_layer_as_it_is(function, operator):
    calls = []

    def backend(graph, example_inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with FakeTensorMode():
        torch.compile(function, fullgraph=True, backend=backend)(*layer())
    assert [name for name in calls if "palm_rlhf" in name] == [f"palm_rlhf.{operator}.default"]


def test_without_triton_a_gpu_takes_what_it_took_before():
    code = """
import sys
sys.modules["triton"] = None  # what an import finds where Triton is not installed
import torch
from palm_rlhf.ops.devices import why_not_triton
from torch._subclasses.fake_tensor import FakeTensorMode
with FakeTensorMode():
    print(why_not_triton(torch.empty(2, device="cuda")) is None)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.strip() == "False", process.stderr


def test_kernels_on_a_gpu_equal_the_definitions(gpu):
    for dtype, tolerance in zip(TYPES, (1e-5, 2e-3, 1.5e-2), strict=True):
        x, weight = (torch.randn(n, 64, device=gpu).to(dtype).requires_grad_() for n in (300, 5000))
        tokens, counts = torch.randint(5000, (300,), device=gpu), torch.rand(300, device=gpu)
        options = {"weights": counts, "z_loss": 1e-2, "scale": 0.125}
        losses = [f(x, weight, tokens, **options) for f in (linear_cross_entropy, linear_cross_entropy_reference)]
        said = [
            sum((counts * t).sum() for t in f(x, weight, tokens, scale=0.125, entropy_needs_grad=True))
            for f in (linear_logprobs, linear_logprobs_reference)
        ]
        hidden = torch.randn(3, 100, 514, device=gpu).to(dtype).requires_grad_()
        gate, value = hidden.chunk(2, dim=-1)
        gated = [swiglu(gate, value), gate / (1 + (-gate).exp()) * value]
        pairs = [(*losses, (x, weight)), (*said, (x, weight)), (*(t.float().square().sum() for t in gated), (hidden,))]
        for ours, theirs, inputs in pairs:
            results = [[loss, *torch.autograd.grad(loss, inputs, retain_graph=True)] for loss in (ours, theirs)]
            for got, expected in zip(*results, strict=True):
                assert (got - expected).abs().max() <= 2 * tolerance * expected.abs().max()
        qkv = torch.randn(2, 50, 8, 64, device=gpu).to(dtype).requires_grad_()
        tables = [t.unsqueeze(-2) for t in rotary_tables(torch.arange(50, device=gpu)[None], 64)]
        parts = rotary_split(qkv, *tables, heads=4, kv_heads=2)
        (back,) = torch.autograd.grad(parts, qkv, parts)  # a rotation's transpose is its inverse
        assert (back - qkv).abs().max() <= 2 * tolerance * qkv.abs().max()
