"""Requests in OpenAI's protocol: their parameters, read and checked."""

import json
from dataclasses import dataclass, field, fields, replace
from typing import Any

from palm_rlhf.ops.sampling import Sampling
from palm_rlhf.serving.protocol.errors import ApiError
from palm_rlhf.serving.protocol.openai_parameters import CHAT, COMPLETION, SCORE
from palm_rlhf.serving.protocol.schema import check
from palm_rlhf.serving.protocol.tool_calls import Tools, read_history, read_tools

COMPLETION_TOKENS = 16  # OpenAI's default, where a chat may fill the context


@dataclass(frozen=True)
class ParsedRequest:
    """A request that has been read: `prompts` are conversations, texts or token ids; `options` go to the engine."""

    model: str
    prompts: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None  # None: as many as the context has room for
    n: int = 1
    best_of: int = 1
    stream: bool = False
    add_special_tokens: bool = False  # whether a text begins with the tokenizer's own special tokens
    echo: bool = False
    prompt_logprobs: int | None = None  # alternatives reported for each token of the prompt
    ignore_eos: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    user: str | None = None
    json_schema: dict[str, Any] | None = None  # which a reply has to conform to
    schema_name: str = "response_format"  # of the parameter that asks for it
    tools: Tools | None = None  # which a reply may call
    continued: bool = False  # whether the reply goes on with the last message
    template_options: dict[str, bool] = field(default_factory=dict)  # switches of the chat template
    repeated: dict[str, Any] = field(default_factory=dict)  # parameters that a response repeats
    metadata: dict[str, str] = field(default_factory=dict)


def read_json(body: bytes | bytearray) -> dict[str, Any]:
    """Return a body as an object of JSON; ApiError where it is none."""

    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is not JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}; expected an object", code="invalid_json")
    return value


def read_chat(body: dict[str, Any]) -> ParsedRequest:
    """Return a parsed request for a chat completion."""
    values = check(body, CHAT)
    logprobs = values.get("top_logprobs", 0) if values.get("logprobs") else None
    if values.get("top_logprobs") and logprobs is None:
        raise ApiError(400, "got top_logprobs without logprobs; set logprobs to true", param="top_logprobs")
    prompt_logprobs = values.get("prompt_logprobs")
    messages = [with_calls(message, f"messages[{index}]") for index, message in enumerate(values["messages"])]
    schema, tools = json_schema(values.get("response_format", {"type": "text"})), read_tools(values)
    if schema is not None and tools is not None:
        message = "got response_format and tools; expected one of them, or a tool_choice of none"
        raise ApiError(400, message, param="response_format", code="conflict")
    parsed = common(values, [messages], most_tokens(values), logprobs, prompt_logprobs)
    continued = continues(values, messages, free=schema is None and tools is None)
    parsed = replace(parsed, template_options=values.get("chat_template_kwargs", {}), prompt_logprobs=prompt_logprobs)
    return replace(parsed, json_schema=schema, tools=tools, continued=continued)


def continues(values: dict[str, Any], messages: list[dict[str, Any]], *, free: bool) -> bool:
    """Return whether a reply goes on with the last message; ApiError where it cannot."""
    if not values.get("continue_final_message", False):
        if values.get("add_generation_prompt", True):
            return False
        message = "add_generation_prompt is false; expected that only with continue_final_message"
        raise ApiError(400, message, param="add_generation_prompt", code="conflict")
    last = messages[-1]
    if last["role"] != "assistant" or "tool_calls" in last:
        message = f"continue_final_message expects words of the assistant; the last message is of the {last['role']}"
        raise ApiError(400, message, param="continue_final_message", code="conflict")
    if not free:
        message = "a reply in a form, or with tools, cannot be continued; expected continue_final_message without them"
        raise ApiError(400, message, param="continue_final_message", code="conflict")
    return True


def json_schema(response_format: dict[str, Any]) -> dict[str, Any] | None:
    """Return the JSON Schema that a response format asks for; None for text."""
    match response_format["type"]:
        case "json_schema":
            return response_format["json_schema"].get("schema", {})
        case "json_object":
            return {"type": "object"}
    return None


