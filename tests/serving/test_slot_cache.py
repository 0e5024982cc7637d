"""The cache of many rows: what a row holds does not depend on the others, nor on how the block was reshaped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.ops.cpu.native_library import why_not
from palm_rlhf.serving.engine.slot_cache import RaggedRows, SlotCache
from tests.factories import palm_of


@pytest.fixture(scope="module")
def palm():
    return palm_of(num_tokens=40, dim=32, heads=4, kv_heads=2, xpos=True).double().eval()


def read(palm, slots, row, tokens, chunks=(100,)):
    """Reads tokens into a row, so many at a time, and returns the logits after the last."""
    done = 0
    for size in chunks:
        part = tokens[done : done + size]
        logits = palm(torch.tensor([part]), cache=slots.row(row, done))
        done += len(part)
    assert done == len(tokens)
    return logits[0, -1]


class Unmasked(RaggedRows):
    """A wrong cache: short rows see what lies behind their end."""

    def key_mask(self, num_new):
        return None


class Shifted(RaggedRows):
    """A wrong cache: short rows stand where the longest does."""

    def positions(self, num_new, device):
        return torch.full_like(self.lengths, self.longest).unsqueeze(-1)


class Overlong(RaggedRows):
    """A wrong cache: the kernel takes short rows to be as long as the longest."""

    def window(self):
        *blocks, first, lengths = super().window()
        return *blocks, first, torch.full_like(lengths, self.longest)


@pytest.mark.parametrize("mutant", [Unmasked, Shifted, Overlong])
def test_a_wrong_cache_is_noticed(palm, monkeypatch, mutant):
    monkeypatch.setattr(SlotCache, "rows", lambda slots, lengths: mutant(slots, lengths))
    if mutant is Unmasked or why_not() is not None:  # the kernel needs no mask
        monkeypatch.setattr("palm_rlhf.model.native_decode.why_not_native", lambda: "switched off")
    if mutant is Overlong and why_not() is not None:
        return
    with pytest.raises(AssertionError):
        test_rows_of_different_lengths_compute_what_each_does_alone(palm)


@torch.no_grad()
def test_rows_of_different_lengths_compute_what_each_does_alone(palm):
    slots = SlotCache(palm, max_tokens=200, max_rows=4)
    sequences = [torch.randint(40, (length,)).tolist() for length in (3, 17, 9)]
    assert slots.reserve(3, 20, [])
    for row, tokens in enumerate(sequences):
        read(palm, slots, row, tokens, chunks=(2, 100))
    logits = palm(torch.tensor([[5], [6], [7]]), cache=slots.rows([3, 17, 9]))[:, 0]
    for row, tokens in enumerate(sequences):
        expected = palm(torch.tensor([[*tokens, 5 + row]]))[0, -1]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-10)


@torch.no_grad()
@settings(max_examples=15)
@given(st.data())
def test_moving_copying_and_reshaping_keep_what_a_row_holds(palm, data):
    slots = SlotCache(palm, max_tokens=400, max_rows=8)
    tokens = torch.randint(40, (11,)).tolist()
    assert slots.reserve(2, 16, [])
    read(palm, slots, 0, tokens[:-1])
    row = 0
    for step in data.draw(st.lists(st.sampled_from(["grow", "widen", "shrink", "move", "copy"]), max_size=6)):
        if step in ("grow", "widen", "shrink"):
            shape = {"grow": (5, 16), "widen": (2, 90), "shrink": (8, 50)}[step]
            assert slots.reserve(*shape, [10, 10])
            assert slots.num_rows * slots.num_columns <= 400
        elif step == "move":
            slots.move(row, 1 - row, 10)
            row = 1 - row
        else:
            contents = slots.read(row, 0, 10)
            row = 1 - row
            slots.write(row, contents)
    logits = palm(torch.tensor([tokens[-1:]]), cache=slots.row(row, 10))[0, -1]
    torch.testing.assert_close(logits, palm(torch.tensor([tokens]))[0, -1], rtol=0, atol=1e-10)


def test_the_budget_is_kept_and_a_refusal_changes_nothing(palm):
    slots = SlotCache(palm, max_tokens=100, max_rows=4)
    assert slots.reserve(1, 60, [])
    assert not slots.reserve(2, 60, [5])
    assert (slots.num_rows, slots.num_columns) == (1, 60)
    assert slots.reserve(2, 50, [5])  # rows there are need fewer columns by now
    assert (slots.num_rows, slots.num_columns) == (2, 50)
