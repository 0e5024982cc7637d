"""Conversations in which an environment replies between the policy's turns: a tool, a game, a simulated user."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.model.inputs import check_token_ids
from palm_rlhf.model.palm import PaLM

Message = dict[str, Any]  # {"role": "user" or "assistant", "content": a text, or 1-d ids without a tokenizer}
Environment = Callable[..., str | Tensor | None]
Draw = Callable[[Sequence[Tensor], int, Tensor], tuple[list[Tensor], list[Tensor]]]


@dataclass
class Conversation:
    """A prompt and its response in parts: the policy's turns, and between them the environment's replies."""

    prompt: Tensor
    room: int  # tokens that may still follow
    messages: list[Message]
    columns: dict[str, Any]  # the columns of the prompt that the environment asks for
    parts: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)  # of each part; 0 where the environment wrote it
    policy_mask: list[Tensor] = field(default_factory=list)  # of each part, True where the policy wrote it
    truncated: bool = False

    @property
    def context(self) -> Tensor:
        """The tokens that the next turn reads."""
        return torch.cat([self.prompt, *self.parts])

    def add(self, tokens: Tensor, message: Message, logprobs: Tensor | None = None) -> None:
        """Append a turn of the policy, or without `logprobs` a reply of the environment."""
        self.room -= len(tokens)
        self.messages.append(message)
        self.parts.append(tokens)
        self.policy_mask.append(torch.full_like(tokens, logprobs is not None, dtype=torch.bool))
        self.logprobs.append(torch.zeros(len(tokens), device=tokens.device) if logprobs is None else logprobs)


@dataclass(frozen=True)
class Turns:
    """The rules of a conversation between a policy and an environment.

    The environment is called with the messages so far, the last of them the policy's. It returns its reply, or None if
    the conversation is over. Further parameters of its signature are passed by name: the prompt's other columns. With a
    tokenizer all contents are texts, also that of the prompt. A reply is then a text, which is encoded as it stands, or
    1-d ids, which can hold special tokens such as the marks of turns: see `palm_rlhf.data.conversation.encode_reply`.
    Without a tokenizer contents and replies are 1-d ids. Conversations are asked one after another, turn by turn.

    A turn of the policy ends with its end-of-sequence token. If there is none, it ends after `max_turn_tokens`. A
    conversation is cut off, and counts as truncated, if a turn ends without the end-of-sequence token, and if the
    environment replies after `max_turns` turns or leaves no room for another token of the policy. Such a reply is left
    out, so a response always ends with an action.
    """

    environment: Environment
    max_turns: int
    max_turn_tokens: int | None = None  # None: a turn may fill the rest of the response's room
    tokenizer: Any = None

    @beartype
    def converse(
        self,
        palm: PaLM,
        draw: Draw,
        prompts: Sequence[Tensor],
        rooms: Tensor,
        *,
        num_samples: int,
        eos_token: int | None,
        columns: Mapping[str, Sequence] | None = None,
    ) -> list[Conversation]:
        """Return `num_samples` conversations for each prompt, those of one prompt next to each other.

        Args:
            draw: samples `num_samples` turns after each context, up to a limit of tokens for each, and returns them
                with their log-probabilities.
            rooms: longest responses to the prompts, replies included: `b`.
            columns: an entry for each conversation.

        Raises RuntimeError if the environment raises, and ValueError if it returns no valid reply or asks for a column
        that does not exist.
        """
        rows = [
            (prompt, room) for prompt, room in zip(prompts, rooms.tolist(), strict=True) for _ in range(num_samples)
        ]
        columns = columns or {}
        asked = {name: columns[name] for name in asked_columns(self.environment, columns)}
        conversations = [
            Conversation(
                prompt.to(palm.device),
                room,
                [self._message("user", prompt)],
                {name: values[row] for name, values in asked.items()},
            )
            for row, (prompt, room) in enumerate(rows)
        ]
        running = conversations
        drawn = draw(prompts, num_samples, self._limits(rooms))  # the samples of a prompt read it together
        for turn in range(1, self.max_turns + 1):
            going_on = []
            for talk, tokens, logprobs in zip(running, *drawn, strict=True):
                ends = eos_token is None or int(tokens[-1]) == eos_token
                has_eos = eos_token is not None and ends
                talk.add(tokens, self._message("assistant", tokens[: len(tokens) - has_eos]), logprobs)
                reply = self._ask(talk, eos_token, palm.num_tokens) if ends else None
                talk.truncated = not ends or (reply is not None and (turn == self.max_turns or len(reply) >= talk.room))
                if reply is not None and not talk.truncated:
                    talk.add(reply.to(palm.device), self._message("user", reply))
                    going_on.append(talk)
            if not going_on:
                break
            running = going_on
            rooms = torch.tensor([talk.room for talk in running])
            drawn = draw([talk.context for talk in running], 1, self._limits(rooms))
        return conversations

    def _limits(self, rooms: Tensor) -> Tensor:
        return rooms if self.max_turn_tokens is None else rooms.clamp(max=self.max_turn_tokens)

    def _message(self, role: str, tokens: Tensor) -> Message:
        content = tokens.clone() if self.tokenizer is None else self.tokenizer.decode(tokens.tolist())
        return {"role": role, "content": content}

    def _ask(self, talk: Conversation, eos_token: int | None, num_tokens: int) -> Tensor | None:
        """Return the tokens of the reply, or None at the end. The environment may change the messages it is given."""
        try:
            reply = self.environment([dict(message) for message in talk.messages], **talk.columns)
        except Exception as error:
            raise RuntimeError(f"the environment raised {error!r} {_place(talk)}") from error
        if reply is None:
            return None
        if isinstance(reply, str) and self.tokenizer is not None:
            reply = torch.tensor(_encode(self.tokenizer, reply, eos_token), dtype=torch.long)
        if not isinstance(reply, Tensor) or reply.ndim != 1:
            wanted = "1-d ids" if self.tokenizer is None else "a text, 1-d ids"
            raise ValueError(
                f"the environment returned {reply!r:.200} {_place(talk)}; expected {wanted}, or None where it is over"
            )
        check_token_ids(reply, num_tokens)
        return reply


@beartype
def asked_columns(environment: Environment, names: Collection[str]) -> list[str]:
    """Return the columns, among `names`, that an environment's signature asks for.

    Raises ValueError if it asks for a column that does not exist.
    """
    try:
        parameters = list(inspect.signature(environment).parameters.values())
    except (TypeError, ValueError):  # some functions written in C have no signature
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return list(names)
    by_name = [p for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing := [p.name for p in by_name if p.default is p.empty and p.name not in names]:
        raise ValueError(
            f"the environment asks for {' and '.join(map(repr, missing))} beside the messages; expected columns of the "
            f"prompts, which are {sorted(names)}: give the prompts such a column, or the parameter a default"
        )
    return [p.name for p in by_name if p.name in names]


def _encode(tokenizer: Any, text: str, eos_token: int | None) -> list[int]:
    """Return the ids of a text inside a sequence: without the BOS that some Hugging Face tokenizers prepend."""
    if hasattr(tokenizer, "encode_continuation"):
        return tokenizer.encode_continuation(text, after_special=eos_token in tokenizer.special_tokens.values())
    puts_tokens_around = "add_special_tokens" in inspect.signature(tokenizer.encode).parameters
    ids = tokenizer.encode(text, **({"add_special_tokens": False} if puts_tokens_around else {}))
    return getattr(ids, "ids", ids)


def _place(talk: Conversation) -> str:
    """Return the words that say where in which conversation an error occurred."""
    first, last = (
        content if isinstance(content, str) else content.tolist()
        for content in (talk.messages[0]["content"], talk.messages[-1]["content"])
    )
    num_turns = sum(message["role"] == "assistant" for message in talk.messages)
    return f"in the conversation on the prompt {first!r:.200}, after turn {num_turns}, {last!r:.200}"
