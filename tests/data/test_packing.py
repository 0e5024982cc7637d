"""Packed rows: full, fair, in a new order each epoch, and the same again from any point."""

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.conversation import encode
from palm_rlhf.data.packing import PackedSampler
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.training.weighted_examples import RowSampler

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=30)


def fills(sampler: PackedSampler, rows: list[list[int]]) -> list[int]:
    return [sum(sampler.lengths[index] for index in row) for row in rows]


@given(lengths=LENGTHS, room=st.integers(0, 30), seed=st.integers(0, 5), count=st.integers(1, 15))
@settings(max_examples=100)
def test_rows_hold_what_fits_and_every_example_has_its_turn_each_epoch(lengths, room, seed, count):
    sampler = PackedSampler(lengths, max(lengths) + room, seed)
    rows = sampler.draw(count)
    assert len(rows) == count and all(rows)
    assert max(fills(sampler, rows)) <= sampler.capacity
    drawn = Counter(index for row in rows for index in row)
    epochs = sampler.num_drawn // len(lengths)
    assert all(drawn[index] >= epochs for index in range(len(lengths)))
    assert drawn.total() >= sampler.num_drawn
    assert isinstance(sampler, RowSampler)


@given(lengths=LENGTHS, room=st.integers(0, 30), seed=st.integers(0, 5))
@settings(max_examples=60)
def test_a_row_holds_the_first_in_line_and_as_much_as_can_be(lengths, room, seed):
    """Against all subsets of the next ten in line."""
    capacity = max(lengths) + room
    sampler = PackedSampler(lengths, capacity, seed)
    line = [index for epoch in range(160) for index in np.random.default_rng([seed, epoch]).permutation(len(lengths))]
    for row in sampler.draw(3):
        assert row[0] == line[0]
        rest = [lengths[index] for index in line[1:10]]
        sums = [sum(chosen) for size in range(6) for chosen in combinations(rest, size)]
        best = max(total for total in sums if lengths[line[0]] + total <= capacity)
        assert sum(lengths[index] for index in row) >= lengths[line[0]] + best
        for index in row:
            line.remove(index)


def test_six_lengths_leave_as_little_empty_as_possible():
    lengths, capacity = [1, 5, 7, 8, 3, 2], 8
    for seed in range(20):
        sampler = PackedSampler(lengths, capacity, seed)
        batches = [sampler.draw(2) for _ in range(6)]
        drawn = Counter(index for batch in batches for row in batch for index in row)
        # 26 tokens an epoch: 12 rows of 8 have room for three epochs and 18 tokens
        assert sum(sum(fills(sampler, batch)) for batch in batches) >= 12 * 8 - 2
        assert all(drawn[index] >= 3 for index in range(6))
        once = fills(sampler, PackedSampler(lengths, capacity, seed).draw(2))
        assert once in ([8, 8], [8, 7], [7, 8])  # 7 and no 1 in sight, at worst


def tokenized(shared_data, kind: str) -> list[int]:
    """The lengths of real conversations."""
    roles = {"human": "user", "gpt": "assistant"}
    records = json.loads(shared_data("sharegpt_dummy_conversation.json").read_text())
    conversations = [[{"role": roles[m["from"]], "content": m["value"]} for m in r["conversations"]] for r in records]
    tokenizer = ByteTokenizer()
    if kind == "bpe":
        texts = [message["content"] for messages in conversations for message in messages]
        tokenizer = HuggingFaceTokenizer.train(texts, 600)
    return [len(encode(messages, tokenizer, PRESETS["default"])) for messages in conversations]


def first_fit_decreasing(lengths: list[int], capacity: int, num_rows: int) -> bool:
    room = [capacity] * num_rows
    for length in sorted(lengths, reverse=True):
        row = next((row for row in range(num_rows) if room[row] >= length), None)
        if row is None:
            return False
        room[row] -= length
    return True


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_batches_of_real_conversations_are_full(shared_data, kind):
    lengths = tokenized(shared_data, kind)
    for num_rows in (1, 2, 8):
        sampler = PackedSampler(lengths, 2048, seed=0)
        while sampler.num_drawn < 3 * len(lengths):
            assert sum(fills(sampler, sampler.draw(num_rows))) >= 0.99 * num_rows * 2048


def test_the_fill_rejects_batches_by_first_fit_decreasing(shared_data):
    lengths = tokenized(shared_data, "bytes")
    order = [lengths[index] for index in np.random.default_rng(0).permutation(len(lengths))]
    count = 1
    while first_fit_decreasing(order[: count + 1], 2048, 2):
        count += 1
    assert sum(order[:count]) < 0.99 * 2 * 2048


def test_short_examples_fill_long_rows():
    sampler = PackedSampler([3, 5] * 500, 4096)
    assert fills(sampler, sampler.draw(3)) == [4096] * 3


@given(lengths=LENGTHS, before=st.integers(0, 12), seed=st.integers(0, 5))
@settings(max_examples=60)
def test_the_state_brings_the_rows_back(lengths, before, seed):
    def sampler():
        return PackedSampler(lengths, 25, seed)

    one, other = sampler(), sampler()
    one.draw(before)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.num_drawn == one.num_drawn
    assert other.draw(9) == one.draw(9)
    assert other.state_dict() == one.state_dict()


def test_a_state_is_small():
    sampler = PackedSampler(np.random.default_rng(0).integers(10, 2000, 5000), 2048)
    sampler.draw(1000)
    assert len(json.dumps(sampler.state_dict())) < 10_000


def test_seeds_and_epochs_have_orders_of_their_own():
    lengths = [1] * 50
    rows = [PackedSampler(lengths, 50, seed).draw(2) for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    assert rows[0][0] != rows[0][1]
    assert sorted(rows[0][0]) == sorted(rows[0][1]) == list(range(50))


@pytest.mark.parametrize("change", [{"capacity": 26}, {"seed": 1}, {"lookahead": 2}, {"lengths": [4, 3]}])
def test_a_state_of_other_data_or_settings_is_refused(change):
    options = {"lengths": [3, 4], "capacity": 25, "seed": 0}
    state = PackedSampler(**options).state_dict()
    with pytest.raises(ValueError, match="resume with the data and settings of the run"):
        PackedSampler(**{**options, **change}).load_state_dict(state)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lengths": [3, 9]}, "got 9 tokens in example 1, expected 1 to the capacity, 8"),
        ({"lengths": [0]}, "got 0 tokens in example 0"),
        ({"lengths": []}, "expected at least one example"),
        ({"lengths": [3], "lookahead": 0}, "got lookahead=0"),
    ],
)
def test_what_cannot_be_packed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PackedSampler(capacity=8, **options)
