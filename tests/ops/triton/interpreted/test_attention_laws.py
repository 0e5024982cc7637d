"""Laws of fused attention that need no other attention, its operators, and a PaLM that trains and generates with it."""

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from palm_rlhf import PaLM
from palm_rlhf.ops.attention import attention
from palm_rlhf.ops.devices import available_implementations
from palm_rlhf.ops.triton import attention_backward, attention_forward, tiles
from palm_rlhf.ops.triton.attention_backward import backward
from palm_rlhf.ops.triton.attention_decode import decode
from palm_rlhf.ops.triton.attention_forward import forward
from palm_rlhf.ops.triton.tiles import Tile

triton = functools.partial(attention, implementation="triton")
eager = functools.partial(attention, implementation="eager")
CAUSAL = {"causal": True}


def qkv(num_queries: int, num_keys: int, *, heads=4, kv_heads=2, dim=32, batch=2) -> list[Tensor]:
    shapes = (batch, heads, num_queries, dim), *[(batch, kv_heads, num_keys, dim)] * 2
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def run(inputs: list[Tensor], d_out: Tensor | None = None, function=triton, **options) -> list[Tensor]:
    """The result and the gradients."""
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.ones_like(out) if d_out is None else d_out)]


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_it_can_run_here():
    assert available_implementations("cpu")["triton"] is None


def test_the_future_changes_no_bit_of_the_past():
    q, k, v = qkv(90, 90)
    d_out = torch.randn_like(q)
    out, d_q, _, _ = run([q, k, v], d_out, **CAUSAL)
    for cut in (1, 64, 65):
        new_k, new_v = (t.detach().clone() for t in (k, v))
        new_k[:, :, cut:], new_v[:, :, cut:] = torch.randn(2, *k[:, :, cut:].shape) * 9
        changed = run([q, new_k.requires_grad_(), new_v.requires_grad_()], d_out, **CAUSAL)
        assert torch.equal(changed[0][:, :, :cut], out[:, :, :cut])
        assert torch.equal(changed[1][:, :, :cut], d_q[:, :, :cut])
        assert not torch.equal(changed[0][:, :, cut:], out[:, :, cut:])


@pytest.mark.parametrize("length", [17, 64])
def test_the_length_of_the_padding_changes_no_bit(length):
    """Whatever stands in the pads, and however many they are."""
    results = []
    for padding in (3, 50):
        torch.manual_seed(length)
        real = qkv(length, length)
        d_real = torch.randn_like(real[0])
        q, k, v, d_out = (
            torch.cat((t, torch.full_like(t[:, :, :1], pad).expand(-1, -1, padding, -1)), dim=2)
            for t, pad in zip((*real, d_real), (3.0, 1e30, 1e30, 0.0), strict=True)
        )
        key_mask = (torch.arange(length + padding) < length).expand(2, -1)
        results.append([t[:, :, :length] for t in run([q, k, v], d_out, **CAUSAL, key_mask=key_mask)])
    for short, long in zip(*results, strict=True):
        assert torch.equal(short, long)
    assert_close(results[0], run(real, d_real, **CAUSAL))


def test_left_padding_equals_none():
    real = qkv(40, 40)
    d_real = torch.randn_like(real[0])
    inputs, d_out = [torch.cat((torch.randn_like(t), t), dim=2) for t in real], torch.cat((d_real, d_real), dim=2)
    d_out[:, :, :40] = 0
    got = run(inputs, d_out, **CAUSAL, key_mask=(torch.arange(80) >= 40).expand(2, -1))
    assert_close([t[:, :, 40:] for t in got], run(real, d_real, **CAUSAL))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_packed_documents_equal_separate_ones(causal):
    inputs = qkv(150, 150, batch=1)
    d_out, lengths = torch.randn_like(inputs[0]), [70, 1, 66, 13]
    ids = torch.repeat_interleave(torch.tensor([5, -3, 2**40, 0]), torch.tensor(lengths)).unsqueeze(0)
    got = run(inputs, d_out, causal=causal, document_ids=ids)
    parts = zip(*(t.split(lengths, dim=2) for t in (*inputs, d_out)), strict=True)
    separate = [run(list(part), d, causal=causal) for *part, d in parts]
    assert_close(got, [torch.cat(ts, dim=2) for ts in zip(*separate, strict=True)])


