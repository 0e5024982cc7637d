"""A conversation with a model: its messages, and the part of them that the context has room for."""

import json
from collections.abc import Iterator
from pathlib import Path

from beartype import beartype

from palm_rlhf.ops.sampling import Sampling
from palm_rlhf.serving.engine import Engine
from palm_rlhf.serving.generation import Request
from palm_rlhf.serving.served_model import ServedModel
from palm_rlhf.training.run.checkpoints import write_text

CHATTING = Sampling(temperature=0.7)


class Dialogue:
    """What was said, and what the model says next.

    `messages` are those of the user and the assistant in turn, whole exchanges only: all that was said, of which the
    model reads what its context has room for. `num_forgotten` counts the exchanges before that.
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
        self._request([0], 1)  # an option out of range is told now

    @beartype
    def say(self, text: str) -> Iterator[str]:
        """The reply to a message, as it comes.

        Both are remembered from its first words on: whoever stops listening keeps what was said. ValueError for a
        message that the context has no room for.
        """
        return self._reply([*self.messages, {"role": "user", "content": text}])

    def say_again(self) -> Iterator[str]:
        """Another reply to the last message, which takes the place of the one there is."""
        if not self.messages:
            raise ValueError("nothing was said yet: there is no reply to say anew")
        return self._reply(self.messages[:-1])

    def reset(self) -> None:
        """Forgets what was said, but not the system message."""
        self.messages, self.num_forgotten = [], 0

    @beartype
    def save(self, path: Path) -> None:
        """Writes all that was said to a new file, as a line of JSON; FileExistsError where there is one."""
        with open(path, "x"):
            pass  # the name is ours now: nobody's file is written over
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
        said = [*messages, reply]
        for piece in self.engine.submit(request):
            reply["content"] += piece.text
            self.finish_reason = piece.finish_reason
            if piece.text or piece.finish_reason == "stop":
                self.messages, self.num_forgotten = said, num_forgotten
            yield piece.text

    def _request(self, prompt: list[int], max_new_tokens: int) -> Request:
        ends = {"stop": self.model.turn_end_strings, "stop_tokens": self.model.turn_ends}
        return Request(prompt, max_new_tokens, index=self.num_replies, seed=self.seed, **ends, **self.sampling.options)

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """The tokens of the latest exchanges that leave a quarter of the context to the reply, and how many they leave
        out. The last message may take more of it.
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
                    f"the message has {len(prompt)} tokens with what stands around it, and the context has {context} "
                    "for it and the reply: say it in fewer words"
                )
            forgotten += 1
