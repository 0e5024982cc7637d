"""The sequences that are computed together: prompts are read in chunks, and each row gets one token per step."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from palm_rlhf.model.cache import Cache
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine.capacity import columns_of
from palm_rlhf.serving.engine.launched_step import LaunchedStep
from palm_rlhf.serving.engine.prefix_cache import PrefixCache, common_prefix
from palm_rlhf.serving.engine.prompt_logprobs import score_prompt
from palm_rlhf.serving.engine.row_adapters import RowAdapters
from palm_rlhf.serving.engine.sampler import NO_TOKEN, SampledToken, Sampler
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.engine.static_step import StaticSteps
from palm_rlhf.serving.engine.transfer import upload
from palm_rlhf.serving.generation import EngineError, Generation

logger = logging.getLogger(__name__)
# The cost of one more forward, as the number of tokens that could be read in the same time, on a CPU and on a GPU.
FORWARD_COST, GPU_FORWARD_COST = 32, 256
HEADROOM = 256  # tokens that each row can grow by after another joins, before memory can run out again
Outcome = SampledToken | Exception
Results = list[tuple[Generation, Outcome]]


class Batch:
    """Rows 0, 1, ... of the cache: sequences that are sampled from, then those being read, then those read in part.

    The last sequence takes the row of one that leaves, so that the rows of a step always lie next to each other. The
    keys and values of a sequence that leaves are kept for prompts of its cache key that begin as it did, within
    `prefix_bytes`. A sequence that left before its end may be admitted again, and goes on where it was.
    """

    def __init__(self, palm: PaLM, sampler: Sampler, slots: SlotCache, *, prefix_bytes: int):
        self.palm, self.sampler, self.slots = palm, sampler, slots
        self.prefixes = PrefixCache(prefix_bytes, SlotCache.bytes_per_token(palm))
        self.forward_cost = FORWARD_COST if palm.device.type == "cpu" else GPU_FORWARD_COST
        self.adapters = RowAdapters(palm)
        self.static = StaticSteps(palm, slots, self.adapters)
        self.rows: list[Generation] = []
        self.reading: list[Generation] = []  # all read to the same position
        self.halted: list[Generation] = []  # read in part, and left for later
        self._ahead: LaunchedStep | None = None  # whose tokens have not been looked at

    @property
    def members(self) -> list[Generation]:
        """All sequences, in the order of their rows."""
        return [*self.rows, *self.reading, *self.halted]

    def admit(self, generation: Generation, num_tokens: int) -> bool:
        """Begin to read a sequence; return False where there is no row or memory, or it may not join those being read.

        Only the memory to begin with is reserved, not the memory for the longest replies: most end long before, and
        `make_room` finds more for the others.

        Args:
            num_tokens: The number of tokens that the next `read` will be given.
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
        elif source is not None and start:
            self.slots.move(source, row, start)
        self.reading.append(generation)
        generation.num_read = start
        if not generation.admitted:
            generation.started, generation.num_cached = time.monotonic(), start
        return True

    def _may_join(self, generation: Generation, known: int, num_tokens: int) -> bool:
        """Return whether a sequence is better read beside those being read, padded to the longest, than alone.

        Alone, it would begin after the prefix that is known by then, which includes sequences of its client that are
        being read. Sequences of different clients are only read together where both would begin at the same place
        alone: otherwise the time of one would tell how much of the other was cached.
        """
        start, others = self.reading[0].num_read, len(self.reading)
        own = [other for other in self.reading if other.request.cache_key == generation.request.cache_key]
        if len(own) < others and known != start:
            return False
        shared = max((common_prefix(other.sequence, generation.sequence[:-1]) for other in own), default=0)
        longest = max(other.length for other in self.reading) - start
        together = max(longest, generation.length - start) * (others + 1)
        alone = generation.length - max(known, shared)
        return known >= start and together <= num_tokens and together <= others * longest + alone + self.forward_cost

    def halt(self) -> None:
        """Leave the sequences being read for later, so that others are read first."""
        self.halted, self.reading = [*self.reading, *self.halted], []

    def resume(self) -> None:
        """Go on with the first sequence that was left for later."""
        self.reading = [self.halted.pop(0)]

    def make_room(self) -> bool:
        """Reserve the memory for one more token of every row; return False where the budget has none."""
        return self._reserve(self.members, max(member.length for member in self.members))

    def _reserve(self, members: list[Generation], columns: int) -> bool:
        return self.slots.reserve(len(members), columns_of(columns), [member.num_read + 1 for member in self.members])

    def _find(self, generation: Generation) -> tuple[int, int | Tensor | None]:
        """Return the longest prefix known from sequences of the same cache key, in tokens, and where it is.

        Its place is a row, or a tensor of keys and values of the prefix cache.
        """
        wanted, key = generation.sequence[: generation.num_reusable], generation.request.cache_key
        source: int | Tensor | None
        length, source = self.prefixes.find(wanted, key)
        for row, other in enumerate(self.rows):
            if other.request.cache_key != key or min(other.num_read, len(wanted)) <= length:
                continue
            known = other.sequence[: other.num_read]
            # a row that knows more has the next token too: few rows are compared from their beginning
            if known[length] == wanted[length] and (shared := common_prefix(known, wanted)) > length:
                length, source = shared, row
        return length, source

    def read(self, num_tokens: int) -> tuple[int, Results]:
        """Read up to `num_tokens` of one sequence, or all the tokens of several that were admitted together.

        Returns the number of tokens read, and for each sequence that was read to its end, which has a row to sample
        from now, its next token or the error that ended it. A sequence not read to its end stays in `reading`.
        """
        group, sequences = self.reading, [generation.sequence for generation in self.reading]
        start, longest = group[0].num_read, max(map(len, sequences))
        stop = min(start + num_tokens, longest) if len(group) == 1 else longest
        parts = [sequence[start:stop] for sequence in sequences]

        def forward(first: int, count: int) -> list[Outcome] | None:
            some = parts[first : first + count]
            cache = self.slots.row(len(self.rows) + first, start, count)
            tokens = np.zeros((count, stop - start), dtype=np.int64)  # 0 is padding, never attended to or sampled from
            for row, part in enumerate(some):
                tokens[row, : len(part)] = part
            embeds = self._embed(tokens, cache, group[first : first + count])
            for generation, part, embedded in zip(group[first : first + count], some, embeds, strict=True):
                if generation.request.prompt_logprobs is not None:
                    score_prompt(generation, start, embedded[: len(part)], self.palm, self.sampler)
            if stop < longest:
                return None
            places = upload([len(part) - 1 for part in some], embeds.device).view(-1, 1, 1)
            last = embeds.take_along_dim(places, dim=1)[:, 0]
            return self._sample(self.palm.to_logits(last), group[first : first + count])

        results = self._each(group, forward)
        for (generation, found), part in zip(results, parts, strict=True):
            if not isinstance(found, Exception):
                generation.num_read = start + len(part)
        if stop == longest:
            self.rows, self.reading = [*self.rows, *self.reading], []
        return sum(map(len, parts)), [(generation, found) for generation, found in results if found is not None]

    def step(self) -> Results:
        """Return the next tokens of rows, or the errors that ended them.

        On a GPU, the step after this one begins before anybody looks at the tokens. So the GPU computes while the
        tokens are made into text; the next token of a row that ends with this one is dropped. A row that has just
        joined waits for the step that is computed already.
        """
        launched, self._ahead = self._ahead or self._launch(None), None
        if launched is None:
            results = self._step_by_plain_forwards()
        else:
            self._ahead = self._launch(launched)
            results = [(row, self._outcome(row, token)) for row, token in launched.wait()]
        for row, found in results:
            row.num_read += not isinstance(found, Exception)
        return results

    def _launch(self, before: LaunchedStep | None) -> LaunchedStep | None:
        """Begin a step of all rows, after the step `before` where its tokens have not been looked at.

        Returns None where the step has to wait for tokens, for memory or for rows, or cannot be captured.
        """
        if not self.static.enabled or not self.sampler.options_of(self.rows, self.palm.device).simple:
            return None
        tokens: Sequence[int] | Tensor = [row.tokens[-1] for row in self.rows]
        lengths = [member.num_read for member in self.members]
        if before is not None:
            go_on = any(len(row.tokens) + 1 < row.request.max_new_tokens for row in self.rows)
            if not go_on or not before.has(self.rows) or max(lengths) + 2 > self.slots.num_columns:
                return None
            tokens = before.tokens_of(self.rows)
            lengths[: len(self.rows)] = [row.num_read + 1 for row in self.rows]
        logits = self.static.logits(tokens, lengths, [row.request.adapter for row in self.rows])
        return None if logits is None else LaunchedStep(self.rows, self.sampler.draw(logits, self.rows))

    def _step_by_plain_forwards(self) -> Results:
        """Compute and wait for a step of rows with any options, on any device."""
        rows = list(self.rows)

        def forward(first: int, count: int) -> list[Outcome]:
            some = rows[first : first + count]
            tokens, lengths = [row.tokens[-1] for row in some], [row.num_read for row in some]
            if count == len(rows):
                scopes = [row.request.adapter for row in rows]
                logits = self.static.logits(tokens, [member.num_read for member in self.members], scopes)
                if logits is not None:
                    return self._sample(logits, some)
            cache = self.slots.rows(lengths) if count == len(rows) else self.slots.row(first, *lengths)
            embeds = self._embed(np.array(tokens)[:, None], cache, some)
            return self._sample(self.palm.to_logits(embeds[:, -1]), some)

        return [(row, found) for row, found in self._each(rows, forward) if found is not None]

    def _each(
        self, members: list[Generation], forward: Callable[[int, int], list[Outcome] | None]
    ) -> list[tuple[Generation, Outcome | None]]:
        """Run one forward for all sequences; where it fails, run one for each alone, so that only the cause is lost.

        `forward` takes the first of the sequences it is for, and their number.
        """
        try:
            outcomes: Sequence[Outcome | None] = forward(0, len(members)) or [None] * len(members)
            return list(zip(members, outcomes, strict=True))
        except Exception as error:
            if len(members) == 1:
                return [(members[0], error)]
            logger.warning("a forward for %d replies failed; each is tried alone", len(members), exc_info=True)
        results: list[tuple[Generation, Outcome | None]] = []
        for place, member in enumerate(members):
            try:
                own = forward(place, 1)
                results.append((member, own[0] if own else None))
            except Exception as error:
                results.append((member, error))
        return results

    def _embed(self, tokens: np.ndarray, cache: Cache, members: Sequence[Generation]) -> Tensor:
        """Return the final embeddings of rows, each under its own adapter: `b i -> b i e`."""
        scope = self.adapters.of([member.request.adapter for member in members])
        ids = upload(tokens, self.palm.device)
        return self.palm(ids, cache=cache, return_only_embedding=True, finetune_scope=scope)

    def _sample(self, logits: Tensor, members: list[Generation]) -> list[Outcome]:
        """Return the next tokens after logits, `b v`, or the reasons why there is none."""
        found = self.sampler(logits, members)
        return [sampled or self._why_none(member) for member, sampled in zip(members, found, strict=True)]

    def _outcome(self, member: Generation, token: int) -> Outcome:
        return self._why_none(member) if token == NO_TOKEN else SampledToken(token, None)

    def _why_none(self, member: Generation) -> Exception:
        return member.failure or EngineError("the model computed logits that are not finite")

    def remove(self, generation: Generation, *, keep: bool = True) -> None:
        """Take a sequence out, which frees its row. `keep` is False after an error: its keys and values are lost."""
        before = self.members
        if self._ahead is not None:
            self._ahead.drop(generation)
        if keep:
            self._keep(before.index(generation), generation)
        else:
            self.slots.wipe(before.index(generation))
        group = next(group for group in (self.rows, self.reading, self.halted) if generation in group)
        last = group.pop()
        if last is not generation:
            group[group.index(generation)] = last
        for row, member in enumerate(self.members):  # each moves down, to a row that is free by then
            if before[row] is not member:
                self.slots.move(before.index(member), row, member.num_read + 1)  # with what a step ahead has written

    def _keep(self, row: int, generation: Generation) -> None:
        """Keep the keys and values of a sequence for later prompts."""
        tokens = generation.sequence[: generation.num_read]
        self.prefixes.put(tokens, partial(self.slots.read, row), generation.request.cache_key)

    def clear(self) -> None:
        """Forget all sequences and all cached prefixes."""
        self.rows, self.reading, self.halted, self._ahead = [], [], [], None
        self.slots.clear()
        self.prefixes.clear()
