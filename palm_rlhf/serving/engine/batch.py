"""The sequences that are being computed together: prompts read in chunks, and one token a step for each row."""

import logging
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from palm_rlhf.model.cache import Cache
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine.prefix_cache import PrefixCache, common_prefix
from palm_rlhf.serving.engine.prompt_logprobs import score_prompt
from palm_rlhf.serving.engine.sampler import SampledToken, Sampler
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.generation import EngineError, Generation

logger = logging.getLogger(__name__)
COLUMN_STEP = 64  # reserved lengths are rounded up to it, so that the block is seldom reshaped
FORWARD = 32  # tokens that a forward more would have taken the time of
HEADROOM = 256  # tokens that each row may go on for when another one joins it, before memory can run out again
Results = list[tuple[Generation, SampledToken | Exception]]


class Batch:
    """Rows 0, 1, ... of the cache: sequences that are sampled from, then those being read, then those read in part.

    A sequence that leaves is replaced by the last one, so that the rows of a step always lie next to each other. What
    it leaves in the cache is kept for prompts of its client that begin as it did, within `prefix_bytes`. One that left
    before its end may be admitted again, and goes on where it was.
    """

    def __init__(self, palm: PaLM, sampler: Sampler, slots: SlotCache, *, prefix_bytes: int):
        self.palm, self.sampler, self.slots = palm, sampler, slots
        self.prefixes = PrefixCache(prefix_bytes)
        self.rows: list[Generation] = []
        self.reading: list[Generation] = []  # as far as each other
        self.halted: list[Generation] = []  # read in part, and to be read on later

    @property
    def members(self) -> list[Generation]:
        """All sequences, in the order of their rows."""
        return [*self.rows, *self.reading, *self.halted]

    def admit(self, generation: Generation, num_tokens: int) -> bool:
        """Begins to read a sequence, if there is a row and the memory for it, and it may join those being read.

        That is memory to begin with, not for all that the replies may become: most end long before, and `make_room`
        finds more for those that do not. `num_tokens` is what the next `read` will be given.
        """
        members = [*self.members, generation]
        if len(members) > self.slots.max_rows:
            return False
        known, source = self._find(generation)
        if self.reading and not self._may_join(generation, known, num_tokens):
            return False
        if not self._reserve(members, max(min(member.length + HEADROOM, member.limit) for member in members)):
            return False
        row = len(self.rows) + len(self.reading)
        if self.halted:
            self.slots.move(row, len(self.members), self.halted[0].num_read)
            self.halted.append(self.halted.pop(0))
        start = self.reading[0].num_read if self.reading else known
        if isinstance(source, Tensor):
            self.slots.write(row, source[:, :, :start])
        elif start:
            self.slots.move(source, row, start)
        self.reading.append(generation)
        generation.num_read = start
        if not generation.admitted:
            generation.started, generation.num_cached = time.monotonic(), start
        return True

    def _may_join(self, generation: Generation, known: int, num_tokens: int) -> bool:
        """Whether it is better read with those being read, from where they are and padded to the longest, than alone.

        Alone, it would begin after what is known of it by then, its client's own that are read included. Between
        clients, both have to begin where they would alone: one would else be told how much of the other's was known.
        """
        start, others = self.reading[0].num_read, len(self.reading)
        own = [other for other in self.reading if other.request.client == generation.request.client]
        if len(own) < others and known != start:
            return False
        shared = max((_shared(other.sequence, generation.sequence[:-1]) for other in own), default=0)
        longest = max(other.length for other in self.reading) - start
        together = max(longest, generation.length - start) * (others + 1)
        alone = generation.length - max(known, shared)
        return known >= start and together <= num_tokens and together <= others * longest + alone + FORWARD

    def halt(self) -> None:
        """Leaves what is being read for later, so that others are read first."""
        self.halted, self.reading = [*self.reading, *self.halted], []

    def resume(self) -> None:
        """Goes on with the first that was left for later."""
        self.reading = [self.halted.pop(0)]

    def make_room(self) -> bool:
        """Sees to the memory for a token more of every row; False where the budget has none."""
        return self._reserve(self.members, max(member.length for member in self.members))

    def _reserve(self, members: list[Generation], columns: int) -> bool:
        columns = -(-columns // COLUMN_STEP) * COLUMN_STEP
        return self.slots.reserve(len(members), columns, [member.num_read for member in self.members])

    def _find(self, generation: Generation) -> tuple[int, int | Tensor | None]:
        """The longest beginning that its client's sequences know, in tokens, and the row or the contents it is in."""
        wanted, client = generation.sequence[: generation.num_reusable], generation.request.client
        length, source = self.prefixes.find(np.array(wanted), client)
        for row, other in enumerate(self.rows):
            if other.request.client != client:
                continue
            if (shared := _shared(other.sequence[: other.num_read], wanted)) > length:
                length, source = shared, row
        return length, source

    def read(self, num_tokens: int) -> tuple[int, Results]:
        """Reads a sequence, up to so many tokens of it, or all that were admitted to be read together.

        Returns how many tokens were read, and the next token of each sequence that has ended, which has a place in the
        rows now; or what broke it. One that has not ended is still in `reading`.
        """
        group, sequences = self.reading, [generation.sequence for generation in self.reading]
        start, longest = group[0].num_read, max(map(len, sequences))
        stop = min(start + num_tokens, longest) if len(group) == 1 else longest
        parts = [sequence[start:stop] for sequence in sequences]

        def forward(first: int, count: int) -> list[SampledToken] | None:
            some = parts[first : first + count]
            cache = self.slots.row(len(self.rows) + first, start, count)
            embeds = self._embed([part + [0] * (stop - start - len(part)) for part in some], cache)  # never seen
            for generation, part, embedded in zip(group[first : first + count], some, embeds, strict=True):
                if generation.request.prompt_logprobs is not None:
                    score_prompt(generation, start, embedded[: len(part)], self.palm, self.sampler)
            if stop < longest:
                return None
            last = embeds[torch.arange(count), [len(part) - 1 for part in some]]
            return self._sample(last, group[first : first + count])

        results = self._each(group, forward)
        for (generation, found), part in zip(results, parts, strict=True):
            if not isinstance(found, Exception):
                generation.num_read = start + len(part)
        if stop == longest:
            self.rows, self.reading = [*self.rows, *self.reading], []
        return sum(map(len, parts)), [result for result in results if result[1] is not None]

    def step(self) -> Results:
        """The next token of every row, or what broke it."""
        rows = list(self.rows)

        def forward(first: int, count: int) -> list[SampledToken]:
            some = rows[first : first + count]
            lengths = [row.num_read for row in some]
            cache = self.slots.rows(lengths) if count == len(rows) else self.slots.row(first, *lengths)
            return self._sample(self._embed([[row.tokens[-1]] for row in some], cache)[:, -1], some)

        results = self._each(rows, forward)
        for row, found in results:
            row.num_read += not isinstance(found, Exception)
        return results

    def _each(self, members: list[Generation], forward: Callable[[int, int], list[SampledToken] | None]) -> Results:
        """The results of a forward for all of them, or where it fails for each alone, so that only its own is lost.

        `forward` takes the first and the number of those that it is for.
        """
        try:
            return list(zip(members, forward(0, len(members)) or [None] * len(members), strict=True))
        except Exception as error:
            if len(members) == 1:
                return [(members[0], error)]
            logger.warning("a forward for %d replies failed; each is tried alone", len(members), exc_info=True)
        results: Results = []
        for place, member in enumerate(members):
            try:
                results.append((member, (forward(place, 1) or [None])[0]))
            except Exception as error:
                results.append((member, error))
        return results

    def _embed(self, tokens: list[list[int]], cache: Cache) -> Tensor:
        """The final embeddings: `b i -> b i e`."""
        return self.palm(torch.tensor(tokens, device=self.palm.device), cache=cache, return_only_embedding=True)

    def _sample(self, embeds: Tensor, members: list[Generation]) -> list[SampledToken | Exception]:
        """The next tokens after these embeddings, `b e`, or why there is none."""
        found = self.sampler(self.palm.to_logits(embeds), members)
        return [
            sampled or member.failure or EngineError("the model computed logits that are no finite numbers")
            for member, sampled in zip(members, found, strict=True)
        ]

    def remove(self, generation: Generation, *, keep: bool = True) -> None:
        """Takes a sequence out; its row is free at once. What was read of one that broke is not to be kept."""
        before = self.members
        if keep:
            self._keep(before.index(generation), generation)
        else:
            self.slots.wipe(before.index(generation))
        group = next(group for group in (self.rows, self.reading, self.halted) if generation in group)
        last = group.pop()
        if last is not generation:
            group[group.index(generation)] = last
        for row, member in enumerate(self.members):  # all move down, to what is free by then
            if before[row] is not member:
                self.slots.move(before.index(member), row, member.num_read)

    def _keep(self, row: int, generation: Generation) -> None:
        """Remembers what was read of a sequence."""
        length, client = generation.num_read, generation.request.client
        if not self.prefixes.max_bytes:
            return
        tokens = np.array(generation.sequence[:length])
        if self.prefixes.wants(tokens, length * SlotCache.bytes_per_token(self.palm), client):
            self.prefixes.put(tokens, self.slots.read(row, length), client)

    def clear(self) -> None:
        """Forgets all sequences and everything known of others."""
        self.rows, self.reading, self.halted = [], [], []
        self.slots.clear()
        self.prefixes.clear()


def _shared(one: list[int], other: list[int]) -> int:
    size = min(len(one), len(other))
    return common_prefix(np.array(one[:size]), np.array(other[:size]))
