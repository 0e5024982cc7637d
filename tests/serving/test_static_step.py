"""Steps of few shapes: the numbers are those of any step, rows beside those of the step stay whole, memory is freed."""

import logging
import math
import threading
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.engine import batch as batch_module
from palm_rlhf.serving.engine import static_step as static_module
from palm_rlhf.serving.engine.launched_step import LaunchedStep
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.engine.static_step import MAX_GRAPHS, WARM_GRAPHS, StaticStep, rows_computed
from palm_rlhf.serving.generation import EngineError, Request
from tests.factories import palm_of


@pytest.fixture(scope="module")
def palm():
    """A model whose choices are clear ones, and depend much on earlier tokens."""
    palm = palm_of(num_tokens=256, dim=32, heads=4, kv_heads=2, logit_scale=4.0, xpos=True, max_seq_len=4096)
    for layer in palm.layers:
        layer.attn_out.weight.data.mul_(8)
    return palm.double().eval()


def filled(palm, lengths, num_rows, num_columns) -> SlotCache:
    """A cache whose first rows have read so many tokens each."""
    slots = SlotCache(palm, max_tokens=num_rows * num_columns, max_rows=num_rows)
    assert slots.reserve(num_rows, num_columns, [])
    for row, length in enumerate(lengths):
        if length:
            palm(torch.randint(256, (1, length)), cache=slots.row(row, 0))
    return slots


