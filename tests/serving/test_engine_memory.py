"""The memory of the engine: replies share it by what they need so far, and wait again where it runs short."""

import threading

import numpy as np
import pytest
import torch

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.generation import Generation, Request


def ask(prompt, num_tokens, **options) -> Request:
    return Request(prompt, num_tokens, **{"temperature": 0, **options})


def test_replies_that_may_be_long_run_together_as_long_as_they_are_short(start_engine, served_model, dialogues):
    """Two contexts of memory are enough for six replies that end long before theirs."""
    per_token = SlotCache.bytes_per_token(served_model.palm)
    engine = start_engine(max_batch=6, context=1024, cache_memory=2048 * per_token, prefix_memory=0)
    prompts = [served_model.encode_chat([{"role": "user", "content": said}]) for said in dialogues]
    running = set()
    finished = threading.Semaphore(0)

    def deliver(_, piece):
        running.add(engine.num_running)
        if piece.finish_reason is not None:
            finished.release()

    replies = [
        engine.submit(ask(prompt, 1024 - len(prompt), stop_tokens=served_model.turn_ends), deliver)
        for prompt in prompts
    ]
    for _ in replies:
        assert finished.acquire(timeout=900)
    assert [served_model.tokenizer.decode(reply.tokens[:-1]) for reply in replies] == list(dialogues.values())
    assert max(running) == 6
    assert engine.counts["preempted"] == 0


@pytest.fixture(scope="module")
def exact() -> PaLM:
    """A model of doubles, whose choices no order of adding can tip, and that does not say one thing for ever."""
    torch.manual_seed(4)
    palm = PaLM(num_tokens=100, dim=16, depth=2, heads=2, dim_head=8, max_seq_len=512).double().eval()
    with torch.no_grad():
        palm.token_emb.weight.mul_(0.3)
        for parameter in palm.layers.parameters():
            parameter.mul_(2)
    return palm


LONG = 440  # tokens of a reply: two of them with their prompts, and no third, fit into 1000


def replies_where_memory_is_short(start_engine, palm, prefix_memory, **options):
    """Four long replies in the memory of two and a bit, with the order in which they end."""
    per_token = SlotCache.bytes_per_token(palm)
    memory = {"cache_memory": 1000 * per_token, "prefix_memory": prefix_memory}
    engine = start_engine(palm, ByteTokenizer(), max_batch=4, prefill_chunk=32, **memory)
    order, sizes = [], set()
    finished = threading.Semaphore(0)

    def deliver(generation, piece):
        sizes.add(engine.cache_bytes)
        if piece.finish_reason is not None:
            order.append(generation)
            finished.release()

    prompts = [[step * place % 100 for place in range(1, 21)] for step in (7, 8, 9, 11)]
    replies = engine.submit_all([ask(prompt, LONG, **options) for prompt in prompts], deliver)
    for _ in replies:
        assert finished.acquire(timeout=900)
    assert max(sizes) <= 1000 * per_token
    return engine, replies, order


@pytest.mark.parametrize("prefix_memory", [0, 2**24])
def test_who_waits_again_for_memory_goes_on_as_if_nothing_had_been(start_engine, exact, prefix_memory):
    engine, replies, order = replies_where_memory_is_short(start_engine, exact, prefix_memory)
    assert engine.counts["preempted"] > 0
    for reply in replies:
        alone = exact.generate(prompt=torch.tensor(reply.request.prompt), max_new_tokens=LONG, temperature=0)
        assert reply.tokens == alone.tolist()
    assert order == replies  # those that came first are never the ones that wait
    assert engine.counts["tokens"] == 4 * LONG
    assert engine.counts["prompt_tokens"] == 4 * 20
    assert [reply.num_cached for reply in replies] == [0] * 4


def test_who_waits_again_for_memory_draws_the_same_sample(start_engine, exact):
    wild = {"temperature": 1, "seed": 5, "frequency_penalty": 0.5}
    engine, replies, _ = replies_where_memory_is_short(start_engine, exact, 0, **wild)
    assert engine.counts["preempted"] > 0
    roomy = start_engine(exact, ByteTokenizer(), max_batch=1)
    for reply in replies:
        alone = roomy.submit(ask(reply.request.prompt, LONG, **wild))
        alone.text()
        assert reply.tokens == alone.tokens


def test_forgetting_what_was_said_before_waiting_is_noticed(start_engine, exact, monkeypatch):
    monkeypatch.setattr(Generation, "sequence", property(lambda self: np.array(self.request.prompt)))
    with pytest.raises(AssertionError):
        test_who_waits_again_for_memory_goes_on_as_if_nothing_had_been(start_engine, exact, 0)


def test_the_memory_has_to_hold_one_context(start_engine, served_model):
    per_token = SlotCache.bytes_per_token(served_model.palm)
    with pytest.raises(ValueError, match=f"expected at least {256 * per_token:,}"):
        start_engine(cache_memory=255 * per_token)
