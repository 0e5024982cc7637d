"""Cached prefixes: the longest is found, memory is counted exactly, and the end unused for longest is forgotten."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.serving.engine import prefix_cache
from palm_rlhf.serving.engine.prefix_cache import PrefixCache, PrefixTree, common_prefix

BYTES = 24  # of a token: 3 layers-and-kinds of one head of one double


def contents_of(tokens) -> torch.Tensor:
    """Keys and values that tell which tokens they belong to, and after which: `3 1 n 1`."""
    sums = torch.tensor([hash(tuple(map(int, tokens[: end + 1]))) % 10**9 for end in range(len(tokens))])
    return torch.stack([sums.double() + kind for kind in range(3)]).view(3, 1, -1, 1)


def put(cache: PrefixCache, tokens, client: str = "") -> list[tuple[int, int]]:
    """Keeps a sequence, and returns the parts that were read for it."""
    parts = []

    def read(start, stop):
        parts.append((start, stop))
        return contents_of(tokens)[:, :, start:stop].clone()

    cache.put(np.array(tokens), read, client)
    return parts


class Pieces:
    """A slow and simple model of the cache for one client: pieces, each a sequence and where its part begins.

    The pieces last used are at the end, those of one sequence from its end to its beginning.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens, self.pieces = max_tokens, []  # (client, sequence up to the end of the piece, start)

    def size(self, client=None) -> int:
        return sum(len(tokens) - start for name, tokens, start in self.pieces if client in (None, name))

    def begun(self, client, tokens) -> list[tuple[int, tuple]]:
        """The pieces that a sequence begins with, each after the number of tokens in common up to it."""
        found = []
        for piece in self.pieces:
            same = [one == other for one, other in zip(piece[1], tokens)] + [False]
            if piece[0] == client and same.index(False) > piece[2]:
                found.append((same.index(False), piece))
        return found

    def use(self, client, tokens) -> int:
        """Counts the pieces that a sequence begins with as used, and returns the tokens in common."""
        begun = self.begun(client, tokens)
        for _, piece in sorted(begun, key=lambda entry: -entry[1][2]):
            self.pieces.remove(piece)
            self.pieces.append(piece)
        return max((length for length, _ in begun), default=0)

    def put(self, client, tokens) -> None:
        if not 0 < len(tokens) <= self.max_tokens:
            return
        known = max((length for length, _ in self.begun(client, tokens)), default=0)
        if known < len(tokens):
            for place, (name, other, start) in enumerate(self.pieces):
                if name == client and other[:known] == tokens[:known] and start < known < len(other):  # it is divided
                    self.pieces[place] = (name, other, known)
                    self.pieces.append((name, other[:known], start))
                    break
            self.pieces.append((client, tokens, known))
        self.use(client, tokens)
        while self.size() > self.max_tokens:
            for piece in self.pieces:  # the first that nothing follows
                follows = any(other[2] >= len(piece[1]) and other[1][: len(piece[1])] == piece[1]
                              for other in self.pieces if other[0] == piece[0])  # fmt: skip
                if not follows:
                    self.pieces.remove(piece)
                    break


SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)
ACTIONS = st.lists(st.tuples(st.sampled_from(["put", "find"]), SEQUENCES), max_size=30)


@settings(max_examples=300)
@given(ACTIONS, st.integers(1, 25))
def test_one_client_is_served_as_by_the_model(actions, max_tokens):
    require_equal_to_model([(action, tokens, "") for action, tokens in actions], max_tokens)


def require_equal_to_model(actions, max_tokens):
    cache, model = PrefixCache(max_tokens * BYTES, BYTES), Pieces(max_tokens)
    for action, tokens, client in actions:
        if action == "put":
            put(cache, tokens, client)
            model.put(client, tokens)
        else:
            length, found = cache.find(np.array(tokens), client)
            assert length == model.use(client, tokens)
            if length:
                assert torch.equal(found, contents_of(tokens[:length]))
            else:
                assert found is None
        assert cache.num_bytes == model.size() * BYTES <= cache.max_bytes
        assert cache.num_bytes == held(cache)


def held(cache: PrefixCache) -> int:
    """The bytes that the tensors of all spans take, with the memory that a view would keep."""
    return sum(span.contents.untyped_storage().nbytes() for tree in cache._trees.values() for span in tree.spans)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(["put", "find"]), SEQUENCES, st.sampled_from("ab")), max_size=30))
def test_clients_never_share(actions):
    """Each client finds what it would alone, while there is memory for all."""
    together, alone = PrefixCache(10**6, BYTES), {client: PrefixCache(10**6, BYTES) for client in "ab"}
    for action, tokens, client in actions:
        if action == "put":
            assert put(together, tokens, client) == put(alone[client], tokens)
        else:
            length, found = together.find(np.array(tokens), client)
            expected, contents = alone[client].find(np.array(tokens))
            assert length == expected and (found is contents is None or torch.equal(found, contents))
    assert together.num_bytes == sum(cache.num_bytes for cache in alone.values()) == held(together)


def test_a_common_beginning_is_kept_once():
    cache = PrefixCache(10**6, BYTES)
    assert put(cache, [1, 2, 3, 4]) == [(0, 4)]
    assert put(cache, [1, 2, 5]) == [(2, 3)]
    assert put(cache, [1, 2]) == put(cache, [1, 2, 5]) == []
    assert put(cache, [1, 2, 3, 4, 6]) == [(4, 5)]
    assert cache.num_bytes == 6 * BYTES == held(cache)


