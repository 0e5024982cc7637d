"""Keys and values of sequences that have ended, for prompts of the same client that begin as they did."""

from collections import OrderedDict

import numpy as np
from torch import Tensor

MAX_ENTRIES = 256  # sequences of one client; each new prompt is compared with all of them
Entries = OrderedDict[bytes, tuple[np.ndarray, Tensor]]  # token ids, and their keys and values


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of tokens that two sequences share from their beginning."""
    size = min(len(one), len(other))
    different = one[:size] != other[:size]
    return int(different.argmax()) if different.any() else size


class PrefixCache:
    """The sequences used last, as many as fit into `max_bytes`, found by their token ids.

    Each client has sequences of its own. A prompt is never compared with the sequences of other clients, so that
    neither the length that is found nor the time that it saves tells one client what another has asked. Where memory is
    short, the client whose sequences take most of it loses the sequence that it has not used for longest.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._kept: dict[str, Entries] = {}  # by client, the entry used last at the end
        self._sizes: dict[str, int] = {}  # bytes by client

    def __len__(self) -> int:
        return sum(map(len, self._kept.values()))

    def find(self, tokens: np.ndarray, client: str = "") -> tuple[int, Tensor | None]:
        """Return the length of the longest known prefix, in tokens, and its keys and values: `... hk n d`."""
        kept: Entries = self._kept.get(client, OrderedDict())
        best, length = None, 0
        for key, (known, _) in kept.items():
            if (shared := common_prefix(known, tokens)) > length:
                best, length = key, shared
        if best is None:
            return 0, None
        kept.move_to_end(best)
        return length, kept[best][1][:, :, :length]

    def wants(self, tokens: np.ndarray, num_bytes: int, client: str = "") -> bool:
        """Return whether these tokens of a client would fit and are not known already."""
        fits = len(tokens) > 0 and num_bytes <= self.max_bytes
        kept: Entries = self._kept.get(client, OrderedDict())
        return fits and all(common_prefix(known, tokens) < len(tokens) for known, _ in kept.values())

    def put(self, tokens: np.ndarray, contents: Tensor, client: str = "") -> None:
        """Keep a client's sequence, in place of its sequences that are a beginning of this one."""
        entries = self._kept.get(client, OrderedDict())
        for key in [key for key, (known, _) in entries.items() if common_prefix(known, tokens) == len(known)]:
            self._drop(client, key)
        self._kept.setdefault(client, OrderedDict())[tokens.tobytes()] = (tokens, contents)
        self._sizes[client] = self._sizes.get(client, 0) + contents.nbytes
        self.num_bytes += contents.nbytes
        if len(self._kept[client]) > MAX_ENTRIES:
            self._drop(client, next(iter(self._kept[client])))
        while self.num_bytes > self.max_bytes:
            largest = max(self._sizes, key=lambda name: self._sizes[name])
            self._drop(largest, next(iter(self._kept[largest])))

    def clear(self) -> None:
        """Forget all sequences."""
        self._kept.clear()
        self._sizes.clear()
        self.num_bytes = 0

    def _drop(self, client: str, key: bytes) -> None:
        kept = self._kept[client]
        size = kept.pop(key)[1].nbytes
        self.num_bytes -= size
        self._sizes[client] -= size
        if not kept:
            del self._kept[client], self._sizes[client]
