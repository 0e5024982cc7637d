"""Generation by steps of fixed shapes, run on a CPU as they are: the tokens are those of the loop without them."""

import copy
import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palm_rlhf.model import step_memory
from palm_rlhf.model.captured import StepGraphs
from palm_rlhf.model.decoding_step import CastMatrices, static_logits
from palm_rlhf.model.prompts import PaddedPrompts
from palm_rlhf.model.static_cache import StaticCache
from palm_rlhf.model.static_generate import CHECK_EVERY
from palm_rlhf.model.step_memory import StepMemory
from palm_rlhf.ops.cpu import native_library
from palm_rlhf.ops.sampling import Sampling
from tests.factories import SERIAL
from tests.factories import palm_of as small_palm
from tests.model.test_generate import GREEDY, OPTIONS, VOCABULARY, cut, palm_of, palm_with, prompts_of, seeded

ALLOWED = torch.arange(VOCABULARY) % 3 != 0


@contextmanager
def steps_of_fixed_shapes():
    """`generate` and `stream` take the steps of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("palm_rlhf.model.generate.why_not_captured", lambda palm: None)
        yield


def both(palm, method="generate", **options):
    """What the loop on a CPU returns, and what the steps of fixed shapes do, each with a generator of its own."""
    found = []
    for way in (torch.no_grad, steps_of_fixed_shapes):
        with way():
            result = getattr(palm, method)(generator=seeded(), return_logprobs=True, **options)
            found.append(list(result) if method == "stream" else result)
    return found


def assert_same(one, other):
    """Pairs of tokens and log-probabilities, or lists of them, are equal."""
    for mine, theirs in zip(one, other, strict=True):
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if mine.dtype == torch.int64 else 1e-10)
        else:
            assert_same(mine, theirs)


def static(palm, **options):
    with steps_of_fixed_shapes():
        return palm.generate(**options)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.fixed_dictionaries({}, optional={**OPTIONS, "allowed_tokens": st.just(ALLOWED)}),
    st.integers(1, 3),
    st.integers(1, 2 * CHECK_EVERY + 3),
)
def test_tokens_are_those_of_the_loop(lengths, options, num_samples, num_new):
    palm, rows = palm_of(), prompts_of(*lengths)
    assert_same(*both(palm, prompt=rows, max_new_tokens=num_new, num_samples=num_samples, **options))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"qk_norm": True},
        {"xpos": True},
        {"kv_heads": 1},
        {"kv_heads": 4, "flash_attn": False},
        {"dropout": 0.5},
        SERIAL,
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["none", "n", "b n", "list"])
def test_every_model_and_form_of_prompts(fields, prompt):
    palm = palm_with(**fields)
    prompts = {"none": None, "n": prompts_of(4)[0], "b n": torch.stack(prompts_of(4, 4)), "list": prompts_of(3, 1, 6)}
    length = {"seq_len": 12} if prompt == "none" else {"max_new_tokens": 11}
    options = {"prompt": prompts[prompt], "num_samples": 2, "temperature": 0.8, **length}
    assert_same(*both(palm, **options))
    assert_same(*both(palm, method="stream", **options))


@pytest.mark.parametrize("length", [252, 255, 256, 257])
def test_steps_read_more_columns_as_rows_grow(length):
    palm, rows = palm_of(), prompts_of(length, 3)
    assert_same(*both(palm, prompt=rows, max_new_tokens=7))
    assert_same(*both(palm, method="stream", prompt=rows, max_new_tokens=7, top_k=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_nearly_the_same(dtype):
    """A mask over more columns adds zeros in another order: log-probabilities of the same tokens agree."""
    palm, rows = palm_with(dtype=dtype), prompts_of(4, 2)
    (tokens, logprobs), (other, others) = both(palm, prompt=rows, max_new_tokens=6)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    for mine, theirs, logprob, own in zip(tokens, other, logprobs, others, strict=True):
        same = int((mine == theirs).int().cumprod(0).sum())
        assert same >= 1 and logprob.dtype == own.dtype == torch.float32
        torch.testing.assert_close(logprob[:same], own[:same], rtol=0, atol=tolerance)


def test_autocast():
    palm, rows = palm_with(dtype=torch.float32), prompts_of(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        (tokens, logprobs), (other, others) = both(palm, prompt=rows, max_new_tokens=4)
    same = int((tokens[0] == other[0]).int().cumprod(0).sum())
    assert same >= 1
    torch.testing.assert_close(logprobs[0][:same], others[0][:same], rtol=0, atol=0.1)


@pytest.mark.parametrize("fields", [{"qk_norm": True}, SERIAL], ids=["parallel", "serial"])
def test_matrices_that_are_cast_once_are_those_that_autocast_casts(fields, monkeypatch):
    """The same bits, also after weights have changed in place, and after they have been replaced."""
    palm, rows = palm_with(dtype=torch.float32, **fields), prompts_of(4, 2)
    for adapters in palm.add_finetune_params("voice", r=2):
        for part in adapters.parts:
            part.B.data.normal_(std=0.5)

    def said(scope):
        with torch.autocast("cpu", torch.bfloat16):
            options = {"max_new_tokens": 9, "generator": seeded(), "return_logprobs": True, "finetune_scope": scope}
            return [row.tolist() for rows_of in static(palm, prompt=rows, **options) for row in rows_of]

    def change(palm):
        for parameter in palm.parameters():
            parameter.data.mul_(1.2)

    def replace(palm):
        palm.layers[1].in_proj.weight = torch.nn.Parameter(palm.layers[1].in_proj.weight.flip(0).clone())

    casts, found = [], []
    monkeypatch.setattr(
        "palm_rlhf.model.static_generate.static_logits", lambda *a: casts.append(a[5]) or static_logits(*a)
    )
    for alter in (lambda palm: None, change, replace):
        alter(palm)
        once = [said(scope) for scope in (None, "voice", None)]
        assert all(isinstance(matrices, CastMatrices) for matrices in casts)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CastMatrices, "are_needed", staticmethod(lambda palm: False))
            each = [said(scope) for scope in (None, "voice", None)]
        assert casts[-1] is None
        casts.clear()
        assert once == each and once[0] == once[2] != once[1]
        found.append(once[0])
    assert found[0] != found[1] != found[2]
    static(palm, prompt=rows, max_new_tokens=4)
    assert casts[-1] is None  # without autocast


def test_a_scope_of_lora():
    palm, rows = palm_with(), prompts_of(3, 5)
    for adapters in palm.add_finetune_params("voice", r=2):
        for part in adapters.parts:
            part.B.data.normal_(std=0.5)
    options = {"prompt": rows, "max_new_tokens": 8}
    assert_same(*both(palm, finetune_scope="voice", **options))
    voice = static(palm, finetune_scope="voice", **options, **GREEDY)
    assert [row.tolist() for row in voice] != [row.tolist() for row in static(palm, **options, **GREEDY)]
    palm.merge_finetune_params("voice")
    assert [row.tolist() for row in voice] == [row.tolist() for row in static(palm, **options, **GREEDY)]


EVERY_OPTION = Sampling(
    temperature=0.7, top_k=9, top_p=0.8, min_p=0.1, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1
)


@torch.no_grad()
def draw_without_numbers(kind=StepMemory, sampling=EVERY_OPTION):
    """A whole step on the device "meta", which knows shapes alone, and refuses to tell a number, as a capture does."""
    with torch.device("meta"):
        palm = small_palm(num_tokens=VOCABULARY)
        memory = kind(palm, 4, 256)
        prompts = PaddedPrompts(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, dtype=torch.int64), "rows")
        memory.start(prompts, torch.ones(4, dtype=torch.int64), sampling, ALLOWED.to("meta"))
        cache = memory.cache.view(4, 256)
        memory.draw(static_logits(palm, memory.tokens, cache, memory.lookup), sampling, 3, True)
        return memory


def test_a_step_with_every_option_reads_no_number_back():
    memory = draw_without_numbers()
    assert memory.seen is not None and memory.counts is not None


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0), Sampling(top_p=0.5)], ids=str)
def test_a_step_that_reads_one_is_noticed(sampling):
    class Reading(StepMemory):
        def draw(self, logits, *options):
            super().draw(logits, *options)
            bool(self.running.any())

    draw_without_numbers(sampling=sampling)
    with pytest.raises(RuntimeError, match="meta"):
        draw_without_numbers(Reading, sampling)


# rows that end


@settings(max_examples=10)
@given(st.integers(1, 12), st.integers(0, VOCABULARY - 1), st.integers(0, 99), st.sampled_from([0, 1, 2.0]))
def test_a_row_does_not_depend_on_when_others_end(num_rows, eos, seed, temperature):
    """Also where rows are dropped: the tokens up to the end are those of a run in which no row ends."""
    palm, rows = palm_of(), prompts_of(*[1 + n % 5 for n in range(num_rows)], seed=seed)
    options = {"prompt": rows, "max_new_tokens": 40, "temperature": temperature}
    endless = static(palm, generator=seeded(seed), **options)
    ended, logprobs = static(palm, generator=seeded(seed), eos_token=eos, return_logprobs=True, **options)
    assert [row.tolist() for row in ended] == [cut(row.tolist(), eos) for row in endless]
    assert [len(row) for row in logprobs] == [len(row) for row in ended]
    assert all((row < 0).all() or temperature == 0 for row in logprobs)


def test_limits_end_rows_alike():
    palm, rows, limits = palm_of(), prompts_of(*[3] * 9), torch.tensor([1, 50, 3, 9, 2, 2, 17, 8, 1])
    endless = static(palm, prompt=rows, max_new_tokens=50, generator=seeded())
    ended = static(palm, prompt=rows, max_new_tokens=limits, generator=seeded())
    assert [row.tolist() for row in ended] == [row.tolist()[:n] for row, n in zip(endless, limits, strict=True)]


def test_greedy_rows_that_end_are_those_of_the_loop():
    palm, rows = palm_of(), prompts_of(*range(1, 12))
    for eos in range(0, VOCABULARY, 8):
        options = {"prompt": rows, "max_new_tokens": 40, "eos_token": eos, **GREEDY}
        assert_same(*both(palm, **options))
        assert_same(*both(palm, method="stream", **options))
        assert_same(*both(palm, **{**options, "prompt": torch.stack([row[:1] for row in rows])}))


def test_a_stream_is_what_generate_returns():
    palm, rows = palm_of(), torch.stack(prompts_of(*[4] * 10))
    options = {"max_new_tokens": 60, "eos_token": 3, "temperature": 1.5}
    with steps_of_fixed_shapes():
        tokens, logprobs = palm.generate(prompt=rows, generator=seeded(), return_logprobs=True, **options)
        streamed = []
        for step in palm.stream(rows, generator=seeded(), return_logprobs=True, **options):
            streamed.append([part.clone() for part in step])
            for part in step:
                part.fill_(0)  # what is yielded belongs to the caller
    for got, parts in zip((tokens, logprobs), zip(*streamed, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(parts, dim=1), got, rtol=0, atol=1e-10)
    assert (tokens == 3).any(dim=-1).sum() >= 5
    after = (tokens == 3).cumsum(dim=-1) - (tokens == 3).int() > 0
    assert after.any() and (tokens[after] == 3).all() and torch.equal(logprobs == 0, after)


def sizes_of_steps(palm, **options):
    """How many rows each call of the embedding reads."""
    sizes = []
    hook = palm.token_emb.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    try:
        static(palm, **options)
    finally:
        hook.remove()
    return sizes[1:]


def test_rows_that_have_ended_are_dropped_and_the_end_is_noticed():
    palm, rows, every = palm_of(), prompts_of(*[3] * 9), CHECK_EVERY
    limits = torch.tensor([1, 500, *[2 * every] * 3, *[2] * 4])
    sizes = sizes_of_steps(palm, prompt=rows, max_new_tokens=limits)
    # nine rows are computed as 16; at 2 * every the answer of `every` steps says 4, later that of 2 * every says 1
    assert sizes[: 5 * every] == [16] * (2 * every - 1) + [4] * every + [1] * (2 * every + 1)
    ending = sizes_of_steps(palm, prompt=rows, max_new_tokens=torch.tensor([2] * 8 + [500]), eos_token=0)
    tokens = static(palm, prompt=rows[8:], max_new_tokens=500, eos_token=0)
    assert len(ending) <= len(tokens[0]) + 2 * every + 500 * (len(tokens[0]) == 500)


# replays


class Tape(TorchDispatchMode):
    """The operations of a step, to be done again on the same tensors: what a CUDA graph does, on a CPU."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    def replay(self):
        for function, args, kwargs, results in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes(StepGraphs):
    """Steps that are recorded the second time, without effect, and then replayed."""

    replays = 0

    def __init__(self, memory):
        super().__init__(torch.device("cpu"))
        self.memory, self.captures = memory, True

    def _capture(self, step):
        cache = vars(self.memory.cache)
        tensors = [t for t in tree_leaves([cache, vars(self.memory)]) if isinstance(t, torch.Tensor)]
        before = [t.clone() for t in tensors]
        tape = Tape()
        with tape:
            step()
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)
        return tape

    def run(self, key, step):
        Tapes.replays += key in self.graphs
        super().run(key, step)