@torch.no_grad()
def require_step(palm, step_lengths, other_lengths, num_free, num_columns=640):
    """A static step gives the logits of the plain one, and leaves all that others have read as it is."""
    lengths = [*step_lengths, *other_lengths]
    slots = filled(palm, lengths, len(lengths) + num_free, num_columns)
    before = [slots.read(row, 0, length) for row, length in enumerate(lengths)]
    tokens = torch.randint(256, (len(step_lengths),)).tolist()
    found = StaticStep(palm, slots)(tokens, lengths).clone()
    after = [slots.read(row, 0, length) for row, length in enumerate(lengths)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    written = [slots.read(row, length, length + 1) for row, length in enumerate(step_lengths)]
    expected = palm(torch.tensor(tokens).unsqueeze(-1), cache=slots.rows(step_lengths))[:, 0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for row, length in enumerate(step_lengths):
        torch.testing.assert_close(written[row], slots.read(row, length, length + 1), rtol=0, atol=1e-10)


LENGTHS = st.one_of(st.integers(1, 20), st.sampled_from([254, 255, 256, 511]))


@settings(max_examples=15)
@given(st.lists(LENGTHS, min_size=1, max_size=11), st.lists(LENGTHS, max_size=3), st.integers(0, 6))
def test_a_static_step_computes_what_any_step_does(palm, step_lengths, other_lengths, num_free):
    require_step(palm, step_lengths, other_lengths, num_free)


def test_the_last_column_of_the_cache_can_be_written(palm):
    require_step(palm, [63, 5], [], 0, num_columns=64)
    require_step(palm, [319], [318], 2, num_columns=320)


class PaddingAtTheBeginning(StaticStep):
    """A wrong step, which takes every row beside its own for an empty one."""

    def __call__(self, tokens, lengths):
        return super().__call__(tokens, lengths[: len(tokens)])


class ColumnsOfItsRows(StaticStep):
    """A wrong step, whose columns are those of its own rows."""

    def _run(self, rows, columns):
        super()._run(rows, 256)


class NextToThem(StaticStep):
    """A wrong step, whose rows write one column too far."""

    def __call__(self, tokens, lengths):
        return super().__call__(tokens, [length + 1 for length in lengths])


@pytest.mark.parametrize("mutant", [PaddingAtTheBeginning, ColumnsOfItsRows, NextToThem])
def test_a_wrong_static_step_is_noticed(palm, monkeypatch, mutant):
    monkeypatch.setitem(globals(), "StaticStep", mutant)
    with pytest.raises((AssertionError, RuntimeError)):
        require_step(palm, [5, 9, 3, 7, 2], [300, 17], 1)


def test_rows_are_rounded_to_few_numbers():
    assert [rows_computed(rows) for rows in (1, 2, 3, 5, 9, 33, 64, 65, 97, 256)] == [
        1,
        2,
        4,
        8,
        16,
        40,
        64,
        96,
        128,
        256,
    ]
    assert len({rows_computed(rows) for rows in range(1, 257)}) <= WARM_GRAPHS < MAX_GRAPHS


@torch.no_grad()
def test_a_resize_frees_the_old_memory(palm):
    slots = filled(palm, [3], 2, 64)
    slots.static_step = StaticStep(palm, slots)
    assert slots.static_step.graphs.max_graphs == MAX_GRAPHS
    slots.static_step([1], [3])
    old = weakref.ref(slots.keys[0])
    slots.max_tokens = 10**4
    assert slots.reserve(2, 128, [4])
    assert slots.static_step is None and old() is None


# the engine


@pytest.fixture
def static(monkeypatch):
    """Engines take the steps of a GPU, which a CPU runs without graphs; counts them by shape."""
    shapes = []
    run = StaticStep._run

    def counted(step, rows, columns):
        shapes.append((rows, columns))
        run(step, rows, columns)

    monkeypatch.setattr(static_module, "why_not_captured", lambda palm: None)
    monkeypatch.setattr(StaticStep, "_run", counted)
    return shapes


PROMPTS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=9)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PROMPTS, st.booleans())
def test_replies_are_those_of_each_alone(palm, static, parts, remember):
    """While rows are read, halted, make way and come back, beside steps that compute more rows than there are."""
    text = torch.randint(256, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    config = EngineConfig(max_batch=3, prefill_chunk=16, prefix_memory=2**18 if remember else 0, context=200)
    requests = [
        Request(text[:shared] + [index] * own, 6, temperature=0, client=client)
        for index, (client, shared, own) in enumerate(parts)
    ]
    static.clear()
    with Engine(palm, ByteTokenizer(), config) as engine:
        replies = [engine.submit(request) for request in requests]
        for reply in replies:
            reply.text()
    assert static
    for reply in replies:
        alone = palm.generate(prompt=torch.tensor(reply.request.prompt), max_new_tokens=6, temperature=0)
        assert reply.tokens == alone.tolist()


def test_seeded_replies_are_those_of_plain_steps(palm, start_engine, static, monkeypatch):
    options = [{}, {"top_p": 0.9}, {"top_k": 7}, {"temperature": 0.5, "presence_penalty": 1.0}, {"logprobs": 2}]
    requests = [Request([1, 2, index], 20, **{"seed": index, **one}) for index, one in enumerate(options)]

    def sampled():
        engine = start_engine(palm, ByteTokenizer(), max_batch=8, prefix_memory=0, context=128)
        replies = engine.submit_all(requests)
        for reply in replies:
            reply.text()
        return [reply.tokens for reply in replies]

    replies, num_steps = sampled(), len(static)
    assert num_steps
    monkeypatch.setattr(static_module, "why_not_captured", lambda palm: "switched off")
    assert sampled() == replies
    assert len(static) == num_steps


# steps that begin before the tokens of the step before are looked at


def seeded(palm, num_replies=5) -> list[Request]:
    """Requests whose replies end at different places: after so many tokens, or at a token."""
    ends = [frozenset(range(index, 256, 40)) if index % 3 == 1 else frozenset() for index in range(num_replies)]
    return [
        Request([1, 2, index], 60 + 9 * index, seed=index, top_p=0.99, temperature=1.3, stop_tokens=ends[index])
        for index in range(num_replies)
    ]


def replies(engine, requests) -> list[list[int]]:
    generations = [engine.submit(request) for request in requests]
    for generation in generations:
        generation.text()
    return [generation.tokens for generation in generations]


def require_the_same_where_memory_is_short(palm, start_engine, monkeypatch):
    """Replies that leave at different steps, and wait again for memory, draw what they do alone, one by one."""
    monkeypatch.setattr(batch_module, "HEADROOM", 8)  # rows join early, and are soon too many
    roomy = start_engine(palm, ByteTokenizer(), max_batch=1, prefix_memory=0, context=128)
    expected = [replies(roomy, [request])[0] for request in seeded(palm)]
    for columns, prefix_memory in ((1024, 0), (256, 0), (192, 2**20)):
        memory = columns * SlotCache.bytes_per_token(palm)
        short = {"context": 128, "cache_memory": memory, "prefix_memory": prefix_memory}
        engine = start_engine(palm, ByteTokenizer(), max_batch=8, **short)
        assert replies(engine, seeded(palm)) == expected
        assert (engine.counts["preempted"] > 0) == (columns < 1024)


def test_replies_that_leave_and_come_back_are_the_same(palm, start_engine, static, monkeypatch):
    require_the_same_where_memory_is_short(palm, start_engine, monkeypatch)


def require_the_same_after_a_pause(palm, start_engine, monkeypatch):
    """A reply that is paused while a step is under way draws what it does without."""
    request = Request([1, 2, 3], 60, seed=3, temperature=1.3)
    engine = start_engine(palm, ByteTokenizer(), max_batch=4, context=128)
    (expected,) = replies(engine, [request])
    paused = []

    def deliver(generation, piece):
        if len(generation.tokens) in (10, 30):
            generation.pause(True)
            paused.append(len(generation.tokens))
            timer = threading.Timer(0.05, generation.pause, [False])
            timer.start()
        if piece.finish_reason is not None:
            ended.set()

    ended = threading.Event()
    generation = engine.submit(request, deliver)
    beside = engine.submit(Request([7], 60, seed=1))
    assert ended.wait(600)
    beside.text()
    assert generation.tokens == expected and len(paused) == 2
    assert engine.counts["paused"] >= 1


def test_a_reply_that_is_paused_goes_on_as_it_would_have(palm, start_engine, static):
    require_the_same_after_a_pause(palm, start_engine, None)


def drop_for_good(step, generation):
    if generation in step.rows:
        step.rows[step.rows.index(generation)] = None


def in_the_old_order(step, rows):
    return step.tokens[: len(rows)]


MOVE = SlotCache.move


@pytest.mark.parametrize(
    "law, owner, name, mutant",
    [
        (require_the_same_after_a_pause, LaunchedStep, "drop", drop_for_good),
        (require_the_same_where_memory_is_short, LaunchedStep, "tokens_of", in_the_old_order),
        (require_the_same_where_memory_is_short, SlotCache, "move", lambda *of: MOVE(*of[:3], of[3] - 1)),
    ],
)
def test_a_wrong_step_ahead_is_noticed(palm, start_engine, static, monkeypatch, law, owner, name, mutant):
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises(AssertionError):
        law(palm, start_engine, monkeypatch)


def test_a_step_begins_before_the_tokens_of_the_last_are_looked_at(palm, start_engine, static, monkeypatch):
    events = []
    begin, wait = LaunchedStep.__init__, LaunchedStep.wait

    def begin_and_tell(step, *arguments):
        events.append("begin")
        begin(step, *arguments)

    def wait_and_tell(step):
        events.append("look")
        return wait(step)

    monkeypatch.setattr(LaunchedStep, "__init__", begin_and_tell)
    monkeypatch.setattr(LaunchedStep, "wait", wait_and_tell)
    engine = start_engine(palm, ByteTokenizer(), max_batch=4, context=128)
    replies(engine, [Request([1, 2], 6, seed=1)])
    # the first token comes with the prompt, and no step is begun beyond the last
    assert events == ["begin", *["begin", "look"] * 4, "look"]
    assert len(static) == 5 + 2 * len({rows_computed(rows) for rows in range(1, 5)})


def test_options_that_need_the_last_token_wait_for_it(palm, start_engine, static, monkeypatch):
    monkeypatch.setattr(LaunchedStep, "wait", lambda step: pytest.fail("a step began too early"))
    engine = start_engine(palm, ByteTokenizer(), max_batch=4, context=128)
    for options in ({"logit_bias": {5: 1.0}}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.1}, {"logprobs": 1}):
        assert len(replies(engine, [Request([1, 2], 6, **options)])[0]) == 6


