"""Laws of the kernels beside attention, their operators, and a PaLM that trains with all of them."""

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from palm_rlhf import PaLM
from palm_rlhf.ops import devices
from palm_rlhf.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from palm_rlhf.ops.logprobs import chunks_are_faster, linear_logprobs
from palm_rlhf.ops.rotary import rotary_tables
from palm_rlhf.ops.triton import fused_cross_entropy
from palm_rlhf.ops.triton.fused_cross_entropy import chunks, linear_cross_entropy_triton
from palm_rlhf.ops.triton.fused_logprobs import linear_logprobs_triton
from palm_rlhf.ops.triton.fused_rotary import rotary_split_triton
from palm_rlhf.ops.triton.fused_swiglu import swiglu_triton
from palm_rlhf.policy.sequences import join, response_logprobs

F32 = torch.float32


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What is dispatched on a GPU, here."""
    monkeypatch.setattr(devices, "GPUS", {"cpu"})
    monkeypatch.setattr("palm_rlhf.ops.attention.choose", lambda *tensors, **masks: "triton")


class Called(TorchDispatchMode):
    """The names of our operators that are called within it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "palm_rlhf":
            self.names.add(function._schema.name.partition("::")[2])
        return function(*args, **(kwargs or {}))


def assert_close(got, expected, tolerance: float = 1e-5) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def layer(n: int = 20, num_tokens: int = 70, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, output weights, tokens."""
    x, weight = torch.randn(n, dim, requires_grad=True), torch.randn(num_tokens, dim, requires_grad=True)
    return x, weight, torch.randint(num_tokens, (n,))


def loss_and_gradients(x, weight, targets, counts, *, scale=0.3, z_loss=0.1) -> list[Tensor]:
    loss = linear_cross_entropy_triton(x, weight, targets, counts, scale, z_loss, F32)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


# cross-entropy and log-probabilities


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_the_size_of_the_chunks_does_not_matter(rows, monkeypatch):
    x, weight, tokens = layer(n=7)
    counts, d_entropy = torch.rand(2, 7)

    def run() -> list[Tensor]:
        said, entropy = linear_logprobs_triton(x, weight, tokens, 0.3, F32, True)
        grads = torch.autograd.grad((said * counts + entropy * d_entropy).sum(), (x, weight))
        return [*loss_and_gradients(x, weight, tokens, counts), said, entropy, *grads]

    expected = run()
    monkeypatch.setattr(fused_cross_entropy, "CHUNK_BYTES", rows * 128 * 4)
    assert_close(run(), expected)


def test_chunks_are_whole_tiles_of_products_and_never_larger_than_allowed(monkeypatch):
    monkeypatch.setattr(fused_cross_entropy, "CHUNK_BYTES", 300 * 128 * 2)
    x, matrix = torch.randn(600, 8), torch.randn(70, 8).to(torch.bfloat16)
    found = [(rows, part, logits.clone(), logits.stride()) for rows, part, logits in chunks(x, matrix)]
    assert [rows.start for rows, *_ in found] == [0, 256, 512]
    assert [len(logits) for _, _, logits, _ in found] == [256, 256, 88]
    assert all(stride == (128, 1) for *_, stride in found)
    assert torch.equal(torch.cat([part for _, part, _, _ in found]), x.to(torch.bfloat16))
    logits = torch.cat([logits for _, _, logits, _ in found])
    assert torch.equal(logits[:, :70], x.to(torch.bfloat16) @ matrix.mT) and not logits[:, 70:].any()


def test_gradients_sum_to_zero_over_the_vocabulary():
    """A number added to all logits of a token changes nothing but Z, so that without z-loss the slopes cancel out."""
    x, weight, tokens = layer(num_tokens=300)
    counts = torch.rand(20)
    _, _, d_weight = loss_and_gradients(x, weight, tokens, counts, z_loss=0.0)
    assert_close([d_weight.sum(dim=0)], [torch.zeros(16)])
    _, _, d_weight = loss_and_gradients(x, weight, tokens, counts, z_loss=0.1)
    assert d_weight.sum(dim=0).abs().max() > 1e-2
    entropy = linear_logprobs_triton(x, weight, tokens, 1.0, F32, True)[1]
    (d_weight,) = torch.autograd.grad(entropy.sum(), weight)
    assert_close([d_weight.sum(dim=0)], [torch.zeros(16)])
    assert d_weight.abs().max() > 1e-2


def test_what_all_tokens_are_said_with_sums_to_one():
    x, weight, _ = layer(n=1)
    x, weight = x.detach().expand(70, -1), weight.detach()
    said, entropy = linear_logprobs_triton(x, weight, torch.arange(70), 0.5, F32, False)
    assert float(said.exp().sum()) == pytest.approx(1, abs=1e-5)
    assert float(-(said.exp() * said).sum()) == pytest.approx(float(entropy[0]), abs=1e-5)


def test_the_entropy_of_an_even_choice_and_of_none():
    x, weight, tokens = layer()
    said, entropy = linear_logprobs_triton(torch.zeros_like(x), weight, tokens, 1.0, F32, False)
    assert_close([said, entropy], [torch.full((20,), -math.log(70)), torch.full((20,), math.log(70))], 1e-6)
    weight = torch.eye(70, 16) * 1e4
    said, entropy = linear_logprobs_triton(torch.eye(16), weight, torch.arange(16), 1.0, F32, False)
    assert not said.any() and not entropy.any()


def test_what_does_not_count_changes_no_bit():
    """Whatever it is, and whether it is a token at all."""
    x, weight, tokens = layer()
    counts = torch.rand(20) * (torch.arange(20) % 3 > 0)
    expected = loss_and_gradients(x, weight, tokens, counts)
    other = torch.where(counts == 0, torch.tensor([-100, 70, 1 << 40, -1, 69]).repeat(4), tokens)
    changed = torch.where(counts[:, None] == 0, x * 2, x).detach().requires_grad_()
    got = loss_and_gradients(changed, weight, other, counts)
    assert all(map(torch.equal, got, expected))
    assert not got[1][counts == 0].any()


def test_large_logits_do_not_overflow():
    x, weight, tokens = layer()
    options = {"scale": 1000.0, "z_loss": 0.0}
    got = loss_and_gradients(x, weight, tokens, torch.ones(20), **options)
    expected = linear_cross_entropy_reference(x, weight, tokens, denominator=1, **options)
    assert all(t.isfinite().all() for t in got)
    torch.testing.assert_close(got[0], expected)


def test_a_nan_is_seen():
    x, weight, tokens = layer()
    x = x.detach().index_fill(0, torch.tensor([3]), math.nan).requires_grad_()
    assert loss_and_gradients(x, weight, tokens, torch.ones(20))[0].isnan()
    counts = (torch.arange(20) != 3).float()
    loss, d_x, _ = loss_and_gradients(x, weight, tokens, counts)
    assert loss.isfinite() and d_x.isfinite().all()


def saved_numbers(run: Callable[[], object]) -> int:
    numbers = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
        run()
    return sum(numbers)


def test_nothing_that_grows_like_the_logits_is_saved():
    x, weight, tokens = layer(n=50, num_tokens=400)
    both = x.numel() + weight.numel()
    count = functools.partial(linear_cross_entropy_triton, x, weight, tokens, torch.ones(50), 1.0, 0.0, F32)
    say = functools.partial(linear_logprobs_triton, x, weight, tokens, 1.0, F32, True)
    frozen = functools.partial(linear_logprobs_triton, x, weight.detach(), tokens, 1.0, F32, False)
    assert saved_numbers(count) == both
    assert saved_numbers(say) == both + 3 * 50
    assert saved_numbers(frozen) == x.numel()
    gate, value = torch.randn(2, 3, 5, requires_grad=True)
    assert saved_numbers(lambda: swiglu_triton(gate, value)) == 30


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_is_trained_gets_a_gradient(frozen):
    x, weight, tokens = layer()
    x, weight = (t.detach().requires_grad_(name != frozen) for name, t in (("x", x), ("weight", weight)))
    loss = linear_cross_entropy_triton(x, weight, tokens, torch.ones(20), 1.0, 0.0, F32)
    said, entropy = linear_logprobs_triton(x, weight, tokens, 1.0, F32, False)
    assert not entropy.requires_grad
    for result in (loss, -said.sum()):
        x.grad = weight.grad = None
        result.backward()
        assert [t.grad is not None for t in (x, weight)] == [frozen == "weight", frozen == "x"]
    with torch.no_grad():
        assert not linear_cross_entropy_triton(x, weight, tokens, torch.ones(20), 1.0, 0.0, F32).requires_grad


def test_nothing_is_an_input_too():
    x, weight, tokens = layer(n=0)
    loss, d_x, d_weight = loss_and_gradients(x, weight, tokens, torch.ones(0))
    assert loss == 0 and d_x.shape == (0, 16) and not d_weight.any()
    said, entropy = linear_logprobs_triton(x, weight, tokens, 1.0, F32, False)
    assert said.shape == entropy.shape == (0,)
    assert swiglu_triton(torch.ones(0, 4), torch.ones(0, 4)).shape == (0, 4)


# rotary and SwiGLU


def rotated(batch: int = 2, n: int = 5, dim: int = 16) -> tuple[Tensor, tuple[Tensor, ...], list[Tensor]]:
    """A projection for 3 heads over 1, what becomes of it, and the tables."""
    qkv = torch.randn(batch, n, 5, dim, requires_grad=True)
    tables = [t.unsqueeze(-2) for t in rotary_tables(torch.arange(n)[None] + 2, dim)]
    return qkv, rotary_split_triton(qkv, *tables, heads=3, kv_heads=1), tables


def test_rotation_keeps_lengths_and_values():
    qkv, (q, k, v), _ = rotated()
    turned = torch.cat((q, k), dim=-2)
    assert_close([turned.norm(dim=-1)], [qkv[:, :, :4].norm(dim=-1)])
    assert not torch.isclose(turned, qkv[:, :, :4]).all(dim=-1).any()
    assert torch.equal(v, qkv[:, :, 4:])
    assert all(t.is_contiguous() for t in (q, k, v))


def test_the_backward_is_the_inverse():
    qkv, parts, _ = rotated()
    (back,) = torch.autograd.grad(parts, qkv, parts)
    assert_close([back], [qkv.detach()])


def test_scores_see_distances_only():
    q, k = torch.randn(2, 16)
    qkv = torch.stack((q, q, q, k, k)).expand(1, 12, 5, 16)
    turned_q, turned_k, _ = rotary_split_triton(qkv, *rotated(n=12)[2], heads=3, kv_heads=1)
    scores = turned_q[0, :, 0] @ turned_k[0, :, 0].mT
    for distance in (-7, 0, 4):
        diagonal = scores.diagonal(distance)
        assert_close([diagonal], [diagonal[:1].expand_as(diagonal)])


def test_strides_do_not_matter():
    qkv, parts, tables = rotated(n=3)
    wide = torch.randn(2, 3, 5 * 16 + 7)
    wide[..., 3:83] = qkv.detach().flatten(-2)
    strided = wide[..., 3:83].unflatten(-1, (5, 16))
    d_parts = [torch.randn_like(t) for t in parts]
    expected = torch.autograd.grad(parts, qkv, d_parts)
    for other in (strided, qkv.detach().transpose(0, 1).contiguous().transpose(0, 1), qkv.detach().mT.contiguous().mT):
        other.requires_grad_()
        got = rotary_split_triton(other, *(t.mT.contiguous().mT for t in tables), heads=3, kv_heads=1)
        assert all(map(torch.equal, got, parts))
        swapped = [d.transpose(1, 2).contiguous().transpose(1, 2) for d in d_parts]
        assert torch.equal(torch.autograd.grad(got, other, swapped)[0], expected[0])

    gate, value, d_out = torch.randn(3, 2, 3, 10)
    out = swiglu_triton(gate, value)
    for swap in ((0, 1), (1, 2), (0, 2)):
        inputs = [t.transpose(*swap).contiguous().transpose(*swap) for t in (gate, value, d_out)]
        assert torch.equal(swiglu_triton(*inputs[:2]), out)
        grads = [
            torch.ops.palm_rlhf.swiglu_backward(*tensors) for tensors in (inputs[2:] + inputs[:2], (d_out, gate, value))
        ]
        assert all(map(torch.equal, *grads))


def test_swiglu_of_extreme_gates_is_finite():
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    out = swiglu_triton(gate, torch.ones(5))
    assert_close([out], [torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4])])
    assert_close(torch.autograd.grad(out.sum(), gate), [torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0])])


# operators, dispatch and training


def test_operators_keep_their_promises_to_torch():
    ops = torch.ops.palm_rlhf
    x, weight, tokens = layer(n=2, num_tokens=9)
    counts = torch.ones(2)
    gate, value = (torch.randn(1, 5, requires_grad=True) for _ in range(2))
    qkv, parts, tables = rotated(batch=1, n=2)
    torch.library.opcheck(ops.swiglu_forward.default, (gate, value))
    torch.library.opcheck(ops.rotary_split.default, (qkv, *tables, 3, 1))
    torch.library.opcheck(ops.linear_logprobs.default, (x, weight, tokens, 0.5, F32, False))
    said, entropy, log_z, _ = ops.linear_logprobs(x.detach(), weight.detach(), tokens, 0.5, F32, False)
    flat = x.detach(), weight.detach()
    for operator, args in (
        (ops.linear_cross_entropy, (*flat, tokens, counts, 0.5, 0.1, F32, True, True)),
        (ops.linear_logprobs, (*flat, tokens, 0.5, F32, True)),
        (ops.linear_logprobs_backward, (said, None, *flat, tokens, log_z, entropy, 0.5, F32, True, False)),
        (ops.swiglu_backward, (gate.detach(), gate.detach(), value.detach())),
        (ops.rotary_join, (*(t.detach() for t in parts), *tables)),
    ):
        torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("form", ["mask", "denominator", "weights", "nothing"])
def test_the_loss_normalises_as_its_reference_does(form, on_a_gpu):
    x, weight, targets = layer()
    x, targets, mask = x.unflatten(0, (4, 5)), targets.view(4, 5), torch.rand(4, 5) < 0.7
    options = {
        "mask": {"mask": mask},
        "denominator": {"mask": mask, "denominator": torch.tensor([[2], [5], [9], [1]])},
        "weights": {"weights": torch.rand(4, 5) * mask},
        "nothing": {},
    }[form]
    with Called() as called:
        ours = linear_cross_entropy(x, weight, targets, z_loss=0.1, scale=0.5, **options)
    assert called.names == {"linear_cross_entropy"}
    expected = linear_cross_entropy_reference(x, weight, targets, z_loss=0.1, scale=0.5, **options)
    assert_close([ours], [expected])
    assert_close(*(torch.autograd.grad(loss, (x, weight)) for loss in (ours, expected)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_products_their_type(dtype, on_a_gpu):
    x, weight, tokens = layer(dim=64)
    exact = linear_cross_entropy_reference(x, weight, tokens, scale=0.125)
    with torch.autocast("cpu", dtype):
        ours = linear_cross_entropy(x, weight, tokens, scale=0.125)
        theirs = linear_cross_entropy_reference(x, weight, tokens, scale=0.125)
        said, entropy = linear_logprobs(x, weight, tokens, scale=0.125)
    assert ours.dtype == said.dtype == entropy.dtype == F32 and ours != exact
    torch.testing.assert_close(-said.mean(), ours, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(loss, (x, weight)) for loss in (ours, theirs, exact)]
    for mine, other, right in zip(*grads, strict=True):
        assert mine.dtype == F32 and (mine - right).norm() <= 1.5 * (other - right).norm() + 1e-6


FORMS = {
    "plain": {},
    "grouped, xPos": {"kv_heads": 3, "heads": 6, "xpos": True},
    "normalised queries": {"qk_norm": True, "gradient_checkpointing": True},
}
ALL = {"attention_forward", "rotary_split", "swiglu_forward", "linear_cross_entropy"}
BACKWARD = {"attention_backward", "rotary_join", "swiglu_backward"}


def models(**options) -> tuple[PaLM, PaLM]:
    """One for the kernels, and one of the same weights that is eager."""
    palm = PaLM(num_tokens=37, dim=24, dim_head=8, ff_mult=2, **{"depth": 2, "heads": 3, **options})
    reference = PaLM.from_config(dataclasses.replace(palm.config, flash_attn=False))
    reference.load_state_dict(palm.state_dict())
    return palm, reference


def rows(batch: int = 2, n: int = 8) -> tuple[Tensor, dict[str, Tensor]]:
    masks = {"key_mask": torch.arange(n) < torch.tensor([[n], [5]]), "loss_mask": torch.rand(batch, n) < 0.8}
    return torch.randint(37, (batch, n)), masks


@pytest.mark.parametrize("form", FORMS)
def test_a_training_step_of_palm_equals_the_reference(form, request):
    palm, reference = models(**FORMS[form])
    tokens, masks = rows()
    losses = [reference(tokens, return_loss=True, **masks)]
    losses[0].backward()
    request.getfixturevalue("on_a_gpu")
    with Called() as called:
        losses.append(palm(tokens, return_loss=True, **masks))
        assert called.names == ALL
        losses[1].backward()
    assert called.names == ALL | BACKWARD
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
    for (name, ours), theirs in zip(palm.named_parameters(), reference.parameters(), strict=True):
        said = f"{name}: {{}}".format
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=said)
        assert theirs.grad.abs().max() > 1e-4, name


def test_a_compiled_training_step_of_palm_equals_the_reference(request):
    """PyTorch's compiler fuses rotary and SwiGLU itself, and takes the loss and the attention as they are."""
    names = set()

    def backend(graph, inputs):
        targets = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        names.update(target.split(".")[1] for target in targets if target.startswith("palm_rlhf."))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    palm, reference = models()
    tokens, _ = rows()
    expected = reference(tokens, return_loss=True)
    expected.backward()
    request.getfixturevalue("on_a_gpu")
    loss = torch.compile(palm, fullgraph=True, backend=backend)(tokens, return_loss=True)
    loss.backward()
    assert names == {"attention_forward", "linear_cross_entropy"}
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert_close([p.grad for p in palm.parameters()], [p.grad for p in reference.parameters()])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "adapters"])
def test_responses_are_said_as_the_reference_does(frozen, request):
    palm, reference = models(depth=1)
    for model in (palm, reference):
        if frozen:
            torch.manual_seed(0)
            for adapter in model.add_finetune_params(r=2).parameters():
                torch.nn.init.normal_(adapter, std=0.1)
    sequences = join([torch.tensor([1, 2, 3]), torch.tensor([4])], [torch.tensor([5, 36]), torch.arange(4)])
    options = {"temperature": 0.7, "entropy_needs_grad": not frozen, "finetune_scope": "default" if frozen else None}

    def run(model: PaLM) -> list[Tensor]:
        logprobs, entropy = response_logprobs(model, sequences, **options)
        trained = [p for p in model.parameters() if p.requires_grad]
        total = logprobs.sum() if frozen else (logprobs + entropy).sum()
        return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(total, trained)]

    expected = run(reference)
    request.getfixturevalue("on_a_gpu")
    with Called() as called:
        got = run(palm)
    assert "linear_logprobs" in called.names and ("linear_logprobs_backward" in called.names) is not frozen
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_kernels_are_for_the_types_they_compute_in(on_a_gpu):
    x, weight, _ = layer()
    assert chunks_are_faster(x, weight) and chunks_are_faster(x.half(), weight.bfloat16())
    assert not chunks_are_faster(x.double(), weight) and devices.why_not_triton(x, weight.double()) is not None
