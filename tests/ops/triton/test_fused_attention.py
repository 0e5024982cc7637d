"""Fused attention in Triton: its kernels in the interpreter, each part in a process of its own, and who may run it."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from palm_rlhf.ops.attention import attention, choose
from palm_rlhf.ops.attention_choices import PACKAGED, ChoiceTable, use_table
from palm_rlhf.ops.devices import available_implementations


@pytest.mark.slow(140)
@pytest.mark.parametrize(
    "name", ["test_attention_accuracy.py", "test_attention_laws.py", "test_attention_descriptors.py"]
)
def test_in_a_process(interpreted, name):
    interpreted(name)


def run_python(code: str, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def fakes(dtype=torch.bfloat16, *, device="cuda", num_queries=50, dim=32) -> list[torch.Tensor]:
    shapes = (2, 4, num_queries, dim), *[(2, 2, 50, dim)] * 2
    return [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]


@pytest.fixture
def triton_first():
    """A table that ranks the kernels first, as a GPU where they are fastest has it."""
    entries = copy.deepcopy(ChoiceTable.load(PACKAGED).entries)
    for entry in entries.values():
        for by_mask in entry["defaults"].values():
            by_mask.update({mask: ["triton", "chunked"] for mask in by_mask})
    use_table(ChoiceTable(entries))
    yield
    use_table(None)


def test_auto_takes_it_on_a_gpu_for_what_it_can_compute(triton_first):
    with FakeTensorMode():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert choose(*fakes(dtype), causal=True) == "triton"
        assert choose(*fakes(torch.float64), causal=True) == "chunked"
        assert choose(*fakes(dim=512), causal=True) == "chunked"
        assert choose(*fakes(device="cpu"), causal=True) == "chunked"


@pytest.mark.parametrize("num_queries, operator", [(50, "attention_forward"), (1, "attention_decode")])
def test_auto_takes_it_in_a_compiled_graph_too(num_queries, operator, triton_first):
    calls = []

    def backend(graph, example_inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda *tensors: attention(*tensors, causal=True), fullgraph=True, backend=backend)
    with FakeTensorMode():
        compiled(*fakes(num_queries=num_queries))
    assert [name for name in calls if "palm_rlhf" in name] == [f"palm_rlhf.{operator}.default"]


class Operators(TorchDispatchMode):
    """Writes down which of our operators are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "palm_rlhf":
            self.names.append(function.name().removeprefix("palm_rlhf::"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_queries, num_keys", [(50, 50), (4, 4), (1, 1), (1, 50), (4, 50)])
def test_without_gradients_whole_sequences_take_the_kernel_of_training(num_queries, num_keys):
    """However short they are: what a policy said is compared bit by bit with what it says in training."""
    with FakeTensorMode():
        lengths = num_queries, num_keys, num_keys
        q, k, v = (torch.empty(2, 4, length, 32, device="cuda", dtype=torch.bfloat16) for length in lengths)
        with Operators() as operators:
            attention(q, k, v, causal=True, implementation="triton")
    assert operators.names == ["attention_decode" if num_queries < num_keys else "attention_forward"]


@pytest.mark.parametrize("num_queries", [50, 1])
def test_results_lie_in_memory_as_the_model_joins_heads(num_queries):
    with FakeTensorMode():
        out = attention(*fakes(num_queries=num_queries), causal=True, implementation="triton")
        assert out.shape == (2, 4, num_queries, 32) and out.dtype == torch.bfloat16 and out.device.type == "cuda"
        assert out.transpose(1, 2).is_contiguous()


@pytest.mark.slow(6)
def test_each_refusal_has_its_reason():
    code = "from palm_rlhf.ops.devices import available_implementations as f; print(f('cpu')['triton'])"
    assert "TRITON_INTERPRET=1" in run_python(code, TRITON_INTERPRET="0")
    version = "import triton; triton.__version__ = '{}'; import numpy; numpy.__version__ = '{}'; " + code
    assert "install numpy<2.4" in run_python(version.format("3.6.0", "2.4.0"), TRITON_INTERPRET="1")
    assert run_python(version.format("3.6.0", "2.3.5"), TRITON_INTERPRET="1") == "None"
    assert run_python(version.format("3.10.0+git1", "2.4.0"), TRITON_INTERPRET="1") == "None"
    assert "mps" in available_implementations("mps")["triton"]


def test_a_named_one_is_refused_with_the_reason():
    with FakeTensorMode():
        with pytest.raises(ValueError, match=r"float64.* it takes one of .*float32"):
            attention(*fakes(torch.float64), causal=True, implementation="triton")
        with pytest.raises(ValueError, match="heads have 512 dimensions; it takes up to 256"):
            attention(*fakes(dim=512), causal=True, implementation="triton")
        q, k, v = fakes()
        with pytest.raises(ValueError, match=r"q, k and v are torch.bfloat16, torch.bfloat16 and torch.float32"):
            attention(q, k, v.float(), causal=True, implementation="triton")


def test_programs_are_split_until_they_fill_the_machine():
    from palm_rlhf.ops.triton.attention_decode import choose_splits
    from palm_rlhf.ops.triton.attention_keys_backward import rows_of_share, shares
    from palm_rlhf.ops.triton.tiles import Tile

    splits = [
        choose_splits(programs, num_keys, 108) for programs, num_keys in ((4, 16384), (4, 1024), (4, 7), (300, 16384))
    ]
    assert splits == [64, 4, 1, 1]
    assert [shares(blocks, 108) for blocks in (8, 64, 128, 512, 1024)] == [16, 16, 8, 2, 1]
    tile = Tile(96, 64, 4)  # a share is a number of whole tiles, and the same for all lengths up to the next power of 2
    assert [rows_of_share(length, 3, 4, tile) for length in (2048, 2049, 4096)] == [1536, 3072, 3072]
    assert rows_of_share(5, 3, 16, tile) == 576


def test_kernels_on_a_gpu_equal_the_definition(gpu):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)):
        q, k, v = (torch.randn(2, h, 300, 64, device=gpu, dtype=dtype, requires_grad=True) for h in (6, 2, 2))
        results = []
        for implementation in ("triton", "eager"):
            out = attention(q, k, v, causal=True, implementation=implementation)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
        for got, expected in zip(*results, strict=True):
            assert (got - expected).abs().max() <= 2 * tolerance * expected.abs().max()
