"""The protocol of a cache: all that a forward uses of one, and that every cache of the library meets."""

import pytest
import torch

from palm_rlhf.model.cache import Cache, KVCache, PromptCache
from palm_rlhf.model.static_cache import StaticCache
from palm_rlhf.serving.engine.slot_cache import AlignedRows, RaggedRows, SlotCache
from tests.factories import palm_of


@pytest.fixture(scope="module")
def palm():
    return palm_of(num_tokens=31, heads=4, kv_heads=2, dim_head=4, xpos=True).double().eval()


class ListCache:
    """The protocol and nothing more: keys and values are concatenated, and no kernel may write to them."""

    def __init__(self, depth):
        self.kept, self.length, self.kernels = [None] * depth, 0, {}

    def positions(self, num_new, device):
        return torch.arange(self.length, self.length + num_new, device=device)[None]

    def key_mask(self, num_new):
        return None

    def append(self, layer, k, v):
        before = self.kept[layer]
        self.kept[layer] = (k, v) if before is None else tuple(torch.cat(pair, dim=2) for pair in zip(before, (k, v)))
        return self.kept[layer]

    def advance(self, num_new):
        self.length += num_new

    def window(self):
        return None


def caches(palm):
    slots = SlotCache(palm, max_tokens=64, max_rows=2)
    assert slots.reserve(2, 16, [])
    return {
        KVCache: palm.make_cache(2, 16),
        PromptCache: PromptCache(palm.config.depth, torch.zeros(2, dtype=torch.long)),
        AlignedRows: slots.row(0, 0, 2),
        RaggedRows: slots.rows([3, 2]),
        StaticCache: StaticCache(depth=2, batch=2, kv_heads=2, capacity=16, dim_head=4),
        ListCache: ListCache(palm.config.depth),
    }


def test_every_cache_meets_the_protocol(palm):
    for kind, cache in caches(palm).items():
        assert type(cache) is kind
        assert isinstance(cache, Cache)


@pytest.mark.parametrize("name", ["positions", "key_mask", "append", "advance", "window", "kernels"])
def test_a_cache_that_lacks_a_part_does_not_meet_it(name):
    body = {key: value for key, value in vars(ListCache).items() if key not in ("__init__", "__dict__", "__weakref__")}
    body = {**body, "kernels": {}}
    assert isinstance(type("Whole", (), body)(), Cache)
    del body[name]
    assert not isinstance(type("Lacking", (), body)(), Cache)


@torch.no_grad()
@pytest.mark.parametrize("kind", [KVCache, PromptCache, AlignedRows, ListCache])
def test_a_forward_needs_no_more_than_the_protocol(palm, kind):
    tokens = torch.randint(31, (2, 9))
    expected = palm(tokens)[:, -1]
    cache = caches(palm)[kind]
    palm(tokens[:, :8], cache=cache)
    torch.testing.assert_close(one_token(palm, tokens[:, 8:], cache), expected, rtol=0, atol=1e-12)


def one_token(palm, tokens, cache):
    if isinstance(cache, PromptCache):
        cache.select(torch.arange(len(tokens)))
    return palm(tokens, cache=cache)[:, -1]
