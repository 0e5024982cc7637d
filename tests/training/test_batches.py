"""Examples by epochs: each once, in an order that a few numbers bring back; and their way to processes."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.training.epoch_sampler import EpochSampler, micro_batches

SIZES = st.integers(1, 60)


def is_balanced(indices: list[int], num_items: int) -> bool:
    """Whether every stretch that is an epoch has each index once, and the last, broken one none twice."""
    epochs = [indices[first : first + num_items] for first in range(0, len(indices), num_items)]
    full = all(sorted(epoch) == list(range(num_items)) for epoch in epochs if len(epoch) == num_items)
    return full and len(set(epochs[-1])) == len(epochs[-1]) and set(epochs[-1]) <= set(range(num_items))


@given(num_items=SIZES, counts=st.lists(st.integers(0, 50), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_every_index_comes_once_an_epoch_however_many_are_drawn_at_a_time(num_items, counts, seed):
    sampler = EpochSampler(num_items, seed)
    indices = [index for count in [*counts, 1] for index in sampler.draw(count)]
    assert len(indices) == sum(counts) + 1
    assert is_balanced(indices, num_items)
    assert sampler.num_drawn == len(indices)
    assert sampler.epoch == len(indices) // num_items
    assert indices == EpochSampler(num_items, seed).draw(len(indices))


def test_the_law_of_epochs_rejects_draws_with_replacement_and_a_last_part_that_is_left_out():
    assert not is_balanced([0, 1, 1, 2], 4)
    assert not is_balanced([2, 0, 1, 0, 1], 4)
    assert not is_balanced([0, 1, 2, 3, 1, 1], 4)
    assert not is_balanced([4, 0, 1, 2], 4)


def test_orders_differ_between_epochs_and_seeds_and_favour_no_index():
    first, second = (EpochSampler(100, seed=0).draw(200)[part] for part in (slice(100), slice(100, 200)))
    assert first != second
    assert list(range(100)) not in (first, second)
    assert EpochSampler(100, seed=1).draw(100) != first
    heads = Counter(EpochSampler(4, seed=seed).draw(1)[0] for seed in range(400))
    assert all(70 < heads[index] < 130 for index in range(4))  # 100 each, by 3.5 standard deviations


@given(num_items=SIZES, split=st.integers(0, 100), stray=st.integers(0, 100))
@settings(max_examples=50)
def test_the_state_brings_the_order_back(num_items, split, stray):
    whole = EpochSampler(num_items, seed=3).draw(100)
    before = EpochSampler(num_items, seed=3)
    assert before.draw(split) == whole[:split]
    after = EpochSampler(num_items, seed=3)
    after.draw(stray)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.draw(100 - split) == whole[split:]


@pytest.mark.parametrize("change", [{"seed": 4}, {"num_items": 31}])
def test_a_state_of_other_data_or_another_seed_is_refused(change):
    same = {"num_items": 30, "seed": 3}
    state = EpochSampler(**same).state_dict()
    with pytest.raises(ValueError, match=f"checkpoint's sampler has {next(iter(change))}"):
        EpochSampler(**{**same, **change}).load_state_dict(state)


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="num_items is 0, expected at least one"):
        EpochSampler(0, seed=0)


@given(num_items=st.integers(0, 40), size=st.integers(1, 10), num_processes=st.integers(1, 5))
def test_batches_of_all_processes_are_the_step_and_as_many_in_each_where_they_can_be(num_items, size, num_processes):
    dealt = [micro_batches(range(num_items), size, (rank, num_processes)) for rank in range(num_processes)]
    assert sorted(item for mine in dealt for batch in mine for item in batch) == list(range(num_items))
    assert all(len(batch) == size for mine in dealt for batch in mine[:-1])
    assert all(0 < len(batch) <= size for mine in dealt for batch in mine)
    if num_items % num_processes == 0:
        assert len({len(mine) for mine in dealt}) == 1
