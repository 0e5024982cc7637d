"""Conversations as tokens: the replies of the assistant are learnt, and no message can forge a special token."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.data.conversation_parts import (
    RewrittenMessages,
    Template,
    Tools,
    checked_weights,
    has_tools,
    no_checkpoint,
    parts_of,
)
from palm_rlhf.data.templates import Messages
from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.training.weighted_examples import Example

__all__ = [
    "Template",
    "Tools",
    "encode",
    "encode_all",
    "encode_prompt",
    "encode_reply",
    "encode_response",
    "end_of_turn",
    "has_tools",
]


@beartype
def encode(messages: Messages, tokenizer: Tokenizer, template: Template, *, tools: Tools = ()) -> Example:
    """Return the tokens `n` of a conversation, and the weight `n` of each in the loss.

    The weight is 0, except for the content of assistant messages and the special token that ends their turn, which have
    the "weight" of the message (1 by default). The tokens of the beginning of a conversation are the beginning of its
    tokens.

    Raises ValueError if no message has a weight above 0, if a message is malformed, or if the template does not fit the
    tokenizer or leaves out a part of the tools; RewrittenMessages, which is one, if the template rewrites earlier
    replies and one of them has a weight: see `encode_all`.

    Args:
        messages: The messages, `{"role", "content"}`. Messages of the role "tool", and "tool_calls" of the
            assistant, which are learnt like its content, need a Jinja template that writes them.
        tokenizer: Encodes the text.
        template: Puts text around the messages.
        tools: The functions that may be called, in the form of OpenAI; they need a Jinja template that writes them.
    """
    weights_of = checked_weights(messages)
    if not any(weights_of):
        raise ValueError(
            "got no assistant message with a weight above 0, expected one to learn from: raise "
            "a weight, or leave it out"
        )
    tokens, weights = [], []
    parts = list(parts_of(messages, tokenizer, template, tools=tools))
    if set(_weighted(weights_of)) - {part.message for part in parts}:
        raise RewrittenMessages(
            "the template changes the text of earlier messages, so that only the last reply is learnt after the prompt "
            "that generation has; expected no weight for the others: encode_all makes an example of each reply"
        )
    for part in parts:
        weight = 0.0 if part.message is None else weights_of[part.message]
        tokens += part.tokens
        weights += [weight] * part.num_learned + [0.0] * (len(part.tokens) - part.num_learned)
    return Example(torch.tensor(tokens, dtype=torch.int32), torch.tensor(weights, dtype=torch.float32))


def _weighted(weights: list[float]) -> list[int]:
    """Return the places of the weights above 0."""
    return [index for index, weight in enumerate(weights) if weight]


@beartype
def encode_prompt(
    messages: Messages,
    tokenizer: Tokenizer,
    template: Template,
    *,
    add_generation_prompt: bool = True,
    tools: Tools = (),
    checkpoint: Callable[[], None] = no_checkpoint,
) -> Tensor:
    """Return the tokens `n` of messages up to where the assistant begins to speak.

    They are the beginning of the tokens of `encode`, unless the template rewrites earlier messages. The time is linear
    in the number of messages for a `ChatTemplate`, and quadratic for a `JinjaTemplate`, which is rendered for each of
    them.

    Args:
        messages: The messages, see `encode`.
        tokenizer: Encodes the text.
        template: Puts text around the messages.
        add_generation_prompt: Whether to end with the text that begins the turn of the assistant.
        tools: The functions that may be called, see `encode`.
        checkpoint: Called before each message is encoded; it may raise an error to stop.
    """
    checked_weights(messages)
    parts = parts_of(messages, tokenizer, template, add_generation_prompt, tools, checkpoint)
    return torch.tensor([token for part in parts for token in part.tokens], dtype=torch.long)


@beartype
def encode_response(
    messages: Messages,
    response: str,
    tokenizer: Tokenizer,
    template: Template,
    *,
    checkpoint: Callable[[], None] = no_checkpoint,
) -> Tensor:
    """Return the tokens `t` of a response to `encode_prompt(messages)`, with the end of its turn.

    `encode` has the same tokens after those of the prompt.

    Args:
        messages: The messages of the prompt.
        response: The content of the assistant's message.
        tokenizer: Encodes the text.
        template: Puts text around the messages.
        checkpoint: See `encode_prompt`.
    """
    messages = [*messages, {"role": "assistant", "content": response}]
    checked_weights(messages)
    *_, last = parts_of(messages, tokenizer, template, checkpoint=checkpoint)
    return torch.tensor(last.tokens[: last.num_learned], dtype=torch.long)


@beartype
def encode_reply(text: str, tokenizer: Tokenizer, template: Template, *, role: str = "user") -> Tensor:
    """Return the tokens `n` of a message of `role` after a response, up to where the assistant speaks again.

    An environment of reinforcement learning returns them, see `palm_rlhf.policy.turns`. After the tokens of
    `encode_prompt` and `encode_response`, they continue the conversation as `encode` does. Raises ValueError if the
    template rewrites earlier messages.
    """
    opening = [{"role": "user", "content": "?"}]
    before = torch.cat(
        [encode_prompt(opening, tokenizer, template), encode_response(opening, "!", tokenizer, template)]
    )
    messages = [*opening, {"role": "assistant", "content": "!"}, {"role": role, "content": text}]
    tokens = encode_prompt(messages, tokenizer, template)
    if not torch.equal(tokens[: len(before)], before):
        raise RewrittenMessages(
            "the template changes the text of earlier messages, expected one that only adds text, since a message of "
            "an environment follows the tokens that were sampled: take another template"
        )
    return tokens[len(before) :]


@beartype
def end_of_turn(tokenizer: Tokenizer, template: Template) -> int:
    """Return the token that ends a turn of the assistant: the `eos_token` of generation."""
    question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
    try:
        return int(encode_response([question], answer["content"], tokenizer, template)[-1])
    except RewrittenMessages as error:  # the generation prompt has more than conversations, such as <think>
        turns = [question, answer, question]
        tokens = encode_prompt(turns, tokenizer, template, add_generation_prompt=False).tolist()
        places = [place for place in range(len(tokens)) if answer["content"] in tokenizer.decode(tokens[place:])]
        special = set(tokenizer.special_tokens.values())
        ends = [token for token in tokens[places[-1] if places else len(tokens) :] if token in special]
        if not ends:
            raise ValueError(
                "the chat template writes no special token after a reply, expected one, by which a model stops"
            ) from error
        return ends[0]


@beartype
def encode_all(
    conversations: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: Template,
    *,
    rejected: Counter[str] | None = None,
) -> Iterator[Example]:
    """Yield the tokens and weights of each conversation, `{"messages"}` and maybe `"tools"`.

    Where the template rewrites earlier messages, as those of models that reason do, each reply with a weight above 0
    becomes an example of its own, after the prompt that it has in generation. A conversation with tools that the
    template does not write is counted in `rejected`. Other errors are those of `encode`.
    """
    rejected = Counter() if rejected is None else rejected
    for conversation in conversations:
        messages, tools = conversation["messages"], conversation.get("tools") or ()
        try:
            examples = _examples_of(messages, tokenizer, template, tools)
        except ValueError:
            if not has_tools(messages, tools):
                raise
            rejected["tools that the template does not write"] += 1
        else:
            yield from examples


def _examples_of(messages: Messages, tokenizer: Tokenizer, template: Template, tools: Tools) -> list[Example]:
    """Return the example of a conversation, or one of each reply if the template rewrites earlier messages."""
    try:
        return [encode(messages, tokenizer, template, tools=tools)]
    except RewrittenMessages:
        weights = checked_weights(messages)
        silent = [{**message, "weight": 0.0} for message in messages]
        return [
            encode([*silent[:index], messages[index]], tokenizer, template, tools=tools) for index in _weighted(weights)
        ]
