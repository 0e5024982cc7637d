"""A request to the engine, and the reply to it while it is generated."""

import logging
import queue
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from beartype import BeartypeConf, beartype

from palm_rlhf.ops.sampling import Sampling
from palm_rlhf.serving.structured import Grammar
from palm_rlhf.serving.token_text import TextStream

logger = logging.getLogger(__name__)
FINISH_REASONS = ("stop", "length", "cancelled", "timeout", "error")


class EngineFull(RuntimeError):
    """The queue is at its limit; `retry_after` estimates, in seconds, when it will have room again."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(RuntimeError):
    """A reply that failed through no fault of its request: the model failed, or the engine was closed."""


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class Request(Sampling):
    """A prompt, and how to sample its continuation, with all options of `Sampling`.

    Args:
        prompt: The token ids of the prompt.
        max_new_tokens: The most tokens of the reply; 0 only reads the prompt.
        seed: Makes the sample repeatable: equal `seed` and `index` draw equal samples, whatever else runs.
        index: The number of this reply among the replies to one prompt.
        stop: Strings that end the reply, and are left out of it.
        stop_tokens: Token ids that end the reply, and are left out of its text.
        logit_bias: Added to the logits of these token ids, after the penalties and before the temperature.
        logprobs: Reports the log-probability of each token, and of so many of the likeliest alternatives.
        prompt_logprobs: Reports the same of the prompt's tokens, which are computed anew even where they are cached.
        grammar: The grammar that the reply has to follow.
        continues_text: The reply goes on with the text of the prompt, and may begin with a space; else it is a message.
        timeout: Seconds until the reply is ended, its time in the queue included.
        adapter: The LoRA scope of the model that replies; None is the base alone.
        client: Names who asks, by any string. Clients share the machine fairly, and no client can learn of the prompts
            of another.
    """

    prompt: list[int]
    max_new_tokens: int
    seed: int | None = None
    index: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    continues_text: bool = False
    timeout: float | None = None
    adapter: str | None = None
    client: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fine, expected in (
            ("max_new_tokens", self.max_new_tokens >= 0, "at least 0, which only reads the prompt"),
            ("stop", all(self.stop), "no empty string"),
            ("logprobs", (self.logprobs or 0) >= 0, "0 or more alternatives, or None"),
            ("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "0 or more alternatives, or None"),
            ("timeout", self.timeout is None or self.timeout > 0, "seconds above 0, or None"),
        ):
            if not fine:
                raise ValueError(f"got {name}={getattr(self, name)!r}, expected {expected}")
        if not self.prompt:
            raise ValueError("got an empty prompt, expected at least one token")

    @property
    def cache_key(self) -> tuple[str, str | None]:
        """Requests of one key may share keys and values: one client's, under one adapter."""
        return self.client, self.adapter

    @property
    def continued(self) -> list[int]:
        """The tokens of the text that the reply goes on with."""
        return self.prompt if self.continues_text else []


class TokenLogprob(NamedTuple):
    """A token's log-probability in nats under the model's own distribution: no temperature, penalties or bias."""

    token: int
    logprob: float | None  # None for the first token of a prompt
    alternatives: tuple[tuple[int, float], ...]  # the likeliest tokens and their log-probabilities, likeliest first
    rank: int = 1  # 1 for the likeliest
    offset: int = 0  # where the text of the token begins in the text of the reply, in characters


class ToolCall(NamedTuple):
    """A function that a model wants to have called: call `number` of its reply, from 0. `arguments` is JSON."""

    number: int
    id: str
    name: str
    arguments: str


