"""FlexAttention: its block mask against the definition of what is visible, and the kernel that a CPU can compile."""

import itertools

import pytest
import torch

from palm_rlhf.ops import attention_flex as module
from palm_rlhf.ops import devices
from palm_rlhf.ops.attention import attention, choose, forget_choices
from palm_rlhf.ops.attention_choices import PACKAGED, ChoiceTable, use_table
from palm_rlhf.ops.attention_flex import BLOCK, block_mask, mask_for, why_not_flex
from palm_rlhf.ops.attention_reference import visibility
from palm_rlhf.ops.devices import available_implementations
from tests.ops.test_attention import MASKS, assert_close, qkv, run

needs_a_compiler = pytest.mark.skipif(
    available_implementations("cpu")["flex"] is not None, reason="needs a C++ compiler and AVX2"
)


def masks_of(num_keys: int, padded: bool, documents: str) -> dict[str, torch.Tensor]:
    """A key mask that hides a whole block and more, and documents in order, in pieces, or with padding's own id."""
    generator = torch.Generator().manual_seed(num_keys)
    masks = {}
    if padded:
        masks["key_mask"] = torch.rand(3, num_keys, generator=generator) < 0.7
        masks["key_mask"][0] = True
        masks["key_mask"][1, : num_keys // 2] = False
    drawn = torch.randint(5, (3, num_keys), generator=generator) - 2
    if documents == "in order":
        masks["document_ids"] = drawn.sort(dim=-1).values
    elif documents == "in pieces":
        masks["document_ids"] = drawn
    return masks


SHAPES = [(300, 300), (256, 256), (7, 7), (100, 300), (1, 130), (257, 400), (256, 382)]  # 382: a block but for one key


@pytest.mark.parametrize("documents", ["none", "in order", "in pieces"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_blocks_hold_what_is_visible(causal, padded, documents):
    """The mask inside blocks is the definition; blocks with no mask see all; what is left out, nobody sees."""
    for num_queries, num_keys in SHAPES:
        masks = masks_of(num_keys, padded, documents)
        got = block_mask(num_queries, num_keys, causal, **masks)
        visible = visibility(num_queries, num_keys, causal=causal, **masks)
        visible = torch.ones(1, num_queries, num_keys, dtype=torch.bool) if visible is None else visible
        rows, columns = torch.arange(num_queries).view(-1, 1), torch.arange(num_keys)
        for b in range(len(visible)):
            inside = got.mask_mod(torch.tensor(b), torch.tensor(0), rows, columns)
            assert torch.equal(inside.expand(num_queries, num_keys), visible[b])
        partial, full = (
            dense_blocks(numbers, indices)
            for numbers, indices in ((got.kv_num_blocks, got.kv_indices), (got.full_kv_num_blocks, got.full_kv_indices))
        )
        assert not (partial & full).any()
        padding = (0, -num_keys % BLOCK, 0, -num_queries % BLOCK)
        blocks = torch.nn.functional.pad(visible, padding).unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK))
        assert torch.equal(full, full & blocks.all(dim=4).all(dim=2)), "a block without a mask hides a key"
        assert not (blocks.any(dim=4).any(dim=2) & ~partial & ~full).any(), "a block that someone sees is left out"


def dense_blocks(num_blocks: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Which blocks are listed: `b 1 i`, `b 1 i j` -> `b i j`."""
    dense = torch.zeros(indices.shape[0], *indices.shape[2:], dtype=torch.bool)
    for b, i in itertools.product(range(len(dense)), range(dense.shape[1])):
        dense[b, i, indices[b, 0, i, : num_blocks[b, 0, i]].long()] = True
    return dense


def test_blocks_that_nobody_sees_are_left_out():
    """Four documents of two blocks each, and padding at the end: what remains, counted by hand."""
    ids = (torch.arange(1024) // 256).unsqueeze(0)
    got = block_mask(1024, 1024, True, document_ids=ids)
    # of each document the block below the diagonal is whole, the two on it are masked
    assert got.full_kv_num_blocks.flatten().tolist() == [0, 1] * 4
    assert got.kv_num_blocks.flatten().tolist() == [1] * 8
    kept = torch.arange(1024).unsqueeze(0) < 512
    got = block_mask(1024, 1024, True, key_mask=kept)
    assert got.kv_num_blocks.flatten().tolist() == [1] * 4 + [0] * 4
    assert got.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 3, 4, 4, 4, 4]


def test_layers_share_a_block_mask():
    q, k, _ = qkv(7, 7)
    ids = torch.zeros(3, 7, dtype=torch.long)
    first = mask_for(q, k, causal=True, document_ids=ids)
    assert mask_for(q, k, causal=True, document_ids=ids) is first
    assert mask_for(q, k, causal=False, document_ids=ids) is not first
    assert mask_for(q, k, causal=True, document_ids=ids.clone()) is not mask_for(q, k, causal=True, document_ids=ids)
    assert mask_for(q[:, :, :3], k, causal=True, document_ids=ids).shape[-2:] == (3, 7)


def test_a_mask_that_was_overwritten_is_built_anew():
    q, k, _ = qkv(7, 7)
    keep = torch.ones(3, 7, dtype=torch.bool)
    first = mask_for(q, k, causal=True, key_mask=keep)
    keep[:, 0] = False
    assert mask_for(q, k, causal=True, key_mask=keep) is not first
    with torch.inference_mode():  # whose tensors do not count their changes
        keep = torch.ones(3, 7, dtype=torch.bool)
        assert mask_for(q, k, causal=True, key_mask=keep) is not mask_for(q, k, causal=True, key_mask=keep)


def tensors(dtype=torch.bfloat16, dim=64, device="meta") -> list[torch.Tensor]:
    return [torch.empty(2, heads, 9, dim, dtype=dtype, device=device) for heads in (4, 2, 2)]


@pytest.mark.parametrize(
    "case, device_type, reason",
    [
        (tensors(torch.float64), "cpu", "torch.float64"),
        (tensors(dim=8), "cpu", "heads have 8 dimensions; it takes 16 to 256"),
        (tensors(dim=512), "cpu", "heads have 512 dimensions; it takes 16 to 256"),
        (tensors(), "mps", "not on mps"),
        ([t.requires_grad_() for t in tensors()], "cpu", "no gradients on a CPU"),
        (tensors(), "cpu", None),
    ],
)
@needs_a_compiler
def test_each_refusal_has_its_reason(case, device_type, reason):
    got = why_not_flex(*case, device_type)
    assert got is None if reason is None else reason in got
    with torch.no_grad():
        assert reason != "no gradients on a CPU" or why_not_flex(*case, device_type) is None


def test_older_versions_take_powers_of_two(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.7.1"))
    assert "before torch 2.8 it takes powers of 2" in why_not_flex(*tensors(dim=96), "cuda")
    assert why_not_flex(*tensors(dim=128), "cuda") is None
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0"))
    assert why_not_flex(*tensors(dim=96), "cuda") is None


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    reason = devices._find_why_not_flex_on.__wrapped__("cpu")
    assert reason in ("there is no C++ compiler", "on a CPU it needs Linux and AVX2")


def test_a_named_one_with_gradients_is_refused_on_a_cpu():
    with pytest.raises(ValueError, match='implementation="flex" cannot run here: '):
        attention(*qkv(7, 7, dim=16, dtype=torch.float32), causal=True, implementation="flex")


@pytest.fixture
def flex_first():
    """A table that ranks FlexAttention first on a CPU, then the definition."""
    entries = ChoiceTable.load(PACKAGED).entries
    entries["cpu"]["defaults"]["sequence"]["documents"] = ["flex", "eager"]
    use_table(ChoiceTable(entries))
    yield
    use_table(None)
    module._failure = None
    forget_choices()


@needs_a_compiler
@pytest.mark.slow(14)
def test_auto_goes_on_without_it_where_it_does_not_compile(flex_first, monkeypatch, tmp_path):
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    module._compiled.cache_clear()
    q, k, v = (t.detach() for t in qkv(7, 7, dim=16, dtype=torch.float32))
    masks = {"causal": True, **MASKS["documents"]}
    assert choose(q, k, v, **masks) == "flex"
    with config.patch({"cpp.cxx": ("false",)}), pytest.warns(UserWarning, match="left out: it did not compile"):
        out = attention(q, k, v, **masks)
    assert torch.equal(out, attention(q, k, v, **masks, implementation="eager"))
    assert choose(q, k, v, **masks) == "eager" and "did not compile" in why_not_flex(q, k, v)


@needs_a_compiler
@pytest.mark.slow(25)
@pytest.mark.parametrize("num_queries, kv_heads, masked", [(300, 2, True), (100, 4, False)])
def test_the_compiled_kernel_equals_the_definition(num_queries, kv_heads, masked):
    """That of a CPU, which takes the same blocks and masks as that of a GPU."""
    masks = masks_of(300, True, "in order") if masked else {}
    q, k, v = (t.detach() for t in qkv(num_queries, 300, kv_heads=kv_heads, dim=16, dtype=torch.float32))
    out = attention(q, k, v, causal=True, **masks, implementation="flex")
    expected = attention(q.double(), k.double(), v.double(), causal=True, **masks, implementation="eager")
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    if masked:
        hidden = ~visibility(num_queries, 300, causal=True, **masks).any(dim=-1)
        assert hidden.any() and not out.transpose(1, 2)[hidden].any(), "a query that sees no key returns 0"


@needs_a_compiler
def test_it_is_part_of_one_graph():
    """Without its compiler: the graph's own operators compute it."""

    def function(q, k, v, ids):
        return attention(q, k, v, causal=True, document_ids=ids, implementation="flex")

    torch.compiler.reset()
    inputs = [t.detach() for t in qkv(200, 200, dim=16, dtype=torch.float32)]
    ids = masks_of(200, False, "in order")["document_ids"]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = attention(*inputs, causal=True, document_ids=ids, implementation="eager")
    torch.testing.assert_close(compiled(*inputs, ids), expected, rtol=0, atol=2e-6)


def test_each_kind_of_call_has_a_code_of_its_own():
    """torch.compile counts by code how often it compiled; calls of one kind share theirs."""
    code = [
        module._compiled(*kind)._torchdynamo_orig_callable.__code__ for kind in (("cpu", 2), ("cpu", 3), ("cpu", 2))
    ]
    assert code[0] is code[2] and code[0] is not code[1] and code[0].co_code == code[1].co_code


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_near_the_definition_with_gradients_on_a_gpu(gpu, kv_heads):
    """At several lengths, of which the later ones are compiled as symbols."""
    for length, mask in ((300, "documents"), (257, "documents"), (640, "documents"), (300, "left padding")):
        drawn = qkv(length, length, kv_heads=kv_heads, dim=64, dtype=torch.bfloat16)
        inputs = [t.detach().to(gpu).requires_grad_() for t in drawn]
        masks = masks_of(length, mask == "left padding", "in order" if mask == "documents" else "none")
        masks = {name: t.to(gpu) for name, t in masks.items()}
        names = {"implementation": "flex"}, {"implementation": "eager"}
        got, expected = (
            run(lambda *t, **options: attention(*t, causal=True, **options).cpu(), inputs, **masks, **name)
            for name in names
        )
        assert_close(got, expected, 3e-2)
        with torch.no_grad():  # a whole sequence has the same bits without gradients
            out = attention(*inputs, causal=True, **masks, implementation="flex")
        assert torch.equal(out.cpu(), got[0])
