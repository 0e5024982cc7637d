"""What is held out is the same in every run and every file; a larger fraction holds out the same and more."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.curation.deduplicate import conversation_digest
from palm_rlhf.data.curation.held_out import is_held_out, key_digest

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def talk(question, reply, calls=(), **fields):
    """A conversation of one question and its reply."""
    reply = {"role": "assistant", "content": reply, **({"tool_calls": list(calls)} if calls else {})}
    return {**fields, "messages": [{"role": "user", "content": question}, reply]}


@pytest.mark.parametrize(
    "seed, expected", [(0, [6, 12, 16, 18, 21, 34, 35]), (3, [8, 16, 21, 25, 26, 27, 30])]
)  # fmt: skip
def test_the_keys_held_out_are_those_of_earlier_versions(seed, expected):
    keys = [json.dumps([f"question {number}"]) for number in range(40)]
    assert [number for number, key in enumerate(keys) if is_held_out(key_digest(key, seed), 0.2)] == expected


def test_the_conversations_held_out_are_those_of_earlier_versions():
    talks = [talk(f"question {number}", "é", [{"b": 1, "a": 2}] * (number % 2)) for number in range(40)]
    held_out = [number for number, one in enumerate(talks) if is_held_out(conversation_digest(one), 0.2)]
    assert held_out == [5, 16, 18, 32]


@settings(deadline=None, max_examples=30)
@given(keys=st.sets(TEXT, min_size=1, max_size=20), seed=st.integers(0, 5), fraction=st.floats(0, 0.99))
def test_a_key_is_always_on_the_same_side_and_stays_there_as_the_part_grows(keys, seed, fraction):
    for key in keys:
        assert is_held_out(key_digest(key, seed), fraction) == is_held_out(key_digest(key, seed), fraction)
        assert is_held_out(key_digest(key, seed), fraction) <= is_held_out(key_digest(key, seed), (fraction + 1) / 2)
        assert not is_held_out(key_digest(key, seed), 0)


def test_the_part_held_out_has_its_size_and_differs_by_seed():
    sides = [[is_held_out(key_digest(str(key), seed), 0.2) for key in range(5000)] for seed in (0, 1)]
    for side in sides:
        assert abs(sum(side) - 1000) < 150  # more than 5 standard deviations
    assert sides[0] != sides[1]
    with pytest.raises(ValueError, match="below 1"):
        is_held_out(key_digest("a"), 1.0)


def test_the_held_out_share_does_not_depend_on_the_run_or_the_id():
    conversations = [talk(f"question {i}", "reply", id=i) for i in range(4000)]
    held_out = [is_held_out(conversation_digest(conversation), 0.1) for conversation in conversations]
    assert 320 <= sum(held_out) <= 480  # four standard deviations
    assert held_out == [
        is_held_out(conversation_digest({**conversation, "id": "x"}), 0.1) for conversation in conversations
    ]
    larger = [is_held_out(conversation_digest(conversation), 0.3) for conversation in conversations]
    assert all(b for a, b in zip(held_out, larger) if a)
    assert not any(is_held_out(conversation_digest(conversation), 0.0) for conversation in conversations)
    with pytest.raises(ValueError, match="expected at least 0 and below 1"):
        is_held_out(conversation_digest(conversations[0]), 1.0)
