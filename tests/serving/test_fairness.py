"""Clients share rows, the queue, reading and memory; who is alone has all of them; none learns of another's prompts."""

import threading

import httpx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.generation import EngineFull, Request
from tests.factories import palm_of

NEVER_ENDS = {"logit_bias": {256: -100}}  # the end of the text


def ask(prompt, num_tokens, client, **options) -> Request:
    return Request(prompt, num_tokens, client=client, **{"temperature": 0, **NEVER_ENDS, **options})


@pytest.fixture(scope="module")
def palm() -> PaLM:
    return palm_of(num_tokens=261, depth=1, max_seq_len=4096).double().eval()


@pytest.fixture
def gate(palm):
    """While it is not set, each forward of the model waits for it."""
    gate = threading.Event()

    def wait(*_) -> None:
        gate.wait()

    hook = palm.register_forward_pre_hook(wait)
    yield gate
    hook.remove()
    gate.set()


def test_a_client_alone_has_every_row(start_engine, palm, eventually):
    engine = start_engine(palm, ByteTokenizer(), max_batch=6, queue=20)
    replies = engine.submit_all([ask([7], 3000, "greedy", index=index) for index in range(12)])
    eventually(lambda: engine.num_running == 6)
    for reply in replies:
        reply.cancel()


def test_who_comes_later_is_answered_before_one_of_many_replies_has_ended(start_engine, palm, eventually):
    engine = start_engine(palm, ByteTokenizer(), max_batch=4, queue=20)
    greedy = engine.submit_all([ask([7, index], 4000, "greedy", index=index) for index in range(10)])
    eventually(lambda: engine.num_running == 4)
    engine.submit(ask([9] * 20, 30, "modest")).text()
    assert all(reply.finish_reason is None for reply in greedy)
    # several of the second client have half of the rows
    modest = engine.submit_all([ask([9, index], 4000, "modest") for index in range(4)])
    eventually(lambda: sum(len(reply.tokens) > 0 for reply in modest) == 2)
    running = sum(len(reply.tokens) > 0 for reply in modest)
    assert (running, engine.num_running) == (2, 4)
    for reply in (*greedy, *modest):
        reply.cancel()


def test_a_reply_that_made_way_is_the_one_it_would_have_been(start_engine, palm):
    engine = start_engine(palm, ByteTokenizer(), max_batch=4, queue=20)
    prompts = [[7, index, 3 * index] for index in range(4)]
    came = threading.Event()
    greedy = engine.submit_all([ask(prompt, 200, "greedy") for prompt in prompts], lambda *_: came.set())
    assert came.wait(900)
    engine.submit_all([ask([9, index], 5, "modest") for index in range(2)])[1].text()
    assert engine.counts["preempted"] > 0
    for prompt, reply in zip(prompts, greedy):
        alone = engine.submit(ask(prompt, 200, "alone"))
        alone.text()
        assert reply.tokens == alone.tokens


def test_a_long_prompt_is_read_on_after_the_short_ones_of_others(start_engine, palm):
    engine = start_engine(palm, ByteTokenizer(), max_batch=4, queue=20, prefill_chunk=16, context=4096)
    order = []
    finished = threading.Semaphore(0)

    def deliver(generation, piece):
        if piece.finish_reason is not None:
            order.append(generation.request.client)
            finished.release()

    begun = threading.Event()
    hook = palm.register_forward_pre_hook(lambda *_: begun.set())
    long = torch.randint(256, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    replies = [engine.submit(ask(long, 3, "long"), deliver)]
    assert begun.wait(900)  # of 125 parts, the first is being read
    replies += [engine.submit(ask([8, index], 3, f"short-{index}"), deliver) for index in range(3)]
    for _ in replies:
        assert finished.acquire(timeout=900)
    hook.remove()
    assert order[-1] == "long"
    alone = palm.generate(prompt=torch.tensor(long), max_new_tokens=3, temperature=0)
    assert replies[0].tokens == alone.tolist()


PROMPTS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=9)


