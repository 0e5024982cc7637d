"""The sequences that are being computed together: prompts read in chunks, and one token a step for each row."""

import numpy as np
import torch
from torch import Tensor

from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.generation import Generation
from palm_rlhf.serving.prefix import PrefixCache, common_prefix
from palm_rlhf.serving.sampler import Sampled, Sampler
from palm_rlhf.serving.slots import SlotCache

COLUMN_STEP = 64  # reserved lengths are rounded up to it, so that the block is seldom reshaped
HEADROOM = 256  # tokens that each row may go on for when another one joins it, before memory can run out again


class Batch:
    """Rows 0, 1, ... of the cache, one for each sequence that is sampled from, and the next row for the one being read.

    A sequence that leaves is replaced by the last one, so that the rows of a step always lie next to each other. What
    it leaves in the cache is kept for prompts that begin as it did, within `prefix_bytes`. One that left before its end
    may be admitted again, and goes on where it was.
    """

    def __init__(self, palm: PaLM, sampler: Sampler, slots: SlotCache, *, prefix_bytes: int):
        self.palm, self.sampler, self.slots = palm, sampler, slots
        self.prefixes = PrefixCache(prefix_bytes)
        self.rows: list[Generation] = []
        self.reading: Generation | None = None

    @property
    def members(self) -> list[Generation]:
        """All sequences, in the order of their rows."""
        return self.rows if self.reading is None else [*self.rows, self.reading]

    def admit(self, generation: Generation) -> bool:
        """Begins to read a sequence, if no other is being read and there is a row and the memory for it.

        That is memory to begin with, not for all that the replies may become: most end long before, and `make_room`
        finds more for those that do not.
        """
        if self.reading is not None or len(self.rows) == self.slots.max_rows:
            return False
        members = [*self.rows, generation]
        if not self._reserve(members, max(min(member.length + HEADROOM, member.limit) for member in members)):
            return False
        self.reading = generation
        generation.num_read = self._reuse(generation.sequence)
        if not generation.admitted:
            generation.admitted, generation.num_cached = True, generation.num_read
        return True

    def make_room(self) -> bool:
        """Sees to the memory for a token more of every row; False where the budget has none."""
        return self._reserve(self.members, max(member.length for member in self.members))

    def _reserve(self, members: list[Generation], columns: int) -> bool:
        columns = -(-columns // COLUMN_STEP) * COLUMN_STEP
        return self.slots.reserve(len(members), columns, [member.num_read for member in self.members])

    def _reuse(self, sequence: list[int]) -> int:
        """Copies the longest beginning of a sequence that is known to its row, and counts its tokens.

        The last token is always read, since the logits after it are wanted.
        """
        tokens, row = np.array(sequence[:-1]), len(self.rows)
        known, contents = self.prefixes.find(tokens)
        running, length = None, 0
        for index, other in enumerate(self.rows):
            read = np.array(other.sequence[: min(other.num_read, len(tokens))])
            if (shared := common_prefix(read, tokens)) > length:
                running, length = index, shared
        if length > known:
            self.slots.move(running, row, length)
        elif known:
            self.slots.write(row, contents)
        return max(length, known)

    def read(self, num_tokens: int) -> tuple[int, Sampled | None]:
        """Reads up to so many tokens of the sequence; its end brings its next token, and a place in the rows.

        Returns how many were read. The sequence is still `reading` where it has not ended.
        """
        generation = self.reading
        sequence = generation.sequence
        start, stop = generation.num_read, min(generation.num_read + num_tokens, len(sequence))
        tokens = torch.tensor([sequence[start:stop]], device=self.palm.device)
        embeds = self._embed(tokens, self.slots.row(len(self.rows), start))
        generation.num_read = stop
        if stop < len(sequence):
            return stop - start, None
        self.rows.append(generation)
        self.reading = None
        return stop - start, self.sampler(self.palm.to_logits(embeds), [generation])[0]

    def step(self) -> list[Sampled | None]:
        """The next token of every row."""
        tokens = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.palm.device)
        embeds = self._embed(tokens, self.slots.rows([row.num_read for row in self.rows]))
        for row in self.rows:
            row.num_read += 1
        return self.sampler(self.palm.to_logits(embeds), self.rows)

    def _embed(self, tokens: Tensor, cache) -> Tensor:
        """The embedding of the last token of each row: `b i -> b e`."""
        return self.palm(tokens, cache=cache, return_only_embedding=True)[:, -1]

    def remove(self, generation: Generation) -> None:
        """Takes a sequence out; its row is free at once."""
        if generation is self.reading:
            self._keep(len(self.rows), generation)
            self.reading = None
            return
        index, last = self.rows.index(generation), len(self.rows) - 1
        self._keep(index, generation)
        if index < last:
            self.slots.move(last, index, self.rows[last].num_read)
            self.rows[index] = self.rows[last]
        self.rows.pop()
        if self.reading is not None:
            self.slots.move(last + 1, last, self.reading.num_read)

    def _keep(self, row: int, generation: Generation) -> None:
        """Remembers what was read of a sequence."""
        length = generation.num_read
        if not self.prefixes.max_bytes:
            return
        tokens = np.array(generation.sequence[:length])
        if self.prefixes.wants(tokens, length * SlotCache.bytes_per_token(self.palm)):
            self.prefixes.put(tokens, self.slots.read(row, length))

    def clear(self) -> None:
        """Forgets all sequences and everything known of others."""
        self.rows, self.reading = [], None
        self.slots.clear()
        self.prefixes.clear()
