"""Log-probabilities and entropies in chunks are those of all logits, their gradients too, and those are never held."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.ops import logprobs as module
from palm_rlhf.ops.logprobs import chunks_are_faster, linear_logprobs, linear_logprobs_reference


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three tokens at a vocabulary of 11."""
    monkeypatch.setattr(module, "CHUNK", 33)


def inputs(n=15, dim=8, num_tokens=11, dtype=torch.float64):
    """Embeddings, output weights, tokens, and what the results count."""
    generator = torch.Generator().manual_seed(n)
    x, weight = (torch.randn(rows, dim, dtype=dtype, generator=generator).requires_grad_() for rows in (n, num_tokens))
    tokens = torch.randint(num_tokens, (n,), generator=generator)
    return x, weight, tokens, torch.randn(2, n, dtype=dtype, generator=generator)


def by_definition(x, weight, tokens, scale, top_k=None, top_p=None):
    """Token by token, with sums over the vocabulary in the open."""
    said, entropies = [], []
    for row, token in zip(x, tokens, strict=True):
        weights = (weight @ row * scale).exp()
        order = weights.tolist()
        kept = sorted(range(len(order)), key=lambda one: -order[one])[:top_k]
        shares = (weights[kept] / weights[kept].sum()).detach()
        num_kept = int((shares.cumsum(dim=0) - shares < (top_p or 2)).sum())
        left = sorted({*kept[:num_kept], int(token)})  # what was said is never left out
        weights, token = weights[left], left.index(token)
        probs = weights / weights.sum()
        said.append(probs[token].log())
        entropies.append(-sum(p * p.log() for p in probs))
    return torch.stack(said), torch.stack(entropies)


def assert_all_close(got, expected, atol=1e-12):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def check_gradients(function, frozen=False, **truncation):
    """Of log-probabilities alone, of entropies alone, and of both, by the embeddings and by the weight, or not that."""
    x, weight, tokens, (count, pull) = inputs()
    exact = by_definition(x, weight, tokens, 0.3, **truncation)
    for counts, pulls in ((count, 0 * pull), (0 * count, pull), (count, pull)):
        needs, inputs_ = bool(pulls.any()), [x] if frozen else [x, weight]
        matrix = weight.detach() if frozen else weight
        got = function(x, matrix, tokens, scale=0.3, entropy_needs_grad=needs, **truncation)
        assert_all_close(got, exact)
        totals = [(counts * said).sum() + (pulls * entropy).sum() for said, entropy in (got, exact)]
        assert_all_close(*(torch.autograd.grad(total, inputs_, retain_graph=True) for total in totals))


@settings(max_examples=20)
@given(
    n=st.integers(1, 9), scale=st.sampled_from([1.0, 0.3]), chunk=st.sampled_from([1, 33, 1000]), shape=st.booleans()
)
def test_they_are_those_of_the_definition(n, scale, chunk, shape):
    x, weight, tokens, _ = inputs(n)
    before, module.CHUNK = module.CHUNK, chunk
    try:
        got = linear_logprobs(x[None] if shape else x, weight, tokens[None] if shape else tokens, scale=scale)
    finally:
        module.CHUNK = before
    assert not got[1].requires_grad
    assert_all_close([t[0] if shape else t for t in got], by_definition(x, weight, tokens, scale))


CUTS = [{}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 8, "top_p": 0.8}]