@settings(max_examples=15, deadline=None)
@given(PROMPTS, st.booleans())
def test_replies_are_those_of_each_alone_whoever_else_asks(served_model, palm, parts, remember):
    """Halting, joining, making way and coming back leave every reply as it is alone."""
    text = torch.randint(256, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    config = EngineConfig(max_batch=3, prefill_chunk=16, prefix_memory=2**16 if remember else 0)
    with Engine(palm, ByteTokenizer(), config) as engine:
        wanted = [ask(text[:shared] + [index] * own, 6, client) for index, (client, shared, own) in enumerate(parts)]
        replies = [engine.submit(one) for one in wanted]
        for reply in replies:
            reply.text()
    for reply in replies:
        alone = palm.generate(prompt=torch.tensor(reply.request.prompt), max_new_tokens=6, temperature=0)
        assert reply.tokens == alone.tolist()


def test_tokens_are_shared_and_not_replies(start_engine, palm):
    """With one row, a client of long replies gets as many tokens as one of short ones, not as many turns."""
    engine = start_engine(palm, ByteTokenizer(), max_batch=1, queue=200)
    order = []
    finished = threading.Semaphore(0)

    def deliver(generation, piece):
        if piece.finish_reason is not None:
            order.append(generation.request.client)
            finished.release()

    first = engine.submit(ask([1], 3000, "first"), deliver)  # holds the row until both wait
    replies = engine.submit_all([ask([2], 90, "long") for _ in range(4)], deliver)
    replies += engine.submit_all([ask([3], 9, "short") for _ in range(40)], deliver)
    first.cancel()
    for _ in (first, *replies):
        assert finished.acquire(timeout=900)
    cut = order[1:23]
    assert 1 <= cut.count("long") <= 3 and cut.count("short") >= 18


def test_a_client_leaves_places_for_others_and_those_for_more(start_engine, palm):
    engine = start_engine(palm, ByteTokenizer(), max_batch=2, queue=14)
    assert engine.most_of("one") == 8 and engine.most_of("") == 16
    for client, share in (("one", 8), ("two", 4), ("three", 2), ("four", 1)):
        replies = [engine.submit(ask([1], 4000, client)) for _ in range(share)]
        with pytest.raises(EngineFull, match="of your replies run or wait") as refused:
            engine.submit(ask([1], 4000, client))
        assert refused.value.retry_after >= 1
        assert str(share) in str(refused.value)
        assert len(replies) == share
    small = start_engine(palm, ByteTokenizer(), max_batch=3, queue=0)
    assert small.most_of("one") == 3
    small.submit_all([ask([1], 4000, "one") for _ in range(3)])  # no one else is there, and all rows may be had


def test_memory_is_taken_from_the_client_that_has_most(start_engine, palm, gate):
    memory = {"cache_memory": 1600 * SlotCache.bytes_per_token(palm), "prefix_memory": 0}
    engine = start_engine(palm, ByteTokenizer(), max_batch=4, queue=20, context=1024, **memory)
    greedy = engine.submit_all([ask([7, index], 1000, "greedy") for index in range(3)])
    modest = engine.submit(ask([9], 700, "modest"))  # the last that came, and never the one that has to wait again
    gate.set()
    modest.text()
    assert engine.counts["preempted"] >= 2
    assert all(reply.finish_reason is None for reply in greedy)
    for reply in greedy:
        reply.cancel()


def test_tasks_of_clients_take_turns(start_engine):
    engine = start_engine()
    order, hold = [], threading.Event()
    first = engine.call(hold.wait, "first")
    futures = [engine.call(lambda client=client: order.append(client), client) for client in "aaaabbc"]
    hold.set()
    for future in (first, *futures):
        future.result(60)
    assert "".join(order) == "abcabaa"


# what a client is told of others


def told(palm, prompts_of_others: list[list[int]], own: list[list[int]], running: bool) -> tuple:
    """What a client can see of its requests after, or while, another's have been answered, and what they cost."""
    seen = []
    with Engine(palm, ByteTokenizer(), EngineConfig(max_batch=4, prefill_chunk=64, prefix_memory=2**20)) as engine:
        others = [engine.submit(ask(prompt, 500 if running else 2, "other")) for prompt in prompts_of_others]
        for reply in others:
            next(iter_without_leaving(reply)) if running else reply.text()
        for prompt in own:
            before = engine.counts["prompt_tokens_computed"], engine.counts["prompt_tokens_reused"]
            reply = engine.submit(ask(prompt, 1, "own"))
            reply.text()
            after = engine.counts["prompt_tokens_computed"], engine.counts["prompt_tokens_reused"]
            seen.append((reply.num_cached, after[0] - before[0], after[1] - before[1]))
        for reply in others:
            reply.cancel()
    return tuple(seen)


def iter_without_leaving(reply):
    """The pieces of a reply, which goes on when the loop is left."""
    while True:
        yield reply._pieces.get(timeout=900)


@pytest.mark.parametrize("running", [False, True])
def test_neither_the_count_nor_the_work_tells_another_clients_prompt(palm, running):
    secret = list(b"the password is swordfish, and no one may know it")
    own = [[*secret[:length], wrong] for length in (5, 20, 40) for wrong in (secret[length], 1)] + [secret]
    expected = told(palm, [[200] * len(secret)], own, running)
    assert told(palm, [secret], own, running) == expected
    cached = [row[0] for row in expected]
    # its own prompts it is told of: each begins as the one before it
    assert cached[0] == 0 and cached[1] == 5 and cached[-1] == 41


def test_prompts_that_wait_together_are_no_one_elses(palm, start_engine, gate):
    """Two clients ask the same while both wait to be read: both are read whole, and told so."""
    engine = start_engine(palm, ByteTokenizer(), max_batch=8, queue=20, prefill_chunk=512)
    prompt = list(range(100))
    first = engine.submit(ask([3], 2000, "first"))
    replies = [engine.submit(ask([*prompt, index], 1, client)) for index, client in enumerate(["a", "a", "b", "b"])]
    gate.set()
    for reply in replies:
        reply.text()
    first.cancel()
    assert [reply.num_cached for reply in replies] == [0, 100, 0, 100]


def test_what_is_known_of_another_in_the_same_forward_is_not_told(palm, start_engine, gate):
    """Two clients know beginnings of different lengths: neither is told the other's, by being read together."""
    engine = start_engine(palm, ByteTokenizer(), max_batch=8, queue=20, prefill_chunk=512)
    gate.set()
    known = {"a": list(range(30)), "b": [7] * 40}
    for client, prompt in known.items():
        engine.submit(ask(prompt, 1, client)).text()
    gate.clear()
    first = engine.submit(ask([3], 2000, "first"))
    replies = [engine.submit(ask([*prompt, 9], 1, client)) for client, prompt in known.items()]
    gate.set()
    for reply in replies:
        reply.text()
    first.cancel()
    assert [reply.num_cached for reply in replies] == [30, 40]


def test_keys_are_clients_of_their_own(start_server):
    url, _ = start_server(api_keys=("one", "two"), max_batch=2, queue=6, context=20_000)
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    secret = {"model": "parrot", "prompt": "the password is swordfish", "max_tokens": 4}
    texts = f"{url}/v1/completions"

    def cached(headers) -> int:
        usage = httpx.post(texts, json=secret, headers=headers, timeout=900).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached(one), cached(one), cached(two), cached(two)] == [0, 24, 0, 24]
    assert httpx.post(texts, json={**secret, "n": 5}, headers=one).json()["error"]["param"] == "n"
    endless = {**secret, "max_tokens": 19_000, "n": 4, "stream": True, "logit_bias": {"256": -100}}
    with httpx.Client(timeout=900) as client, client.stream("POST", texts, json=endless, headers=one) as reply:
        lines = reply.iter_lines()
        next(lines)
        refused = client.post(texts, json=secret, headers=one)
        assert (refused.status_code, "your share of" in refused.json()["error"]["message"]) == (429, True)
        assert client.post(texts, json=secret, headers=two).status_code == 200
