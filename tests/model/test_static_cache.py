"""The cache of fixed memory: its logits are those of the growing one, and a step reads no number back."""

from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from palm_rlhf.model.cache import Cache
from palm_rlhf.model.captured import StepGraphs, addresses, why_not_captured
from palm_rlhf.model.decoding_step import CastMatrices, RotaryLookup, static_logits
from palm_rlhf.model.lora import adapters_of
from palm_rlhf.model.static_cache import StaticCache, round_columns, round_rows
from palm_rlhf.ops.cpu import native_library
from tests.factories import SERIAL
from tests.factories import palm_of as small_palm
from tests.model.steps import EXACT, add_scope, palm_of, rows_of, without_kernel


def static_cache_of(palm, batch, capacity):
    c = palm.config
    return StaticCache(
        depth=c.depth,
        batch=batch,
        kv_heads=c.kv_heads,
        capacity=capacity,
        dim_head=c.dim_head,
        device=palm.device,
        dtype=palm.dtype,
    )


@torch.no_grad()
def read_prompts(palm, rows, capacity, **options):
    """The cache of prompts, padded on their left."""
    width = max(map(len, rows))
    padding = torch.tensor([width - len(row) for row in rows])
    prompts = palm.make_cache(len(rows), capacity, left_padding=padding)
    palm(torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows]), cache=prompts, **options)
    return prompts


@pytest.mark.parametrize("scope", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize(
    "fields", [{}, {"qk_norm": True}, {"xpos": True}, {"kv_heads": 4}, {"flash_attn": False}, SERIAL], ids=str
)
@torch.no_grad()
def test_logits_are_those_of_the_growing_cache(fields, scope):
    palm = palm_of(**fields)
    options = add_scope(palm) if scope else {}
    rows = rows_of([2, 5, 3])
    prompts, cache = read_prompts(palm, rows, 16, **options), static_cache_of(palm, 8, 32)
    for kept in cache.keys + cache.values:
        kept.fill_(torch.nan)  # as if an earlier use had left it
    cache.fill(prompts)
    lookup, adapters = RotaryLookup(palm, 32), adapters_of(palm, "scope") if scope else None
    tokens = torch.tensor([3, 1, 4, 0])  # the last row is not in use
    narrow = cache.view(4, 16)
    for step in range(6):
        tokens = (tokens * 5 + step) % 17
        got = static_logits(palm, tokens, narrow if step < 3 else cache.view(4, 32), lookup, adapters)
        with without_kernel():
            expected = palm(tokens[:3, None], cache=prompts, **options)[:, 0]
        torch.testing.assert_close(got[:3], expected, rtol=0, atol=EXACT)
        assert got.isfinite().all()
    assert cache.lengths.tolist() == [11] * 4 + [5] * 4 and cache.first.tolist() == [3, 0, 2] + [5] * 5


@pytest.mark.parametrize("fields", [{}, SERIAL], ids=["parallel", "serial"])
@pytest.mark.parametrize("way", ["bfloat16", "autocast", "cast once"])
@torch.no_grad()
def test_logits_in_lower_precision(way, fields):
    """A mask over more columns adds zeros in another order, so that sums are rounded otherwise."""
    palm = palm_of(**fields).to(torch.bfloat16 if way == "bfloat16" else torch.float32)
    prompts, cache = read_prompts(palm, rows_of([3, 5]), 16), static_cache_of(palm, 2, 16)
    cache.fill(prompts)
    lookup, tokens = RotaryLookup(palm, 16), torch.tensor([3, 1])
    with torch.autocast("cpu", torch.bfloat16, enabled=way != "bfloat16"):
        matrices = CastMatrices(palm) if way == "cast once" else None
        if matrices is not None:
            matrices.refresh()
        for _ in range(6):
            got = static_logits(palm, tokens, cache, lookup, None, matrices)
            expected = palm(tokens[:, None], cache=prompts)[:, 0]
            assert got.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.05)
            tokens = (tokens * 5 + 1) % 17


@torch.no_grad()
def test_rows_of_any_lengths_read_what_a_forward_without_a_cache_reads():
    """Each row at its own column, as in an engine; a forward of the model takes the cache as any other."""
    palm, rows = palm_of(), rows_of([4, 9, 6])
    cache, lookup = static_cache_of(palm, 3, 12), RotaryLookup(palm, 12)
    for place, row in enumerate(rows):
        prompts = read_prompts(palm, [row[:-3]], 12)
        for kept, read in ((cache.keys, prompts.keys), (cache.values, prompts.values)):
            for target, source in zip(kept, read, strict=True):
                target[place, :, : len(row) - 3] = source[0, :, : len(row) - 3]
        cache.lengths[place] = len(row) - 3
    expected = [palm(row[None])[0, -3:] for row in rows]
    for step in range(3):
        tokens = torch.stack([row[len(row) - 3 + step] for row in rows])
        if step == 1:
            got = palm(tokens[:, None], cache=cache)[:, 0]
        else:
            got = static_logits(palm, tokens, cache, lookup)
        torch.testing.assert_close(got, torch.stack([e[step] for e in expected]), rtol=0, atol=EXACT)