class Piece(NamedTuple):
    """A part of a reply as it is generated: text, and data about its tokens. The last piece has a `finish_reason`."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # one of FINISH_REASONS
    num_tokens: int = 0  # sampled for the reply so far
    calls: tuple[ToolCall, ...] = ()  # of tools, found in the text


class Generation:
    """One reply while it is generated.

    Iterate over it for its pieces; leaving the loop early cancels the reply. An error that ended the reply is raised
    after the last piece. The engine's thread writes the attributes, and any thread may read them.
    """

    def __init__(
        self,
        request: Request,
        text: TextStream,
        deliver: Callable[["Generation", Piece], None] | None,
        wake: Callable[[], None],
    ):
        self.request = request
        self.tokens: list[int] = []  # sampled so far, including the token that ends the reply
        self.prompt_logprobs: list[TokenLogprob] = []  # of the prompt's tokens from the second on, as far as computed
        self.started: float | None = None  # when it was first given a row of the batch
        self.num_cached = 0  # tokens of the prompt whose keys and values were cached already
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.submitted = time.monotonic()
        self.first_token: float | None = None  # the time at which it was sampled
        self.cancelled = False
        self.paused = False  # whether it waits until its reader has caught up
        self.num_read = 0  # tokens whose keys and values are in the cache
        self.random = random.Random(None if request.seed is None else f"{request.seed}/{request.index}")
        self.constraint = None if request.grammar is None else request.grammar.start()
        self.counts: dict[int, int] = {}  # how often each token was sampled; only kept where a penalty needs it
        self._drawn: float | None = None  # the last number of `random`
        self._draws_again = False
        self._ids = np.array(request.prompt)  # of prompt and reply, with room for more
        self._text, self._wake = text, wake
        self._pending: list[TokenLogprob] = []  # of tokens whose text is still held back
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._deliver = deliver

    @property
    def admitted(self) -> bool:
        """Whether the reply has ever had a row of the batch."""
        return self.started is not None

    @property
    def sequence(self) -> np.ndarray:
        """The token ids of the prompt and of the reply so far: `n` int64."""
        return self._ids[: self.length]

    @property
    def length(self) -> int:
        """Number of tokens of the prompt and of the reply so far."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def limit(self) -> int:
        """The most tokens that prompt and reply may have together."""
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def num_reusable(self) -> int:
        """The first tokens of the sequence whose keys and values may be taken from another sequence.

        The last token is always computed, since the next token is sampled from its logits. So are tokens of the prompt
        whose log-probabilities are asked for and not known yet.
        """
        num_scored = len(self.prompt_logprobs)
        needs_scores = self.request.prompt_logprobs is not None and num_scored < len(self.request.prompt) - 1
        return num_scored if needs_scores else self.length - 1

    @property
    def failure(self) -> ValueError | None:
        """Why the grammar allows no next token; None where it allows one."""
        return None if self.constraint is None else self.constraint.failure

    def draw(self) -> float:
        """Return the next number of the reply's own generator, from 0 to below 1. For the engine's thread only."""
        if self._drawn is None or not self._draws_again:
            self._drawn = self.random.random()
        self._draws_again = False
        return self._drawn

    def redraw(self) -> None:
        """Let the next number be the last one again, which was not used. For the engine's thread only."""
        self._draws_again = True

    def cancel(self) -> None:
        """End the reply, and free its row before the next token; do nothing where it has ended already."""
        self.cancelled = True
        self._wake()

    def pause(self, paused: bool) -> None:
        """Let the reply wait without a row until its reader has caught up, or let it go on."""
        self.paused = paused
        self._wake()

    def __iter__(self) -> Iterator[Piece]:
        try:
            while self._deliver is None:
                piece = self._pieces.get()
                yield piece
                if piece.finish_reason is not None:
                    break
        finally:
            if self.finish_reason is None:
                self.cancel()
        if self.error is not None:
            raise self.error

    def text(self) -> str:
        """Wait for the whole reply and return its text; raise the error that ended it."""
        return "".join(piece.text for piece in self)

    def push(self, token: int, logprob: TokenLogprob | None) -> Piece | None:
        """Add the next token, and return the piece to be delivered, if there is one. For the engine's thread only."""
        request = self.request
        if request.max_new_tokens == 0:
            return self.end("length")
        if not self.tokens:
            self.first_token = time.monotonic()
        if self.length == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
        self._ids[self.length] = token
        self.tokens.append(token)
        if request.presence_penalty or request.frequency_penalty:
            self.counts[token] = self.counts.get(token, 0) + 1
        if logprob is not None:
            self._pending.append(logprob._replace(offset=self._text.num_chars))
        if token in request.stop_tokens:
            return self.end("stop")
        if self.constraint is not None:
            self.constraint.push(token)
        text = self._text.push(token)
        if self._text.stopped:
            return self._piece(text, "stop")
        is_whole = self.constraint is not None and self.constraint.complete and not request.stop_tokens
        if is_whole or len(self.tokens) == request.max_new_tokens:
            text += self._text.finish()
            return self._piece(text, "stop" if is_whole or self._text.stopped else "length")
        return self._piece(text, None) if text else None

    def end(self, reason: str, error: BaseException | None = None) -> Piece:
        """End the reply, and return its last piece: text that was held back, except after an error.

        For the engine's thread only.
        """
        self.error = error
        return self._piece("" if reason == "error" else self._text.finish(), reason)

    def deliver(self, piece: Piece) -> None:
        """Hand a piece to the reader. For the engine's thread only, which an error of the reader does not stop."""
        if self._deliver is None:
            self._pieces.put(piece)
            return
        try:
            self._deliver(self, piece)
        except Exception:
            logger.exception("the function that received a piece of a reply failed")

    def _piece(self, text: str, reason: str | None) -> Piece:
        piece = Piece(text, tuple(self._pending), reason, len(self.tokens))
        self._pending.clear()
        self.finish_reason = reason
        return piece
