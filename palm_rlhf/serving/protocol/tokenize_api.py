"""Texts and conversations to token ids and back, in the form of vLLM's server."""

from typing import Any

from palm_rlhf.serving.protocol.engine_requests import check_ids, model_of, prompt_tokens
from palm_rlhf.serving.protocol.errors import ApiError
from palm_rlhf.serving.protocol.openai_parameters import (
    CHAT,
    MODEL,
    STRING,
    TOKENS,
    boolean,
    items,
    record,
)
from palm_rlhf.serving.protocol.openai_requests import continues, with_calls
from palm_rlhf.serving.protocol.token_display import token_text
from palm_rlhf.serving.protocol.tool_calls import read_tools
from palm_rlhf.serving.served_model import ServedModel

SHARED = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")  # with a chat
TOKENIZE = record(
    {
        "model": MODEL,
        "prompt": {**STRING, "description": "A text; either this or messages."},
        "add_special_tokens": boolean("Begin a text with the tokenizer's own special tokens; true by default."),
        "messages": {**CHAT["properties"]["messages"], "description": "A conversation, up to where the reply begins."},
        "tools": CHAT["properties"]["tools"],
        "return_token_strs": boolean("Return each token as text, too."),
        **{name: CHAT["properties"][name] for name in SHARED},
    }
)
DETOKENIZE = record({"model": MODEL, "tokens": items(TOKENS, minimum=0)}, "tokens")


def tokenize(model: ServedModel, context: int, values: dict[str, Any]) -> dict[str, Any]:
    """Return the tokens that a completion or a chat would read, their number, and the context of the model."""
    if ("messages" in values) == ("prompt" in values):
        raise ApiError(400, "expected messages or a prompt, exactly one of them", param="messages")
    if "prompt" in values:
        tokens = _text_tokens(model, values["prompt"], values.get("add_special_tokens", True))
    elif values.get("add_special_tokens"):
        message = "add_special_tokens is true; expected it only with a prompt: the chat template writes special tokens"
        raise ApiError(400, message, param="add_special_tokens")
    else:
        messages = [with_calls(message, f"messages[{index}]") for index, message in enumerate(values["messages"])]
        tools = read_tools(values)
        continued = continues(values, messages, free=tools is None)
        definitions = [] if tools is None else tools.definitions
        model = model_of(model, values.get("chat_template_kwargs", {}))
        tokens = prompt_tokens(model, context, messages, definitions, continued=continued)
    strings = [token_text(model.tokenizer, token)[0] for token in tokens] if values.get("return_token_strs") else None
    return {"count": len(tokens), "max_model_len": context, "tokens": tokens, "token_strs": strings}


def _text_tokens(model: ServedModel, text: str, add_special_tokens: bool) -> list[int]:
    try:
        return model.encode_text(text, add_special_tokens=add_special_tokens) if text else []
    except ValueError as error:
        raise ApiError(400, f"prompt cannot be read by this model: {error}", param="prompt") from error


def detokenize(model: ServedModel, values: dict[str, Any]) -> dict[str, Any]:
    """Return the text of tokens, special tokens by their names."""
    check_ids(values["tokens"], model.palm.num_tokens, "tokens")
    try:
        return {"prompt": model.tokenizer.decode(values["tokens"], with_special_tokens=True)}
    except ValueError as error:
        raise ApiError(400, f"tokens cannot be written by this model: {error}", param="tokens") from error