@pytest.mark.parametrize("truncation", CUTS, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_gradients_are_those_of_the_definition(small_chunks, frozen, truncation):
    check_gradients(linear_logprobs, frozen, **truncation)
    check_gradients(linear_logprobs_reference, frozen, **truncation)


def test_equal_tokens_are_cut_off_alike_in_both_directions(small_chunks):
    """Of tokens of one logit some are kept: the backward knows which."""
    x, weight, tokens, (count, _) = inputs()
    weight = weight.detach()[[0, 1, 2, 3, 4, 5, 2, 2, 2, 2, 1]].requires_grad_()
    gradients = []
    for function in (linear_logprobs, linear_logprobs_reference):
        total = (count * function(x, weight, tokens, top_p=0.6)[0]).sum()
        gradients.append(torch.autograd.grad(total, (x, weight)))
    assert_all_close(*gradients)


MUTANTS = {
    "no entropy in its gradient": ("all_logprobs.add_(entropy[rows, None])", "all_logprobs"),
    "the gradient is not scaled": ("(d_logprobs[rows] * ctx.scale)", "d_logprobs[rows]"),
    "the token is not added": ("d_logits.scatter_add_(-1, token, slope)", "d_logits"),
    "the chunks overlap": ("range(0, len(x), size)", "range(0, len(x), max(size - 1, 1))"),
    "the sign of what is made on the way": ("probs.mul_(-scale)", "probs.mul_(scale)"),
    "the backward forgets the cut": ("            if cut:\n", "            if False:\n"),
    "what was said may be left out": (".scatter_(-1, token, True)", ""),
    "the cut is that of other rows": ("part[rows] for part in cut", "part[: len(token)] for part in cut"),
    "no factor for a token": ("return d_x * d_logprobs.unsqueeze(-1).to(d_x.dtype)", "return d_x"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant):
    old, new = MUTANTS[mutant]
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    names = {"__name__": "palm_rlhf.ops.mutant", "__package__": "palm_rlhf.ops"}
    exec(source.replace(old, new), names)
    names["CHUNK"] = 33
    with pytest.raises(AssertionError):
        for frozen, truncation in itertools.product((False, True), CUTS):
            check_gradients(names["linear_logprobs"], frozen, **truncation)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_what_is_trained_gets_a_gradient(small_chunks, frozen):
    x, weight, tokens, _ = inputs()
    x, weight = (t.detach().requires_grad_(name != frozen) for name, t in (("x", x), ("weight", weight)))
    linear_logprobs(x, weight, tokens)[0].sum().backward()
    assert [t.grad is not None for t in (x, weight)] == [frozen == "weight", frozen == "x"]
    with torch.no_grad():
        assert not linear_logprobs(x, weight, tokens)[0].requires_grad


def test_bfloat16_autocast_rounds_like_the_reference(small_chunks):
    x, weight, tokens, (count, _) = inputs(dtype=torch.float32, dim=64)
    results = {"exact": linear_logprobs_reference(x, weight, tokens, scale=0.125)[0]}
    with torch.autocast("cpu", torch.bfloat16):
        results["ours"] = linear_logprobs(x, weight, tokens, scale=0.125)[0]
        results["reference"] = linear_logprobs_reference(x, weight, tokens, scale=0.125)[0]
    assert results["ours"].dtype == torch.float32 and not torch.equal(results["ours"], results["exact"])
    grads = {name: torch.autograd.grad((count * said).sum(), (x, weight)) for name, said in results.items()}
    for ours, theirs, right in zip(grads["ours"], grads["reference"], grads["exact"], strict=True):
        assert (ours - right).norm() <= 1.5 * (theirs - right).norm() + 1e-6


def test_chunks_of_bfloat16_are_summed_in_float32(small_chunks):
    x, weight, tokens, (count, _) = inputs(n=300, dtype=torch.bfloat16)
    wide = x.detach().double(), weight.detach().double().requires_grad_()
    (right,) = torch.autograd.grad((count * linear_logprobs_reference(*wide, tokens)[0]).sum(), wide[1])
    ours, theirs = (
        (torch.autograd.grad((count * f(x, weight, tokens)[0]).sum(), weight)[0] - right).norm()
        for f in (linear_logprobs, linear_logprobs_reference)
    )
    assert ours <= 1.2 * theirs


def test_it_compiles_in_one_graph():
    x, weight, tokens, _ = inputs(dtype=torch.float32)
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    assert_all_close(compiled(x, weight, tokens), linear_logprobs(x, weight, tokens), 1e-5)


def test_chunks_are_for_many_logits_that_are_not_dearer_to_compute_again():
    def pay(n: int, dim: int, num_tokens: int, trained: bool, **options) -> bool:
        x, weight = torch.empty(1, n, dim, device="meta"), torch.empty(num_tokens, dim, device="meta")
        return chunks_are_faster(x, weight.requires_grad_(trained), **options)

    assert pay(1024, 512, 50257, True)
    assert pay(1024, 512, 50257, False)
    assert not pay(100, 512, 50257, True)  # few tokens
    assert not pay(100_000, 512, 256, True)  # a small vocabulary
    assert pay(100_000, 512, 4 * 512, True) and not pay(100_000, 512, 4 * 512 - 1, True)  # of four times the width
    assert not pay(1024, 4096, 50257, True)
    assert pay(1024, 4096, 50257, False)
    assert not pay(1024, 4096, 50257, False, entropy_needs_grad=True)
    with torch.no_grad():  # the same answer, for log-probabilities that are compared with those of training
        assert not pay(1024, 4096, 50257, True)


PEAK = """
import resource, torch
from palm_rlhf.ops.logprobs import linear_logprobs, linear_logprobs_reference
x, weight = torch.randn(1, 1024, 64, requires_grad=True), torch.randn(50257, 64, requires_grad=True)
tokens = torch.randint(50257, (1, 1024))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for say in (linear_logprobs, linear_logprobs_reference):
    say(x, weight, tokens, scale=1 / 8)[0].sum().backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_its_peak_memory_is_a_quarter_at_most_of_that_with_all_logits(root):
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=root, capture_output=True, text=True, check=True)
    chunked, all_logits = map(int, done.stdout.split())  # the smaller peak comes first
    assert chunked <= all_logits / 4
