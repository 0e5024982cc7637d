"""How much an engine takes on at once: numbers that are given, else a CPU's, else what the memory of a GPU holds."""

import pytest

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.serving.engine import EngineConfig
from palm_rlhf.serving.engine import engine as engine_module
from palm_rlhf.serving.engine.batch import FORWARD_COST, GPU_FORWARD_COST, Batch
from palm_rlhf.serving.engine.capacity import Capacity, capacity
from palm_rlhf.serving.engine.sampler import Sampler
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.generation import Request
from tests.factories import palm_of

# Of a large model: 160 KiB a token, so 1.25 GiB a reply of 8192 tokens, and 16,384,000 bytes to sample one of 256,000.
LARGE = {"context": 8192, "bytes_per_token": 163_840, "num_tokens": 256_000}
OF_REPLY, OF_SAMPLING = 1_342_177_280, 16_384_000


def test_a_cpu_has_its_numbers():
    assert capacity(EngineConfig(), free_memory=None, **LARGE) == Capacity(16, 2**31, 256)


@pytest.mark.parametrize("free", [None, 10**9, 10**12])
def test_numbers_that_are_given_stay(free):
    config = EngineConfig(max_batch=7, cache_memory=12345, prefill_chunk=99)
    assert capacity(config, free_memory=free, **LARGE) == Capacity(7, 12345, 99)


def test_a_gpu_computes_as_many_replies_as_it_holds():
    # 60e9 less a tenth and 2**28 for prefixes are 53,731,564,544: 39 times 1,358,561,280, and 747,674,624 more
    assert capacity(EngineConfig(), free_memory=60 * 10**9, **LARGE) == Capacity(39, 39 * OF_REPLY, 2048)
    more = EngineConfig(prefix_memory=2**28 - 747_674_624 + 1_358_561_280)
    assert capacity(more, free_memory=60 * 10**9, **LARGE).max_batch == 39
    more = EngineConfig(prefix_memory=2**28 + 747_674_624 + 1)
    assert capacity(more, free_memory=60 * 10**9, **LARGE).max_batch == 38


def test_there_are_never_too_few_and_never_too_many():
    # 20e9 less 2e9 and 2**28 are 17,731,564,544, which hold 13; 16 share what is left beside the memory to sample with
    found = capacity(EngineConfig(), free_memory=20 * 10**9, **LARGE)
    assert found == Capacity(16, 17_731_564_544 - 16 * OF_SAMPLING, 2048)
    small = {"context": 2000, "bytes_per_token": 3072, "num_tokens": 50_304}
    assert capacity(EngineConfig(), free_memory=80 * 10**9, **small) == Capacity(256, 256 * 2048 * 3072, 2048)
    assert capacity(EngineConfig(), free_memory=10**9, **LARGE).cache_memory == 0


def test_the_other_number_follows_the_one_that_is_given():
    assert capacity(EngineConfig(max_batch=4), free_memory=60 * 10**9, **LARGE).cache_memory == 4 * OF_REPLY
    assert capacity(EngineConfig(cache_memory=20 * OF_REPLY + 5), free_memory=60 * 10**9, **LARGE).max_batch == 20
    assert capacity(EngineConfig(cache_memory=OF_REPLY), free_memory=60 * 10**9, **LARGE).max_batch == 16


def test_an_engine_takes_on_what_the_gpu_holds(start_engine, monkeypatch):
    palm = palm_of(
        num_tokens=256, dim=32, heads=4, kv_heads=2, max_seq_len=100
    )  # 2 * 2 * 2 * 8 * 4 = 256 bytes a token
    of_reply = 128 * 256 + 256 * 64
    monkeypatch.setattr(engine_module, "free_memory", lambda device: 2**30 + 20 * of_reply + 77)
    engine = start_engine(palm, ByteTokenizer(), prefix_memory=0, queue=5)
    assert engine.capacity == Capacity(20, 20 * 128 * 256, 2048)
    batch = engine._scheduler.batch
    assert (batch.slots.max_rows, batch.slots.max_tokens, engine._scheduler.chunk) == (20, 20 * 128, 2048)
    assert engine.limit == 25 and engine.most_of("one") == 20
    assert len(engine.submit(Request([1, 2], 5, temperature=0)).text()) > 0
    monkeypatch.setattr(engine_module, "free_memory", lambda device: 2**30 + 1000)
    with pytest.raises(ValueError, match="cache_memory=0 bytes, expected at least 32,768, for one sequence"):
        start_engine(palm, ByteTokenizer(), prefix_memory=0)


def test_one_more_forward_costs_a_gpu_more_tokens_than_a_cpu():
    def cost(palm) -> int:
        slots = SlotCache(palm, max_tokens=64, max_rows=1)
        return Batch(palm, Sampler(), slots, prefix_bytes=0).forward_cost

    assert cost(palm_of()) == FORWARD_COST
    assert cost(palm_of().to("meta")) == GPU_FORWARD_COST > FORWARD_COST