def test_d_v_sums_to_d_out():
    """The weights of a row sum to 1, so what it sends back to all values is its own gradient."""
    inputs = qkv(70, 90)
    inputs[2] = torch.ones_like(inputs[2], requires_grad=True)
    d_out = torch.randn_like(inputs[0])
    out, _, _, d_v = run(inputs, d_out, **CAUSAL)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=1e-6)
    expected = d_out.unflatten(1, (2, 2)).sum(dim=(2, 3))  # over the heads of a group, and the queries
    torch.testing.assert_close(d_v.sum(dim=2), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_row_that_sees_nothing_is_zero_and_passes_nothing_back(dtype):
    key_mask = torch.stack((torch.arange(70) >= 66, torch.arange(70) > 70))
    inputs = [t.detach().to(dtype).requires_grad_() for t in qkv(70, 70)]
    out, d_q, d_k, d_v = results = run(inputs, **CAUSAL, key_mask=key_mask)
    assert all(t.isfinite().all() for t in results)
    assert not any(t[1].any() for t in results)
    assert not any(t[0, :, :66].any() for t in results)
    assert out[0, :, 66:].all() and d_v[0, :, 66:].all() and d_q[0, :, 67:].any() and d_k[0, :, 66:].any()


@pytest.mark.parametrize("dim", [32, 80, 256])
def test_a_row_that_sees_one_key_passes_no_bit_back_to_its_score(dim):
    """Its weight is 1, whatever the score."""
    _, d_q, d_k, d_v = run(qkv(1, 1, dim=dim), torch.randn(2, 4, 1, dim), **CAUSAL)
    assert not d_q.any() and not d_k.any() and d_v.all()
    _, d_q, _, _ = run(qkv(12, 12, dim=dim, batch=1), torch.randn(1, 4, 12, dim), **CAUSAL)
    assert not d_q[:, :, 0].any() and d_q[:, :, 1:].all()


def test_large_scores_do_not_overflow():
    inputs = [t.detach().mul(100).requires_grad_() for t in qkv(70, 70)]
    got, expected = (run(inputs, **CAUSAL, function=function) for function in (triton, eager))
    assert all(t.isfinite().all() for t in got)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-3, atol=1e-2)


def test_strides_do_not_matter():
    inputs = qkv(20, 33)
    expected = run(inputs, **CAUSAL)
    for swap in ((1, 2), (2, 3), (1, 3), (0, 2)):
        strided = [t.detach().transpose(*swap).contiguous().transpose(*swap).requires_grad_() for t in inputs]
        d_out = torch.ones_like(expected[0]).transpose(*swap).contiguous().transpose(*swap)
        assert all(map(torch.equal, run(strided, d_out, **CAUSAL), expected))


@pytest.mark.parametrize("num_queries, num_keys", [(0, 0), (0, 5), (5, 0)])
def test_nothing_is_an_input_too(num_queries, num_keys):
    results = run(qkv(num_queries, num_keys), causal=False)
    assert not any(t.any() for t in results)


@pytest.mark.parametrize("tile", [Tile(16, 32, 4), Tile(32, 16, 4), Tile(64, 128, 4)], ids=str)
def test_the_tile_does_not_matter(tile, monkeypatch):
    inputs, key_mask = qkv(50, 70), torch.rand(2, 70) < 0.7
    d_out = torch.randn_like(inputs[0])
    expected = run(inputs, d_out, eager, **CAUSAL, key_mask=key_mask)
    tables = attention_forward.TILES, attention_backward.KEY_TILES, attention_backward.QUERY_TILES
    for table in tables:
        monkeypatch.setitem(table, "sm_80", {64: tile})
    assert_close(run(inputs, d_out, **CAUSAL, key_mask=key_mask), expected)


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_the_tiles_of_other_gpus_do_not_matter(arch, dim, monkeypatch):
    """Under masks, whose calls have tiles of their own there."""
    inputs, key_mask = qkv(50, 150, dim=dim, batch=1), torch.rand(1, 150) < 0.7
    masks = {"key_mask": key_mask, "document_ids": torch.randint(3, (1, 150)).sort(dim=-1).values}
    d_out = torch.randn_like(inputs[0])
    expected = run(inputs, d_out, eager, **CAUSAL, **masks)
    monkeypatch.setattr(tiles, "properties", lambda device: (arch, 1))
    assert_close(run(inputs, d_out, **CAUSAL, **masks), expected)


def test_shares_of_the_rows_add_up():
    """d_k and d_v of few keys are summed by several programs, each over a share of the rows."""
    inputs = [t.detach() for t in qkv(60, 75)]
    masks = (True, torch.rand(2, 75) < 0.8, torch.arange(75).div(40, rounding_mode="floor").expand(2, -1).contiguous())
    for causal, key_mask, ids in (masks, (True, None, None), (False, None, None)):
        out, lse = forward(*inputs, causal, key_mask, ids)
        d_out = torch.randn_like(out)
        whole = backward(d_out, *inputs, out, lse, causal, key_mask, ids, num_shares=1)
        for num_shares in (2, 5):
            assert_close(backward(d_out, *inputs, out, lse, causal, key_mask, ids, num_shares=num_shares), whole)


def test_saved_memory_is_linear_in_the_length():
    def saved(length: int) -> int:
        numbers = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t)
        with hooks:
            triton(*qkv(length, length, heads=2, batch=1), **CAUSAL)
        return sum(numbers)

    assert saved(64) == 2 * saved(32) > 0


