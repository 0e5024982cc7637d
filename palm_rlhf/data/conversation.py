"""Conversations as tokens: what the assistant says is learnt, and no message can pass for anything but text."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.data.special_token_guard import SpecialNames, guarded_value, strings, unused_character
from palm_rlhf.data.templates import ChatTemplate, JinjaTemplate, Messages
from palm_rlhf.data.tokenizer import Tokenizer
from palm_rlhf.training.weighted_examples import Example

Template = ChatTemplate | JinjaTemplate
Tools = Sequence[Mapping[str, Any]]
ROLES = ("system", "user", "assistant", "tool")


@beartype
def encode(messages: Messages, tokenizer: Tokenizer, template: Template, *, tools: Tools = ()) -> Example:
    """A conversation's tokens, and the weight that the loss gives each.

    That is 0 but for the words of assistant messages and the special token that ends their turn, which have the
    message's "weight" (1 where it has none). The tokens of a conversation begin with those of its beginning.

    A Jinja template that has a place for them writes `tools`, the functions in OpenAI's form that may be called,
    "tool_calls" of the assistant, which are learnt like its words, and messages of the role "tool".

    Raises:
        ValueError: a conversation without a weight above 0, a malformed message, or a template that does not fit or
            leaves out a part of what tools say.
    """
    weights_of = _checked_weights(messages)
    if not any(weights_of):
        raise ValueError("the conversation has no assistant message with a weight above 0: there is nothing to learn")
    tokens, weights = [], []
    for part in _parts(messages, tokenizer, template, tools=tools):
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
    tools: Tools = (),
    checkpoint: Callable[[], None] = _go_on,
) -> Tensor:
    """The tokens of messages up to where the assistant is to speak, as `encode` has them before it does: `n`.

    `checkpoint` is called before each message is worked on, and may raise an error to stop. The time is linear in the
    number of messages for a `ChatTemplate`, and quadratic for one in Jinja, which has to be run for each of them.
    """
    _checked_weights(messages)
    parts = _parts(messages, tokenizer, template, add_generation_prompt, tools, checkpoint)
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
def encode_reply(text: str, tokenizer: Tokenizer, template: Template, *, role: str = "user") -> Tensor:
    """What stands between the end of an assistant's turn and its next words, where somebody answers it: `n`.

    An environment of reinforcement learning returns it, see `palm_rlhf.policy.turns`: after the tokens of
    `encode_prompt` and `encode_response` come these, and the conversation is as `encode` has it.
    """
    opening = [{"role": "user", "content": "?"}]
    before = len(encode_prompt(opening, tokenizer, template)) + len(encode_response(opening, "!", tokenizer, template))
    messages = [*opening, {"role": "assistant", "content": "!"}, {"role": role, "content": text}]
    return encode_prompt(messages, tokenizer, template)[before:]


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
    tools: Tools = (),
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
    if isinstance(template, ChatTemplate) and has_tools(messages, tools):
        raise ValueError("the conversation has tools, for which only a chat_template in Jinja can have a place")
    names = SpecialNames.of(tuple(template.special_tokens or tokenizer.special_tokens))
    ids = {tokenizer.special_tokens[name] for name in names.names}
    guard = unused_character(strings([*messages, *tools]))
    guarded = []
    for message in messages:
        checkpoint()
        guarded.append({**_callable(message, names, guard), "role": message["role"]})
    if isinstance(template, ChatTemplate):
        texts = _texts_of_turns(guarded, template, add_generation_prompt)
    else:
        definitions = [guarded_value(tool, names, guard) for tool in tools] or None
        texts = _texts(guarded, template, add_generation_prompt, definitions)
    spaces, before = "", None
    for text, message in texts:
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


def _texts(
    messages: Messages, template: JinjaTemplate, add_generation_prompt: bool, tools: Tools | None
) -> Iterator[tuple[str, int | None]]:
    """The rendered conversation in pieces; those that the assistant says have the number of the message."""

    def rendered(end: int, add_generation_prompt: bool = False) -> str:
        return template.render(messages[:end], add_generation_prompt=add_generation_prompt, tools=tools)

    done, since = "", 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _grown(done, rendered(index, True))
            _check_shown(messages[since:index], prompt[len(done) :], template)
            yield prompt[len(done) :], None
            done, since = _grown(prompt, rendered(index + 1)), index + 1
            _check_shown([message], done[len(prompt) :], template)
            yield done[len(prompt) :], index
            continue
        if message["role"] == "tool" and index + 1 < len(messages) and messages[index + 1]["role"] == "tool":
            continue  # some templates put several results in one turn
        try:
            text = rendered(index + 1)
        except ValueError:
            if index + 1 == len(messages) and not add_generation_prompt:
                raise
            continue  # some templates want a user after the system: what comes next has this in it
        _check_shown(messages[since : index + 1], _grown(done, text)[len(done) :], template)
        yield text[len(done) :], None
        done, since = text, index + 1
    if add_generation_prompt:
        prompt = _grown(done, rendered(len(messages), True))
        yield prompt[len(done) :], None
        done = prompt
    if any(_function_name(tool) not in done for tool in tools or ()):
        raise ValueError("the chat template leaves out the definitions of tools, expected one that writes tools")


def _check_shown(messages: Messages, text: str, template: JinjaTemplate) -> None:
    """ValueError where a template leaves out the result of a tool or a call: it would be lost without a word."""
    for message in messages:
        said = message["content"].strip() if message["role"] == "tool" else ""
        if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
            raise ValueError("the chat template leaves out what a tool says, expected one that writes the role 'tool'")
        if any(_function_name(call) not in text for call in message.get("tool_calls") or ()):
            raise ValueError("the chat template leaves out calls of tools, expected one that writes tool_calls")


def _function_name(call: Mapping[str, Any]) -> str:
    return str(call["function"]["name"])


def _callable(message: Mapping[str, Any], names: SpecialNames, guard: str) -> dict[str, Any]:
    """A message whose texts hold no special token, with the arguments of its calls as the objects that they are."""
    calls = [{**call, "function": {**call["function"]}} for call in message.get("tool_calls") or ()]
    for call in calls:
        arguments = call["function"].get("arguments")
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            call["function"]["arguments"] = parsed
    kept = {key: value for key, value in message.items() if key not in ("weight", "tool_calls")}
    return guarded_value({**kept, **({"tool_calls": calls} if calls else {})}, names, guard)


@beartype
def encode_all(
    conversations: Iterable[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: Template,
    *,
    rejected: Counter[str] | None = None,
) -> Iterator[Example]:
    """The tokens of each conversation, {"messages", maybe "tools"}.

    What has tools that the template does not write is counted in `rejected`; every other error is that of `encode`.
    """
    rejected = Counter() if rejected is None else rejected
    for conversation in conversations:
        messages, tools = conversation["messages"], conversation.get("tools") or ()
        try:
            yield encode(messages, tokenizer, template, tools=tools)
        except ValueError:
            if not has_tools(messages, tools):
                raise
            rejected["tools that the template does not write"] += 1


@beartype
def has_tools(messages: Messages, tools: Tools = ()) -> bool:
    """Whether a conversation has tools, calls of them or results: not every template has a place for these."""
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


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
