"""Replies in OpenAI's protocol: the objects of chats and completions, whole and in chunks."""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from palm_rlhf import __version__
from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.serving.generation import Generation, Piece, Request, TokenLogprob, ToolCall
from palm_rlhf.serving.protocol.errors import ApiError
from palm_rlhf.serving.protocol.token_display import token_text

LEAST_LOGPROB = -9999.0  # JSON has no infinity
ENCODED_LEVELS = 5  # down to the entry of one token: reply, choices, choice, logprobs, content
FINGERPRINT = f"palm-rlhf-{__version__}"


def usage(generations: Sequence[Generation], completion_tokens: int | None = None) -> dict[str, Any]:
    """Return the numbers of tokens read and sampled; a prompt with several replies counts once.

    Args:
        completion_tokens: The tokens sampled so far; by default all tokens of the replies.
    """
    prompts = {id(generation.request.prompt): generation for generation in generations}.values()
    prompt_tokens = sum(len(generation.request.prompt) for generation in prompts)
    if completion_tokens is None:
        completion_tokens = sum(len(generation.tokens) for generation in generations)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(generation.num_cached for generation in prompts)},
    }


@dataclass(frozen=True)
class CompletionWriter:
    """A writer of one reply's objects, for a chat or a completion.

    Args:
        include_usage: Whether the chunks of a stream have a place for the usage, which the last chunk fills.
        continuous_usage: Whether every chunk has the usage so far.
        prompt_logprobs: The number of alternatives reported for each token of the prompt, in vLLM's form; None reports
            none.
    """

    kind: Literal["chat", "completion"]
    model: str
    tokenizer: Tokenizer
    include_usage: bool = False
    continuous_usage: bool = False
    prompt_logprobs: int | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    num_tokens: dict[int, int] = field(default_factory=dict)  # sampled so far, by the number of the choice

    def _envelope(self, choices: list[dict[str, Any]], chunk: bool, **more: Any) -> dict[str, Any]:
        chat = self.kind == "chat"
        kind = f"chat.completion{'.chunk' if chunk else ''}" if chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            **more,
        }

    def whole(self, replies: Sequence[tuple[Generation, list[Piece]]], everything: Sequence[Generation]) -> dict:
        """Return the object of a reply that is not streamed; `everything` are the generations it cost."""
        choices: list[dict[str, Any]] = []
        for index, (generation, pieces) in enumerate(replies):
            text = "".join(piece.text for piece in pieces)
            logprobs = self._logprobs([one for piece in pieces for one in piece.logprobs], generation.request)
            calls = [call_object(call) for piece in pieces for call in piece.calls]
            content = {"message": message(text, calls)} if self.kind == "chat" else {"text": text}
            choice: dict[str, Any] = {"index": index, **content, "logprobs": logprobs}
            choice["finish_reason"] = pieces[-1].finish_reason
            if self.prompt_logprobs is not None and self.kind == "completion":
                choice["prompt_logprobs"] = self._prompt_logprobs(generation)
            choices.append(choice)
        more: dict[str, Any] = {"usage": usage(everything)}
        if self.prompt_logprobs is not None and self.kind == "chat":
            more["prompt_logprobs"] = self._prompt_logprobs(replies[0][0])
        return self._envelope(choices, chunk=False, **more)

    def first(self, index: int, generations: Sequence[Generation]) -> dict[str, Any]:
        """Return the chunk that opens a choice of a chat."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}}, generations, 0)

    def chunks(
        self, index: int, piece: Piece, generations: Sequence[Generation], num_tokens: int
    ) -> list[dict[str, Any]]:
        """Return the chunks of one piece: its text, its calls, and the reason why the choice ends.

        Args:
            index: The number of the choice.
            num_tokens: The tokens sampled so far for all choices.
        """
        found, logprobs = [], self._logprobs(piece.logprobs, generations[index].request)
        if piece.text or logprobs is not None:
            content = {"delta": {"content": piece.text}} if self.kind == "chat" else {"text": piece.text}
            found.append(self._chunk({"index": index, **content, "logprobs": logprobs}, generations, num_tokens))
        if piece.calls:
            delta = {"tool_calls": [{"index": call.number, **call_object(call)} for call in piece.calls]}
            found.append(self._chunk({"index": index, "delta": delta}, generations, num_tokens))
        if piece.finish_reason is not None:
            empty: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
            end = {"index": index, **empty, "finish_reason": piece.finish_reason}
            found.append(self._chunk(end, generations, num_tokens))
        return found

    def _chunk(self, choice: dict[str, Any], generations: Sequence[Generation], num_tokens: int) -> dict[str, Any]:
        choice = {"logprobs": None, "finish_reason": None, **choice}
        so_far = usage(generations, num_tokens) if self.continuous_usage else None
        return self._envelope([choice], chunk=True, **({"usage": so_far} if self.include_usage else {}))

    def opening(self, generations: Sequence[Generation]) -> bytes:
        """Return the beginning of a stream: the chunks that open the choices of a chat."""
        if self.kind == "completion":
            return b""
        return b"".join(event(self.first(index, generations)) for index in range(len(generations)))

    def block(self, found: Sequence[tuple[int, Piece]], generations: Sequence[Generation]) -> bytes:
        """Return the chunks of the pieces that have come."""
        chunks = []
        for number, piece in found:
            self.num_tokens[number] = piece.num_tokens
            chunks += self.chunks(number, piece, generations, sum(self.num_tokens.values()))
        return b"".join(map(event, chunks))

    def closing(self, generations: Sequence[Generation]) -> bytes:
        """Return the end of a stream: the chunk with the usage, where it is asked for."""
        return event(self._envelope([], chunk=True, usage=usage(generations))) if self.include_usage else b""

    def failure(self, error: ApiError) -> bytes:
        """Return the end of a stream that failed; its status has been sent already."""
        return event(error.body)

    @property
    def end(self) -> bytes:
        return event("[DONE]")

    def _logprobs(self, logprobs: Sequence[TokenLogprob], request: Request) -> dict[str, Any] | None:
        """Return log-probabilities in OpenAI's forms: a chat leaves out the token that ends it."""
        if self.kind == "chat":
            logprobs = [one for one in logprobs if one.token not in request.stop_tokens]
        if not logprobs:
            return None
        if self.kind == "chat":
            return {"content": [self._entry(one) for one in logprobs], "refusal": None}
        return {
            "tokens": [self._name(one.token) for one in logprobs],
            "token_logprobs": [None if one.logprob is None else finite(one.logprob) for one in logprobs],
            "top_logprobs": [None if one.logprob is None else self._named(one) for one in logprobs],
            "text_offset": [one.offset for one in logprobs],
        }

    def _named(self, one: TokenLogprob) -> dict[str, float]:
        """Return log-probabilities by the text of the token; of tokens with equal texts the likeliest."""
        own = () if one.logprob is None else ((one.token, one.logprob),)
        found: dict[str, float] = {}
        for token, value in (*one.alternatives, *own):
            found.setdefault(self._name(token), finite(value))
        return found

    def _prompt_logprobs(self, generation: Generation) -> list[dict[str, Any] | None]:
        """Return the tokens of the prompt and their alternatives, by id; None for the first token."""
        found: list[dict[str, Any] | None] = [None]
        for one in generation.prompt_logprobs:
            best = enumerate(one.alternatives[: self.prompt_logprobs], start=1)
            assert one.logprob is not None  # only the first token, which is not among these, has none
            ranked = ((one.rank, one.token, one.logprob), *((rank, *alternative) for rank, alternative in best))
            entries: dict[str, Any] = {}
            for rank, token, value in ranked:
                entry = {"logprob": finite(value), "rank": rank, "decoded_token": self._name(token)}
                entries.setdefault(str(token), entry)
            found.append(entries)
        return found

    def _entry(self, one: TokenLogprob) -> dict[str, Any]:
        assert one.logprob is not None  # a chat has no echo, and so no first token of a prompt
        return {
            **self._one(one.token, one.logprob),
            "top_logprobs": [self._one(token, value) for token, value in one.alternatives],
        }

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, octets = token_text(self.tokenizer, token)
        return {"token": text, "logprob": finite(logprob), "bytes": octets}

    def _name(self, token: int) -> str:
        return token_text(self.tokenizer, token)[0]


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def message(text: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant's message, with the calls of functions in it."""
    reply = {"role": "assistant", "content": text}
    return {**reply, "content": text or None, "tool_calls": list(calls)} if calls else reply


def call_object(call: ToolCall) -> dict[str, Any]:
    """Return a call of a function."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def encoded(value: Any) -> bytes:
    """Return a large reply as JSON, by many calls of the encoder, since each call holds up every other thread."""
    return "".join(json_pieces(value, ENCODED_LEVELS)).encode()


def json_pieces(value: Any, levels: int) -> Iterator[str]:
    """Yield JSON in pieces: entry by entry in the objects and lists of so many levels."""
    if not levels or not value or not isinstance(value, (dict, list)):
        yield json.dumps(value)
        return
    named = isinstance(value, dict)
    for number, item in enumerate(value):
        yield ", " if number else "{" if named else "["
        if named:
            yield f"{json.dumps(item)}: "
        yield from json_pieces(value[item] if named else item, levels - 1)
    yield "}" if named else "]"


def event(data: dict[str, Any] | str) -> bytes:
    """Return a server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