def test_logits_that_are_no_numbers_end_replies(start_engine, static):
    broken = palm_of(num_tokens=256, dim=32, heads=4, kv_heads=2, max_seq_len=128)
    broken.token_emb.weight.data[77] = math.nan
    engine = start_engine(broken, ByteTokenizer(), max_batch=4)
    for reply in engine.submit_all([Request([1, index], 9) for index in range(3)]):
        with pytest.raises(EngineError, match="not finite"):
            reply.text()
    assert engine.alive and engine.num_running == 0


def test_steps_are_captured_before_the_first_request(palm, start_engine, static, caplog):
    with caplog.at_level(logging.INFO, static_module.__name__):
        engine = start_engine(palm, ByteTokenizer(), max_batch=8, context=600)
    sizes = [(rows, columns) for columns in (256, 512, 640) for rows in (8, 4, 2, 1)]
    assert static == [shape for shape in sizes for _ in range(2)]  # once to compile, and once to capture
    assert "captured 12 decoding steps in" in caplog.text
    slots = engine._scheduler.batch.slots
    assert (slots.num_rows, slots.num_columns) == (8, 640)
    before = slots.keys[0]
    reply = engine.submit(Request(list(range(100)), 150, temperature=0))
    reply.text()
    assert slots.keys[0] is before  # neither memory nor graphs are made anew
    assert set(static) == set(sizes)


def test_a_large_context_captures_as_many_steps_as_are_kept(palm, start_engine, static):
    start_engine(palm, ByteTokenizer(), max_batch=8, context=4096)
    assert len(static) == 2 * WARM_GRAPHS
    assert {rows for rows, columns in static if columns == 256} == {1, 2, 4, 8}


@pytest.mark.parametrize("when", ["start", "later"])
def test_where_steps_cannot_be_captured_they_run_as_they_are(palm, start_engine, static, monkeypatch, caplog, when):
    def fails(*_):
        raise RuntimeError("out of memory")

    if when == "start":
        monkeypatch.setattr(StaticStep, "warm_up", fails)
    else:
        monkeypatch.setattr(StaticStep, "__call__", fails)
    engine = start_engine(palm, ByteTokenizer(), max_batch=4, context=256)
    requests = [Request([1, 2, index], 6, temperature=0) for index in range(3)]
    for reply in engine.submit_all(requests):
        reply.text()
        alone = palm.generate(prompt=torch.tensor(reply.request.prompt), max_new_tokens=6, temperature=0)
        assert reply.tokens == alone.tolist()
    assert caplog.text.count("cannot be captured") == 1


def test_little_memory_is_taken_as_before(palm, start_engine, static):
    per_token = SlotCache.bytes_per_token(palm)
    engine = start_engine(palm, ByteTokenizer(), max_batch=8, context=256, cache_memory=256 * per_token)
    assert engine.cache_bytes == 0
    for reply in engine.submit_all([Request([1, 2, index], 70, temperature=0) for index in range(3)]):
        reply.text()
        alone = palm.generate(prompt=torch.tensor(reply.request.prompt), max_new_tokens=70, temperature=0)
        assert reply.tokens == alone.tolist()
        assert engine.cache_bytes <= 256 * per_token
    assert static
