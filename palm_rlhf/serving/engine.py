"""Continuous batching: requests join and leave between tokens, and one thread computes for all of them."""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from beartype import beartype

from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.vocabulary import known_tokens
from palm_rlhf.serving.batch import COLUMN_STEP, Batch
from palm_rlhf.serving.generation import EngineError, EngineFull, Generation, Piece, Request
from palm_rlhf.serving.sampler import Sampled, Sampler
from palm_rlhf.serving.slots import SlotCache
from palm_rlhf.serving.text import TextStream

logger = logging.getLogger(__name__)
LONGEST_RETRY = 60


@beartype
@dataclass(frozen=True)
class EngineConfig:
    """How much an engine takes on at once.

    `context`: tokens of a prompt with its reply; None is the model's `max_seq_len`. `max_batch`: replies computed
    together. `queue`: replies that may wait beyond them. `prefill_chunk`: tokens of prompts read between two tokens of
    the others. `cache_memory` and `prefix_memory`: bytes for running sequences, and for what prompts may begin with.
    Where the first is short, those who came last wait again, and go on when there is room.
    `timeout`: seconds for each reply, its time in the queue included.
    """

    context: int | None = None
    max_batch: int = 16
    queue: int = 64
    prefill_chunk: int = 256
    cache_memory: int = 2**31
    prefix_memory: int = 2**28
    timeout: float | int = 600.0

    def __post_init__(self):
        for name, least in (("context", 2), ("max_batch", 1), ("queue", 0), ("prefill_chunk", 1), ("prefix_memory", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
        if self.timeout <= 0:
            raise ValueError(f"timeout is {self.timeout}; expected seconds above 0")


class Engine:
    """Replies to many at once; use it as a context manager, or `close` it.

    A greedy reply is that of `PaLM.generate`, and a seeded one the same at every time, whatever the others ask: their
    rows are only computed beside it. That is exact but for rounding, since products over more rows add in another
    order: it could tip a choice between two tokens whose logits are equal to the last digits.

    The model is put into eval mode, and all that is computed with it is computed in the engine's thread.
    """

    @beartype
    def __init__(self, palm: PaLM, tokenizer: Tokenizer, config: EngineConfig | None = None):
        self.config = config = config or EngineConfig()
        self.palm, self.tokenizer = palm.eval(), tokenizer
        self.context = palm.config.max_seq_len if config.context is None else config.context
        self.counts: Counter[str] = Counter()  # what has happened since the start, for whoever watches
        self.limit = config.max_batch + config.queue  # replies that may run or wait
        self._batch = self._make_batch()
        self._waiting: deque[Generation] = deque()
        self._inbox: deque[Generation] = deque()
        self._jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self._changed = threading.Condition()
        self._num_open, self._mean_seconds, self._closed = 0, 1.0, False
        self._thread = threading.Thread(target=self._run, name="palm-rlhf-engine", daemon=True)
        self._thread.start()

    def _make_batch(self) -> Batch:
        config, per_token = self.config, SlotCache.bytes_per_token(self.palm)
        if not self.palm.config.causal:
            raise ValueError("a bidirectional PaLM cannot be sampled from; expected one with causal=True")
        least = -(-self.context // COLUMN_STEP) * COLUMN_STEP
        if config.cache_memory < least * per_token:
            raise ValueError(
                f"cache_memory is {config.cache_memory:,} bytes; expected at least {least * per_token:,}, for one "
                f"sequence of the context of {self.context} tokens: raise it, or lower the context"
            )
        slots = SlotCache(self.palm, max_tokens=config.cache_memory // per_token, max_rows=config.max_batch)
        allowed = known_tokens(self.tokenizer, self.palm.num_tokens)
        allowed = None if allowed is None else allowed.to(self.palm.device)
        return Batch(self.palm, Sampler(allowed), slots, prefix_bytes=config.prefix_memory)

    @property
    def num_running(self) -> int:
        """Replies that have a row in the cache."""
        return len(self._batch.members)

    @property
    def num_waiting(self) -> int:
        """Replies that wait for one."""
        return len(self._waiting) + len(self._inbox)

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache of those that run."""
        slots = self._batch.slots
        return slots.num_rows * slots.num_columns * SlotCache.bytes_per_token(self.palm)

    @property
    def prefix_bytes(self) -> int:
        """Memory of what prompts may begin with."""
        return self._batch.prefixes.num_bytes

    @property
    def alive(self) -> bool:
        """Whether it computes."""
        return self._thread.is_alive() and not self._closed

    @beartype
    def submit(self, request: Request, deliver: Callable[[Generation, Piece], None] | None = None) -> Generation:
        """Asks for a reply: iterate over it, or give a function that the engine's thread calls with each piece.

        Raises:
            ValueError: a prompt that does not fit the context, or ids outside of the vocabulary.
            EngineFull: the queue is at its limit.
        """
        return self.submit_all([request], deliver)[0]

    @beartype
    def submit_all(
        self, requests: Sequence[Request], deliver: Callable[[Generation, Piece], None] | None = None
    ) -> list[Generation]:
        """Asks for several replies, all or none; see `submit`."""
        for request in requests:
            self._check(request)
        if len(requests) > self.limit:
            raise ValueError(f"got {len(requests)} requests at once; expected at most {self.limit}, rows and queue")
        generations = [
            Generation(request, TextStream(self.tokenizer, request.stop), deliver, self._wake) for request in requests
        ]
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed")
            if self._num_open + len(requests) > self.limit:
                self.counts["refused"] += 1
                raise EngineFull(
                    f"{self._num_open} replies run or wait, and {len(requests)} more would be above the limit of "
                    f"{self.limit}; try again later",
                    self._retry_after(),
                )
            self._num_open += len(requests)
            self._inbox.extend(generations)
            self._changed.notify()
        return generations

    def _check(self, request: Request) -> None:
        length, size = len(request.prompt), self.palm.num_tokens
        if length + request.max_new_tokens > self.context:
            raise ValueError(
                f"the prompt has {length} tokens and asks for {request.max_new_tokens} more; the context is "
                f"{self.context} tokens for both"
            )
        for name, ids in (("prompt", request.prompt), ("logit_bias", request.logit_bias)):
            if ids and not 0 <= min(ids) <= max(ids) < size:
                bad = min(ids) if min(ids) < 0 else max(ids)
                raise ValueError(f"{name} has the token id {bad}; expected 0 to {size - 1}")

    @beartype
    def call(self, function: Callable[[], Any]) -> Future:
        """Runs a function in the engine's thread, between two tokens, without gradients; EngineFull above the limit."""
        future: Future = Future()
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed")
            if len(self._jobs) >= self.limit:
                raise EngineFull(f"{len(self._jobs)} other tasks wait; try again later", self._retry_after())
            self._jobs.append((function, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Ends the thread, and every reply with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _retry_after(self) -> int:
        """Seconds until a reply has probably ended: how long one takes, by how many are computed at once."""
        seconds = self._mean_seconds / self.config.max_batch * max(1, self.config.queue / 2)
        return min(max(math.ceil(seconds), 1), LONGEST_RETRY)

    # From here on, the engine's thread.

    @torch.inference_mode()
    def _run(self) -> None:
        while self._has_work():
            try:
                self._step()
            except Exception as error:
                logger.exception("a step of the engine failed; its replies are lost")
                members = self._batch.members
                self._batch.clear()
                for generation in members:
                    self._finish(generation, "error", error)
        closed = EngineError("the engine was closed before the reply had ended")
        for generation in (*self._batch.members, *self._waiting, *self._inbox):
            self._finish(generation, "error", closed)
        for _, future in self._jobs:
            future.set_exception(closed)
        self._batch.clear()
        self._waiting.clear()

    def _has_work(self) -> bool:
        """Waits for something to do; False when the engine is closed."""
        with self._changed:
            while not (self._closed or self._inbox or self._jobs or self._waiting or self._batch.members):
                self._changed.wait()
            self._waiting.extend(self._inbox)
            self._inbox.clear()
            return not self._closed

    def _step(self) -> None:
        """One token for every reply that runs, and a part of the prompts of those that come."""
        self._drop_those_who_left()
        self._run_job()
        while self._batch.rows and not self._batch.make_room():
            self._make_way()
        if self._batch.rows:
            started = list(self._batch.rows)
            self.counts["steps"] += 1
            for generation, sampled in zip(started, self._batch.step(), strict=True):
                self._push(generation, sampled)
        while self._admit():
            pass
        if self._batch.reading:
            num_read, ended = self._batch.read(self.config.prefill_chunk)
            self.counts["prompt_tokens_computed"] += num_read
            for generation, sampled in ended:
                self._push(generation, sampled)

    def _drop_those_who_left(self) -> None:
        now = time.monotonic()
        for generation in (*self._batch.members, *self._waiting):
            timeout = min(generation.request.timeout or math.inf, self.config.timeout)
            if generation.cancelled:
                self._leave(generation, "cancelled")
            elif now - generation.submitted > timeout:
                self._leave(generation, "timeout", TimeoutError(f"the reply took longer than {timeout:g} seconds"))

    def _run_job(self) -> None:
        if not self._jobs:
            return
        function, future = self._jobs.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _admit(self) -> bool:
        """Gives the first that waits a row; those behind it wait too, so that no one is overtaken for ever."""
        if not self._waiting:
            return False
        generation = self._waiting[0]
        is_new = not generation.admitted
        if not self._batch.admit(generation, self.config.prefill_chunk):
            return False
        self._waiting.popleft()
        if is_new:
            self.counts["prompt_tokens"] += len(generation.request.prompt)
            self.counts["prompt_tokens_reused"] += generation.num_cached
        return True

    def _make_way(self) -> None:
        """Sends who came last back to the head of the queue: the memory is short, and those before it go on."""
        generation = max(self._batch.members, key=lambda member: member.submitted)
        self._batch.remove(generation)
        self._waiting.appendleft(generation)
        self.counts["preempted"] += 1

    def _push(self, generation: Generation, sampled: Sampled | None) -> None:
        if sampled is None:
            not_finite = EngineError("the model computed logits that are no finite numbers")
            self._leave(generation, "error", generation.failure or not_finite)
            return
        self.counts["tokens"] += 1
        piece = generation.push(*sampled)
        if piece is not None and piece.finish_reason is not None:
            self._batch.remove(generation)
            self._count_end(generation)
        if piece is not None:
            generation.deliver(piece)

    def _leave(self, generation: Generation, reason: str, error: BaseException | None = None) -> None:
        if generation in self._waiting:
            self._waiting.remove(generation)
        else:
            self._batch.remove(generation)
        self._finish(generation, reason, error)

    def _finish(self, generation: Generation, reason: str, error: BaseException | None = None) -> None:
        piece = generation.end(reason, error)
        self._count_end(generation)
        generation.deliver(piece)

    def _count_end(self, generation: Generation) -> None:
        """Makes room in the queue, before whoever waits for the end hears of it and asks for more."""
        seconds = time.monotonic() - generation.submitted
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        self.counts[f"finished_{generation.finish_reason}"] += 1
        with self._changed:
            self._num_open -= 1
