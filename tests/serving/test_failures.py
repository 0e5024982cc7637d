"""What breaks a reply ends that reply alone, with its reason; health tells an engine that does nothing."""

import threading

import httpx
import pytest
import torch

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.generation import EngineError, Request
from tests.factories import palm_of

BAD = 99  # the token that breaks a forward, where a test says so
NEVER_ENDS = {"logit_bias": {256: -100, BAD: -100}}


def ask(prompt, num_tokens, **options) -> Request:
    return Request(prompt, num_tokens, **{"temperature": 0, **NEVER_ENDS, **options})


@pytest.fixture
def palm() -> PaLM:
    return palm_of(num_tokens=261, depth=3, max_seq_len=4096).double().eval()


def alone(palm: PaLM, request: Request) -> list[int]:
    """The reply that no engine has touched."""
    sequence = list(request.prompt)
    with torch.no_grad():
        for _ in range(request.max_new_tokens):
            logits = palm(torch.tensor([sequence]))[0, -1]
            logits[[256, BAD]] -= 100
            sequence.append(int(logits.argmax()))
    return sequence[len(request.prompt) :]


@pytest.fixture
def little_memory(monkeypatch):
    """A machine without memory for more than so many tokens of a layer: torch's own allocator says so."""

    def limit(num_tokens: int, after: int = 0):
        block, calls = SlotCache._block, []

        def limited(slots, rows, columns):
            calls.append(rows * columns)
            # 8 EiB, which no machine has
            return torch.zeros(2**60) if calls[-1] > num_tokens and len(calls) > after else block(slots, rows, columns)

        monkeypatch.setattr(SlotCache, "_block", limited)

    return limit


def test_a_prompt_without_memory_fails_and_those_behind_it_are_answered(start_engine, palm, little_memory):
    little_memory(1000)
    engine = start_engine(palm, ByteTokenizer(), max_batch=1)
    large = engine.submit(ask([1] * 2000, 5))
    small = engine.submit(ask([1] * 20, 5))
    with pytest.raises(MemoryError, match="no memory for this reply after 2000 tokens"):
        large.text()
    small.text()
    assert small.tokens == alone(palm, small.request)
    assert (engine.counts["finished_error"], engine.counts["finished_length"]) == (1, 1)
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_a_prompt_without_memory_leaves_those_that_run(start_engine, palm, little_memory):
    little_memory(1000)
    engine = start_engine(palm, ByteTokenizer(), max_batch=2)
    running = engine.submit(ask([2] * 20, 400))
    next(iter_on(running))
    with pytest.raises(MemoryError):
        engine.submit(ask([1] * 2000, 5)).text()
    for _ in running:
        pass
    assert running.tokens == alone(palm, running.request)


def iter_on(reply):
    """The pieces of a reply, which goes on when the loop is left."""
    while True:
        yield reply._pieces.get(timeout=900)


@pytest.mark.parametrize("layer", range(6))
def test_memory_that_ends_within_the_layers_leaves_the_cache_whole(palm, little_memory, layer):
    slots = SlotCache(palm, max_tokens=10**6, max_rows=4)
    little_memory(400, after=6 + layer)  # some layers have grown by then
    assert slots.reserve(1, 64, [])
    with torch.no_grad():
        palm(torch.tensor([[5, 6, 7]]), cache=slots.row(0, 0))
    before = slots.read(0, 0, 3)
    with pytest.raises(MemoryError, match="1 sequences of 500 tokens"):
        slots.reserve(1, 500, [3])
    assert {block.shape[2] for block in (*slots.keys, *slots.values)} == {64}
    assert (slots.num_rows, slots.num_columns) == (1, 64)
    assert torch.equal(slots.read(0, 0, 3), before)


def test_a_smaller_block_is_tried_before_a_reply_fails(palm, little_memory):
    slots = SlotCache(palm, max_tokens=10**6, max_rows=64)
    assert slots.reserve(2, 100, [])
    little_memory(300)
    assert slots.reserve(3, 100, [])  # 4 rows, as many as there may soon be, are too much
    assert slots.num_rows == 3


def test_a_reply_that_outgrows_the_memory_fails_and_the_shorter_one_goes_on(start_engine, palm, little_memory):
    little_memory(1300)
    engine = start_engine(palm, ByteTokenizer(), max_batch=2)
    long, short = engine.submit_all([ask([1] * 200, 3000), ask([2] * 20, 700)])
    with pytest.raises(MemoryError, match=r"after 6\d\d tokens"):
        long.text()
    short.text()
    assert short.tokens == alone(palm, short.request)