@torch.no_grad()
def test_prompts_are_copied_to_neighbouring_rows_and_rows_move():
    palm, rows = palm_of(), rows_of([2, 5])
    prompts, cache = read_prompts(palm, rows, 8), static_cache_of(palm, 8, 16)
    cache.fill(prompts, copies=3)
    cache.select(torch.tensor([4, 0, 7]))
    assert cache.first.tolist()[:3] == [0, 3, 5] and cache.lengths.tolist()[:3] == [5] * 3
    for kept, read in ((cache.keys, prompts.keys), (cache.values, prompts.values)):
        for target, source in zip(kept, read, strict=True):
            assert torch.equal(target[:2, :, :5], source[[1, 0], :, :5])
            assert not target[2].any() and not target[:, :, 5:].any()


def test_a_view_has_the_memory_of_the_whole():
    cache = static_cache_of(palm_of(), 8, 32)
    part = cache.view(2, 16)
    assert (part.batch, part.capacity) == (2, 16) and isinstance(part, Cache)
    part.lengths += 3
    part.append(1, *(torch.ones(2, 2, 1, 6, dtype=torch.float64) * sign for sign in (1, -1)))
    assert cache.keys[1][:2, :, 3].eq(1).all() and cache.values[1][:2, :, 3].eq(-1).all()
    assert cache.keys[1].abs().sum() == 2 * 2 * 6 and cache.lengths.tolist() == [3, 3] + [0] * 6
    with pytest.raises(ValueError, match="got 2 tokens a row, expected 1"):
        part.append(0, *torch.ones(2, 2, 2, 2, 6))


@pytest.mark.parametrize("most, rounded", [(3000, round_columns), (600, round_rows)])
def test_sizes_are_few_and_waste_little(most, rounded):
    sizes = {number: rounded(number) for number in range(1, most)}
    assert all(size >= number and rounded(size) == size for number, size in sizes.items())
    assert len(set(sizes.values())) <= {round_columns: 14, round_rows: 80}[rounded]
    assert [round_columns(n) for n in (1, 256, 257, 2048, 2049, 8193)] == [256, 256, 512, 2048, 2560, 10240]
    assert [round_rows(n) for n in (1, 2, 3, 5, 8, 9, 64, 65)] == [1, 2, 4, 8, 8, 16, 64, 72]


@torch.no_grad()
def step_without_numbers(kind=StaticCache):
    """A step on the device "meta", which knows shapes alone, and refuses to tell a number, as a capture does."""
    with torch.device("meta"):
        palm = small_palm(num_tokens=17, kv_heads=2, qk_norm=True, xpos=True)
        palm.add_finetune_params("scope", 2)
        cache = static_cache_of(palm, 4, 256)
        cache.__class__ = kind
        tokens = torch.zeros(4, dtype=torch.int64)
        return static_logits(palm, tokens, cache, RotaryLookup(palm, 256), adapters_of(palm, "scope"))


def test_a_step_reads_no_number_back():
    assert step_without_numbers().shape == (4, 17)


def test_a_step_that_reads_one_is_noticed():
    class Reading(StaticCache):
        def key_mask(self, num_new=1):
            return super().key_mask()[:, : int(self.lengths.max()) + 1]

    with pytest.raises(RuntimeError, match="meta"):
        step_without_numbers(Reading)


VIEWS = ("view", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "t", "detach", "split", "alias")


class Operations(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] += not name.removesuffix("_with_sizes").strip("_").endswith(VIEWS)
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def operations_of_a_step(monkeypatch, depth):
    monkeypatch.setattr("palm_rlhf.ops.attention_fused.GPUS", {"cpu"})
    monkeypatch.setenv("PALM_RLHF_NATIVE", "0")
    native_library._load.cache_clear()
    try:
        palm = small_palm(depth=depth)
        cache, lookup = static_cache_of(palm, 4, 256), RotaryLookup(palm, 256)
        with Operations() as operations:
            static_logits(palm, torch.zeros(4, dtype=torch.int64), cache, lookup)
    finally:
        native_library._load.cache_clear()
    return operations.counts


def test_a_layer_of_a_step_takes_few_operations(monkeypatch):
    """Each is a launch in a graph, of some two microseconds; masks and rotary tables are made once for all layers."""
    one, two = (operations_of_a_step(monkeypatch, depth) for depth in (1, 2))
    layer = two - one
    rotation = Counter(roll=1, mul_=1, addcmul_=1, _to_copy=layer["_to_copy"])  # a single kernel on a GPU
    assert layer - rotation == Counter(
        native_layer_norm=1,
        mm=3,
        scatter_=2,
        _scaled_dot_product_flash_attention_for_cpu=1,
        masked_fill_=1,
        silu=1,  # with the next, a single kernel on a GPU
        mul_=1,
        add=2,
    )


