"""Keys and values of sequences that have ended, for prompts under the same key that begin as they did."""

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
import torch
from torch import Tensor


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of tokens that two sequences share from their beginning."""
    size = min(len(one), len(other))
    different = one[:size] != other[:size]
    return int(different.argmax()) if different.any() else size


class Span:
    """A node of a radix tree: tokens that follow those of its ancestors, with their keys and values: `... hk n d`.

    The spans that follow it begin with different tokens.
    """

    def __init__(self, tokens: np.ndarray, contents: Tensor, parent: "Span | None"):
        self.tokens, self.contents, self.parent = tokens, contents, parent
        self.followers: dict[int, Span] = {}  # by their first token


class PrefixTree:
    """The sequences of one key as a radix tree, which keeps every common beginning once.

    A span counts as used before the spans that it follows, so that the span unused for longest is always a leaf.
    """

    def __init__(self) -> None:
        self.root = Span(np.empty(0, dtype=np.int64), torch.empty(0), None)
        self.spans: OrderedDict[Span, None] = OrderedDict()  # the span used last at the end
        self.num_bytes = 0

    def walk(self, tokens: np.ndarray) -> tuple[list[Span], int]:
        """Return the spans that a sequence begins with, the last one perhaps in part, and their tokens in common."""
        path: list[Span] = []
        span, length = self.root, 0
        while length < len(tokens) and (follower := span.followers.get(int(tokens[length]))) is not None:
            shared = common_prefix(follower.tokens, tokens[length:])
            path.append(follower)
            span, length = follower, length + shared
            if shared < len(follower.tokens):
                break
        return path, length

    def use(self, path: list[Span]) -> None:
        """Count the spans of a path as used now."""
        for span in reversed(path):
            self.spans.move_to_end(span)

    def add(self, path: list[Span], tokens: np.ndarray, contents: Tensor, num_shared: int) -> None:
        """Add tokens that follow a path, of whose last span the first `num_shared` tokens belong to it."""
        if path and num_shared < len(path[-1].tokens):
            path[-1] = self._split(path[-1], num_shared)
        parent = path[-1] if path else self.root
        span = parent.followers[int(tokens[0])] = Span(tokens, contents, parent)
        path.append(span)
        self.spans[span] = None
        self.num_bytes += contents.nbytes

    def _split(self, span: Span, size: int) -> Span:
        """Divide a span, and return the part that has its first tokens."""
        assert span.parent is not None  # the root is empty
        # copies, since a view of one part would keep the memory of both
        first = Span(span.tokens[:size].copy(), span.contents[..., :size, :].clone(), span.parent)
        span.tokens, span.contents = span.tokens[size:].copy(), span.contents[..., size:, :].clone()
        span.parent.followers[int(first.tokens[0])] = first
        span.parent, first.followers = first, {int(span.tokens[0]): span}
        self.spans[first] = None
        return first

    def forget(self) -> int:
        """Drop the span that was unused for longest, and return the bytes of its memory."""
        span, _ = self.spans.popitem(last=False)
        assert span.parent is not None and not span.followers  # used after all that follow it
        del span.parent.followers[int(span.tokens[0])]
        self.num_bytes -= span.contents.nbytes
        return span.contents.nbytes


class PrefixCache:
    """The sequences used last, as many as fit into `max_bytes`, found by their token ids.

    A key is a client and the adapter that it asks: keys and values of one adapter are wrong under another. A prompt
    walks down a tree of the sequences of its key, so that the time to find its beginning does not depend on their
    number. A prompt is never compared with the sequences of other clients, so that neither the length that is found nor
    the time that it saves tells one client what another has asked. Where memory is short, the key whose sequences take
    most of it loses the end that was not used for longest.

    Args:
        max_bytes: The most memory of keys and values.
        bytes_per_token: The memory of the keys and values of one token.
    """

    def __init__(self, max_bytes: int, bytes_per_token: int):
        self.max_bytes, self.bytes_per_token, self.num_bytes = max_bytes, bytes_per_token, 0
        self._trees: dict[Hashable, PrefixTree] = {}

    def find(self, tokens: np.ndarray, key: Hashable = "") -> tuple[int, Tensor | None]:
        """Return the length of the longest known prefix, in tokens, and its keys and values: `... hk n d`."""
        tree = self._trees.get(key)
        path, length = ([], 0) if tree is None else tree.walk(tokens)
        if tree is None or not path:
            return 0, None
        tree.use(path)
        contents = [span.contents for span in path]
        known = contents[0] if len(contents) == 1 else torch.cat(contents, dim=-2)
        return length, known[..., :length, :]

    def put(self, tokens: np.ndarray, read: Callable[[int, int], Tensor], key: Hashable = "") -> None:
        """Keep a sequence under a key, unless it takes more memory than there is.

        Args:
            read: Returns a copy of the keys and values from one token of the sequence to another, `... hk n d`; called
                for tokens that are not known yet.
        """
        size = len(tokens)
        if not size or size * self.bytes_per_token > self.max_bytes:
            return
        tree = self._trees.get(key, PrefixTree())
        path, length = tree.walk(tokens)
        if length < size:
            contents = read(length, size)
            before = sum(len(span.tokens) for span in path[:-1])
            tree.add(path, np.array(tokens[length:]), contents, length - before)
            self._trees[key] = tree
            self.num_bytes += contents.nbytes
        tree.use(path)
        while self.num_bytes > self.max_bytes:
            largest = max(self._trees, key=lambda name: self._trees[name].num_bytes)
            self.num_bytes -= self._trees[largest].forget()
            if not self._trees[largest].spans:
                del self._trees[largest]

    def clear(self) -> None:
        """Forget all sequences."""
        self._trees.clear()
        self.num_bytes = 0
