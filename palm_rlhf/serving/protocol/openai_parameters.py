"""The parameters of OpenAI's protocol as JSON Schemas: they describe the API, and requests are checked by them."""

from typing import Any

MOST_CHOICES = 128
MOST_TOOLS = 128
MOST_STOPS = 64  # OpenAI takes 4; evaluation harnesses send more


def integer(minimum: int, maximum: int, description: str) -> dict[str, Any]:
    """Return the schema of a whole number."""
    return {"type": "integer", "minimum": minimum, "maximum": maximum, "description": description}


def number(minimum: float, maximum: float, description: str) -> dict[str, Any]:
    """Return the schema of a number."""
    return {"type": "number", "minimum": minimum, "maximum": maximum, "description": description}


def string(most: int, description: str) -> dict[str, Any]:
    """Return the schema of a short text."""
    return {"type": "string", "maxLength": most, "description": description}


def boolean(description: str) -> dict[str, Any]:
    """Return the schema of a switch."""
    return {"type": "boolean", "description": description}


def record(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """Return the schema of an object of these entries and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def items(schema: dict[str, Any], minimum: int = 1, maximum: int | None = None) -> dict[str, Any]:
    """Return the schema of a list."""
    return {"type": "array", "items": schema, "minItems": minimum, **({} if maximum is None else {"maxItems": maximum})}


def neutral(*values: Any) -> dict[str, Any]:
    """Return the schema of an unsupported parameter, which is accepted at values that ask for nothing."""
    return {"enum": list(values), "description": "Not supported: accepted only at a value that changes nothing."}


STRING = {"type": "string"}
MODEL = {"type": "string", "description": "The name of the model, as /v1/models lists it."}
TOKENS = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
STOP = {"type": "string", "minLength": 1, "maxLength": 256}
COUNT = integer(1, 2**31 - 1, "The most tokens of a reply.")
SAMPLING = {
    "temperature": number(0, 2, "Divides the logits; 0 is greedy."),
    "top_k": integer(-1, 2**31 - 1, "Samples from this many of the likeliest tokens; 0 or -1: from all."),
    "top_p": number(0, 1, "Samples from the fewest tokens that hold this much of the probability."),
    "min_p": number(0, 1, "Samples from tokens of at least this fraction of the likeliest token's probability."),
    "seed": integer(-(2**63), 2**63 - 1, "Makes the sample repeatable."),
    "repetition_penalty": number(
        0.01,
        100,
        "Divides positive logits of tokens in the prompt and the reply, multiplies negative ones; 1: no penalty.",
    ),
    "presence_penalty": number(-2, 2, "Subtracted from the logits of tokens that have been sampled."),
    "frequency_penalty": number(-2, 2, "Subtracted from the logit of a token for each time it has been sampled."),
    "logit_bias": {
        "type": "object",
        "additionalProperties": number(-100, 100, "Added to the logit."),
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "description": "Token ids, and the number that is added to the logit of each.",
    },
}
ENDING = {
    "max_tokens": COUNT,
    "max_completion_tokens": {**COUNT, "description": "The newer name of max_tokens."},
    "stop": {
        "anyOf": [string(256, "One string; an empty one stops nothing."), items(STOP, minimum=0, maximum=MOST_STOPS)],
        "description": "Strings that end a reply, and are left out of it.",
    },
    "ignore_eos": boolean("Go on after tokens that end a text or a turn, up to the most tokens."),
}
STREAMING = {
    "stream": boolean("Send server-sent events as tokens are generated."),
    "stream_options": record(
        {
            "include_usage": boolean("Send the usage in a last chunk."),
            "continuous_usage_stats": boolean("With include_usage, send the usage so far in every chunk."),
            "include_obfuscation": neutral(False),
        }
    ),
}
TEMPLATE_OPTIONS = {
    "type": "object",
    "additionalProperties": {"type": "boolean"},
    "propertyNames": {"maxLength": 64},
    "maxProperties": 16,
    "description": "Switches of the model's chat template, such as enable_thinking, which has to read them.",
}
PROMPT_LOGPROBS = integer(
    0, 20, "Return the log-probability of each token of the prompt, and of so many of the likeliest others."
)
NOTED = {
    "user": string(512, "Written to the log beside the request."),
    "safety_identifier": string(512, "The newer name of user."),
    "metadata": {
        "type": "object",
        "additionalProperties": {"type": "string", "maxLength": 512},
        "propertyNames": {"maxLength": 64},
        "maxProperties": 16,
        "description": "Written to the log beside the request.",
    },
    "prompt_cache_key": string(512, "Accepted and not needed: prompts that begin alike are found by their tokens."),
}
# Parameters that clients of OpenAI's and vLLM's servers send at values that ask for nothing. Any may be null.
NEUTRAL = {
    "store": neutral(False),
    "service_tier": neutral("auto", "default"),
    "prompt_cache_retention": neutral("in_memory", "in-memory"),
    "use_beam_search": neutral(False),
    "length_penalty": neutral(1),
    "min_tokens": neutral(0),
    "stop_token_ids": neutral([]),
    "bad_words": neutral([]),
    "logits_processors": neutral([]),
    "include_stop_str_in_output": neutral(False),
    "skip_special_tokens": neutral(True),
    "spaces_between_special_tokens": neutral(True),
    "return_token_ids": neutral(False),
    "return_tokens_as_token_ids": neutral(False),
    "priority": neutral(0),
    "typical_p": neutral(1),
    "early_stopping": neutral(False),
    "detokenize": neutral(True),
    "vllm_xargs": neutral({}),
}
NEUTRAL_IN_CHATS = {
    "functions": neutral([]),
    "function_call": neutral("none", "auto"),
    "modalities": neutral(["text"]),
    "reasoning_effort": neutral("none"),
    "verbosity": neutral("medium"),
    "echo": neutral(False),
    "add_special_tokens": neutral(False),
    "documents": neutral([]),
    "include_reasoning": neutral(True),
}
NEUTRAL_IN_COMPLETIONS = {"suffix": neutral("")}
NEUTRAL_IN_MESSAGES = {
    "annotations": neutral([]),
    "refusal": neutral(""),
    "reasoning": neutral(""),
    "reasoning_content": neutral(""),
}
COMMON = {
    "model": MODEL,
    **SAMPLING,
    **ENDING,
    **STREAMING,
    **NOTED,
    "n": integer(1, MOST_CHOICES, "The number of replies."),
    "best_of": integer(
        1, MOST_CHOICES, "Samples so many replies, and returns the n that the reward model scores highest."
    ),
    **NEUTRAL,
}
FREE = {"type": "object", "additionalProperties": True}
RESPONSE_FORMAT: dict[str, Any] = {
    "anyOf": [
        record({"type": {"type": "string", "enum": ["text", "json_object"]}}, "type"),
        record(
            {
                "type": {"type": "string", "enum": ["json_schema"]},
                "json_schema": record(
                    {
                        "name": {"type": "string", "minLength": 1, "maxLength": 64},
                        "description": STRING,
                        "schema": {**FREE, "description": "A JSON Schema; without one, any JSON."},
                        "strict": {"type": "boolean", "description": "Always true: replies always conform."},
                    },
                    "name",
                ),
            },
            "type",
            "json_schema",
        ),
    ],
    "description": "The form of the reply: text, any object of JSON, or JSON that follows a schema.",
}
FUNCTION_NAME = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
FUNCTION = record(
    {
        "name": FUNCTION_NAME,
        "description": STRING,
        "parameters": {**FREE, "description": "A JSON Schema of its arguments."},
        "strict": boolean("Whether calls always conform to the parameters."),
    },
    "name",
)
IS_FUNCTION = {"type": "string", "enum": ["function"]}
TOOLS = {
    **items(record({"type": IS_FUNCTION, "function": FUNCTION}, "type", "function"), minimum=0, maximum=MOST_TOOLS),
    "description": "Functions that the model may call, where its chat template knows tools.",
}
TOOL_CHOICE = {
    "anyOf": [
        {"type": "string", "enum": ["none", "auto", "required"]},
        record({"type": IS_FUNCTION, "function": record({"name": FUNCTION_NAME}, "name")}, "type", "function"),
    ],
    "description": "Whether the model may call a function, has to call one, or which one it has to call.",
}
TOOL_CALL = record(
    {
        "id": string(256, "The id by which the message with the result refers to the call."),
        "type": IS_FUNCTION,
        "index": integer(0, MOST_TOOLS, "The number of the call, as in the chunks of a stream."),
        "function": record({"name": FUNCTION_NAME, "arguments": {"type": "string"}}, "name", "arguments"),
    },
    "id",
    "function",
)
PART = record({"type": {"type": "string", "enum": ["text"]}, "text": STRING}, "type", "text")
CONTENT = {"anyOf": [STRING, items(PART)]}
MESSAGE = record(
    {
        "name": string(64, "The name of the speaker, for chat templates that show it."),
        "role": {"type": "string", "enum": ["system", "developer", "user", "assistant"]},
        "content": CONTENT,
        **NEUTRAL_IN_MESSAGES,
    },
    "role",
    "content",
)
ASSISTANT_MESSAGE = record(
    {
        **MESSAGE["properties"],
        "role": {"type": "string", "enum": ["assistant"]},
        "tool_calls": items(TOOL_CALL, minimum=0, maximum=MOST_TOOLS),
    },
    "role",
)
TOOL_MESSAGE = record(
    {
        **MESSAGE["properties"],
        "role": {"type": "string", "enum": ["tool"]},
        "tool_call_id": string(256, "The id of the call whose result this message is."),
    },
    "role",
    "content",
)
OTHER_MESSAGE = record(
    {**MESSAGE["properties"], "role": {"type": "string", "enum": ["system", "developer", "user"]}}, "role", "content"
)
CHAT = record(
    {
        **COMMON,
        "messages": items({"anyOf": [OTHER_MESSAGE, ASSISTANT_MESSAGE, TOOL_MESSAGE]}),
        "tools": TOOLS,
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": boolean("Whether one reply may hold several calls."),
        "logprobs": boolean("Return the log-probability of each token."),
        "top_logprobs": integer(0, 20, "Return the log-probabilities of so many of the likeliest tokens, too."),
        "prompt_logprobs": PROMPT_LOGPROBS,
        "response_format": RESPONSE_FORMAT,
        "chat_template_kwargs": TEMPLATE_OPTIONS,
        "continue_final_message": boolean("Go on with the last message, which is the assistant's, as vLLM does."),
        "add_generation_prompt": boolean("Begin a message of the assistant; false only with continue_final_message."),
        **NEUTRAL_IN_CHATS,
    },
    "model",
    "messages",
)
PROMPTS = [items(kind, maximum=MOST_CHOICES) for kind in (STRING, items(TOKENS))]
PROMPT = {"anyOf": [STRING, items(TOKENS), *PROMPTS], "description": "Text or token ids, of one prompt or of several."}
COMPLETION = record(
    {
        **COMMON,
        "prompt": PROMPT,
        "add_special_tokens": boolean("Begin a text with the tokenizer's own special tokens; true by default."),
        "max_tokens": integer(0, 2**31 - 1, "The most tokens of a reply; 0 only reads the prompt."),
        "echo": boolean("Begin the text, and the log-probabilities where asked for, with those of the prompt."),
        "prompt_logprobs": PROMPT_LOGPROBS,
        "logprobs": {
            "anyOf": [
                integer(0, 5, "Return the log-probability of each token, and of so many of the likeliest."),
                neutral(False),
            ]
        },
        **NEUTRAL_IN_COMPLETIONS,
    },
    "model",
    "prompt",
)
SCORE = record(
    {"model": MODEL, "messages": items(MESSAGE), "prompt": STRING, "replies": items(STRING, maximum=MOST_CHOICES)},
    "replies",
)