class TapedMemory(StepMemory):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.graphs = Tapes(self)


def run_and_replayed(monkeypatch, **options):
    """Tokens of steps that run each time, and of replayed ones, at two calls with other prompts and weights."""
    limits, found = torch.tensor([3, 30, 30, 2, 2, 2, 2, 30, 4]), []
    monkeypatch.setenv("PALM_RLHF_NATIVE", "0")  # kernels in C write past the tape
    native_library._load.cache_clear()
    try:
        for kind in (StepMemory, TapedMemory):
            monkeypatch.setattr(step_memory, "StepMemory", kind)
            palm, before = palm_with(qk_norm=True, xpos=True), Tapes.replays
            for seed in (3, 4):
                rows = prompts_of(*[1 + n % 3 for n in range(9)], seed=seed)
                length = {"max_new_tokens": limits, "eos_token": 5}
                answers = static(palm, prompt=rows, generator=seeded(seed), **length, **options)
                found.append([row.tolist() for row in answers])
                for parameter in palm.parameters():
                    parameter.data.neg_()
        assert Tapes.replays - before > 30
    finally:
        native_library._load.cache_clear()
    return found[:2], found[2:]


@pytest.mark.parametrize(
    "options",
    [{}, GREEDY, {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.01}, {"allowed_tokens": ALLOWED},
     {"repetition_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1}],
    ids=str,
)  # fmt: skip
def test_a_replayed_step_goes_on_where_the_last_one_ended(options, monkeypatch):
    """No number of a step is one of Python's: at other columns, for other rows, prompts, limits and weights."""
    run, replayed = run_and_replayed(monkeypatch, **options)
    assert run == replayed


def test_a_number_of_python_in_a_step_is_noticed(monkeypatch):
    def positions(cache, num_new=1, device=None):
        return (int(cache.lengths[0]) - cache.first).unsqueeze(-1)

    monkeypatch.setattr(StaticCache, "positions", positions)
    run, replayed = run_and_replayed(monkeypatch)
    assert run != replayed


# memory


def kept(palm):
    return step_memory._kept.get(palm, [])


def test_memory_is_used_again_and_belongs_to_no_copy_and_no_file():
    palm, rows = palm_with(), prompts_of(3, 4)
    static(palm, prompt=rows, max_new_tokens=4)
    (memory,) = kept(palm)
    static(palm, prompt=rows[:1], max_new_tokens=9, temperature=0.5, repetition_penalty=1.2)
    assert kept(palm) == [memory]
    assert kept(copy.deepcopy(palm)) == [] and set(palm.state_dict()) == set(palm_with().state_dict())
    static(palm, prompt=prompts_of(*[2] * 9), max_new_tokens=4)
    static(palm, prompt=rows, max_new_tokens=300)
    assert len(kept(palm)) == step_memory.MAX_KEPT and memory not in kept(palm)
    last = weakref.ref(kept(palm)[-1])
    del palm
    gc.collect()
    assert last() is None


@pytest.mark.parametrize("share, capacity", [(1, 1024), (100, 1024), (101, 256)])
def test_memory_has_room_for_longer_sequences_where_it_is_small(share, capacity, monkeypatch):
    """Up to 1 % of a GPU's memory: a chat that grows keeps its graphs."""
    palm, rows = palm_with(max_seq_len=1000), prompts_of(3, 4)
    needed = 2 * 2 * 2 * 4 * 8 * 2 * 1024  # keys and values, layers, heads, dimensions, bytes, rows, columns
    monkeypatch.setattr(step_memory, "_memory_of", lambda device: needed * 100 * 100 // share)
    static(palm, prompt=rows, max_new_tokens=4)
    (memory,) = kept(palm)
    assert memory.cache.capacity == capacity
    static(palm, prompt=rows, max_new_tokens=300)
    assert (kept(palm) == [memory]) == (capacity == 1024)


def test_generations_at_the_same_time_have_memory_of_their_own():
    palm, rows = palm_with(), torch.stack(prompts_of(3, 3))
    options = {"max_new_tokens": 5, **GREEDY}
    with steps_of_fixed_shapes():
        expected = palm.generate(prompt=rows, **options)
        one, other = palm.stream(rows, **options), palm.stream(rows.flip(0), **options)
        pairs = list(zip(one, other, strict=True))
    assert torch.equal(torch.stack([mine for mine, _ in pairs], dim=1), expected)
    assert torch.equal(torch.stack([theirs for _, theirs in pairs], dim=1), expected.flip(0))


def test_what_an_earlier_generation_left_changes_nothing():
    palm, rows = palm_with(), prompts_of(3, 5)
    options = {"prompt": rows, "max_new_tokens": 6}
    expected = static(palm, generator=seeded(), **options)
    memory = kept(palm)[0]
    for tensor in (*memory.cache.keys, *memory.cache.values, memory.drawn_logprobs):
        tensor.fill_(torch.nan)
    memory.clocks.fill_(7)
    got = static(palm, generator=seeded(), **options)
    assert [row.tolist() for row in got] == [row.tolist() for row in expected] and kept(palm) == [memory]


def test_weights_may_change_between_steps_and_calls():
    palm, row = palm_with(), prompts_of(4)[0]
    other = palm_with(seed=1)
    with steps_of_fixed_shapes():
        stream = palm.stream(row, max_new_tokens=8, **GREEDY)
        got = [int(next(stream)) for _ in range(4)]
        palm.load_state_dict(other.state_dict())
        rest = [int(token) for token in stream]
    found = []
    palm = palm_with()
    for token in palm.stream(row, max_new_tokens=8, **GREEDY):
        found.append(int(token))
        if len(found) == 4:
            palm.load_state_dict(other.state_dict())
    assert got + rest == found


def test_weights_that_are_cast_may_change_between_steps(monkeypatch):
    """Autocast would cast them anew in the next step."""
    row, found = prompts_of(4)[0], []
    for casts_once in (True, False):
        if not casts_once:
            monkeypatch.setattr(CastMatrices, "are_needed", staticmethod(lambda palm: False))
        palm, other = (palm_with(dtype=torch.float32, seed=seed) for seed in (0, 1))
        logprobs = []
        with steps_of_fixed_shapes(), torch.autocast("cpu", torch.bfloat16):
            for _, logprob in palm.stream(row, max_new_tokens=8, return_logprobs=True, generator=seeded()):
                logprobs.append(logprob.item())
                if len(logprobs) == 4:
                    palm.load_state_dict(other.state_dict())
        found.append(logprobs)
    assert found[0] == found[1]


@pytest.mark.parametrize("first", [torch.inference_mode, torch.enable_grad])
def test_modes_of_the_caller_do_not_matter(first):
    palm, rows = palm_with(), torch.stack(prompts_of(3, 3))
    with first():
        one = static(palm, prompt=rows, max_new_tokens=5, generator=seeded())
    other = static(palm, prompt=rows, max_new_tokens=5, generator=seeded())
    assert torch.equal(one, other) and not other.requires_grad and not other.is_inference()
    with steps_of_fixed_shapes():
        for _ in palm.stream(rows, max_new_tokens=3):
            assert torch.is_grad_enabled()


def test_an_error_leaves_the_next_generation_as_it_was():
    palm, rows = palm_with(), prompts_of(3)
    expected = static(palm, prompt=rows, max_new_tokens=5, **GREEDY)[0].tolist()
    hook = palm.norm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        static(palm, prompt=rows, max_new_tokens=5, **GREEDY)
    hook.remove()
    assert static(palm, prompt=rows, max_new_tokens=5, **GREEDY)[0].tolist() == expected
    stream = palm.stream(torch.stack(rows), max_new_tokens=5, **GREEDY)
    next(stream)
    stream.close()
    assert static(palm, prompt=rows, max_new_tokens=5, **GREEDY)[0].tolist() == expected
