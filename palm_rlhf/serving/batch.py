"""The sequences that are being computed together: prompts read in chunks, and one token a step for each row."""

import numpy as np
import torch
from torch import Tensor

from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.generation import Generation
from palm_rlhf.serving.prefix import PrefixCache, common_prefix
from palm_rlhf.serving.prompt_logprobs import score_prompt
from palm_rlhf.serving.sampler import Sampled, Sampler
from palm_rlhf.serving.slots import Row, Rows, SlotCache

COLUMN_STEP = 64  # reserved lengths are rounded up to it, so that the block is seldom reshaped
FORWARD = 32  # tokens that a forward more would have taken the time of
HEADROOM = 256  # tokens that each row may go on for when another one joins it, before memory can run out again


class Batch:
    """Rows 0, 1, ... of the cache, one for each sequence that is sampled from, and the next ones for those being read.

    A sequence that leaves is replaced by the last one, so that the rows of a step always lie next to each other. What
    it leaves in the cache is kept for prompts that begin as it did, within `prefix_bytes`. One that left before its end
    may be admitted again, and goes on where it was.
    """

    def __init__(self, palm: PaLM, sampler: Sampler, slots: SlotCache, *, prefix_bytes: int):
        self.palm, self.sampler, self.slots = palm, sampler, slots
        self.prefixes = PrefixCache(prefix_bytes)
        self.rows: list[Generation] = []
        self.reading: list[Generation] = []  # as far as each other

    @property
    def members(self) -> list[Generation]:
        """All sequences, in the order of their rows."""
        return [*self.rows, *self.reading]

    def admit(self, generation: Generation, num_tokens: int) -> bool:
        """Begins to read a sequence, if there is a row and the memory for it, and it may join those being read.

        That is memory to begin with, not for all that the replies may become: most end long before, and `make_room`
        finds more for those that do not. `num_tokens` is what the next `read` will be given.
        """
        members = [*self.members, generation]
        if len(members) > self.slots.max_rows:
            return False
        known, source = self._find(generation.sequence[: generation.num_reusable])
        if self.reading and not self._may_join(generation, known, num_tokens):
            return False
        if not self._reserve(members, max(min(member.length + HEADROOM, member.limit) for member in members)):
            return False
        start = self.reading[0].num_read if self.reading else known
        if isinstance(source, Tensor):
            self.slots.write(len(members) - 1, source[:, :, :start])
        elif start:
            self.slots.move(source, len(members) - 1, start)
        self.reading.append(generation)
        generation.num_read = start
        if not generation.admitted:
            generation.admitted, generation.num_cached = True, start
        return True

    def _may_join(self, generation: Generation, known: int, num_tokens: int) -> bool:
        """Whether it is better read with those being read, from where they are and padded to the longest, than alone.

        Alone, it would begin after what is known of it by then, their own beginnings included.
        """
        start, others = self.reading[0].num_read, len(self.reading)
        shared = max(_shared(other.sequence, generation.sequence[:-1]) for other in self.reading)
        longest = max(other.length for other in self.reading) - start
        together = max(longest, generation.length - start) * (others + 1)
        alone = generation.length - max(known, shared)
        return known >= start and together <= num_tokens and together <= others * longest + alone + FORWARD

    def make_room(self) -> bool:
        """Sees to the memory for a token more of every row; False where the budget has none."""
        return self._reserve(self.members, max(member.length for member in self.members))

    def _reserve(self, members: list[Generation], columns: int) -> bool:
        columns = -(-columns // COLUMN_STEP) * COLUMN_STEP
        return self.slots.reserve(len(members), columns, [member.num_read for member in self.members])

    def _find(self, wanted: list[int]) -> tuple[int, int | Tensor | None]:
        """The longest beginning of a sequence that is known, in tokens, and the row or the contents that it is in."""
        length, source = self.prefixes.find(np.array(wanted))
        for row, other in enumerate(self.rows):
            if (shared := _shared(other.sequence[: other.num_read], wanted)) > length:
                length, source = shared, row
        return length, source

    def read(self, num_tokens: int) -> tuple[int, list[tuple[Generation, Sampled | None]]]:
        """Reads a sequence, up to so many tokens of it, or all that were admitted to be read together.

        Returns how many tokens were read, and the next token of each sequence that has ended, which has a place in the
        rows now. One that has not is still in `reading`.
        """
        group, sequences = self.reading, [generation.sequence for generation in self.reading]
        start, longest = group[0].num_read, max(map(len, sequences))
        stop = min(start + num_tokens, longest) if len(group) == 1 else longest
        parts = [sequence[start:stop] for sequence in sequences]
        padded = [part + [0] * (stop - start - len(part)) for part in parts]  # what comes after a row is never seen
        tokens = torch.tensor(padded, device=self.palm.device)
        embeds = self._embed(tokens, self.slots.row(len(self.rows), start, len(group)))
        for generation, part, embedded in zip(group, parts, embeds, strict=True):
            if generation.request.prompt_logprobs is not None:
                score_prompt(generation, start, embedded[: len(part)], self.palm, self.sampler)
            generation.num_read = start + len(part)
        num_read = sum(map(len, parts))
        if stop < longest:
            return num_read, []
        self.rows, self.reading = self.members, []
        last = embeds[torch.arange(len(group)), [len(part) - 1 for part in parts]]
        return num_read, list(zip(group, self.sampler(self.palm.to_logits(last), group), strict=True))

    def step(self) -> list[Sampled | None]:
        """The next token of every row."""
        tokens = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.palm.device)
        embeds = self._embed(tokens, self.slots.rows([row.num_read for row in self.rows]))
        for row in self.rows:
            row.num_read += 1
        return self.sampler(self.palm.to_logits(embeds[:, -1]), self.rows)

    def _embed(self, tokens: Tensor, cache: Row | Rows) -> Tensor:
        """The final embeddings: `b i -> b i e`."""
        return self.palm(tokens, cache=cache, return_only_embedding=True)

    def remove(self, generation: Generation) -> None:
        """Takes a sequence out; its row is free at once."""
        before = self.members
        self._keep(before.index(generation), generation)
        group = self.rows if generation in self.rows else self.reading
        last = group.pop()
        if last is not generation:
            group[group.index(generation)] = last
        for row, member in enumerate(self.members):  # all move down, to what is free by then
            if before[row] is not member:
                self.slots.move(before.index(member), row, member.num_read)

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
        self.rows, self.reading = [], []
        self.slots.clear()
        self.prefixes.clear()


def _shared(one: list[int], other: list[int]) -> int:
    size = min(len(one), len(other))
    return common_prefix(np.array(one[:size]), np.array(other[:size]))
