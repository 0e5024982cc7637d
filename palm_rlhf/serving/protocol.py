"""Requests in OpenAI's protocol: what they may hold, and what they ask for."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from palm_rlhf.serving.errors import ApiError
from palm_rlhf.serving.schema import check

MOST_CHOICES = 128
COMPLETION_TOKENS = 16  # OpenAI's default, where a chat may fill the context


def integer(minimum: int, maximum: int, description: str) -> dict[str, Any]:
    """The schema of a whole number."""
    return {"type": "integer", "minimum": minimum, "maximum": maximum, "description": description}


def number(minimum: float, maximum: float, description: str) -> dict[str, Any]:
    """The schema of a number."""
    return {"type": "number", "minimum": minimum, "maximum": maximum, "description": description}


def record(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """The schema of an object of these entries and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def items(schema: dict[str, Any], minimum: int = 1, maximum: int | None = None) -> dict[str, Any]:
    """The schema of a list."""
    return {"type": "array", "items": schema, "minItems": minimum, **({} if maximum is None else {"maxItems": maximum})}


STRING = {"type": "string"}
MODEL = {"type": "string", "description": "The name that /v1/models tells."}
TOKENS = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
STOP = {"type": "string", "minLength": 1, "maxLength": 256}
COUNT = integer(1, 2**31 - 1, "Most tokens of a reply.")
COMMON = {
    "model": MODEL,
    "max_tokens": COUNT,
    "temperature": number(0, 2, "Divides the logits; 0 is greedy."),
    "top_p": number(0, 1, "Samples from the fewest tokens that hold this much of the probability."),
    "n": integer(1, MOST_CHOICES, "Replies."),
    "best_of": integer(1, MOST_CHOICES, "Draws so many replies, and returns the n best by the reward model."),
    "stop": {"anyOf": [STOP, items(STOP, maximum=4)], "description": "Strings that end a reply."},
    "stream": {"type": "boolean", "description": "Send server-sent events as tokens come."},
    "stream_options": record({"include_usage": {"type": "boolean"}}),
    "seed": integer(-(2**63), 2**63 - 1, "Makes the sample repeatable."),
    "presence_penalty": number(-2, 2, "Taken from the logits of tokens that have been sampled."),
    "frequency_penalty": number(-2, 2, "Taken from those for each time they have been sampled."),
    "logit_bias": {
        "type": "object",
        "additionalProperties": number(-100, 100, "Added to the logit."),
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "description": "Token ids, and what is added to their logits.",
    },
    "user": {"type": "string", "maxLength": 512, "description": "Written to the log beside the request."},
}
FREE = {"type": "object", "additionalProperties": True}
RESPONSE_FORMAT = {
    "anyOf": [
        record({"type": {"type": "string", "enum": ["text", "json_object"]}}, "type"),
        record(
            {
                "type": {"type": "string", "enum": ["json_schema"]},
                "json_schema": record(
                    {
                        "name": {"type": "string", "minLength": 1, "maxLength": 64},
                        "description": STRING,
                        "schema": {**FREE, "description": "A JSON Schema; any JSON where there is none."},
                        "strict": {"type": "boolean", "description": "Taken for true: replies always conform."},
                    },
                    "name",
                ),
            },
            "type",
            "json_schema",
        ),
    ],
    "description": "The form of the reply: text, any object of JSON, or JSON by a schema.",
}
PART = record({"type": {"type": "string", "enum": ["text"]}, "text": STRING}, "type", "text")
CONTENT = {"anyOf": [STRING, items(PART)]}
MESSAGE = record(
    {"role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]}, "content": CONTENT},
    "role",
    "content",
)
CHAT = record(
    {
        **COMMON,
        "messages": items(MESSAGE),
        "max_completion_tokens": COUNT,
        "logprobs": {"type": "boolean", "description": "Return the log-probability of each token."},
        "top_logprobs": integer(0, 20, "Return those of the likeliest tokens, too."),
        "response_format": RESPONSE_FORMAT,
    },
    "model",
    "messages",
)
PROMPTS = [items(kind, maximum=MOST_CHOICES) for kind in (STRING, items(TOKENS))]
PROMPT = {"anyOf": [STRING, items(TOKENS), *PROMPTS], "description": "Text or token ids, of one prompt or of several."}
COMPLETION = record(
    {**COMMON, "prompt": PROMPT, "logprobs": integer(0, 5, "Return those of each token and the likeliest others.")},
    "model",
    "prompt",
)
SCORE = record(
    {"model": MODEL, "messages": items(MESSAGE), "prompt": STRING, "replies": items(STRING, maximum=MOST_CHOICES)},
    "replies",
)


@dataclass(frozen=True)
class Ask:
    """A request that has been read: `prompts` are conversations, texts or token ids; `options` those of the engine."""

    model: str | None
    prompts: list[Any]
    options: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None  # None: as many as the context has room for
    n: int = 1
    best_of: int = 1
    stream: bool = False
    include_usage: bool = False
    user: str | None = None
    json_schema: dict[str, Any] | None = None  # what a reply has to conform to


def read_json(body: bytes) -> dict[str, Any]:
    """A body as an object of JSON; ApiError where it is none."""

    def refuse(literal: str) -> None:
        raise ValueError(f"{literal} is no JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body is a JSON {type(value).__name__}; expected an object", code="invalid_json")
    return value


def read_chat(body: dict[str, Any]) -> Ask:
    """A request for a chat completion."""
    values = check(body, CHAT, "")
    if "max_tokens" in values and "max_completion_tokens" in values:
        raise ApiError(
            400, "got max_tokens and max_completion_tokens; expected one of them", param="max_tokens", code="conflict"
        )
    logprobs = values.get("top_logprobs", 0) if values.get("logprobs") else None
    if "top_logprobs" in values and logprobs is None:
        raise ApiError(400, "got top_logprobs without logprobs; set logprobs to true", param="top_logprobs")
    limit = values.get("max_completion_tokens", values.get("max_tokens"))
    ask = _ask(values, [[plain(message) for message in values["messages"]]], limit, logprobs)
    return replace(ask, json_schema=json_schema(values.get("response_format", {"type": "text"})))


def json_schema(response_format: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON Schema that a format asks for; None for text."""
    match response_format["type"]:
        case "json_schema":
            return response_format["json_schema"].get("schema", {})
        case "json_object":
            return {"type": "object"}
    return None


def read_completion(body: dict[str, Any]) -> Ask:
    """A request for completions of one prompt or several."""
    values = check(body, COMPLETION, "")
    prompt = values["prompt"]
    alone = isinstance(prompt, str) or isinstance(prompt[0], int)
    limit = values.get("max_tokens", COMPLETION_TOKENS)
    return _ask(values, [prompt] if alone else prompt, limit, values.get("logprobs"))


def read_score(body: dict[str, Any]) -> tuple[str | None, Any, list[str]]:
    """A request for scores: the model's name, a conversation or text, and replies to it."""
    values = check(body, SCORE, "")
    if ("messages" in values) == ("prompt" in values):
        raise ApiError(400, "expected messages or a prompt, exactly one of them", param="messages")
    conversation = [plain(message) for message in values.get("messages", ())]
    return values.get("model"), conversation or values["prompt"], values["replies"]


def plain(message: dict[str, Any]) -> dict[str, str]:
    """A message of a role of ours and one text."""
    role, content = message["role"], message["content"]
    content = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"role": "system" if role == "developer" else role, "content": content}


def _ask(values: dict[str, Any], prompts: list[Any], limit: int | None, logprobs: int | None) -> Ask:
    """What chats and completions have in common."""
    stream, n = values.get("stream", False), values.get("n", 1)
    best_of, stop = values.get("best_of", n), values.get("stop", ())
    if best_of < n:
        raise ApiError(400, f"best_of is {best_of}; expected at least n, which is {n}", param="best_of")
    if stream and best_of > n:
        raise ApiError(400, "the best replies are known at the end only; expected best_of or stream", param="best_of")
    if "stream_options" in values and not stream:
        raise ApiError(400, "got stream_options without stream; set stream to true", param="stream_options")
    names = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")
    return Ask(
        model=values["model"],
        prompts=prompts,
        options={
            **{name: values[name] for name in names if name in values},
            "stop": (stop,) if isinstance(stop, str) else tuple(stop),
            "logit_bias": {int(token): bias for token, bias in values.get("logit_bias", {}).items()},
            "logprobs": logprobs,
        },
        max_new_tokens=limit,
        n=n,
        best_of=best_of,
        stream=stream,
        include_usage=values.get("stream_options", {}).get("include_usage", False),
        user=values.get("user"),
    )
