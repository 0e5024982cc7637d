"""Bits per byte: each token predicted once, with enough before it, and the sum that of known probabilities."""

import math
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.training.bits_per_byte import sliding_windows, total_nats


def is_fair(windows, length: int, seq_len: int, context: int) -> bool:
    """Every token but the first predicted once, from at least `context` tokens, and one, or all there are."""
    windows = list(windows)
    predicted = Counter(target for _, first, stop in windows for target in range(first, stop))
    return predicted == Counter(range(1, length)) and all(
        0 <= start and stop - start <= seq_len + 1 and target - start >= (1 if start == 0 else max(context, 1))
        for start, first, stop in windows
        for target in range(first, stop)
    )


@given(length=st.integers(1, 300), seq_len=st.integers(1, 40), data=st.data())
def test_each_token_is_predicted_once_with_enough_before_it(length, seq_len, data):
    context = data.draw(st.integers(0, seq_len))
    assert is_fair(sliding_windows(length, seq_len, context), length, seq_len, context)


def test_the_law_rejects_windows_side_by_side_and_windows_that_score_their_context():
    def side_by_side(length, seq_len):
        return [(start, start + 1, min(start + seq_len + 1, length)) for start in range(0, length - 1, seq_len)]

    assert is_fair(side_by_side(100, 16), 100, 16, context=0)
    assert not is_fair(side_by_side(100, 16), 100, 16, context=8)
    assert not is_fair([(s, s + 1, e) for s, _, e in sliding_windows(100, 16, 8)], 100, 16, context=0)


def nats_of(palm, arrays, **options):
    fields = {"seq_len": 16, "context": 8, "batch_size": 3, "autocast": nullcontext, **options}
    return total_nats(palm, arrays, **fields)


@torch.no_grad()
def test_the_sum_is_that_of_the_model_read_window_by_window(tiny_palm, text):
    palm = tiny_palm().eval()
    array = text[:75]
    expected = math.log(256)
    for start, first, stop in sliding_windows(75, 16, 8):
        window = torch.from_numpy(array[start:stop].astype(np.int64))[None]
        logprobs = palm(window)[0].log_softmax(dim=-1)
        expected -= sum(float(logprobs[t - 1 - start, int(array[t])]) for t in range(first, stop))
    assert nats_of(palm, [array]) == pytest.approx(expected, rel=1e-6)
    assert nats_of(palm, [array], batch_size=1) == pytest.approx(expected, rel=1e-6)


def test_a_model_that_knows_nothing_spends_eight_bits_a_byte(tiny_palm, text):
    palm = tiny_palm()
    with torch.no_grad():
        palm.norm.weight.zero_()  # all logits are 0
    assert nats_of(palm, [text[:100], text[:1]]) / math.log(2) / 101 == pytest.approx(8.0, rel=1e-6)


def test_shards_add_up_to_the_whole(tiny_palm, text):
    palm, arrays = tiny_palm(), [text[:70], text[100:133]]
    whole = nats_of(palm, arrays)
    parts = [nats_of(palm, arrays, shard=(index, 3)) for index in range(3)]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(whole, rel=1e-6)


def test_dropout_is_off_and_training_goes_on_as_before(tiny_palm, text):
    palm = tiny_palm(dropout=0.5).train()
    assert nats_of(palm, [text[:50]]) == nats_of(palm, [text[:50]])
    assert palm.training
