"""Tokens read one by one, and what they are compared with."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf import PaLM
from palm_rlhf.model.cache import KVCache
from palm_rlhf.ops.attention import attention
from palm_rlhf.ops.cpu import native_library
from tests.factories import palm_of_scaled_norms

VOCABULARY = 17
SIZES = {"dim": 10, "depth": 2, "heads": 4, "kv_heads": 2, "dim_head": 6, "ff_inner_dim": 7}
EXACT = 1e-11
PAIRS = torch.cpu._is_avx512_bf16_supported()  # products of pairs of bfloat16


def palm_of(*, seed=0, **changes) -> PaLM:
    """A float64 model of random weights, the scales of its norms included."""
    return palm_of_scaled_norms(seed, num_tokens=VOCABULARY, **{**SIZES, **changes})


def add_scope(palm, r=2, seed=1, **options):
    """A scope of random weights, which says something at once."""
    torch.manual_seed(seed)
    for parameter in palm.add_finetune_params("scope", r, **options).parameters():
        torch.nn.init.normal_(parameter)
    return {"finetune_scope": "scope"}


def rows_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def read(palm, rows, steps=4, order=None, between=lambda: None, **options):
    """Logits of the last tokens of each row, `b steps v`, which are read one by one after the rest, and the cache.

    Half-way something may happen, and rows be dropped, doubled and moved.
    """
    width = max(steps, *map(len, rows))
    tokens = torch.stack([F.pad(row, (width - len(row), 0)) for row in rows])
    cache = palm.make_cache(len(rows), width, left_padding=torch.tensor([width - len(row) for row in rows]))
    for unwritten in cache.keys + cache.values:
        unwritten.fill_(torch.nan)
    if width > steps:
        palm(tokens[:, :-steps], cache=cache, **options)
    logits = []
    for column in range(width - steps, width):
        if column == width - steps // 2:
            between()
            if order is not None:
                cache.select(torch.tensor(order))
                tokens, logits = tokens[order], [seen[order] for seen in logits]
        logits.append(palm(tokens[:, column : column + 1], cache=cache, **options)[:, 0])
    return torch.stack(logits, dim=1), cache


@torch.no_grad()
def read_at_once(palm, rows, steps=4, order=None, **options):
    """The same logits without a cache, of each row alone; NaN for pads, of which nothing is expected."""
    logits = [palm(row[None], **options)[0, -steps:] for row in rows]
    logits = [F.pad(row, (0, 0, steps - len(row), 0), value=torch.nan) for row in logits]
    return torch.stack(logits if order is None else [logits[n] for n in order])


@contextmanager
def without_kernel():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("palm_rlhf.model.native_decode.why_not_native", lambda: "switched off")
        yield


WAYS = {"kernel": nullcontext, "operations": without_kernel}


def assert_way(cache, way):
    """A cache that the kernel has read keeps it; a machine without a compiler has none."""
    assert ("decoder" in cache.kernels) == (way == "kernel" and native_library.why_not() is None)


def assert_close(got, expected):
    wanted = ~expected.isnan()
    torch.testing.assert_close(got[wanted], expected[wanted], rtol=0, atol=EXACT)


class Rounded(KVCache):
    """Keys and values of bfloat16, in float64."""

    def append(self, layer, k, v):
        return super().append(layer, k.bfloat16().double(), v.bfloat16().double())


@contextmanager
def rounded_products(pairs):
    """What meets weights and keys in a product is rounded to bfloat16, where the processor multiplies pairs of it."""
    with pytest.MonkeyPatch.context() as patch:
        if pairs:
            patch.setattr("palm_rlhf.ops.linear.linear", lambda x, weight: F.linear(x.bfloat16().double(), weight))
            patch.setattr(
                "palm_rlhf.model.block.attention", lambda q, *r, **o: attention(q.bfloat16().double(), *r, **o)
            )
        yield


@torch.no_grad()
def bfloat16_error(pairs=PAIRS):
    """How far the kernel's outputs are from those in float64, where only what the kernel rounds is rounded.

    Of one block, before its output is rounded too: a second one's keys could be rounded the other way.
    """
    palm, exact, tokens = palm_of(depth=1).bfloat16(), palm_of(depth=1), torch.stack(rows_of([3, 3]))
    exact.load_state_dict(palm.state_dict())
    palm.norm = exact.norm = torch.nn.Identity()
    cache = palm.make_cache(2, 3)
    rounded = Rounded(depth=1, batch=2, kv_heads=2, capacity=3, dim_head=6, dtype=torch.float64)
    wide, errors = torch.zeros(1), []  # an embedding of float32 comes out as such
    for column in tokens.split(1, dim=1):
        out = palm(column, cache=cache, extra_embed=wide, return_only_embedding=True)
        with without_kernel(), rounded_products(pairs):
            expected = exact(column, cache=rounded, return_only_embedding=True)
        assert out.dtype == torch.float32
        errors.append((out - expected).abs().max())
    assert_way(cache, "kernel")
    assert torch.equal(cache.keys[0].double(), rounded.keys[0])
    assert torch.equal(cache.values[0].double(), rounded.values[0])
    return max(errors)