# graphs


def test_on_a_cpu_a_step_runs_each_time():
    graphs, calls = StepGraphs(torch.device("cpu")), []
    for key in ("a", "a", "b", "a"):
        graphs.run(key, lambda key=key: calls.append((key, torch.is_grad_enabled())))
    assert calls == [("a", False), ("a", False), ("b", False), ("a", False)] and not graphs.graphs


def test_a_step_keeps_no_cast_weights():
    graphs, caches = StepGraphs(torch.device("cpu")), []

    def step():
        caches.append((torch.is_autocast_cache_enabled(), torch.get_autocast_dtype("cpu")))

    graphs.run("plain", step)
    with torch.autocast("cpu", torch.float16):
        graphs.run("low", step)
        assert torch.is_autocast_cache_enabled()
    assert caches[1] == (False, torch.float16)


@pytest.fixture
def graphs_without_gpu(monkeypatch):
    """StepGraphs whose graphs write down what is done to them, in a list that comes with them."""
    said = []

    class Graph:
        def replay(self):
            said.append("replay")

    @contextmanager
    def capture(graph, **options):
        assert isinstance(graph, Graph) and options.pop("pool") is not None
        assert options == {"stream": "a stream", "capture_error_mode": "thread_local"}
        said.append("capture")
        yield
        said.append("captured")

    for name, fake in {"CUDAGraph": Graph, "graph": capture, "device": nullcontext, "synchronize": said.append}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    graphs = StepGraphs(torch.device("cpu"))
    graphs.captures, graphs.pool, graphs.stream = True, object(), "a stream"
    return graphs, said


def test_a_step_runs_then_is_captured_then_replayed(graphs_without_gpu):
    graphs, said = graphs_without_gpu

    def step():
        said.append((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))

    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(4):
            graphs.run("key", step)
    alone = (False, False)  # without gradients, and without casts that autocast keeps
    assert said == [alone, "capture", alone, "captured", "replay", "replay", "replay"]
    graphs.run("other", step)
    assert said[-1] == (False, True) and len(graphs.graphs) == 1


def test_the_graph_unused_for_longest_goes_first(graphs_without_gpu):
    graphs, said = graphs_without_gpu
    graphs.max_graphs = 2
    for key in "aabbacc":
        graphs.run(key, lambda: None)
    assert list(graphs.graphs) == ["a", "c"]
    pool = graphs.pool
    graphs.clear()
    said.clear()
    graphs.run("a", lambda: None)
    assert not said and not graphs.graphs and graphs.pool is not pool


def test_a_step_that_cannot_be_captured_says_what_to_do(graphs_without_gpu):
    graphs, said = graphs_without_gpu

    def step():
        if said:
            raise RuntimeError("operation not permitted when stream is capturing")

    graphs.run("key", step)
    with pytest.raises(
        RuntimeError, match=r"operation not permitted.*; start the process with PALM_RLHF_CUDA_GRAPHS=0"
    ):
        graphs.run("key", step)


def test_addresses_change_with_weights_scopes_and_precision_alone():
    palm = palm_of().float()
    before = addresses(palm)
    with torch.no_grad():
        for parameter in palm.parameters():
            parameter.add_(1)
    palm.load_state_dict({name: t.clone() for name, t in palm.state_dict().items()})
    assert addresses(palm) == before and hash(before) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert addresses(palm) != before
    add_scope(palm)
    scope = addresses(palm, adapters_of(palm, "scope"))
    assert scope != addresses(palm)
    for adapters in adapters_of(palm, "scope"):
        adapters.k.alpha *= 2
    assert addresses(palm, adapters_of(palm, "scope")) != scope
    palm.remove_finetune_params("scope")
    assert addresses(palm) == before
    palm.norm.weight = torch.nn.Parameter(palm.norm.weight.clone())
    assert addresses(palm) != before


def test_why_steps_are_not_captured(monkeypatch):
    palm = palm_of()
    assert why_not_captured(palm) == "the model is not on a GPU"
    monkeypatch.setattr("palm_rlhf.model.captured.GPUS", {"cpu"})
    assert why_not_captured(palm) is None
    hook = palm.layers[0].in_proj.register_forward_hook(lambda *args: None)
    assert why_not_captured(palm) == "a module has a forward hook, which a graph does not call"
    hook.remove()
    monkeypatch.setenv("PALM_RLHF_CUDA_GRAPHS", "0")
    assert why_not_captured(palm) == "PALM_RLHF_CUDA_GRAPHS=0"
    monkeypatch.delenv("PALM_RLHF_CUDA_GRAPHS")
    palm.norm = palm.norm.to("meta")
    assert why_not_captured(palm) == "weights are sharded, or lie on several devices"