@pytest.fixture
def breaks_at_bad(palm):
    """The model fails at any forward that a certain token is in."""

    def check(_, inputs) -> None:
        if (inputs[0] == BAD).any():
            raise FloatingPointError("that token")

    palm.register_forward_pre_hook(check)


def test_a_prompt_that_breaks_the_model_breaks_no_other_that_is_read_with_it(start_engine, palm, breaks_at_bad):
    engine = start_engine(palm, ByteTokenizer(), max_batch=4)
    running = engine.submit(ask([5] * 9, 300))
    next(iter_on(running))
    fine, bad, other = engine.submit_all([ask([1, 2, 3], 20), ask([4, BAD, 6], 20), ask([7, 8, 9], 20)])
    with pytest.raises(FloatingPointError, match="that token"):
        bad.text()
    for reply in (fine, other, running):
        for _ in reply:
            pass
        assert reply.tokens == alone(palm, reply.request)
    assert engine.counts["finished_error"] == 1


def test_a_token_that_breaks_the_model_breaks_no_other_row(start_engine, palm, breaks_at_bad):
    engine = start_engine(palm, ByteTokenizer(), max_batch=4)
    fine = engine.submit(ask([1, 2, 3], 60))
    bad = engine.submit(Request([4, 5], 60, temperature=0, logit_bias={BAD: 100}))
    other = engine.submit(ask([7, 8, 9], 60))
    with pytest.raises(FloatingPointError):
        bad.text()
    for reply in (fine, other):
        reply.text()
        assert reply.tokens == alone(palm, reply.request)
    assert bad.tokens == [BAD]


def test_a_text_that_cannot_be_decoded_ends_its_reply_alone(start_engine, palm):
    class Strict(ByteTokenizer):
        def decode(self, tokens, **options):
            if BAD in tokens:
                raise UnicodeError("no text")
            return super().decode(tokens, **options)

    engine = start_engine(palm, Strict(), max_batch=2)
    bad = engine.submit(Request([4, 5], 60, temperature=0, logit_bias={BAD: 100}))
    fine = engine.submit(ask([1, 2, 3], 30))
    with pytest.raises(UnicodeError, match="no text"):
        bad.text()
    fine.text()
    assert fine.tokens == alone(palm, fine.request)


def test_what_was_no_number_is_not_left_behind_for_others(start_engine, palm, monkeypatch):
    """A row that held no numbers is used again by a short reply beside a long one: no mask would hide them."""
    # the kernel in C needs no mask
    monkeypatch.setattr("palm_rlhf.model.native_decode.why_not_native", lambda: "switched off")

    def no_numbers(_, inputs, embeds):
        return embeds.masked_fill((inputs[0] == BAD).unsqueeze(-1), float("nan"))

    hook = palm.token_emb.register_forward_hook(no_numbers)
    engine = start_engine(palm, ByteTokenizer(), max_batch=2)
    long = engine.submit(ask([7] * 400, 500))
    next(iter_on(long))
    with pytest.raises(EngineError, match="not finite"):
        engine.submit(ask([BAD] * 390, 5)).text()
    short = engine.submit(ask([1, 2, 3], 20))
    short.text()
    hook.remove()
    assert short.tokens == alone(palm, short.request)
    long.cancel()


def test_health_tells_a_loop_that_works_from_one_that_is_stuck(start_server, served_model, eventually):
    url, engine = start_server(stall_timeout=0.05)
    gate = threading.Event()

    def wait(*_) -> None:
        gate.wait()

    hook = served_model.palm.register_forward_pre_hook(wait)
    try:
        assert httpx.get(f"{url}/healthz").status_code == 200  # with nothing to do, nothing has to be done
        reply = engine.submit(ask([1, 2, 3], 5))
        eventually(lambda: engine.stalled)
        stuck = httpx.get(f"{url}/healthz")
        assert (stuck.status_code, stuck.json()["error"]["code"]) == (503, "stalled")
        assert "0.05 seconds" in stuck.json()["error"]["message"]
        gate.set()
        reply.text()
        eventually(lambda: httpx.get(f"{url}/healthz").status_code == 200)
    finally:
        gate.set()
        hook.remove()


def test_a_client_is_told_that_the_memory_was_short(start_server, little_memory):
    little_memory(300)
    url, _ = start_server(context=1024)
    body = {"model": "parrot", "prompt": "a" * 600, "max_tokens": 5}
    reply = httpx.post(f"{url}/v1/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "out_of_memory")
    assert "no memory for this reply" in reply.json()["error"]["message"]
    assert httpx.post(f"{url}/v1/completions", json={**body, "prompt": "a"}).status_code == 200
