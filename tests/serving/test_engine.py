"""The engine: whatever others ask, a reply is what it would be alone; rows, memory and queue are bounded, and freed."""

import threading

import pytest
import torch

from palm_rlhf.data.tokenizer import EOS, ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.generation import EngineError, EngineFull, Request
from palm_rlhf.serving.served_model import load

CLEAR_GAP = 1e-3  # far above what adding in another order can change of a logit


def greedy_alone(palm: PaLM, prompt: list[int], num_tokens: int) -> list[int]:
    """The reply of `PaLM.generate`; its choices have to be clear ones, or the comparison would be a matter of luck."""
    reply = palm.generate(prompt=torch.tensor(prompt), max_new_tokens=num_tokens, temperature=0)
    with torch.no_grad():
        logits = palm(torch.cat((torch.tensor(prompt), reply))[None])[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > CLEAR_GAP
    return reply.tolist()


@pytest.fixture(scope="module")
def prompts(served_model, dialogues) -> list[list[int]]:
    """Conversations of different lengths."""
    return [served_model.encode_chat([{"role": "user", "content": said}]) for said in dialogues]


@pytest.fixture(scope="module")
def alone(served_model, prompts) -> list[list[int]]:
    return [greedy_alone(served_model.palm, prompt, 12 + 5 * index) for index, prompt in enumerate(prompts)]


def ask(prompt, num_tokens, **options) -> Request:
    return Request(prompt, num_tokens, **{"temperature": 0, **options})


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("prefix_memory", [0, 2**20])
def test_greedy_replies_are_those_of_generate_alone(
    device, start_engine, checkpoint, prompts, alone, chunk, prefix_memory
):
    palm = load(checkpoint, device=str(device)).palm
    engine = start_engine(palm, max_batch=4, prefill_chunk=chunk, prefix_memory=prefix_memory)
    for _ in range(2):  # the second time the cache knows the prompts
        replies = [engine.submit(ask(prompt, len(tokens))) for prompt, tokens in zip(prompts, alone)]
        for reply, tokens in zip(replies, alone):
            reply.text()
            assert reply.tokens == tokens
            assert reply.finish_reason == "length"


def test_bfloat16_says_what_was_learnt(start_engine, checkpoint, dialogues):
    low = load(checkpoint, dtype=torch.bfloat16, device="cpu")
    engine = start_engine(low.palm, max_batch=8)
    prompts = [low.encode_chat([{"role": "user", "content": said}]) for said in dialogues]
    replies = [engine.submit(ask(prompt, 100, stop_tokens=low.turn_ends)) for prompt in prompts]
    assert [reply.text() for reply in replies] == list(dialogues.values())


def test_the_pieces_of_any_tokenizer_are_the_text_of_its_tokens(start_engine):
    text = "a café, a naïve façade, 🐈🐕 and so on; " * 20
    tokenizer = HuggingFaceTokenizer.train([text], 320, [EOS], eos_token=EOS)
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=16, depth=1, heads=2, dim_head=8, max_seq_len=256)
    engine = start_engine(palm, tokenizer)
    replies = [engine.submit(ask([index], 120, temperature=1, seed=index)) for index in range(8)]
    for reply in replies:
        assert reply.text() == tokenizer.decode(reply.tokens).rstrip("\ufffd")


def test_rows_join_and_leave_between_tokens(start_engine, prompts, alone):
    engine = start_engine(max_batch=3)
    replies, running = [], set()

    def deliver(generation, piece):
        running.add(engine.num_running)
        if len(generation.tokens) == 5 and len(replies) < len(prompts):  # the next comes while this one runs
            submit()
        if piece.finish_reason is not None:
            finished.release()

    def submit():
        index = len(replies)
        replies.append(None)
        replies[index] = engine.submit(ask(prompts[index], len(alone[index])), deliver)

    finished = threading.Semaphore(0)
    submit()
    for _ in prompts:
        assert finished.acquire(timeout=900)
    assert [reply.tokens for reply in replies] == alone
    assert max(running) == 3


def test_the_cache_stays_in_its_memory_and_replies_wait_for_it(start_engine, served_model, prompts, alone):
    per_token = SlotCache.bytes_per_token(served_model.palm)
    engine = start_engine(max_batch=8, context=128, cache_memory=200 * per_token, prefix_memory=0)
    seen = []
    finished = threading.Semaphore(0)

    def deliver(_, piece):
        seen.append((engine.cache_bytes, engine.num_running))
        if piece.finish_reason is not None:
            finished.release()

    replies = [engine.submit(ask(prompt, len(tokens)), deliver) for prompt, tokens in zip(prompts, alone)]
    for _ in replies:
        assert finished.acquire(timeout=900)
    assert [reply.tokens for reply in replies] == alone
    assert max(size for size, _ in seen) <= 200 * per_token
    assert 1 < max(running for _, running in seen) < 4  # 200 tokens are three rows of 64, and one of 128


