"""Conversations as tokens: what the assistant says is learnt, and no message can pass for anything but text."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.data.templates import ChatTemplate, JinjaTemplate, Messages
from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.training.examples import Example

Template = ChatTemplate | JinjaTemplate
ROLES = ("system", "user", "assistant")


@beartype
def encode(messages: Messages, tokenizer: Tokenizer, template: Template) -> Example:
    """A conversation's tokens, and the weight that the loss gives each.

    That is 0 but for the words of assistant messages and the special token that ends their turn, which have the
    message's "weight" (1 where it has none). The tokens of a conversation begin with those of its beginning.

    Raises:
        ValueError: a conversation without a weight above 0, a malformed message, or a template that does not fit.
    """
    weights_of = _checked_weights(messages)
    if not any(weights_of):
        raise ValueError("the conversation has no assistant message with a weight above 0: there is nothing to learn")
    tokens, weights = [], []
    for part in _parts(messages, tokenizer, template):
        weight = 0.0 if part.message is None else weights_of[part.message]
        tokens += part.tokens
        weights += [weight] * part.num_said + [0.0] * (len(part.tokens) - part.num_said)
    return Example(torch.tensor(tokens, dtype=torch.int32), torch.tensor(weights, dtype=torch.float32))


def _go_on() -> None:
    """The checkpoint of those who have no reason to stop."""


@beartype
def encode_prompt(
    messages: Messages,
    tokenizer: Tokenizer,
    template: Template,
    *,
    add_generation_prompt: bool = True,
    checkpoint: Callable[[], None] = _go_on,
) -> Tensor:
    """The tokens of messages up to where the assistant is to speak, as `encode` has them before it does: `n`.

    `checkpoint` is called before each message is worked on, and may raise an error to stop. The time is linear in the
    number of messages for a `ChatTemplate`, and quadratic for one in Jinja, which has to be run for each of them.
    """
    _checked_weights(messages)
    parts = _parts(messages, tokenizer, template, add_generation_prompt, checkpoint)
    return torch.tensor([token for part in parts for token in part.tokens], dtype=torch.long)


@beartype
def encode_response(
    messages: Messages,
    response: str,
    tokenizer: Tokenizer,
    template: Template,
    *,
    checkpoint: Callable[[], None] = _go_on,
) -> Tensor:
    """What the assistant says after `encode_prompt(messages)`, its end of turn included, as `encode` has it: `t`.

    For `checkpoint` see `encode_prompt`.
    """
    messages = [*messages, {"role": "assistant", "content": response}]
    _checked_weights(messages)
    *_, last = _parts(messages, tokenizer, template, checkpoint=checkpoint)
    return torch.tensor(last.tokens[: last.num_said], dtype=torch.long)


@beartype
def end_of_turn(tokenizer: Tokenizer, template: Template) -> int:
    """The token with which the assistant ends its turn: the `eos_token` of generation."""
    return int(encode_response([{"role": "user", "content": "?"}], "!", tokenizer, template)[-1])


class _Part(NamedTuple):
    """Some tokens, the assistant message that they are or None, and how many of them the assistant says."""

    tokens: list[int]
    message: int | None = None
    num_said: int = 0


def _checked_weights(messages: Messages) -> list[float]:
    """The weight of each message; ValueError for what is no message."""
    if not messages:
        raise ValueError("the conversation is empty, expected at least one message")
    weights = []
    for index, message in enumerate(messages):
        role, content, weight = (message.get(key) for key in ("role", "content", "weight"))
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"message {index} has the role {role!r} and the content {content!r:.80}, expected one of {ROLES}, and "
                "a string"
            )
        weight = float(role == "assistant") if weight is None else weight
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"message {index} has the weight {weight!r}, expected a number of at least 0")
        if weight and role != "assistant":
            raise ValueError(f"message {index} has the weight {weight}, expected none: it is of the {role}")
        weights.append(float(weight))
    return weights


def _parts(
    messages: Messages,
    tokenizer: Tokenizer,
    template: Template,
    add_generation_prompt: bool = False,
    checkpoint: Callable[[], None] = _go_on,
) -> Iterator[_Part]:
    """The conversation as tokens, cut where messages end and where the assistant begins to speak.

    A word's token holds the space before it: spaces at the end of a part go to the next, or nowhere.
    """
    if missing := [name for name in template.special_tokens if name not in tokenizer.special_tokens]:
        raise ValueError(
            f"the template needs the special tokens {missing}, which the tokenizer lacks: give it them, and the model "
            "room for them, by add_special_tokens"
        )
    names = SpecialNames.of(tuple(template.special_tokens or tokenizer.special_tokens))
    ids = {tokenizer.special_tokens[name] for name in names.names}
    guard = unused_character(message["content"] for message in messages)
    guarded = []
    for message in messages:
        checkpoint()
        guarded.append({"role": message["role"], "content": names.guarded(message["content"], guard)})
    texts = _texts_of_turns if isinstance(template, ChatTemplate) else _texts
    spaces, before = "", None
    for text, message in texts(guarded, template, add_generation_prompt):
        checkpoint()
        text, spaces = spaces + text, ""
        if message is None:
            spaces = text[len(text.rstrip(" ")) :]
            tokens = names.encode(text.rstrip(" "), guard, tokenizer, before)
            yield _Part(tokens)
        else:
            tokens = names.encode(text, guard, tokenizer, before)
            special = [place for place, token in enumerate(tokens) if token in ids]
            if not special:
                raise ValueError(
                    f"after message {message} the template puts no special token of the tokenizer, expected one: a "
                    f"model learns by it to stop. It puts {text.replace(guard, '')[-20:]!r} there"
                )
            yield _Part(tokens, message, special[-1] + 1)
        before = tokens[-1] if tokens else before


def _texts_of_turns(
    messages: Messages, template: ChatTemplate, add_generation_prompt: bool
) -> Iterator[tuple[str, int | None]]:
    """The same as `_texts` where each message stands by itself, without rendering it anew for each that follows."""
    opening = template.opening(messages)
    for index, message in enumerate(messages):
        before, after = getattr(template, message["role"])
        if message["role"] == "assistant":
            yield opening + before, None
            yield message["content"] + after, index
        else:
            yield opening + before + message["content"] + after, None
        opening = ""
    if add_generation_prompt:
        yield template.assistant[0], None


def _texts(messages: Messages, template: Template, add_generation_prompt: bool) -> Iterator[tuple[str, int | None]]:
    """The rendered conversation in pieces; those that the assistant says have the number of the message."""
    done = ""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _grown(done, template.render(messages[:index], add_generation_prompt=True))
            yield prompt[len(done) :], None
            done = _grown(prompt, template.render(messages[: index + 1]))
            yield done[len(prompt) :], index
            continue
        try:
            text = template.render(messages[: index + 1])
        except ValueError:
            if index + 1 == len(messages) and not add_generation_prompt:
                raise
            continue  # some templates want a user after the system: what comes next has this in it
        yield _grown(done, text)[len(done) :], None
        done = text
    if add_generation_prompt:
        yield _grown(done, template.render(messages, add_generation_prompt=True))[len(done) :], None


def _grown(before: str, after: str) -> str:
    """`after`; ValueError where it does not go on from `before`."""
    if not after.startswith(before):
        same = next((i for i, (one, other) in enumerate(zip(before, after)) if one != other), len(after))
        raise ValueError(
            f"the template changes what it made of earlier messages ({before[same : same + 40]!r} becomes "
            f"{after[same : same + 40]!r}), so that a model would be trained on other prompts than it is given: "
            "expected one that only adds; take a preset, or one message of the assistant at a time"
        )
    return after


def unused_character(texts: Iterable[str]) -> str:
    """A character that none of the texts has."""
    used = set().union(*texts)
    return next(character for character in map(chr, range(0x10FFFF, 0, -1)) if character not in used)


class SpecialNames:
    """The names of special tokens: found in rendered text, and broken by a guard in what people write."""

    def __init__(self, names: Sequence[str]):
        names = sorted((name for name in names if len(name) > 1), key=len, reverse=True)
        pattern = "|".join(map(re.escape, names)) or "(?!)"
        self.names = frozenset(names)
        self.whole = re.compile(f"({pattern})")
        self.start = re.compile(f"(?={pattern}).", re.DOTALL)
        self.heads = tuple({name[:end] for name in names for end in range(1, len(name))})
        self.tails = tuple({name[start:] for name in names for start in range(1, len(name))})

    @staticmethod
    @cache
    def of(names: tuple[str, ...]) -> "SpecialNames":
        """Those of a template, in any order; made once."""
        return SpecialNames(names)

    def guarded(self, content: str, guard: str) -> str:
        """The content with a guard in each name, and where a name could begin or end with what the template adds."""
        content = self.start.sub(lambda match: match.group() + guard, content)
        core = content.strip()  # templates may strip it themselves
        before = guard if core.startswith(self.tails) else ""
        after = guard if core.endswith(self.heads) else ""
        return content.replace(core, before + core + after, 1) if core else content

    def encode(self, text: str, guard: str, tokenizer: Tokenizer, before: int | None) -> list[int]:
        """Names as their tokens, and the text between them without guards; `before` is the token that stands before."""
        special = {tokenizer.special_tokens[name] for name in self.names}
        tokens: list[int] = []
        for piece in self.whole.split(text):
            if piece in self.names:
                tokens.append(tokenizer.special_tokens[piece])
            elif words := piece.replace(guard, ""):
                last = tokens[-1] if tokens else before
                if last is None:
                    tokens += tokenizer.encode(words)
                else:
                    tokens += tokenizer.encode_continuation(words, after_special=last in special)
        return tokens