@pytest.mark.parametrize(
    "num_queries, heads, kv_heads, dtype",
    [(1, 5, 1, torch.float32), (3, 6, 2, torch.float32), (2, 2, 2, torch.bfloat16), (1, 3, 1, torch.float16)],
)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_decoding_in_any_number_of_splits_is_the_end_of_the_prefill(num_queries, heads, kv_heads, dtype, masked):
    q, k, v = (t.detach().to(dtype) for t in qkv(150, 150, heads=heads, kv_heads=kv_heads))
    key_mask = torch.arange(150) >= torch.tensor([[120], [3]]) if masked else None
    prefill = forward(q, k, v, True, key_mask, None)[0][:, :, -num_queries:]
    new = q[:, :, -num_queries:]
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for num_splits in (1, 2, 4, 7):
        assert_close([decode(new, k, v, True, key_mask, num_splits)], [prefill], tolerance)
    assert_close([triton(new, k, v, **CAUSAL, key_mask=key_mask)], [prefill], tolerance)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_decoding_sees_what_a_mask_keeps_and_no_more(num_splits):
    """Columns of a cache between padding at both ends; a hole inside blocks that are kept otherwise; nothing."""
    q, k, v = (t.detach() for t in qkv(1, 300, batch=3))
    columns = torch.arange(300)
    key_mask = torch.stack(((columns >= 5) & (columns < 270), (columns < 100) | (columns > 101), columns > 300))
    out = decode(q, k, v, True, key_mask, num_splits)
    assert_close([out[:2]], [eager(q[:2], k[:2], v[:2], **CAUSAL, key_mask=key_mask[:2])], 1e-6)
    assert not out[2].any()


def test_decoding_sees_no_future_and_no_neighbour():
    q, k, v = (t.detach() for t in qkv(3, 100))
    out = decode(q, k, v, True, None, 2)
    k[:, :, 98:], v[:, :, 98:] = 7, 7
    changed = decode(q, k, v, True, None, 2)
    assert torch.equal(out[:, :, 0], changed[:, :, 0]) and not torch.equal(out[:, :, 1], changed[:, :, 1])
    assert not decode(q, k, v, True, torch.zeros(2, 100, dtype=torch.bool), 3).any()


def test_operators_keep_their_promises_to_torch():
    q, k, v = qkv(9, 12, batch=1)
    key_mask = torch.rand(1, 12) < 0.8
    detached = [t.detach() for t in (q, k, v)]
    operators = torch.ops.palm_rlhf
    out, lse = operators.attention_forward(*detached, True, key_mask, None)
    d_out = torch.randn_like(out)
    torch.library.opcheck(operators.attention_forward.default, (q, k, v, True, key_mask, None))
    for operator, args in (
        (operators.attention_backward, (d_out, *detached, out, lse, True, key_mask, None)),
        (operators.attention_decode, (*detached, True, key_mask)),
    ):
        torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))


def test_compiles_into_one_graph():
    def loss(q, k, v, ids):
        return triton(q, k, v, causal=True, document_ids=ids).square().sum()

    inputs, ids = qkv(20, 20), torch.arange(20).div(7, rounding_mode="floor").expand(2, -1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs, ids), loss(*inputs, ids))
    expected = torch.autograd.grad(loss(*inputs, ids), inputs)
    assert_close(torch.autograd.grad(compiled(*inputs, ids), inputs), expected)


@pytest.fixture
def palm() -> PaLM:
    return PaLM(num_tokens=11, dim=24, depth=2, heads=3, dim_head=8, ff_mult=1)


@pytest.fixture
def auto_takes_triton(monkeypatch):
    """What `auto` chooses on a GPU, here."""
    monkeypatch.setattr("palm_rlhf.ops.attention.choose", lambda *tensors, **masks: "triton")


@pytest.mark.parametrize("mask", ["plain", "padding", "documents"])
def test_a_training_step_of_palm_equals_the_reference(palm, auto_takes_triton, mask):
    tokens = torch.randint(11, (2, 40))
    options = {
        "plain": {},
        "padding": {"key_mask": torch.arange(40) >= torch.tensor([[0], [25]])},
        "documents": {"document_ids": torch.arange(40).div(17, rounding_mode="floor").expand(2, -1)},
    }[mask]
    reference = PaLM.from_config(dataclasses.replace(palm.config, flash_attn=False))
    reference.load_state_dict(palm.state_dict())
    losses = []
    for model in (palm, reference):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append(model(tokens, return_loss=True, **options))
        losses[-1].backward()
        optimizer.step()
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for (name, ours), theirs in zip(palm.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_palm_generates_what_the_reference_does(palm, auto_takes_triton):
    prompts = [torch.tensor([1, 2, 3, 4, 5]), torch.tensor([7, 8])]
    reference = PaLM.from_config(dataclasses.replace(palm.config, flash_attn=False))
    reference.load_state_dict(palm.state_dict())
    ours, theirs = (model.generate(12, prompts, temperature=0.0) for model in (palm, reference))
    assert all(map(torch.equal, ours, theirs))
