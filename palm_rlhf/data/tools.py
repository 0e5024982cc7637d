"""Conversations with tools as tokens: definitions, calls and results, as a model's own chat template writes them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from beartype import beartype
from torch import Tensor

from palm_rlhf.data.conversation import Template
from palm_rlhf.data.special_names import SpecialNames, guarded_value, strings, unused_character
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
        guarded.append(guarded_value(message, names, guard))
    definitions = [guarded_value(tool, names, guard) for tool in tools] or None
    text = template.render(guarded, add_generation_prompt=True, tools=definitions)
    return torch.tensor(names.encode(text, guard, tokenizer, None), dtype=torch.long)
