"""A conversation with a model: its messages, and the part of them that the context has room for."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beartype import beartype

from palm_rlhf.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from palm_rlhf.model.files import write_text
from palm_rlhf.ops.sampling import Sampling, UncheckedSampling
from palm_rlhf.serving.engine import Engine
from palm_rlhf.serving.generation import Request
from palm_rlhf.serving.served_model import ServedModel

CHATTING = Sampling(temperature=0.7)


@dataclass(frozen=True, kw_only=True)
class ChatSampling(UncheckedSampling):
    """The options of a command line of chats; options that are None are the model's own."""

    temperature: float | None = None  # type: ignore[assignment]  # `over` takes the model's own, and so makes a number
    """Divides the logits; 0 is greedy and always takes the likeliest token; None: the model's own, or 0.7."""

    def over(self, own: Mapping[str, Any]) -> Sampling:
        """Return these options, and where they are None, those of a model; ValueError for a value out of its range."""
        chosen = {name: value for name, value in self.options.items() if value is not None}
        return Sampling(**{**CHATTING.options, **own, **chosen})


@beartype
def recommended_sampling(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return how a model's makers sample replies, by its generation_config.json: options of `Sampling`, maybe none."""
    generation = tokenizer.generation if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    found = {name: generation.get(name) for name in ("temperature", "top_p", "min_p")}
    found = {name: value for name, value in found.items() if isinstance(value, int | float)}
    top_k = generation.get("top_k")
    return found | ({"top_k": top_k} if isinstance(top_k, int) and top_k > 0 else {})  # 0 is all tokens there


class Dialogue:
    """A conversation of a user and a model.

    `messages` are the messages of the user and the assistant in turn, whole exchanges only. The model reads as many of
    the last exchanges as its context has room for; `num_forgotten` counts the exchanges before them.
    """

    @beartype
    def __init__(
        self,
        model: ServedModel,
        engine: Engine,
        *,
        system: str | None = None,
        sampling: Sampling = CHATTING,
        max_tokens: int | None = None,
        seed: int | None = None,
    ):
        self.model, self.engine, self.system, self.max_tokens = model, engine, system, max_tokens
        self.sampling, self.seed = sampling, seed
        self.messages: list[dict[str, str]] = []
        self.num_forgotten = self.num_replies = 0
        self.finish_reason: str | None = None  # of the last reply
        self._request([0], 1)  # so that an option out of range fails now

    @beartype
    def say(self, text: str) -> Iterator[str]:
        """Yield the reply to a message as it is generated.

        From the first words of the reply on, the message and the reply are remembered: a reader who stops early keeps
        the reply so far. Raises ValueError for a message that the context has no room for.
        """
        return self._reply([*self.messages, {"role": "user", "content": text}])

    def say_again(self) -> Iterator[str]:
        """Yield another reply to the last message, which replaces the reply it has."""
        if not self.messages:
            raise ValueError("nothing was said yet: there is no reply to replace")
        return self._reply(self.messages[:-1])

    def reset(self) -> None:
        """Forget the messages, but not the system message."""
        self.messages, self.num_forgotten = [], 0

    @beartype
    def save(self, path: Path) -> None:
        """Write all messages to a new file, as a line of JSON; FileExistsError where the file exists."""
        with open(path, "x"):
            pass  # the name is taken now, and no other file is overwritten
        try:
            write_text(path, json.dumps({"messages": [*self._opening, *self.messages]}, ensure_ascii=False) + "\n")
        except BaseException:
            path.unlink()
            raise

    @property
    def _opening(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        prompt, num_forgotten = self._fit(messages)
        room = self.engine.context - len(prompt)
        request = self._request(prompt, min(self.max_tokens or room, room))
        self.num_replies += 1
        reply = {"role": "assistant", "content": ""}
        exchanges = [*messages, reply]
        for piece in self.engine.submit(request):
            reply["content"] += piece.text
            self.finish_reason = piece.finish_reason
            if piece.text or piece.finish_reason == "stop":
                self.messages, self.num_forgotten = exchanges, num_forgotten
            yield piece.text

    def _request(self, prompt: list[int], max_new_tokens: int) -> Request:
        return Request(
            prompt,
            max_new_tokens,
            seed=self.seed,
            index=self.num_replies,
            stop=self.model.turn_end_strings,
            stop_tokens=self.model.turn_ends,
            **self.sampling.options,
        )

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """Return the tokens of the latest exchanges that fit the context, and the number of exchanges left out.

        A quarter of the context is left to the reply; the last message alone may take more.
        """
        context, forgotten = self.engine.context, self.num_forgotten
        wanted = min(self.max_tokens or context, max(context // 4, 1))
        while True:
            prompt = self.model.encode_chat([*self._opening, *messages[2 * forgotten :]])
            is_last = 2 * forgotten + 1 == len(messages)
            if len(prompt) + wanted <= context or (is_last and len(prompt) < context):
                return prompt, forgotten
            if is_last:
                raise ValueError(
                    f"the message has {len(prompt)} tokens with its template, and the context has {context} for it "
                    "and the reply: say it in fewer words"
                )
            forgotten += 1