def test_a_common_beginning_is_computed_once(start_engine, served_model):
    engine = start_engine(max_batch=2)
    system = {"role": "system", "content": "You are a parrot. " * 3}
    first = served_model.encode_chat([system, {"role": "user", "content": "Hello"}])
    second = served_model.encode_chat([system, {"role": "user", "content": "Count to ten."}])
    shared = next(i for i, (one, other) in enumerate(zip(first, second)) if one != other)
    reply = engine.submit(ask(first, 8))
    reply.text()
    assert reply.num_cached == 0
    other = engine.submit(ask(second, 8))
    other.text()
    assert other.num_cached == shared
    assert other.tokens == greedy_alone(served_model.palm, second, 8)
    # the next turn of the first chat knows its reply, too, but for the last token, which was never read
    going_on = first + reply.tokens + served_model.tokenizer.encode(" more")
    turn = engine.submit(ask(going_on, 8))
    turn.text()
    assert turn.num_cached == len(first) + len(reply.tokens) - 1
    assert turn.tokens == greedy_alone(served_model.palm, going_on, 8)
    num_tokens = sum(map(len, (first, second, going_on)))
    assert engine.counts["prompt_tokens_computed"] == num_tokens - shared - turn.num_cached


def test_a_beginning_is_taken_from_a_reply_that_still_runs(start_engine, prompts):
    engine = start_engine(max_batch=3, prefix_memory=0)
    prompt = prompts[0] + prompts[2] + prompts[3]  # long enough for reading it again to cost more than waiting
    replies = engine.submit_all([ask(prompt, 100, index=index) for index in range(3)])
    texts = [reply.text() for reply in replies]
    assert [reply.num_cached for reply in replies] == [0, len(prompt) - 1, len(prompt) - 1]
    assert len(set(texts)) == 1


def test_what_is_remembered_is_bounded(start_engine, served_model):
    limit = 100 * SlotCache.bytes_per_token(served_model.palm)
    engine = start_engine(max_batch=2, prefix_memory=limit)
    for start in range(12):
        engine.submit(ask([start, *range(40)], 4)).text()
        assert engine.prefix_bytes <= limit
    again = engine.submit(ask([11, *range(40)], 4))
    again.text()
    assert again.num_cached == 40
    forgotten = engine.submit(ask([3, *range(40)], 4))
    forgotten.text()
    assert forgotten.num_cached == 0


def test_a_seed_gives_the_same_sample_whoever_runs_beside_it(start_engine, prompts):
    engine = start_engine(max_batch=4)
    wild = {"temperature": 1.5, "top_p": 0.95}
    want = ask(prompts[0], 40, seed=7, **wild)
    first = engine.submit(want)
    first.text()
    others = [engine.submit(ask(prompt, 60, seed=index, **wild)) for index, prompt in enumerate(prompts[1:3])]
    second = engine.submit(want)
    others.append(engine.submit(ask(prompts[3], 20)))
    for reply in (*others, second):
        reply.text()
    assert second.tokens == first.tokens
    different = [engine.submit(ask(prompts[0], 40, **wild, **seed)) for seed in ({"seed": 8}, {"seed": 7, "index": 1})]
    for reply in different:
        reply.text()
        assert reply.tokens != first.tokens


def test_ids_without_a_token_are_never_sampled(start_engine):
    torch.manual_seed(3)
    palm = PaLM(num_tokens=300, dim=16, depth=1, heads=2, dim_head=8, max_seq_len=256)
    engine = start_engine(palm, ByteTokenizer())  # of 261 tokens
    reply = engine.submit(ask([1, 2], 200, temperature=2, logit_bias={280: 100}, logprobs=20))
    logprobs = [one for piece in reply for one in piece.logprobs]
    assert max(reply.tokens) < 261
    assert max(token for one in logprobs for token, _ in one.alternatives) < 261


