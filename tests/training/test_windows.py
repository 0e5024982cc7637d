"""Windows: every token a target once an epoch, shares by weight, an order that a few numbers bring back."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.training.token_windows import Window, WindowSampler, token_arrays

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=4)


def arrays_of(lengths):
    return [np.arange(length) + 1000 * source for source, length in enumerate(lengths)]


def epoch(sampler: WindowSampler, source: int) -> list[Window]:
    """The windows of the source's first epoch."""
    windows = []
    while sampler.epochs[source] == 0:
        windows += [window for window in sampler.draw(1) if window.source == source]
    return windows


def covers_once(windows: list[Window], length: int, seq_len: int) -> bool:
    targets = Counter(target for window in windows for target in range(window.start + 1, window.stop))
    return targets == Counter(range(1, length)) and all(0 < window.num_targets <= seq_len for window in windows)


@given(length=st.integers(2, 200), seq_len=st.integers(1, 40), seed=st.integers(0, 1000))
def test_every_token_but_the_first_is_a_target_once_an_epoch(length, seq_len, seed):
    assert covers_once(epoch(WindowSampler([np.arange(length)], seq_len, seed), 0), length, seq_len)


def test_the_law_of_coverage_rejects_windows_without_the_short_ends_and_windows_that_overlap():
    windows = epoch(WindowSampler([np.arange(50)], 16, seed=0), 0)
    full = [window for window in windows if window.num_targets == 16]
    assert len(full) < len(windows)
    assert not covers_once(full, 50, 16)
    assert not covers_once([*windows, Window(0, 0, 5)], 50, 16)


def test_epochs_differ_in_offset_and_order():
    sampler = WindowSampler([np.arange(2000)], 16, seed=0)
    first, second = epoch(sampler, 0), sampler.draw(100)
    assert first[:100] != second
    assert {window.start % 16 for window in first if window.start} != {
        window.start % 16 for window in second if window.start
    }
    assert first != sorted(first)


@given(lengths=LENGTHS, seq_len=st.integers(1, 20), split=st.integers(0, 30))
@settings(max_examples=50)
def test_the_state_brings_the_order_back(lengths, seq_len, split):
    whole = WindowSampler(arrays_of(lengths), seq_len, seed=3).draw(60)
    before = WindowSampler(arrays_of(lengths), seq_len, seed=3)
    assert before.draw(split) == whole[:split]
    after = WindowSampler(arrays_of(lengths), seq_len, seed=3)
    after.draw(17)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.draw(60 - split) == whole[split:]


@pytest.mark.parametrize("change", [{"seed": 4}, {"seq_len": 9}, {"arrays": arrays_of([30, 41])}])
def test_a_state_of_other_data_or_settings_is_refused(change):
    same = {"arrays": arrays_of([30, 40]), "seq_len": 8, "seed": 3}
    state = WindowSampler(**same).state_dict()
    with pytest.raises(ValueError, match="checkpoint's sampler"):
        WindowSampler(**{**same, **change}).load_state_dict(state)


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), count=st.integers(1, 300))
@settings(max_examples=50)
def test_sources_take_turns_by_weight(weights, count):
    sampler = WindowSampler(arrays_of([50] * len(weights)), 10, seed=0, weights=weights)
    drawn = Counter(window.source for window in sampler.draw(count))
    for source, weight in enumerate(weights):
        assert abs(drawn[source] - count * weight / sum(weights)) < len(weights)


def test_without_weights_sources_count_by_their_length():
    drawn = Counter(window.source for window in WindowSampler(arrays_of([100, 300]), 10, seed=0).draw(400))
    assert drawn == {0: 100, 1: 300}


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="expected 2 positive numbers"):
        WindowSampler(arrays_of([10, 10]), 4, seed=0, weights=weights)


def test_reading_gives_the_tokens_and_marks_the_real_ones():
    sampler = WindowSampler(arrays_of([30, 30]), 5, seed=0)
    tokens, mask = sampler.read([Window(1, 4, 10), Window(0, 0, 3)])
    assert tokens.dtype == torch.int64
    assert tokens[0].tolist() == [1004, 1005, 1006, 1007, 1008, 1009]
    assert tokens[1, :3].tolist() == [0, 1, 2]
    assert mask.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert sampler.read([Window(1, 4, 10)])[1] is None


def test_arrays_may_be_mapped_files_and_tensors(tmp_path):
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r")
    arrays = token_arrays([mapped, torch.arange(7)], 50, "train_data")
    assert [len(array) for array in arrays] == [50, 7]
    assert np.shares_memory(arrays[0], mapped)
    assert len(token_arrays(torch.arange(7), 50, "train_data")) == 1


@pytest.mark.parametrize(
    "data, message",
    [
        (np.array([1, 2, 256]), r"data has the token id 256 at position 2, expected 0 to 255"),
        (np.array([1, -1, 2]), r"data has the token id -1 at position 1"),
        (np.array([1, 2, -1], dtype=np.int8), r"data has the token id -1 at position 2"),
        ([np.array([1, 2]), np.array([3, 300], dtype=np.uint16)], r"data\[1\] has the token id 300 at position 1"),
        (torch.tensor([0, 1, 999]), r"token id 999 at position 2"),
        (np.array([0.0, 1.0]), r"float64 of shape \(2,\), expected a 1-d array of integer"),
        (np.array([[0, 1]]), r"shape \(1, 2\), expected a 1-d array"),
        (np.array([True, False]), r"bool of shape"),
        (np.array([1]), r"has 1 tokens, expected at least 2"),
        ([], r"got no arrays"),
    ],
)
def test_bad_tokens_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        token_arrays(data, 256, "data")


def test_a_bad_id_far_into_a_long_array_is_found():
    array = np.zeros(5_000_000, dtype=np.int32)
    array[4_999_990] = 256
    with pytest.raises(ValueError, match="token id 256 at position 4999990"):
        token_arrays(array, 256, "data")