def test_the_longest_unused_end_goes_first():
    cache = PrefixCache(30 * BYTES, BYTES)
    for start in (1, 2, 3):
        put(cache, [start] * 10)
    cache.find(np.array([1, 1]))
    put(cache, [4] * 10)
    assert [cache.find(np.array([start]))[0] for start in (1, 2, 3, 4)] == [1, 0, 1, 1]
    assert cache.num_bytes == 30 * BYTES
    assert put(cache, [9] * 31) == []


def test_a_beginning_outlives_its_ends():
    cache = PrefixCache(12 * BYTES, BYTES)
    put(cache, [1, 1, 1, 1, 2, 2, 2, 2])
    put(cache, [1, 1, 1, 1, 3, 3, 3, 3])
    put(cache, [5, 5])
    assert cache.find(np.array([1, 1, 1, 1, 2]))[0] == 4
    assert cache.find(np.array([1, 1, 1, 1, 3]))[0] == 5


def test_the_client_that_keeps_most_pays():
    cache = PrefixCache(12 * BYTES, BYTES)
    put(cache, [1] * 5, "large")
    put(cache, [2] * 3, "large")
    put(cache, [1] * 4, "small")
    put(cache, [3] * 2, "small")
    assert cache.find(np.array([1] * 5), "large")[0] == 0
    assert cache.find(np.array([2] * 5), "large")[0] == 3
    assert cache.find(np.array([1] * 5), "small")[0] == 4
    assert cache.find(np.array([3]), "small")[0] == 1
    assert cache.num_bytes == 9 * BYTES


class Counted:
    """Counts the tokens that are compared, and the comparisons."""

    def __init__(self, monkeypatch):
        self.calls = self.tokens = 0
        monkeypatch.setattr(prefix_cache, "common_prefix", self)

    def __call__(self, one, other):
        self.calls += 1
        self.tokens += min(len(one), len(other))
        return common_prefix(one, other)


def work_to_find(num_kept: int, monkeypatch) -> tuple[int, int]:
    """The comparisons, and the tokens compared, to find a prompt among so many sequences of one beginning."""
    cache = PrefixCache(10**9, BYTES)
    system = list(range(50))
    for number in range(num_kept):
        cache.put(np.array([*system, number, *system]), lambda start, stop: torch.zeros(3, 1, stop - start, 1).double())
    with monkeypatch.context() as patch:
        counted = Counted(patch)
        length, _ = cache.find(np.array([*system, num_kept // 2, *range(30), 77]))
        assert length == 81
    return counted.calls, counted.tokens


def test_the_work_to_find_a_prompt_does_not_depend_on_what_is_kept(monkeypatch):
    few, many = work_to_find(2, monkeypatch), work_to_find(2000, monkeypatch)
    assert few == many
    assert many[0] == 2 and many[1] <= 82


@settings(max_examples=100)
@given(st.lists(SEQUENCES, max_size=12), SEQUENCES)
def test_no_token_of_a_prompt_is_compared_twice(known, wanted):
    cache = PrefixCache(10**6, BYTES)
    for tokens in known:
        put(cache, tokens)
    with pytest.MonkeyPatch.context() as patch:
        counted = Counted(patch)
        cache.find(np.array(wanted))
    assert counted.calls <= len(wanted) and counted.tokens <= len(wanted)


def test_an_error_while_reading_changes_nothing():
    cache = PrefixCache(10**6, BYTES)
    put(cache, [1, 2, 3])

    def fail(start, stop):
        raise MemoryError

    for tokens, client in (([1, 2, 4], ""), ([1], "other")):
        with pytest.raises(MemoryError):
            cache.put(np.array(tokens), fail, client)
    assert cache.num_bytes == 3 * BYTES == held(cache)
    put(cache, [1, 2, 4])
    assert cache.num_bytes == 4 * BYTES
    cache.clear()
    assert (cache.num_bytes, cache.find(np.array([1, 2, 3]))) == (0, (0, None))


def views_of_one_memory(tree, span, size):
    """Divides without copying, so that no part can be freed alone."""
    first = prefix_cache.Span(span.tokens[:size], span.contents[..., :size, :], span.parent)
    span.tokens, span.contents = span.tokens[size:], span.contents[..., size:, :]
    span.parent.followers[int(first.tokens[0])] = first
    span.parent, first.followers = first, {int(span.tokens[0]): span}
    tree.spans[first] = None
    return first


def beginnings_first(tree, path):
    for span in path:
        tree.spans.move_to_end(span)


def only_the_end(tree, path):
    tree.spans.move_to_end(path[-1])


@pytest.mark.parametrize(
    "name, mutant", [("_split", views_of_one_memory), ("use", beginnings_first), ("use", only_the_end)]
)
def test_a_wrong_tree_is_noticed(monkeypatch, name, mutant):
    monkeypatch.setattr(PrefixTree, name, mutant)
    actions = [("put", (0, 0, 1, 1), ""), ("put", (0, 0, 2), ""), ("find", (0, 0, 1), ""), ("put", (1, 1), "")]
    with pytest.raises(AssertionError):
        require_equal_to_model([*actions, ("put", (2,), ""), ("find", (0, 0), "")], 5)


def test_common_prefixes():
    for one, other, length in (([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 2], [1, 3], 1)):
        assert common_prefix(np.array(one), np.array(other)) == length