def test_cancelling_frees_the_row_for_who_waits(start_engine, prompts, eventually):
    engine = start_engine(max_batch=1)
    long = engine.submit(ask(prompts[0], 200, logit_bias={256: -100}))
    waiting = engine.submit(ask(prompts[1], 5))
    given_up = engine.submit(ask(prompts[2], 5))
    next(iter(long))  # leaving the loop cancels
    given_up.cancel()
    waiting.text()
    eventually(lambda: engine.num_running == 0)
    assert (long.finish_reason, given_up.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled", "length")
    assert len(long.tokens) < 200
    assert given_up.tokens == []
    assert list(long)[-1].finish_reason == "cancelled"


def test_a_prompt_is_given_up_while_it_is_read(start_engine, served_model, eventually):
    engine = start_engine(prefill_chunk=1)
    reply = engine.submit(ask([5] * 200, 5))
    eventually(lambda: engine.num_running == 1)
    reply.cancel()
    assert reply.text() == ""
    assert engine.num_running == 0
    assert reply.num_read < 200


def test_the_queue_has_a_limit(start_engine, prompts):
    engine = start_engine(max_batch=1, queue=2)
    held = [engine.submit(ask(prompts[0], 200, logit_bias={256: -100})) for _ in range(3)]
    with pytest.raises(EngineFull, match="above the limit of 3") as refused:
        engine.submit(ask(prompts[0], 5))
    assert refused.value.retry_after >= 1
    with pytest.raises(ValueError, match="at most 3"):
        engine.submit_all([ask(prompts[0], 5)] * 4)
    held[1].cancel()
    list(held[1])
    engine.submit(ask(prompts[0], 5)).cancel()
    for reply in held:
        reply.cancel()


def test_replies_come_in_the_order_of_their_requests(start_engine, prompts):
    engine = start_engine(max_batch=1, queue=8)
    order = []
    finished = threading.Semaphore(0)

    def deliver(generation, piece):
        if piece.finish_reason is not None:
            order.append(generation)
            finished.release()

    replies = [engine.submit(ask(prompt, 20 - 3 * index), deliver) for index, prompt in enumerate(prompts)]
    for _ in replies:
        assert finished.acquire(timeout=900)
    assert order == replies


def test_a_step_is_shared_by_all_that_run(start_engine, prompts):
    engine = start_engine(max_batch=16)
    replies = engine.submit_all([ask(prompts[index % 6], 40, logit_bias={256: -100}) for index in range(16)])
    for reply in replies:
        reply.text()
    assert engine.counts["tokens"] == 640
    assert engine.counts["steps"] < 40 + 16  # a step each in which they came, at most, and those of one


def test_what_a_listener_raises_is_its_own(start_engine, prompts, alone):
    engine = start_engine(max_batch=2)

    def deliver(generation, piece):
        raise RuntimeError("no one listens")

    engine.submit(ask(prompts[0], 12), deliver)
    other = engine.submit(ask(prompts[1], len(alone[1])))
    other.text()
    assert other.tokens == alone[1]


def test_a_timeout_ends_what_runs_and_what_waits(start_engine, prompts):
    engine = start_engine(max_batch=1, timeout=600)
    slow = engine.submit(ask(prompts[0], 230, logit_bias={256: -100}, timeout=0.05))
    waiting = engine.submit(ask(prompts[0], 5, timeout=1e-6))
    for reply in (slow, waiting):
        with pytest.raises(TimeoutError, match="longer than"):
            reply.text()
        assert reply.finish_reason == "timeout"
    assert waiting.tokens == []
    assert engine.submit(ask(prompts[0], 5)).text()


def test_a_model_without_numbers_breaks_replies_and_not_the_engine(start_engine, served_model):
    palm = PaLM.from_config(served_model.palm.config)
    engine = start_engine(palm)
    with torch.no_grad():
        palm.norm.weight.fill_(float("nan"))
    with pytest.raises(EngineError, match="not finite"):
        engine.submit(ask([1, 2, 3], 5)).text()
    with torch.no_grad():
        palm.norm.weight.fill_(1.0)
    assert len(engine.submit(ask([1, 2, 3], 5)).text()) >= 0
    assert engine.num_running == 0


def test_a_step_that_raises_breaks_replies_and_not_the_engine(start_engine, served_model):
    palm = PaLM.from_config(served_model.palm.config)
    engine = start_engine(palm)
    layer = palm.layers[1]
    palm.layers[1] = torch.nn.Identity()  # which does not take what a block takes
    with pytest.raises(TypeError):
        engine.submit(ask([1, 2, 3], 5)).text()
    palm.layers[1] = layer
    assert engine.submit(ask([1, 2, 3], 5)).text() is not None
    assert engine.num_running == 0


def test_tasks_run_in_the_thread_of_the_engine(start_engine):
    engine = start_engine()
    assert engine.call(lambda: threading.current_thread().name).result(60) == "palm-rlhf-engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(60)
    assert engine.alive


def test_closing_ends_every_reply(start_engine, prompts):
    engine = start_engine(max_batch=1)
    replies = [engine.submit(ask(prompts[0], 230, logit_bias={256: -100})) for _ in range(3)]
    engine.close()
    for reply in replies:
        with pytest.raises(EngineError, match="closed"):
            reply.text()
    with pytest.raises(EngineError, match="closed"):
        engine.submit(ask(prompts[0], 5))
    assert not engine.alive


def test_what_does_not_fit_is_refused(start_engine, served_model):
    engine = start_engine()
    with pytest.raises(ValueError, match="prompt has 200 tokens and asks for 57 more; the context is 256"):
        engine.submit(ask([1] * 200, 57))
    with pytest.raises(ValueError, match="got the token id 261 in prompt"):
        engine.submit(ask([261], 5))
    with pytest.raises(ValueError, match="got the token id -1 in logit_bias"):
        engine.submit(ask([1], 5, logit_bias={-1: 1.0}))
    for options in ({"temperature": -1}, {"top_p": 2}, {"stop": ("",)}, {"logprobs": -1}, {"timeout": 0}):
        with pytest.raises(ValueError, match=f"got {next(iter(options))}="):
            ask([1], 5, **options)
    with pytest.raises(ValueError, match="empty"):
        ask([], 5)
    with pytest.raises(ValueError, match="causal"):
        start_engine(PaLM(num_tokens=261, dim=16, depth=1, causal=False))
