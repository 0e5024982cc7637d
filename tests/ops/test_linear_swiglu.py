"""The projections of a block and SwiGLU against their plain formulas, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from palm_rlhf.ops.linear import linear, split_linear, swiglu_linear, swiglu_sum_linear
from palm_rlhf.ops.swiglu import swiglu

SIZES = [4, 1, 6]


def plain_split(x, weight, sizes):
    return (x @ weight.T).split(sizes, dim=-1)


def plain_swiglu(gate, value):
    return gate / (1 + (-gate).exp()) * value


def projection(*, batch=(2, 3), dim=5, dtype=torch.float64):
    x = torch.randn(*batch, dim, dtype=torch.float64).to(dtype).requires_grad_()
    return x, torch.randn(sum(SIZES), dim, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(outs, inputs, used=None, strided=False):
    """Of a fixed projection of the used outputs."""
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outs]
    if strided:
        directions = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in directions]
    used = range(len(outs)) if used is None else used
    return torch.autograd.grad([outs[n] for n in used], inputs, [directions[n] for n in used], retain_graph=True)


def assert_all_close(got, expected, **tolerance):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 0, "atol": 1e-12}))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_split_linear_is_a_product_cut_in_pieces(batch):
    x, weight = projection(batch=batch)
    got, expected = split_linear(x, weight, SIZES), plain_split(x, weight, SIZES)
    assert_all_close(got, expected)
    assert_all_close(gradients(got, (x, weight)), gradients(expected, (x, weight)))
    with torch.no_grad():
        assert_all_close(split_linear(x, weight, SIZES), expected)


def test_split_linear_passes_gradcheck():
    assert gradcheck(lambda x, weight: split_linear(x, weight, SIZES), projection())


@pytest.mark.parametrize("frozen", [0, 1], ids=["weight only", "input only"])
def test_split_linear_with_one_side_frozen(frozen):
    inputs = projection()
    inputs[frozen].requires_grad_(False)
    live = [inputs[1 - frozen]]
    got = split_linear(*inputs, SIZES)
    assert_all_close(gradients(got, live), gradients(plain_split(*inputs, SIZES), live))


@pytest.mark.parametrize("used", [[0], [1], [2], [0, 2]], ids=str)
def test_split_linear_with_outputs_that_nobody_used(used):
    inputs = projection()
    expected = gradients(plain_split(*inputs, SIZES), inputs, used)
    assert_all_close(gradients(split_linear(*inputs, SIZES), inputs, used), expected)


def test_split_linear_reads_strided_gradients_and_inputs():
    x, weight = projection()
    expected = gradients(plain_split(x, weight, SIZES), (x, weight))
    assert_all_close(gradients(split_linear(x, weight, SIZES), (x, weight), strided=True), expected)
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert_all_close(gradients(split_linear(strided, weight, SIZES), (strided, weight)), expected)


def test_a_bfloat16_projection_keeps_its_type():
    inputs = projection(dtype=torch.bfloat16)
    got = split_linear(*inputs, SIZES)
    exact = plain_split(*(t.double() for t in inputs), SIZES)
    assert all(out.dtype == torch.bfloat16 for out in got)
    assert_all_close([out.double() for out in got], exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_split_linear_under_autocast_is_that_of_pytorch(dtype):
    """bfloat16 products; the gradients come back in the types of the inputs."""
    inputs = projection(batch=(4, 32), dim=64, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = split_linear(*inputs, SIZES), F.linear(*inputs).split(SIZES, dim=-1)
    assert [out.dtype for out in got] == [out.dtype for out in expected] == [torch.bfloat16] * 3
    assert_all_close(got, expected, rtol=1e-2, atol=5e-2)
    grads = gradients(got, inputs), gradients(expected, inputs)
    assert [grad.dtype for grad in grads[0]] == [dtype] * 2
    assert_all_close(*grads, rtol=2e-2, atol=2e-1)


def summands(*, batch=(2, 3), dtype=torch.float64, hidden=7):
    """An input and its weight, hidden units in two parts and their weight: `... 5`, `4 5`, twice `... 7`, `4 7`."""
    shapes = (*batch, 5), (4, 5), (*batch, hidden), (*batch, hidden), (4, hidden)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def plain_sum(x, weight, gate, value, hidden_weight):
    return x @ weight.T + plain_swiglu(gate, value) @ hidden_weight.T


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 2, 3), (700,)], ids=str)
def test_swiglu_sum_linear_is_a_sum_of_products(batch):
    """Of few rows, and of more than are taken at a time; nothing that it was given changes."""
    inputs = summands(batch=batch)
    before = [t.detach().clone() for t in inputs]
    got, expected = [swiglu_sum_linear(*inputs)], [plain_sum(*inputs)]
    assert_all_close(got, expected)
    assert_all_close(gradients(got, inputs), gradients(expected, inputs), rtol=0, atol=1e-10)
    assert_all_close(gradients(got, inputs), gradients(expected, inputs), rtol=0, atol=1e-10)  # and a second time
    assert all(torch.equal(t, was) for t, was in zip(inputs, before, strict=True))
    with torch.no_grad():
        assert_all_close([swiglu_sum_linear(*inputs)], expected)


def test_swiglu_sum_linear_passes_gradcheck():
    assert gradcheck(swiglu_sum_linear, summands())


def test_swiglu_sum_linear_reads_strided_gradients_and_inputs():
    inputs = summands()
    expected = gradients([plain_sum(*inputs)], inputs)
    assert_all_close(gradients([swiglu_sum_linear(*inputs)], inputs, strided=True), expected)
    strided = [t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for t in inputs]
    assert_all_close(gradients([swiglu_sum_linear(*strided)], strided), expected)


@pytest.mark.parametrize("live", [(0,), (1,), (2,), (3,), (4,), (0, 2), (1, 3), (2, 4)], ids=str)
def test_swiglu_sum_linear_with_some_of_it_frozen(live):
    inputs = [t.requires_grad_(n in live) for n, t in enumerate(summands())]
    expected = gradients([plain_sum(*inputs)], [inputs[n] for n in live])
    assert_all_close(gradients([swiglu_sum_linear(*inputs)], [inputs[n] for n in live]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_sum_linear_under_autocast_is_that_of_pytorch(dtype):
    """The hidden units come in bfloat16, as the first projection makes them."""
    inputs = summands(batch=(4, 32), dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        x, weight, gate, value, hidden_weight = inputs
        hidden = F.silu(gate.bfloat16()) * value.bfloat16()
        got, expected = [swiglu_sum_linear(*inputs)], [F.linear(x, weight) + F.linear(hidden, hidden_weight)]
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    assert_all_close(got, expected, rtol=1e-2, atol=1e-1)
    grads = gradients(got, inputs), gradients(expected, inputs)
    assert [grad.dtype for grad in grads[0]] == [dtype] * 5
    assert_all_close(*grads, rtol=2e-2, atol=2e-1)


def plain_gated(gate, value, weight):
    return plain_swiglu(gate, value) @ weight.T


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (700,)], ids=str)
def test_swiglu_linear_is_a_product_of_hidden_units(batch):
    inputs = summands(batch=batch)[2:]
    before = [t.detach().clone() for t in inputs]
    got, expected = [swiglu_linear(*inputs)], [plain_gated(*inputs)]
    assert_all_close(got, expected)
    assert_all_close(gradients(got, inputs), gradients(expected, inputs), rtol=0, atol=1e-10)
    assert_all_close(gradients(got, inputs), gradients(expected, inputs), rtol=0, atol=1e-10)  # and a second time
    assert all(torch.equal(t, was) for t, was in zip(inputs, before, strict=True))
    with torch.no_grad():
        assert_all_close([swiglu_linear(*inputs)], expected)


@pytest.mark.parametrize("live", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_swiglu_linear_with_some_of_it_frozen_and_strided_gradients(live):
    inputs = [t.requires_grad_(n in live) for n, t in enumerate(summands()[2:])]
    expected = gradients([plain_gated(*inputs)], [inputs[n] for n in live])
    assert_all_close(gradients([swiglu_linear(*inputs)], [inputs[n] for n in live], strided=True), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu_linear_under_autocast_is_that_of_pytorch(dtype):
    inputs = summands(batch=(4, 32), dtype=dtype)[2:]
    with torch.autocast("cpu", torch.bfloat16):
        gate, value, weight = inputs
        got = [swiglu_linear(*inputs)]
        expected = [F.linear(F.silu(gate.bfloat16()) * value.bfloat16(), weight)]
    assert got[0].dtype == torch.bfloat16
    assert_all_close(got, expected, rtol=1e-2, atol=1e-1)
    grads = gradients(got, inputs), gradients(expected, inputs)
    assert [grad.dtype for grad in grads[0]] == [dtype] * 3
    assert_all_close(*grads, rtol=2e-2, atol=2e-1)


class InFewerBits(torch.Tensor):
    """A weight of a subclass, which counts the products that it is asked for."""

    products = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            cls.products += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("length", [1, 3])
def test_weights_of_subclasses_are_multiplied_by_their_own_product(length):
    """A subclass that keeps its numbers in fewer bits answers to F.linear, not to what the fast ways do to a weight."""
    x, _, gate, value, _ = summands(batch=(2, length))
    weights = [torch.randn(shape).double() for shape in ((14, 5), (4, 7), (4, 5))]
    narrow = [weight.as_subclass(InFewerBits) for weight in weights]
    InFewerBits.products = 0
    with torch.no_grad():
        got = [*split_linear(x, narrow[0], [6, 8]), swiglu_linear(gate, value, narrow[1])]
        got += [swiglu_sum_linear(x, narrow[2], gate, value, narrow[1]), linear(x, narrow[2])]
    assert InFewerBits.products == 5
    expected = [*plain_split(x, weights[0], [6, 8]), plain_gated(gate, value, weights[1])]
    expected += [plain_sum(x, weights[2], gate, value, weights[1]), x @ weights[2].T]
    assert_all_close([t.as_subclass(torch.Tensor) for t in got], expected)


@pytest.mark.parametrize("batch", [(1, 1), (3, 1), (2, 3)], ids=str)
def test_linear_adds_a_bias(batch):
    (x, weight), bias = projection(batch=batch), torch.randn(11).double().requires_grad_()
    got, expected, inputs = [linear(x, weight, bias)], [x @ weight.T + bias], (x, weight, bias)
    assert_all_close(got, expected)
    assert_all_close(gradients(got, inputs), gradients(expected, inputs))
    with torch.no_grad():
        assert_all_close([linear(x, weight, bias)], expected)


@pytest.mark.parametrize("batch", [(), (1,), (1, 1), (3, 1), (1, 3), (2, 3)], ids=str)
def test_linear_is_a_product(batch):
    x, weight = projection(batch=batch)
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_all_close([linear(x, weight)], [x @ weight.T])


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (8, 1), (2, 5), (16,), (17, 1)], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_linear_of_few_rows_and_large_weights_is_a_product(shape, strided):
    weight, x = torch.randn(2048, 512), torch.randn(*shape, 512 * (1 + strided))[..., :: 1 + strided]
    with torch.no_grad():
        got = linear(x, weight)
    assert got.is_contiguous() and got.shape == (*shape, 2048)
    torch.testing.assert_close(got.double(), x.double() @ weight.double().T, rtol=0, atol=1e-3)


def test_swiglu_is_its_formula():
    gate, value = inputs = [torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert_all_close([swiglu(gate, value)], [plain_swiglu(gate, value)])
    assert_all_close(gradients([swiglu(*inputs)], inputs), gradients([plain_swiglu(*inputs)], inputs))
    assert_all_close(gradients([swiglu(*inputs)], inputs, strided=True), gradients([plain_swiglu(*inputs)], inputs))
    assert gradcheck(swiglu, inputs)
    assert float(swiglu(torch.tensor([1.0]), torch.tensor([2.0]))) == pytest.approx(2 * 0.7310585786)


def test_swiglu_of_extreme_gates_is_finite():
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    out = swiglu(gate, torch.ones(5))
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), gate)[0], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize("live", [0, 1], ids=["gate", "value"])
def test_swiglu_with_one_side_frozen(live):
    inputs = [torch.randn(6, dtype=torch.float64, requires_grad=n == live) for n in range(2)]
    got, expected = swiglu(*inputs), plain_swiglu(*inputs)
    assert_all_close(gradients([got], [inputs[live]]), gradients([expected], [inputs[live]]))


def test_swiglu_takes_views_of_one_tensor_and_changes_neither():
    """The two halves of a fused projection."""
    hidden = torch.randn(3, 8, dtype=torch.float64)
    before = hidden.clone()
    halves = hidden.requires_grad_().chunk(2, dim=-1)
    got = swiglu(*halves)
    expected = plain_swiglu(*halves)
    assert_all_close([got], [expected])
    assert_all_close(gradients([got], [hidden]), gradients([expected], [hidden]))
    assert torch.equal(hidden, before)


def test_swiglu_in_bfloat16_stays_near():
    inputs = [torch.randn(1000, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    out, exact = swiglu(*inputs), plain_swiglu(*wide)
    assert out.dtype == torch.bfloat16
    assert_all_close([out.double()], [exact], rtol=2e-2, atol=2e-2)
    grads = gradients([out], inputs), gradients([exact], wide)
    assert_all_close([grad.double() for grad in grads[0]], grads[1], rtol=4e-2, atol=4e-2)


def test_both_compile_to_the_same():
    x, weight = projection()

    def function(x, weight):
        first, gate, value = split_linear(x, weight, [1, 5, 5])
        return first.sum() + (swiglu(gate, value) ** 2).sum()

    torch.compiler.reset()
    losses = function(x, weight), torch.compile(function, fullgraph=True, backend="aot_eager")(x, weight)
    torch.testing.assert_close(*losses, rtol=0, atol=1e-10)
    assert_all_close(*(torch.autograd.grad(loss, (x, weight)) for loss in losses), rtol=0, atol=1e-10)
