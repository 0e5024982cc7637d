"""The two forms in which models write calls of tools, and the form that a chat template uses."""

from typing import Literal

OPEN, CLOSE = "<tool_call>", "</tool_call>"
CallForm = Literal["tags", "json"]
ARGUMENTS: dict[CallForm, str] = {"tags": "arguments", "json": "parameters"}  # the key of a call's arguments


def call_form(source: str) -> CallForm | None:
    """Return the form in which the model of a chat template writes calls; None for a form that is not known here.

    "tags" is <tool_call>{"name", "arguments"}</tool_call> among text (Hermes, Qwen). "json" is a reply that is one
    object {"name", "parameters"} (Llama 3).

    Args:
        source: The Jinja source of the template.
    """
    if OPEN in source:
        return "tags"
    return "json" if '"parameters"' in source and ("python_tag" in source or "ipython" in source) else None