def read_completion(body: dict[str, Any]) -> ParsedRequest:
    """Return a parsed request for completions of one prompt or several."""
    values = check(body, COMPLETION)
    prompt = values["prompt"]
    alone = isinstance(prompt, str) or isinstance(prompt[0], int)
    limit, echo = most_tokens(values), values.get("echo", False)
    limit = COMPLETION_TOKENS if limit is None else limit
    logprobs = None if values.get("logprobs") is False else values.get("logprobs")
    counts = [count for count in (logprobs if echo else None, values.get("prompt_logprobs")) if count is not None]
    parsed = common(values, [prompt] if alone else prompt, limit, logprobs, max(counts, default=None))
    return replace(
        parsed,
        add_special_tokens=values.get("add_special_tokens", True),
        echo=echo,
        prompt_logprobs=values.get("prompt_logprobs"),
    )


def most_tokens(values: dict[str, Any]) -> int | None:
    """Return the most tokens of a reply, by either name; None where neither is given."""
    limit = values.get("max_completion_tokens", values.get("max_tokens"))
    if values.get("max_tokens", limit) != limit:
        raise ApiError(
            400,
            f"max_tokens is {values['max_tokens']} and max_completion_tokens {limit}; expected one of them",
            param="max_tokens",
            code="conflict",
        )
    return limit


def read_score(body: dict[str, Any]) -> tuple[str | None, Any, list[str]]:
    """Return the parts of a request for scores: the model's name, a conversation or text, and replies to it."""
    values = check(body, SCORE)
    if ("messages" in values) == ("prompt" in values):
        raise ApiError(400, "expected messages or a prompt, exactly one of them", param="messages")
    conversation = [plain(message) for message in values.get("messages", ())]
    return values.get("model"), conversation or values["prompt"], values["replies"]


def with_calls(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a message with one text, and the calls of tools that it makes or answers."""
    calls = message.get("tool_calls", [])
    if not calls and "content" not in message:
        raise ApiError(400, f"{name}.content is missing; it is required", param=f"{name}.content", code="missing")
    kept = {"tool_call_id": message["tool_call_id"]} if "tool_call_id" in message else {}
    if calls:
        kept["tool_calls"] = [read_history(call, f"{name}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return {**plain(message), **kept}


def plain(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with one of our roles, one text, and the speaker's name if it has one."""
    role, content = message["role"], message.get("content", "")
    content = content if isinstance(content, str) else "".join(part["text"] for part in content)
    name = {"name": message["name"]} if message.get("name") else {}
    return {"role": "system" if role == "developer" else role, **name, "content": content}


def common(
    values: dict[str, Any], prompts: list[Any], limit: int | None, logprobs: int | None, prompt_logprobs: int | None
) -> ParsedRequest:
    """Return the part of a request that all kinds have in common."""
    stream, n = values.get("stream", False), values.get("n", 1)
    best_of, stop = values.get("best_of", n), values.get("stop", ())
    if best_of < n:
        raise ApiError(400, f"best_of is {best_of}; expected at least n, which is {n}", param="best_of")
    if stream and best_of > n:
        raise ApiError(
            400,
            "got best_of with stream; expected one of them, since the best replies are only known at the end",
            param="best_of",
        )
    streaming = values.get("stream_options", {})
    if any(streaming.values()) and not stream:
        raise ApiError(400, "got stream_options without stream; set stream to true", param="stream_options")
    names = ("seed", *(option.name for option in fields(Sampling)))
    if stream and "prompt_logprobs" in values:
        message = "got prompt_logprobs with stream; expected one of them"
        raise ApiError(400, message, param="prompt_logprobs")
    top_k = values.get("top_k", 0)
    include_usage = streaming.get("include_usage", False)
    return ParsedRequest(
        model=values["model"],
        prompts=prompts,
        options={
            **{name: values[name] for name in names if name in values},
            "top_k": top_k if top_k > 0 else None,
            "stop": tuple(filter(None, [stop])) if isinstance(stop, str) else tuple(stop),
            "logit_bias": {int(token): bias for token, bias in values.get("logit_bias", {}).items()},
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs,
        },
        max_new_tokens=limit,
        n=n,
        best_of=best_of,
        stream=stream,
        ignore_eos=values.get("ignore_eos", False),
        include_usage=include_usage,
        continuous_usage=include_usage and streaming.get("continuous_usage_stats", False),
        user=values.get("user", values.get("safety_identifier")),
        metadata=values.get("metadata", {}),
    )
