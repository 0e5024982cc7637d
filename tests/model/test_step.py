"""The next token of each row, with the kernel in C and without it: what the whole sequence says, and the same cache."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.model.lora import ATTENTION, TARGETS
from palm_rlhf.ops.cpu import native_library
from palm_rlhf.ops.cpu.native_decoding import MAX_ROWS, is_faster
from tests.factories import SERIAL

from .steps import (
    WAYS,
    add_scope,
    assert_close,
    assert_way,
    bfloat16_error,
    palm_of,
    read,
    read_at_once,
    rows_of,
    without_kernel,
)

pytestmark = pytest.mark.usefixtures("one_thread")
every_way = pytest.mark.parametrize("way", WAYS)


@st.composite
def readings(draw):
    """A model of any shape, a scope or none, rows of any length, the shortest with pads to come, and their order."""
    kv_heads, shared = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = {"dim": st.integers(3, 21), "depth": st.integers(1, 3), "ff_inner_dim": st.integers(1, 23)}
    sizes |= {"dim_head": st.sampled_from([2, 4, 6, 10, 18]), "qk_norm": st.booleans(), "xpos": st.booleans()}
    sizes |= {"norm": st.sampled_from(["layer", "rms"])}
    sizes, seed = draw(st.fixed_dictionaries(sizes)), draw(st.integers(0, 2**16))
    if draw(st.booleans()):
        sizes |= {"block": "serial", "qkv_bias": draw(st.booleans()), "tie_embeddings": draw(st.booleans())}
    lengths = draw(st.lists(st.integers(1, 10), min_size=1, max_size=10))
    order = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=10))
    r, alpha = draw(st.integers(0, 5)), draw(st.sampled_from([None, 3.0]))
    targets = draw(st.sets(st.sampled_from(TARGETS), min_size=1)) if draw(st.booleans()) else ATTENTION

    def build():
        palm = palm_of(seed=seed, heads=kv_heads * shared, kv_heads=kv_heads, **sizes)
        return palm, add_scope(palm, r, seed, alpha=alpha, targets=sorted(targets)) if r else {}

    return build, rows_of(lengths, seed), order


@every_way
@settings(max_examples=60)
@given(reading=readings())
def test_tokens_read_one_by_one_equal_those_read_at_once(way, reading):
    build, rows, order = reading
    palm, scope = build()
    with WAYS[way]():
        logits, cache = read(palm, rows, order=order, **scope)
    assert_close(logits, read_at_once(palm, rows, order=order, **scope))
    assert_way(cache, way)


@every_way
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "xpos": True}, SERIAL], ids=str)
@pytest.mark.parametrize("scoped", [False, True])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)], ids=str)
def test_narrow_models_say_what_their_weights_say_in_float64(way, dtype, rtol, scoped, options):
    palm, rows, order = palm_of(**options), rows_of([7, 4, 6]), [2, 0, 1, 2]
    scope = add_scope(palm, alpha=0.5) if scoped else {}
    with WAYS[way]():
        logits, cache = read(palm.to(dtype), rows, order=order, **scope)
    assert logits.dtype == dtype
    exact = read_at_once(palm.double(), rows, order=order, **scope)
    assert (logits - exact).norm() < rtol * exact.norm()
    assert_way(cache, way)


@settings(max_examples=20)
@given(reading=readings())
def test_both_ways_leave_the_same_keys_and_values(reading):
    build, rows, order = reading
    palm, scope = build()
    _, cache = read(palm, rows, order=order, **scope)
    with without_kernel():
        _, expected = read(palm, rows, order=order, **scope)
    assert cache.length == expected.length == cache.capacity
    tokens = torch.ones(len(order), cache.length).bool() if cache.left_padding is None else cache.key_mask(0)
    for got, kept in zip(cache.keys + cache.values, expected.keys + expected.values, strict=True):
        assert_close(got.transpose(1, 2)[tokens], kept.transpose(1, 2)[tokens])
        assert got.isfinite().all()  # pads too: a mask hides any number, but not NaN


def test_the_kernel_rounds_what_it_keeps_and_what_it_multiplies_in_pairs_and_nothing_else():
    if native_library.why_not() is None:
        assert bfloat16_error() < 2e-6


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_row_among_others_is_the_row_alone_bit_for_bit(dtype, amx, monkeypatch):
    """Among as many as the kernel takes at once, which are fewer of bfloat16 where the processor has AMX."""
    if native_library.why_not() is not None:
        return
    monkeypatch.setattr("palm_rlhf.ops.cpu.native_decoding.has_amx", lambda: amx)
    palm = palm_of(dim=70, dim_head=34, ff_inner_dim=37).to(dtype)
    rows = rows_of([9, 4, 6, 1, 9, 2, 7, 7, 3, 9, 5])
    while not is_faster(len(rows), dtype):
        rows = rows[:-1]
    assert len(rows) > 4  # more than are multiplied together
    together, cache = read(palm, rows, steps=9, return_only_embedding=True)
    assert_way(cache, "kernel")
    for row, seen in zip(rows, together, strict=True):
        alone, cache = read(palm, [row], steps=len(row), return_only_embedding=True)
        assert_way(cache, "kernel")
        assert torch.equal(seen[9 - len(row) :], alone[0])


def test_the_number_of_threads_changes_no_bit():
    """One head, and fewer rows of a matrix than threads at a time."""
    palm, rows, logits = palm_of(heads=1, kv_heads=1), rows_of([6]), []
    scope = add_scope(palm)
    try:
        for number in (1, 3, 7):
            torch.set_num_threads(number)
            logits.append(read(palm, rows, **scope)[0])
    finally:
        torch.set_num_threads(1)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    assert_close(logits[0], read_at_once(palm, rows, **scope))


def test_the_number_of_threads_may_change_between_two_tokens():
    palm, rows, logits = palm_of(), rows_of([6, 4, 5]), []
    for number in (1, 7):
        try:
            seen, cache = read(palm, rows, between=lambda number=number: torch.set_num_threads(number))
        finally:
            torch.set_num_threads(1)
        assert_way(cache, "kernel")
        if native_library.why_not() is None:
            assert cache.kernels["decoder"].threads == number  # all of them are used, and have room
        logits.append(seen)
    assert torch.equal(*logits)


def in_place(palm, folder):
    for parameter in palm.parameters():
        parameter *= 1.1


def in_place_in_the_last_block(palm, folder):
    palm.layers[-1].ff_out.weight *= 2


def moved(palm, folder):
    """As `palm.to` moves them."""
    for parameter in palm.parameters():
        parameter.data = parameter.data * 1.1


def assigned(palm, folder):
    palm.load_state_dict(palm_of(seed=1).state_dict(), assign=True)


def loaded(palm, folder):
    palm_of(seed=1).save_pretrained(folder / "palm")
    palm.load(folder / "palm")


def merged(palm, folder):
    add_scope(palm)
    palm.merge_finetune_params("scope")


@pytest.mark.parametrize("change", [in_place, in_place_in_the_last_block, moved, assigned, loaded, merged])
def test_weights_that_change_between_two_tokens_are_seen(change, tmp_path):
    rows, logits = rows_of([7, 5, 6]), []
    for way, context in WAYS.items():
        palm = palm_of()
        with context():
            seen, cache = read(palm, rows, between=lambda palm=palm: change(palm, tmp_path))
        assert_way(cache, way)
        logits.append(seen)
    unchanged = read_at_once(palm_of(), rows)
    assert_close(*logits)
    assert_close(logits[0][:, :2], unchanged[:, :2])
    assert ((logits[0] - unchanged)[:, 2:].abs().amax(dim=-1) > 1e-3).all()


def test_a_scope_comes_and_goes_between_two_tokens():
    palm, rows, logits = palm_of(), rows_of([7, 5, 6]), []
    scope = add_scope(palm)
    for way, context in WAYS.items():
        cache, tokens = palm.make_cache(3, 4), torch.stack([row[:4] for row in rows])
        with context(), torch.no_grad():
            for column, options in zip(tokens.split(1, dim=1), ({}, scope, scope | {"disable_lora": True}, scope)):
                seen = palm(column, cache=cache, **options)
            logits.append(seen)
        assert_way(cache, way)
    assert_close(*logits)


@pytest.mark.parametrize("options", [{}, SERIAL], ids=["parallel", "serial"])
@pytest.mark.parametrize("target", TARGETS)
def test_an_adapter_of_each_target_alone_is_read(target, options):
    palm, rows = palm_of(**options), rows_of([7, 5, 6])
    scope = add_scope(palm, targets=[target])
    logits, cache = read(palm, rows, **scope)
    assert_close(logits, read_at_once(palm, rows, **scope))
    assert (logits - read_at_once(palm, rows)).abs().nan_to_num(nan=1).max() > 1e-3
    assert_way(cache, "kernel")


@pytest.mark.parametrize("target", ["in_proj", "attn_out", "ff_proj", "ff_out"])
def test_weights_that_are_no_plain_tensors_take_the_other_way(target):
    """A subclass may keep its numbers elsewhere, in fewer bits or on other devices."""

    class Subclass(torch.Tensor):
        pass

    palm, rows = palm_of(**SERIAL), rows_of([5, 6])
    expected = read_at_once(palm, rows)
    layer = getattr(palm.layers[1], target)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Subclass), requires_grad=False)
    logits, cache = read(palm, rows)
    assert_close(logits.as_subclass(torch.Tensor), expected)
    assert_way(cache, "operations")


def test_adapters_of_several_factors_take_the_other_way():
    palm, rows = palm_of(), rows_of([7, 5, 6])
    scope = add_scope(palm)
    palm.finetune_modules["scope"][1].v.alpha = 5.0
    logits, cache = read(palm, rows, **scope)
    assert_close(logits, read_at_once(palm, rows, **scope))
    assert_way(cache, "operations")


@every_way
def test_under_autocast_weights_are_rounded_and_changes_of_them_are_seen(way):
    palm, rows, logits = palm_of().float(), rows_of([7, 4, 6]), []
    rounded = palm_of()
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().double()
    for between in (lambda: None, lambda: palm.layers[1].ff_out.weight.mul_(-3)):
        with WAYS[way](), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            seen, cache = read(palm, rows, between=between)
        assert cache.keys[0].dtype == torch.bfloat16
        assert_way(cache, way)
        logits.append(seen)
    exact = read_at_once(rounded, rows)
    assert (logits[0] - exact).norm() < 0.02 * exact.norm()
    with torch.no_grad():
        rounded.layers[1].ff_out.weight.mul_(-3)
    changed = read_at_once(rounded, rows)[:, -2:]
    assert (logits[1][:, -2:] - changed).norm() < 0.02 * changed.norm() < 0.1 * (exact[:, -2:] - changed).norm()


@pytest.mark.parametrize("before, after", [(MAX_ROWS, MAX_ROWS + 1), (MAX_ROWS + 1, MAX_ROWS)])
def test_more_rows_take_the_other_way_until_they_are_fewer(before, after):
    palm, rows, order = palm_of(), rows_of(range(5, 5 + before)), [n % before for n in range(after)]
    logits, cache = read(palm, rows, order=order)
    assert_close(logits, read_at_once(palm, rows, order=order))
    assert_way(cache, "kernel")
    _, cache = read(palm, rows_of([6] * (MAX_ROWS + 1)))
    assert_way(cache, "operations")


def test_tokens_to_learn_from_take_the_other_way():
    palm, (row,) = palm_of(), rows_of([1])
    cache = palm.make_cache(1, 1)
    assert palm(row[None], cache=cache).requires_grad
    assert_way(cache, "operations")


@every_way
def test_a_full_cache_is_refused_and_stays_as_it_is(way):
    palm, rows = palm_of(), rows_of([4, 4])
    with WAYS[way](), torch.no_grad():
        _, cache = read(palm, rows)
        kept = [t.clone() for t in cache.keys + cache.values]
        with pytest.raises(ValueError, match="5 tokens in a cache with room for 4; make it larger"):
            palm(rows[0][:2, None], cache=cache)
    assert_way(cache, way)
    assert cache.length == 4 and all(map(torch.equal, kept, cache.keys + cache.values))


# what the kernel must not read as something else


def test_a_cache_of_other_rows_or_of_another_model_is_left_to_the_operations():
    palm, tokens = palm_of(), torch.stack(rows_of([5, 5, 5]))
    with torch.no_grad():
        for rows, read_as in ((3, 1), (1, 3)):
            cache = palm.make_cache(rows, 6)
            palm(tokens[:rows, :3], cache=cache)
            with pytest.raises((RuntimeError, ValueError)):
                palm(tokens[:read_as, 3:4], cache=cache)
        with pytest.raises((RuntimeError, ValueError)):
            palm(tokens[:, :1], cache=palm_of(dim_head=4).make_cache(3, 6))


def test_any_weight_that_is_given_other_memory_is_read_there():
    def replace(palm):
        palm.layers[1].ff_out.weight = torch.nn.Parameter(palm.layers[1].ff_out.weight * 2)
        palm.layers[0].norm.weight.data = palm.layers[0].norm.weight.data * 2

    rows, palm, other = rows_of([6, 6]), palm_of(), palm_of()
    got, cache = read(palm, rows, between=lambda: replace(palm))
    with without_kernel():
        expected, _ = read(other, rows, between=lambda: replace(other))
    assert_way(cache, "kernel")
    assert_close(got, expected)


@pytest.mark.parametrize(
    "left_padding",
    [torch.tensor([2, 0, 1], dtype=torch.int32), torch.tensor([[2, 9], [0, 9], [1, 9]])[:, 0]],
    ids=["int32", "strided"],
)
def test_padding_may_be_any_integers(left_padding):
    palm, rows = palm_of(), rows_of([4, 6, 5])
    tokens = torch.stack([F.pad(row, (6 - len(row), 0)) for row in rows])
    with torch.no_grad():
        cache = palm.make_cache(3, 6, left_padding=left_padding)
        palm(tokens[:, :5], cache=cache)
        got = palm(tokens[:, 5:], cache=cache)[:, 0]
        assert_close(got, torch.stack([palm(row[None])[0, -1] for row in rows]))


def test_a_copied_cache_goes_on_alone():
    palm, (row,) = palm_of(), rows_of([4])
    with torch.no_grad():
        cache = palm.make_cache(1, 4)
        for column in row[:2].split(1):
            palm(column[None], cache=cache)
        copied = copy.deepcopy(cache)
        palm(torch.zeros(1, 1, dtype=torch.long), cache=cache)
        palm(row[None, 2:3], cache=copied)
        assert_close(palm(row[None, 3:], cache=copied)[0], palm(row[None])[0, 3:])


def test_who_hooks_a_block_sees_every_token():
    palm, (row,), seen = palm_of(), rows_of([4]), []
    palm.layers[1].register_forward_hook(lambda *_: seen.append(1))
    read(palm, [row], steps=3)
    assert len(seen) == 4
    palm, seen = palm_of(), []
    scope = add_scope(palm)
    palm.finetune_modules["scope"][1].out.register_forward_hook(lambda *_: seen.append(1))
    read(palm, [row], steps=3, **scope)
    assert len(seen) == 4


def test_another_default_device_changes_nothing():
    palm, (row,) = palm_of(), rows_of([6])
    expected, _ = read(palm, [row])
    cache = palm.make_cache(1, 6)
    with torch.no_grad(), torch.device("meta"):
        palm(row[None, :5], cache=cache)
        logits = palm(row[None, 5:], cache=cache)
    assert_close(logits[0], expected[0, -1:])
