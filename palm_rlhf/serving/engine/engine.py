"""Continuous batching: requests join and leave between tokens, and one thread computes for all of them."""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import chain
from typing import Any

import torch
from beartype import beartype

from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import known_tokens
from palm_rlhf.ops.cpu.threads import adapt
from palm_rlhf.serving.engine.batch import Batch
from palm_rlhf.serving.engine.capacity import Capacity, capacity, columns_of, free_memory
from palm_rlhf.serving.engine.config import EngineConfig
from palm_rlhf.serving.engine.sampler import Sampler
from palm_rlhf.serving.engine.scheduler import Scheduler
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.generation import FINISH_REASONS, EngineError, EngineFull, Generation, Piece, Request
from palm_rlhf.serving.token_text import TextStream

logger = logging.getLogger(__name__)
LONGEST_RETRY = 60
IDLE_STEP = 1.0  # seconds between two looks at replies that all wait for their readers
# the names in `counts` whose growth is progress
PROGRESS = ("tokens", "prompt_tokens_computed", "tasks", *(f"finished_{reason}" for reason in FINISH_REASONS))


class Engine:
    """An engine that generates many replies at once; use it as a context manager, or `close` it.

    A greedy reply equals the reply of `PaLM.generate`, and a seeded reply is the same at every time, whatever runs
    beside it: other replies only add rows to a forward. This is exact up to rounding, since products over more rows add
    in another order. Rounding can tip the choice between two tokens whose logits are equal to the last digits.

    Requests name their clients, and clients take turns: a row, a place in the queue or memory goes to the client that
    has least, and cached prefixes are never shared between clients. An error of one reply ends that reply only.

    The model is put into eval mode, and everything that is computed with it is computed in the engine's thread.
    """

    @beartype
    def __init__(self, palm: PaLM, tokenizer: Tokenizer, config: EngineConfig | None = None):
        self.config = config = config or EngineConfig()
        self.palm, self.tokenizer = palm.eval(), tokenizer
        self.context = palm.config.max_seq_len if config.context is None else config.context
        self.counts: Counter[str] = Counter()  # of events since the start, for the metrics
        self.capacity = self._size()
        self.limit = self.capacity.max_batch + config.queue  # the most replies that may run or wait
        batch = self._make_batch()
        self._scheduler = Scheduler(
            batch, chunk=self.capacity.prefill_chunk, timeout=config.timeout, counts=self.counts, ended=self._ended
        )
        self._inbox: deque[Generation] = deque()
        self._jobs: dict[str, deque[tuple[Callable[[], Any], Future]]] = {}  # by client: clients take turns
        self._changed = threading.Condition()
        self._open: Counter[str] = Counter()  # replies of each client that run or wait
        self._mean_seconds, self._closed = 1.0, False
        self._busy, self._done, self._progressed = False, 0, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="palm-rlhf-engine", daemon=True)
        self._thread.start()
        if batch.static.enabled:  # in that thread, and before the first request, since it takes time
            self.call(lambda: batch.static.warm_up(self.context)).result()

    def _size(self) -> Capacity:
        """Return how much is taken on at once; ValueError where the memory is too small for one sequence."""
        palm, per_token = self.palm, SlotCache.bytes_per_token(self.palm)
        if not palm.config.causal:
            raise ValueError("got a bidirectional PaLM, expected one with causal=True: only that can be sampled from")
        size = capacity(
            self.config,
            context=self.context,
            bytes_per_token=per_token,
            num_tokens=palm.num_tokens,
            free_memory=free_memory(palm.device),
        )
        least = columns_of(self.context) * per_token
        if size.cache_memory < least:
            raise ValueError(
                f"got cache_memory={size.cache_memory:,} bytes, expected at least {least:,}, for one sequence of the "
                f"context of {self.context} tokens: raise it, or lower the context"
            )
        logger.info(
            "at most %d replies at once, %d bytes of their keys and values, and %d tokens of prompts a step", *size
        )
        return size

    def _make_batch(self) -> Batch:
        max_tokens = self.capacity.cache_memory // SlotCache.bytes_per_token(self.palm)
        slots = SlotCache(self.palm, max_tokens=max_tokens, max_rows=self.capacity.max_batch)
        allowed = known_tokens(self.tokenizer, self.palm.num_tokens)
        allowed = None if allowed is None else allowed.to(self.palm.device)
        return Batch(self.palm, Sampler(allowed), slots, prefix_bytes=self.config.prefix_memory)

    @property
    def num_running(self) -> int:
        """Number of replies that have a row of the cache."""
        return len(self._scheduler.batch.members)

    @property
    def num_waiting(self) -> int:
        """Number of replies that wait for a row."""
        with self._changed:
            return len(self._scheduler.waiting) + len(self._inbox)

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache of running replies, in bytes."""
        slots = self._scheduler.batch.slots
        return slots.num_rows * slots.num_columns * SlotCache.bytes_per_token(self.palm)

    @property
    def prefix_bytes(self) -> int:
        """Memory of the cached prefixes, in bytes."""
        return self._scheduler.batch.prefixes.num_bytes

    @property
    def alive(self) -> bool:
        """Whether the thread of the engine runs."""
        return self._thread.is_alive() and not self._closed

    @property
    def stalled(self) -> bool:
        """Whether there is work to do and no progress was made for longer than `stall_timeout`."""
        return self._busy and time.monotonic() - self._progressed > self.config.stall_timeout

    def most_of(self, client: str) -> int:
        """Return how many replies a client may ask for at once while no other client has any."""
        return max(self.capacity.max_batch, self.limit // 2) if client else self.limit

    @beartype
    def submit(self, request: Request, deliver: Callable[[Generation, Piece], None] | None = None) -> Generation:
        """Ask for a reply: iterate over it, or give a function that the engine's thread calls with each piece.

        Raises ValueError for a prompt that does not fit the context or has ids outside the vocabulary, and EngineFull
        where the queue is at its limit, or the client at its share of it.
        """
        return self.submit_all([request], deliver)[0]

    @beartype
    def submit_all(
        self, requests: Sequence[Request], deliver: Callable[[Generation, Piece], None] | None = None
    ) -> list[Generation]:
        """Ask for several replies, all or none; see `submit`."""
        for request in requests:
            self._check(request)
        if len(requests) > self.limit:
            raise ValueError(f"got {len(requests)} requests at once, expected at most {self.limit}, rows and queue")
        texts = [TextStream(self.tokenizer, request.stop, request.continued) for request in requests]
        generations = [Generation(*pair, deliver, self._wake) for pair in zip(requests, texts)]
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed")
            wanted = Counter(request.client for request in requests)
            for client, count in wanted.items():
                self._check_room(client, count, len(requests))
            self._open += wanted
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
        self._scheduler.batch.adapters.check(request.adapter)
        for name, ids in (("prompt", request.prompt), ("logit_bias", request.logit_bias)):
            if ids and not 0 <= min(ids) <= max(ids) < size:
                bad = min(ids) if min(ids) < 0 else max(ids)
                raise ValueError(f"got the token id {bad} in {name}, expected 0 to {size - 1}")

    def _check_room(self, client: str, count: int, total: int) -> None:
        """Raise EngineFull where `count` replies of a client, of `total` asked for together, have no room.

        A named client has to leave as many places free as it takes (the dynamic thresholds of Choudhury and Hahne,
        1998), so that there is room for others who come later. A client that is alone may take all rows.
        """
        used, own = self._open.total(), self._open[client]
        share = max(self.limit - used - total, self.capacity.max_batch if own == used else 0) if client else self.limit
        if used + total > self.limit:
            reason = f"{used} replies run or wait, and {total} more would be above the limit of {self.limit}"
        elif own + count > share:
            reason = f"{own} of your replies run or wait, and {count} more would be above your share of {share}"
        else:
            return
        self.counts["refused"] += 1
        raise EngineFull(f"{reason}; try again later", self._retry_after())

    @beartype
    def call(self, function: Callable[[], Any], client: str = "") -> Future:
        """Run a function for a client in the engine's thread, between two tokens, without gradients.

        Raises EngineFull where as many functions of the client wait as there may be replies.
        """
        future: Future = Future()
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed")
            jobs = self._jobs.setdefault(client, deque())
            if len(jobs) >= self.limit:
                raise EngineFull(f"{len(jobs)} of your other tasks wait; try again later", self._retry_after())
            jobs.append((function, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Stop the thread, and end every reply with an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _retry_after(self) -> int:
        """Return the seconds until a reply has probably ended: the mean time of one, by the number computed at once."""
        seconds = self._mean_seconds / self.capacity.max_batch * max(1, self.config.queue / 2)
        return min(max(math.ceil(seconds), 1), LONGEST_RETRY)

    # The methods from here on run in the engine's thread.

    @torch.inference_mode()
    def _run(self) -> None:
        if self.palm.device.type == "cuda":
            torch.cuda.set_device(self.palm.device)  # of this thread
        while self._has_work():
            try:
                adapt(self.palm.device.type)
                self._run_job()
                self._scheduler.step()
            except Exception as error:
                logger.exception("a step of the engine failed; its replies are lost")
                self._scheduler.end_all(error, waiting=False)
            self._note_progress()
        closed = EngineError("the engine was closed before the reply had ended")
        self._scheduler.end_all(closed, waiting=True)
        for _, future in chain.from_iterable(self._jobs.values()):
            future.set_exception(closed)

    def _has_work(self) -> bool:
        """Wait for something to do; return False when the engine is closed."""
        with self._changed:
            while not (self._closed or self._inbox or self._jobs or self._scheduler.has_work):
                self._busy = False
                # a reply that waits for its reader may be cancelled, or take too long
                if not self._changed.wait(IDLE_STEP if len(self._scheduler.waiting) else None):
                    break
            while self._inbox:
                self._scheduler.waiting.enter(self._inbox.popleft())
            if not self._busy:
                self._progressed, self._busy = time.monotonic(), True
            return not self._closed

    def _note_progress(self) -> None:
        """Note the time of the last progress, which a loop that does nothing does not make."""
        done = sum(self.counts[name] for name in PROGRESS)
        if done != self._done:
            self._done, self._progressed = done, time.monotonic()

    def _run_job(self) -> None:
        with self._changed:
            if not self._jobs:
                return
            client = next(iter(self._jobs))
            jobs = self._jobs.pop(client)
            function, future = jobs.popleft()
            if jobs:
                self._jobs[client] = jobs  # behind the other clients
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
        self.counts["tasks"] += 1

    def _ended(self, generation: Generation) -> None:
        """Make room in the queue, before the reader of the reply hears of its end and asks for more."""
        seconds = time.monotonic() - generation.submitted
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        with self._changed:
            self._open -= Counter((generation.request.client,))
