"""Steps of few shapes: the numbers are those of any step, rows beside those of the step stay whole, memory is freed."""

import logging
import weakref

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.captured import MAX_GRAPHS
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.engine import batch as batch_module
from palm_rlhf.serving.engine import static_step as static_module
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.engine.static_step import StaticStep, rows_computed
from palm_rlhf.serving.generation import Request
from tests.factories import palm_of


@pytest.fixture(scope="module")
def palm():
    """A model whose choices are clear ones."""
    palm = palm_of(num_tokens=256, dim=32, heads=4, kv_heads=2, logit_scale=4.0, xpos=True, max_seq_len=4096)
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


@settings(max_examples=25)
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
    assert len({rows_computed(rows) for rows in range(1, 257)}) <= MAX_GRAPHS // 2


@torch.no_grad()
def test_a_resize_frees_the_old_memory(palm):
    slots = filled(palm, [3], 2, 64)
    slots.static_step = StaticStep(palm, slots)
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

    monkeypatch.setattr(batch_module, "why_not_captured", lambda palm: None)
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
    monkeypatch.setattr(batch_module, "why_not_captured", lambda palm: "switched off")
    assert sampled() == replies
    assert len(static) == num_steps


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
    assert len(static) == MAX_GRAPHS
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
    assert caplog.text.count("captured as") == 1


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
