"""Conversations rendered and cut into parts: the text that the assistant says, and the text around it, as tokens."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from beartype import beartype

from palm_rlhf.data.special_token_guard import SpecialTokenNames, guarded_value, strings_in, unused_character
from palm_rlhf.data.templates import ChatTemplate, JinjaTemplate, Messages
from palm_rlhf.data.tokenizer import Tokenizer

Template = ChatTemplate | JinjaTemplate
Tools = Sequence[Mapping[str, Any]]
ROLES = ("system", "user", "assistant", "tool")


class RewrittenMessages(ValueError):
    """A chat template writes a message in another way once others follow it, or than its generation prompt begins."""


def no_checkpoint() -> None:
    """Do nothing: the default checkpoint."""


class ConversationPart(NamedTuple):
    """Tokens of a conversation; those of an assistant message have its index, and the first few are learnt."""

    tokens: list[int]
    message: int | None = None
    num_learned: int = 0


def checked_weights(messages: Messages) -> list[float]:
    """Return the weight of each message; ValueError if a message is malformed."""
    if not messages:
        raise ValueError("got a conversation without messages, expected at least one: leave it out")
    weights = []
    for index, message in enumerate(messages):
        role, content, weight = (message.get(key) for key in ("role", "content", "weight"))
        if role not in ROLES or not isinstance(content, str):
            raise ValueError(
                f"message {index} has the role {role!r} and the content {content!r:.80}, expected one of {ROLES}, and "
                "a string: mend the message"
            )
        weight = float(role == "assistant") if weight is None else weight
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"message {index} has the weight {weight!r}, expected a number of at least 0: mend it")
        if weight and role != "assistant":
            raise ValueError(f"message {index} has the weight {weight}, expected none for the role {role}: remove it")
        weights.append(float(weight))
    return weights


def parts_of(
    messages: Messages,
    tokenizer: Tokenizer,
    template: Template,
    add_generation_prompt: bool = False,
    tools: Tools = (),
    checkpoint: Callable[[], None] = no_checkpoint,
) -> Iterator[ConversationPart]:
    """Yield the conversation as tokens, cut where messages end and where the assistant begins to speak.

    The token of a word contains the space before it: spaces at the end of a part move to the next part, or are dropped.
    Of a template that rewrites earlier messages only the last reply is a part of its own: see `_pieces_of_jinja`.
    """
    if missing := [name for name in template.special_tokens if name not in tokenizer.special_tokens]:
        raise ValueError(
            f"the tokenizer lacks the special tokens {missing}, expected those of the template: add them to the "
            "tokenizer and the model by add_special_tokens"
        )
    if isinstance(template, ChatTemplate) and has_tools(messages, tools):
        raise ValueError(
            "got a conversation with tools, expected none with this template: take a JinjaTemplate that writes tools"
        )
    names = SpecialTokenNames.of(tuple(template.special_tokens or tokenizer.special_tokens))
    ids = {tokenizer.special_tokens[name] for name in names.names}
    guard = unused_character(strings_in([*messages, *tools]))
    guarded = []
    for message in messages:
        checkpoint()
        guarded.append({**_guarded_message(message, names, guard), "role": message["role"]})
    if isinstance(template, ChatTemplate):
        pieces = _pieces_by_turn(guarded, template, add_generation_prompt)
    else:
        definitions = [guarded_value(tool, names, guard) for tool in tools] or None
        pieces = iter(_pieces_of_jinja(guarded, template, add_generation_prompt, definitions, checkpoint))
    spaces, before = "", None
    for text, index in pieces:
        checkpoint()
        text, spaces = spaces + text, ""
        if index is None:
            spaces = text[len(text.rstrip(" ")) :]
            tokens = names.encode(text.rstrip(" "), guard, tokenizer, before)
            yield ConversationPart(tokens)
        else:
            tokens = names.encode(text, guard, tokenizer, before)
            special = [place for place, token in enumerate(tokens) if token in ids]
            if not special:
                raise ValueError(
                    f"got {text.replace(guard, '')[-20:]!r} at the end of message {index}, expected a special token "
                    "of the tokenizer, by which a model learns to stop: take a template that ends messages with one"
                )
            yield ConversationPart(tokens, index, special[-1] + 1)
        before = tokens[-1] if tokens else before


def _pieces_by_turn(
    messages: Messages, template: ChatTemplate, add_generation_prompt: bool
) -> Iterator[tuple[str, int | None]]:
    """Yield the pieces of a conversation, each rendered once; those of the assistant have the index of the message."""
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


def _pieces_of_jinja(
    messages: Messages,
    template: JinjaTemplate,
    add_generation_prompt: bool,
    tools: Tools | None,
    checkpoint: Callable[[], None],
) -> list[tuple[str, int | None]]:
    """Return the same pieces for a `JinjaTemplate`, which renders all earlier messages again for each message.

    The templates of models that reason (Qwen3, DeepSeek-R1) leave the reasoning out of earlier replies, so that a
    conversation cannot be cut at every message. It is cut before the last reply then, if it ends with one: the text
    before is the prompt of that reply in generation.
    """

    def rendered(end: int, add_generation_prompt: bool = False) -> str:
        checkpoint()
        return template.render(messages[:end], add_generation_prompt=add_generation_prompt, tools=tools)

    try:
        return list(_pieces_by_rendering(rendered, messages, template, add_generation_prompt, tools))
    except RewrittenMessages:
        whole, last = rendered(len(messages), add_generation_prompt), len(messages) - 1
        _check_tools_written(messages, whole, template)
        _check_definitions_written(tools, whole)
        if add_generation_prompt or messages[last]["role"] != "assistant":
            return [(whole, None)]
        prompt = rendered(last, True)
        return [(prompt, None), (_continued(prompt, whole)[len(prompt) :], last)]


def _pieces_by_rendering(
    rendered: Callable[..., str],
    messages: Messages,
    template: JinjaTemplate,
    add_generation_prompt: bool,
    tools: Tools | None,
) -> Iterator[tuple[str, int | None]]:
    """Yield the pieces of a template that only adds text; RewrittenMessages for another template.

    `rendered` returns the text of the first messages, of which it takes the number, and maybe a generation prompt.
    """
    done, since = "", 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = _continued(done, rendered(index, True) if index else _opening(rendered))
            _check_tools_written(messages[since:index], prompt[len(done) :], template)
            yield prompt[len(done) :], None
            done, since = _continued(prompt, rendered(index + 1)), index + 1
            _check_tools_written([message], done[len(prompt) :], template)
            yield done[len(prompt) :], index
            continue
        if message["role"] == "tool" and index + 1 < len(messages) and messages[index + 1]["role"] == "tool":
            continue  # some templates write several results in one turn
        try:
            text = rendered(index + 1)
        except ValueError:
            if index + 1 == len(messages) and not add_generation_prompt:
                raise
            continue  # some templates want a user after the system message: the next text contains both
        _check_tools_written(messages[since : index + 1], _continued(done, text)[len(done) :], template)
        yield text[len(done) :], None
        done, since = text, index + 1
    if add_generation_prompt:
        prompt = _continued(done, rendered(len(messages), True))
        yield prompt[len(done) :], None
        done = prompt
    _check_definitions_written(tools, done)


def _check_definitions_written(tools: Tools | None, text: str) -> None:
    """Raise ValueError if a template leaves out the definition of a tool."""
    if any(_function_name(tool) not in text for tool in tools or ()):
        raise ValueError(
            "the chat template leaves out the definitions of tools, expected one that writes tools: take another"
        )


def _opening(rendered: Callable[..., str]) -> str:
    """Return the text before the first message where that is the assistant's.

    Templates that open conversations with a system message leave it out, or fail, where there is no message at all.
    """
    whole = rendered(1)
    header = _continued(whole, rendered(1, True))[len(whole) :]
    start = whole.find(header)
    return whole[: start + len(header)] if header and start >= 0 else rendered(0, True)


def _check_tools_written(messages: Messages, text: str, template: JinjaTemplate) -> None:
    """Raise ValueError if a template leaves out a call or the result of a tool, which would be lost silently."""
    for message in messages:
        result = message["content"].strip() if message["role"] == "tool" else ""
        if result not in text and json.dumps(result, ensure_ascii=False)[1:-1] not in text:
            raise ValueError(
                "the chat template leaves out the result of a tool, expected one that writes "
                "the role 'tool': take another"
            )
        if any(_function_name(call) not in text for call in message.get("tool_calls") or ()):
            raise ValueError(
                "the chat template leaves out calls of tools, expected one that writes tool_calls: take another"
            )


def _function_name(call: Mapping[str, Any]) -> str:
    return str(call["function"]["name"])


def _guarded_message(message: Mapping[str, Any], names: SpecialTokenNames, guard: str) -> dict[str, Any]:
    """Return a message without special tokens in its strings, and with the arguments of its calls as objects."""
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
def has_tools(messages: Messages, tools: Tools = ()) -> bool:
    """Return whether a conversation has tools, calls or results of tools, which not every template can write."""
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def _continued(before: str, after: str) -> str:
    """Return `after`; RewrittenMessages if it does not begin with `before`."""
    if not after.startswith(before):
        same = next((i for i, (one, other) in enumerate(zip(before, after)) if one != other), len(after))
        raise RewrittenMessages(
            f"the template changes the text of earlier messages ({before[same : same + 40]!r} becomes "
            f"{after[same : same + 40]!r}), so that the prompts of training differ from those of generation, expected "
            "one that only adds text: take a preset, or conversations with one message of the assistant"
        )
    return after
