"""Replies in OpenAI's protocol: the objects of chats and completions, whole and in chunks."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from palm_rlhf import __version__
from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.serving.generation import Generation, Piece, TokenLogprob
from palm_rlhf.serving.vocabulary import token_text

LEAST_LOGPROB = -9999.0  # JSON has no infinity
FINGERPRINT = f"palm-rlhf-{__version__}"


def usage(generations: Sequence[Generation], completion_tokens: int | None = None) -> dict[str, Any]:
    """Tokens read and sampled, or so many sampled so far; a prompt that is answered several times counts once."""
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
class Form:
    """One reply's objects, of a chat or of a completion.

    The chunks of a stream have a place for the usage where it is asked for; `continuous_usage` fills it in every one.
    """

    kind: Literal["chat", "completion"]
    model: str
    tokenizer: Tokenizer
    include_usage: bool = False
    continuous_usage: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

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
        """The object of a reply that was not streamed; `everything` is what it cost."""
        choices = []
        for index, (_, pieces) in enumerate(replies):
            text = "".join(piece.text for piece in pieces)
            logprobs = self._logprobs([logprob for piece in pieces for logprob in piece.logprobs], pieces)
            said = {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": pieces[-1].finish_reason})
        return self._envelope(choices, chunk=False, usage=usage(everything))

    def first(self, index: int, generations: Sequence[Generation]) -> dict[str, Any]:
        """The chunk that opens a choice of a chat."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}}, generations, 0)

    def chunks(
        self, index: int, piece: Piece, asks_logprobs: bool, generations: Sequence[Generation], num_tokens: int
    ) -> list[dict[str, Any]]:
        """What one piece adds to a choice: its text, and why the choice ends. `num_tokens` were sampled so far."""
        found = []
        if piece.text or piece.logprobs:
            said = {"delta": {"content": piece.text}} if self.kind == "chat" else {"text": piece.text}
            logprobs = self._logprobs(list(piece.logprobs), [piece]) if asks_logprobs else None
            found.append(self._chunk({"index": index, **said, "logprobs": logprobs}, generations, num_tokens))
        if piece.finish_reason is not None:
            said = {"delta": {}} if self.kind == "chat" else {"text": ""}
            end = {"index": index, **said, "finish_reason": piece.finish_reason}
            found.append(self._chunk(end, generations, num_tokens))
        return found

    def _chunk(self, choice: dict[str, Any], generations: Sequence[Generation], num_tokens: int) -> dict[str, Any]:
        choice = {"logprobs": None, "finish_reason": None, **choice}
        so_far = usage(generations, num_tokens) if self.continuous_usage else None
        return self._envelope([choice], chunk=True, **({"usage": so_far} if self.include_usage else {}))

    def last(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._envelope([], chunk=True, usage=usage(generations))

    def _logprobs(self, logprobs: list[TokenLogprob], pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if not any(piece.logprobs for piece in pieces):
            return None
        if self.kind == "chat":
            return {"content": [self._entry(one) for one in logprobs], "refusal": None}
        return {
            "tokens": [self._name(one.token) for one in logprobs],
            "token_logprobs": [max(one.logprob, LEAST_LOGPROB) for one in logprobs],
            "top_logprobs": [
                {self._name(token): max(value, LEAST_LOGPROB) for token, value in one.alternatives} for one in logprobs
            ],
            "text_offset": [one.offset for one in logprobs],
        }

    def _entry(self, one: TokenLogprob) -> dict[str, Any]:
        return {
            **self._one(one.token, one.logprob),
            "top_logprobs": [self._one(token, value) for token, value in one.alternatives],
        }

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, octets = token_text(self.tokenizer, token)
        return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": octets}

    def _name(self, token: int) -> str:
        return token_text(self.tokenizer, token)[0]


def event(data: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
