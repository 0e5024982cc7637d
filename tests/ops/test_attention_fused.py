"""PyTorch's attention as it is called on a GPU: what the calls are, and that they compute the definition.

The calls are made on the CPU, whose kernels take them too; which kernel of a GPU they lead to, only a GPU can show.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from palm_rlhf.ops import attention_fused as module
from palm_rlhf.ops.attention import attention
from palm_rlhf.ops.attention_fused import attention_fused, for_every_head, may_plan, takes_groups
from tests.ops.test_attention import MASKS, assert_close, assert_equal, naive, qkv, run


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr("palm_rlhf.ops.attention_fused.GPUS", {"cpu"})


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("num_queries", [7, 3, 1])
def test_it_computes_the_definition(num_queries, causal, mask, as_on_a_gpu):
    inputs, options = qkv(num_queries, 7), {"causal": causal, **MASKS[mask]}
    assert_equal(run(attention_fused, inputs, **options), run(naive, inputs, **options))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_groups_share_a_key_head(kv_heads, as_on_a_gpu):
    for mask in ("plain", "holes"):
        inputs, options = qkv(7, 7, heads=6, kv_heads=kv_heads), {"causal": True, **MASKS[mask]}
        assert_equal(run(attention_fused, inputs, **options), run(naive, inputs, **options))


def test_a_query_that_sees_nothing_has_no_bad_gradients(as_on_a_gpu, monkeypatch):
    """With a kernel that makes NaN of it, as those of a GPU may; the one of the CPU does not."""
    original = F.scaled_dot_product_attention

    def with_nan(q, k, v, attn_mask, **options):
        hidden = attn_mask.isneginf().all(dim=-1, keepdim=True)
        return original(q, k, v, attn_mask=attn_mask, **options) + torch.where(hidden, torch.nan, 0.0) * v.sum()

    monkeypatch.setattr(F, "scaled_dot_product_attention", with_nan)
    options = {"causal": True, **MASKS["left padding"]}
    inputs = qkv(7, 7)
    assert_equal(run(attention_fused, inputs, **options), run(naive, inputs, **options))
    with torch.no_grad():
        assert torch.equal(attention_fused(*inputs, **options)[1, :, :6], torch.zeros(4, 6, 6, dtype=torch.float64))


def fakes(device="cuda", *, dtype=torch.bfloat16, dim=64, queries=256, keys=256, heads=4, kv_heads=2):
    shapes = (heads, queries), (kv_heads, keys), (kv_heads, keys)
    return [torch.empty(2, h, n, dim, device=device, dtype=dtype) for h, n in shapes]


class Calls(TorchDispatchMode):
    """Writes down the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_groups_are_named_only_where_a_fast_kernel_takes_them():
    with FakeTensorMode():
        for dtype, dim, masked, expected in (
            (torch.bfloat16, 64, False, True),
            (torch.float16, 256, False, True),
            (torch.bfloat16, 64, True, False),  # flash takes no mask, efficient no groups
            (torch.float32, 64, False, False),  # which flash does not take
            (torch.bfloat16, 320, False, False),
        ):
            assert takes_groups(fakes(dtype=dtype, dim=dim)[0], masked) == expected
    assert takes_groups(torch.empty(1, 4, 3, 320), True), "the kernel of the CPU takes all"


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_head_is_repeated_for_its_group(kv_heads):
    x = torch.arange(2 * kv_heads * 3 * 5.0).view(2, kv_heads, 3, 5)
    repeated = for_every_head(x, 4)
    for head in range(4):
        assert torch.equal(repeated[:, head], x[:, head // (4 // kv_heads)])
    assert kv_heads > 1 or repeated.data_ptr() == x.data_ptr(), "one head is not copied"


def test_cudnn_plans_for_whole_sequences_of_round_lengths():
    with FakeTensorMode():
        (q, *_) = fakes()
        for queries, keys, masked, expected in (
            (1024, 1024, False, True),
            (1024, 1024, True, False),
            (1000, 1000, False, False),
            (1, 1024, False, False),  # a cache
            (128, 1024, False, False),
        ):
            assert may_plan(q, queries, keys, masked) == expected
    assert may_plan(torch.empty(1, 1, 3, 8), 3, 3, True), "there is none on a CPU"


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_setting_of_the_process_comes_back(was_enabled, as_on_a_gpu, monkeypatch):
    seen = []
    original = F.scaled_dot_product_attention

    def look(*args, **options):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return original(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
        for length in (7, 128):
            attention(*qkv(length, length), causal=True, implementation="fused")
            assert torch.backends.cuda.cudnn_sdp_enabled() == was_enabled
        with pytest.raises(RuntimeError):
            attention_fused(*qkv(7, 8), causal=False, key_mask=torch.ones(9, 8, dtype=torch.bool))
        assert torch.backends.cuda.cudnn_sdp_enabled() == was_enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert seen == [False, was_enabled, False]


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_a_new_query_waits_for_nothing_and_has_few_operations(mask, as_on_a_gpu):
    """What a CUDA graph holds: no number is read back, and a mask costs one operation a layer."""
    masks = {} if mask == "none" else {"key_mask": torch.rand(2, 256) < 0.5}
    tensors = fakes("cpu", queries=1)
    views = ("view", "unsqueeze", "expand", "slice", "detach", "alias", "scalar_tensor")
    kernel = ["_scaled_dot_product_flash_attention_for_cpu"]
    first, later = (
        (kernel, kernel)
        if mask == "none"
        else (["_to_copy", "log_", "any", "bitwise_not", *kernel, "masked_fill_"], [*kernel, "masked_fill_"])
    )
    for expected in (first, later, later):  # of the layers of a model
        with torch.no_grad(), Calls() as calls:
            attention(*tensors, causal=True, **masks, implementation="fused")
        names = [name.removeprefix("aten::") for name in calls.names]
        names = [name.split(".")[0] for name in names if not name.startswith(views)]  # a kernel takes a number by value
        assert names == expected


@torch.no_grad()
def test_a_mask_that_has_changed_is_looked_at_again(as_on_a_gpu):
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, :4] = mask[1, 2:6] = mask[2] = False  # the last row sees nothing
    for change in (lambda: None, lambda: mask[0].fill_(True), lambda: mask[2, 3:5].fill_(True)):
        change()
        for seed, dtype in ((0, torch.float64), (1, torch.float32), (2, torch.float64)):
            inputs, options = qkv(1, 7, seed=seed, dtype=dtype), {"causal": True, "key_mask": mask}
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
            got = attention_fused(*inputs, **options)
            torch.testing.assert_close(got, naive(*inputs, **options), rtol=0, atol=tolerance)
    with torch.inference_mode():
        options = {"causal": True, "key_mask": mask.clone()}
        for _ in range(2):
            options["key_mask"][0] = ~options["key_mask"][0]
            torch.testing.assert_close(
                attention_fused(*inputs, **options), naive(*inputs, **options), rtol=0, atol=1e-12
            )


def test_a_graph_does_not_hold_what_was_computed_before_it(monkeypatch):
    """Else a replay would see the mask as it was when the graph was captured."""
    key_mask, (q, *_) = torch.ones(2, 256, dtype=torch.bool), fakes("cpu", queries=1)
    before = module._bias_of_mask(key_mask, q)
    assert module._bias_of_mask(key_mask, q) is before
    monkeypatch.setattr(module, "is_captured", lambda x: True)
    inside = module._bias_of_mask(key_mask, q)
    assert inside is not before and module._bias_of_mask(key_mask, q) is inside
    monkeypatch.setattr(module, "is_captured", lambda x: False)
    assert module._bias_of_mask(key_mask, q) is not inside, "whose memory is the graph's"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_call_needs_the_slowest_kernel_of_a_gpu(gpu, dtype):
    """With `math` switched off, PyTorch raises an error where no other kernel can compute."""
    fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for kv_heads, num_queries, mask in itertools.product((1, 2, 4), (128, 60, 1), ("none", "padding", "documents")):
        drawn = qkv(num_queries, 128, kv_heads=kv_heads, dim=64, dtype=dtype)
        inputs = [t.detach().to(gpu).requires_grad_() for t in drawn]
        columns = torch.arange(128, device=gpu).expand(3, 128)
        masks = {
            "none": {},
            "padding": {"key_mask": columns >= torch.tensor([[0], [128], [70]], device=gpu)},
            "documents": {"document_ids": columns // 50},
        }[mask]
        with sdpa_kernel(fast):
            got = run_there(inputs, causal=True, **masks, implementation="fused")
        expected = run_there(inputs, causal=True, **masks, implementation="eager")
        assert_close(got, expected, 3e-2 if dtype == torch.bfloat16 else 1e-3)


def run_there(inputs, **options):
    """`run` of attention, its direction drawn on the CPU."""
    return run(lambda *tensors, **rest: attention(*tensors, **rest).cpu(), inputs, **options)


def test_a_replay_sees_the_mask_of_its_time(gpu):
    q, k, v = (t.detach().to(gpu) for t in qkv(1, 128, dim=64, dtype=torch.bfloat16))
    key_mask = torch.ones(3, 128, dtype=torch.bool, device=gpu)
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(q)

    def step():
        out.copy_(attention(q, k, v, causal=True, key_mask=key_mask, implementation="fused"))

    with torch.no_grad():
        step()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            step()
        key_mask[:, 50:] = False
        graph.replay()
        expected = attention(q, k, v, causal=True, key_mask=key_mask, implementation="eager")
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-2)
