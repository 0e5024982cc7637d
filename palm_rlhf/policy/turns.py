"""Conversations in which an environment answers between the policy's turns: a tool, a game, a model of a user."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.model.generate import check_token_ids
from palm_rlhf.model.palm import PaLM

Message = dict[str, Any]  # {"role": "user" or "assistant", "content": a text, or 1-d ids where there is no tokenizer}
Environment = Callable[..., str | Tensor | None]
Draw = Callable[[Sequence[Tensor], int, Tensor], tuple[list[Tensor], list[Tensor]]]


@dataclass
class Conversation:
    """A prompt and all that followed it, in parts: the policy's turns, and between them the environment's replies."""

    prompt: Tensor
    room: int  # tokens that may still follow
    messages: list[Message]
    columns: dict[str, Any]  # of the prompt, that the environment asks for
    parts: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)  # of each part; 0 where the environment wrote it
    policy_mask: list[Tensor] = field(default_factory=list)  # of each part, True where the policy said it
    truncated: bool = False

    @property
    def context(self) -> Tensor:
        """All that the next turn reads."""
        return torch.cat([self.prompt, *self.parts])

    def add(self, tokens: Tensor, message: Message, logprobs: Tensor | None = None) -> None:
        """Go on with a turn of the policy, or without `logprobs` with a reply to it."""
        self.room -= len(tokens)
        self.messages.append(message)
        self.parts.append(tokens)
        self.policy_mask.append(torch.full_like(tokens, logprobs is not None, dtype=torch.bool))
        self.logprobs.append(torch.zeros(len(tokens), device=tokens.device) if logprobs is None else logprobs)


@dataclass(frozen=True)
class Turns:
    """How a policy and an environment talk.

    The environment is called with the messages so far, the last of them the policy's, and returns its reply, or None
    where the conversation is over. Further parameters of its signature are passed by name: the prompt's other columns.
    With a tokenizer the contents are texts, that of the prompt too, and a reply is a text, encoded as it stands, or 1-d
    ids, which can hold special tokens such as the marks of turns: see `palm_rlhf.data.conversation.encode_reply`.
    Without a tokenizer contents and replies are 1-d ids. One conversation is asked after another, turn by turn.

    A turn of the policy ends with its EOS, or, where no EOS is looked for, after `max_turn_tokens`. A conversation is
    cut off, and counts as truncated, where a turn ends without the EOS, and where the environment replies after
    `max_turns` turns, or so long that no room is left for a token of the policy. Such a reply is left out: a response
    always ends with an action.
    """

    environment: Environment
    max_turns: int
    max_turn_tokens: int | None = None  # None: a turn takes what room the response has left
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
        """`num_samples` conversations about each prompt, those of one next to each other.

        `draw` samples so many turns after each context, up to a limit of tokens each, and returns them with their
        log-probabilities. `rooms` are the longest responses to the prompts, replies included: `b`. `columns` have an
        entry for each conversation. RuntimeError where the environment raises an error, ValueError where it returns
        what is no reply to the palm, or asks for a column that there is not.
        """
        rows = [
            (prompt, room) for prompt, room in zip(prompts, rooms.tolist(), strict=True) for _ in range(num_samples)
        ]
        asked = {name: columns[name] for name in asked_columns(self.environment, columns or {})}
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
        said = draw(prompts, num_samples, self._limits(rooms))  # the samples of a prompt read it together
        for turn in range(1, self.max_turns + 1):
            going_on = []
            for talk, tokens, logprobs in zip(running, *said, strict=True):
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
            said = draw([talk.context for talk in running], 1, self._limits(rooms))
        return conversations

    def _limits(self, rooms: Tensor) -> Tensor:
        return rooms if self.max_turn_tokens is None else rooms.clamp(max=self.max_turn_tokens)

    def _message(self, role: str, tokens: Tensor) -> Message:
        content = tokens.clone() if self.tokenizer is None else self.tokenizer.decode(tokens.tolist())
        return {"role": role, "content": content}

    def _ask(self, talk: Conversation, eos_token: int | None, num_tokens: int) -> Tensor | None:
        """The tokens of the reply, or None at the end; the environment may change the messages that it gets."""
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
    """The columns, among `names`, that an environment's signature asks for; ValueError for one that is not there."""
    try:
        parameters = list(inspect.signature(environment).parameters.values())
    except (TypeError, ValueError):  # some of those written in C do not tell
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
    """The ids of a text amid others: without the BOS that some tokenizers of Hugging Face put before a text."""
    if hasattr(tokenizer, "encode_continuation"):
        return tokenizer.encode_continuation(text, after_special=eos_token in tokenizer.special_tokens.values())
    puts_tokens_around = "add_special_tokens" in inspect.signature(tokenizer.encode).parameters
    ids = tokenizer.encode(text, **({"add_special_tokens": False} if puts_tokens_around else {}))
    return getattr(ids, "ids", ids)


def _place(talk: Conversation) -> str:
    """Where in which conversation."""
    first, last = (
        content if isinstance(content, str) else content.tolist()
        for content in (talk.messages[0]["content"], talk.messages[-1]["content"])
    )
    num_turns = sum(message["role"] == "assistant" for message in talk.messages)
    return f"in the conversation on the prompt {first!r:.200}, after turn {num_turns}, {last!r:.200}"
