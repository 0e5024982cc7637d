"""What is asked of the engine, and the handle on what becomes of it."""

import logging
import queue
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from beartype import BeartypeConf, beartype

from palm_rlhf.ops.sampling import Sampling
from palm_rlhf.serving.structured import Grammar
from palm_rlhf.serving.token_text import TextStream

logger = logging.getLogger(__name__)
FINISH_REASONS = ("stop", "length", "cancelled", "timeout", "error")


class EngineFull(RuntimeError):
    """The queue is at its limit; `retry_after` is a guess, in seconds, of when it will not be."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(RuntimeError):
    """The reply was lost by no fault of its request: the model failed, or the engine was closed."""


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class Request(Sampling):
    """A prompt, and the distribution that its continuation is drawn from, with all options of `Sampling`.

    `seed` and `index` decide the sample: the same pair gives the same one, whatever else runs. `logit_bias` is added to
    the logits of tokens by their ids, after the penalties and before the temperature. `stop` are
    strings that end the reply and are left out of it, `stop_tokens` ids that do. `logprobs` asks for the
    log-probability of each token and so many alternatives, `prompt_logprobs` for the same of the prompt's tokens, which
    are then read anew whatever is known of them. `grammar` is what the reply has to follow. `timeout` is in
    seconds, the time in the queue included. `client` names whoever asks, by any string: clients share the machine
    fairly, and none is told of another's prompts.
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
    timeout: float | None = None
    client: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fine, expected in (
            ("max_new_tokens", self.max_new_tokens >= 0, "at least 0, which reads the prompt alone"),
            ("stop", all(self.stop), "no empty string"),
            ("logprobs", (self.logprobs or 0) >= 0, "0 or more alternatives, or None"),
            ("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "0 or more alternatives, or None"),
            ("timeout", self.timeout is None or self.timeout > 0, "seconds above 0, or None"),
        ):
            if not fine:
                raise ValueError(f"got {name}={getattr(self, name)!r}, expected {expected}")
        if not self.prompt:
            raise ValueError("got an empty prompt, expected at least one token")


class TokenLogprob(NamedTuple):
    """A token's log-probability in nats, by the model alone: before temperature, penalties and bias."""

    token: int
    logprob: float | None  # None for the first token of a prompt
    alternatives: tuple[tuple[int, float], ...]  # the likeliest tokens, best first
    rank: int = 1  # 1 for the likeliest
    offset: int = 0  # where its text begins in that of the reply, in characters


class ToolCall(NamedTuple):
    """A function that a model wants called: the `index`-th call of its reply. `arguments` is JSON."""

    index: int
    id: str
    name: str
    arguments: str


class Piece(NamedTuple):
    """Some text of a reply, and the tokens that it is made of; the last one says why the reply ends."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # one of FINISH_REASONS
    num_tokens: int = 0  # of the reply so far
    calls: tuple[ToolCall, ...] = ()  # found in its text


class Generation:
    """One reply, as it comes.

    Iterating gives its pieces, and raises what broke it; leaving the loop early cancels it. The engine's thread writes,
    everyone may read.
    """

    def __init__(
        self,
        request: Request,
        text: TextStream,
        deliver: Callable[["Generation", Piece], None] | None,
        wake: Callable[[], None],
    ):
        self.request = request
        self.tokens: list[int] = []  # sampled so far, the one that ends the reply included
        self.prompt_logprobs: list[TokenLogprob] = []  # of its tokens from the second on, as far as they are known
        self.started: float | None = None  # when it first had a row
        self.num_cached = 0  # tokens of the prompt that were not computed again
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.submitted = time.monotonic()
        self.first_token: float | None = None  # when it was sampled
        self.cancelled = False
        self.paused = False  # whether it waits for its reader
        self.num_read = 0  # tokens whose keys and values are in the cache
        self.random = random.Random(None if request.seed is None else f"{request.seed}/{request.index}")
        self.constraint = None if request.grammar is None else request.grammar.start()
        self.counts: dict[int, int] = {}  # how often each token was sampled, where a penalty asks for it
        self._text, self._wake = text, wake
        self._pending: list[TokenLogprob] = []  # of tokens whose text is held back
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._deliver = deliver

    @property
    def admitted(self) -> bool:
        """Whether it has ever had a row."""
        return self.started is not None

    @property
    def sequence(self) -> list[int]:
        """The prompt, and what was sampled after it."""
        return self.request.prompt + self.tokens

    @property
    def length(self) -> int:
        """Tokens of that sequence."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def limit(self) -> int:
        """Tokens that it may grow to."""
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def num_reusable(self) -> int:
        """Tokens whose keys and values may come from elsewhere.

        The last token is always read, since the logits after it are wanted; so are those before it that are wanted too.
        """
        num_scored = len(self.prompt_logprobs)
        wanted = self.request.prompt_logprobs is not None and num_scored < len(self.request.prompt) - 1
        return num_scored if wanted else self.length - 1

    @property
    def failure(self) -> ValueError | None:
        """Why no token may come next, where the grammar is at fault."""
        return None if self.constraint is None else self.constraint.failure

    def cancel(self) -> None:
        """Ends the reply, and frees its place before the next token; nothing happens where it has ended already."""
        self.cancelled = True
        self._wake()

    def pause(self, paused: bool) -> None:
        """Lets the reply wait without a row until its reader has caught up, or go on."""
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
        """Waits for the whole reply; raises what broke it."""
        return "".join(piece.text for piece in self)

    def push(self, token: int, logprob: TokenLogprob | None) -> Piece | None:
        """Takes the next token; what it adds, if anything, is for `deliver`. For the engine's thread alone."""
        request = self.request
        if request.max_new_tokens == 0:
            return self.end("length")
        if not self.tokens:
            self.first_token = time.monotonic()
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
        """Ends the reply with what was held back, unless it broke. For the engine's thread alone."""
        self.error = error
        return self._piece("" if reason == "error" else self._text.finish(), reason)

    def deliver(self, piece: Piece) -> None:
        """Hands a piece to whoever asked; what their function raises is theirs. For the engine's thread alone."""
        if self._deliver is None:
            self._pieces.put(piece)
            return
        try:
            self._deliver(self, piece)
        except Exception:
            logger.exception("a function that was given a piece of a reply failed")

    def _piece(self, text: str, reason: str | None) -> Piece:
        piece = Piece(text, tuple(self._pending), reason, len(self.tokens))
        self._pending.clear()
        self.finish_reason = reason
        return piece
