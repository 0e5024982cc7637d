"""Conversations with tools as tokens: definitions, calls and results, as a model's own chat template writes them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.data.conversation import SpecialNames, Template, unused_character
from palm_rlhf.data.templates import JinjaTemplate, Messages
from palm_rlhf.data.tokenizer import Tokenizer


@beartype
def knows_tools(template: Template | None) -> bool:
    """Whether a template writes tools: it is Jinja, and mentions `tools`."""
    return isinstance(template, JinjaTemplate) and re.search(r"\btools\b", template.source) is not None


@beartype
def encode_tool_prompt(
    messages: Messages,
    tools: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: JinjaTemplate,
    *,
    checkpoint: Callable[[], None] = lambda: None,
) -> Tensor:
    """The tokens of a conversation in which tools may be called, up to where the assistant is to speak: `n`.

    Messages are those of `encode_prompt`, and may be of the role "tool", with a "tool_call_id", or of an assistant that
    has "tool_calls": [{"id", "type": "function", "function": {"name", "arguments": an object}}]. `tools` are functions
    in OpenAI's form. The names of special tokens in any of them stay text. `checkpoint` is called before each message,
    and may raise an error to stop. ValueError where the template refuses.
    """
    names = SpecialNames.of(tuple(template.special_tokens or tokenizer.special_tokens))
    guard = unused_character(strings([*messages, *tools]))
    guarded = []
    for message in messages:
        checkpoint()
        guarded.append(_guarded(message, names, guard))
    definitions = [_guarded(tool, names, guard) for tool in tools] or None
    text = template.render(guarded, add_generation_prompt=True, tools=definitions)
    return torch.tensor(names.encode(text, guard, tokenizer, None), dtype=torch.long)


def _guarded(value: Any, names: SpecialNames, guard: str) -> Any:
    """A value of JSON whose strings, and the names of whose entries, hold no special token."""
    match value:
        case str():
            return names.guarded(value, guard)
        case Mapping():
            return {_guarded(key, names, guard): _guarded(item, names, guard) for key, item in value.items()}
        case list() | tuple():
            return [_guarded(item, names, guard) for item in value]
    return value


def strings(value: Any) -> list[str]:
    """All strings in a value of JSON, the names of entries included."""
    match value:
        case str():
            return [value]
        case Mapping():
            return [*value, *(text for item in value.values() for text in strings(item))]
        case list() | tuple():
            return [text for item in value for text in strings(item)]
    return []
