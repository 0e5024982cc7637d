"""Which replies are computed together: one step is one more token for each of them."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable

import torch

from palm_rlhf.serving.engine.batch import Batch
from palm_rlhf.serving.engine.fairness import SAMPLED_WEIGHT, FairQueue
from palm_rlhf.serving.engine.sampler import SampledToken
from palm_rlhf.serving.generation import EngineError, Generation

logger = logging.getLogger(__name__)


class Scheduler:
    """The replies that wait and those that run, for one thread.

    A reply that cannot be computed ends with the error, and the others go on.

    Args:
        chunk: The most tokens of prompts that are read in a step.
        timeout: Seconds that a reply may take.
        counts: Counts events for the metrics.
        ended: Called when a reply has ended, before its reader hears of it.
    """

    def __init__(
        self,
        batch: Batch,
        *,
        chunk: int,
        timeout: float,
        counts: Counter[str],
        ended: Callable[[Generation], None],
    ):
        self.batch, self.chunk, self.timeout, self.counts, self._ended = batch, chunk, timeout, counts, ended
        self.waiting = FairQueue()

    @property
    def has_work(self) -> bool:
        """Whether a step would compute something."""
        return bool(self.batch.members) or self.waiting.next() is not None

    def step(self) -> None:
        """Sample one token for every reply that runs, and read a part of the prompts of new replies."""
        self._drop_ended()
        self._make_room()
        if self.batch.rows:
            self.counts["steps"] += 1
            for generation, found in self.batch.step():
                self._push(generation, found)
        while self._admit():
            pass
        if self.batch.halted and not self.batch.reading:
            self.batch.resume()
        if self.batch.reading:
            self._read()

    def end_all(self, error: Exception, *, waiting: bool) -> None:
        """End every reply that runs, and those that wait too if none runs or `waiting` asks for it."""
        running = self.batch.members
        self.batch.clear()
        for generation in running:
            self._finish(generation, "error", error)
        for generation in self.waiting if waiting or not running else ():
            self.waiting.remove(generation)
            self._finish(generation, "error", error)

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for generation in (*self.batch.members, *self.waiting):
            timeout = min(generation.request.timeout or math.inf, self.timeout)
            if generation.cancelled:
                self._leave(generation, "cancelled")
            elif now - generation.submitted > timeout:
                self._leave(generation, "timeout", TimeoutError(f"the reply took longer than {timeout:g} seconds"))
            elif generation.paused and generation not in self.waiting:
                self._put_back(generation, "paused")

    def _make_room(self) -> None:
        """Reserve memory for one more token of each reply; where it is short, some replies wait again."""
        while self.batch.rows:
            try:
                if self.batch.make_room():
                    return
                self._put_back(last_of(self.batch.members, largest=tokens_by_client(self.batch.members)), "preempted")
            except Exception as error:  # the longest reply is what asked for so much memory
                self._fail(max(self.batch.members, key=lambda member: member.length), error)

    def _admit(self) -> bool:
        """Give a row to the next reply; the others wait behind it, so that nobody is overtaken for ever."""
        generation = self.waiting.next()
        if generation is None:
            return False
        computed_for = self.waiting.computed_for
        if self.batch.halted and computed_for(self.batch.halted[0]) < computed_for(generation):
            return False  # the prompt that was read in part is read first
        self._halt_for(generation)
        is_new = not generation.admitted
        try:
            while not self.batch.admit(generation, self.chunk):
                if self.batch.reading or not self._make_way(generation):
                    return False
        except Exception as error:
            self._fail(generation, error)
            return True
        self.waiting.remove(generation)
        if is_new:
            self.counts["prompt_tokens"] += len(generation.request.prompt)
            self.counts["prompt_tokens_reused"] += generation.num_cached
        return True

    def _halt_for(self, generation: Generation) -> None:
        """Halt the reading of a long prompt, for a reply of a client that less has been computed for."""
        if len(self.batch.reading) == 1:
            (other,) = self.batch.reading
            is_long = other.length - other.num_read > self.chunk
            if is_long and self.waiting.computed_for(generation) < self.waiting.computed_for(other):
                self.batch.halt()

    def _make_way(self, generation: Generation) -> bool:
        """Let the last reply of the client with most rows wait, where that client has two rows more than the other.

        Returns whether a row was freed.
        """
        rows = Counter(member.request.client for member in self.batch.members)
        if max(rows.values(), default=0) < rows[generation.request.client] + 2:
            return False
        self._put_back(last_of(self.batch.members, largest=rows), "preempted")
        return True

    def _put_back(self, generation: Generation, reason: str) -> None:
        """Let a reply wait again; it goes on later where it was."""
        self.batch.remove(generation)
        self.waiting.put_back(generation)
        self.counts[reason] += 1

    def _read(self) -> None:
        before = [(generation, generation.num_read) for generation in self.batch.reading]
        num_read, results = self.batch.read(self.chunk)
        self.counts["prompt_tokens_computed"] += num_read
        for generation, start in before:
            self.waiting.charge(generation, generation.num_read - start)
        for generation, found in results:
            self._push(generation, found)

    def _push(self, generation: Generation, found: SampledToken | Exception) -> None:
        if isinstance(found, Exception):
            self._fail(generation, found)
            return
        self.counts["tokens"] += 1
        self.waiting.charge(generation, SAMPLED_WEIGHT)
        try:
            piece = generation.push(*found)
        except Exception as error:
            self._fail(generation, error)
            return
        if piece is not None and piece.finish_reason is not None:
            self.batch.remove(generation)
            self._count_end(generation)
        if piece is not None:
            generation.deliver(piece)

    def _fail(self, generation: Generation, error: Exception) -> None:
        """End a reply with an error."""
        is_known = isinstance(error, (EngineError, ValueError))
        logger.log(logging.WARNING if is_known else logging.ERROR, "a reply failed", exc_info=error)
        if is_out_of_memory(error):
            length = generation.length
            error = MemoryError(
                f"there is no memory for this reply after {length} tokens; ask for fewer tokens, or later"
            )
        self._leave(generation, "error", error)

    def _leave(self, generation: Generation, reason: str, error: BaseException | None = None) -> None:
        if generation in self.waiting:
            self.waiting.remove(generation)
        else:
            self.batch.remove(generation, keep=reason != "error")
        self._finish(generation, reason, error)

    def _finish(self, generation: Generation, reason: str, error: BaseException | None = None) -> None:
        piece = generation.end(reason, error)
        self._count_end(generation)
        generation.deliver(piece)

    def _count_end(self, generation: Generation) -> None:
        self.counts[f"finished_{generation.finish_reason}"] += 1
        self.waiting.leave(generation)
        self._ended(generation)


def tokens_by_client(members: list[Generation]) -> Counter[str]:
    """Return the tokens in the cache by client."""
    found: Counter[str] = Counter()
    for member in members:
        found[member.request.client] += member.length
    return found


def last_of(members: list[Generation], largest: Counter[str]) -> Generation:
    """Return the reply that came last, of the client with the largest number."""
    client = largest.most_common(1)[0][0]
    own = (member for member in members if member.request.client == client)
    return max(own, key=lambda member: member.submitted)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
