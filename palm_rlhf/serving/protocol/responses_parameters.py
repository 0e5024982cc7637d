"""The parameters of OpenAI's Responses API as JSON Schemas; see `openai_parameters`."""

from palm_rlhf.serving.protocol.openai_parameters import (
    COUNT,
    ENDING,
    MESSAGE,
    MODEL,
    NEUTRAL,
    NOTED,
    RESPONSE_FORMAT,
    SAMPLING,
    STREAMING,
    STRING,
    items,
    neutral,
    record,
    string,
)

TEXT_FORMAT = {
    "anyOf": [
        RESPONSE_FORMAT["anyOf"][0],
        record(
            {
                **RESPONSE_FORMAT["anyOf"][1]["properties"]["json_schema"]["properties"],
                "type": {"type": "string", "enum": ["json_schema"]},
            },
            "type",
            "name",
            "schema",
        ),
    ],
    "description": RESPONSE_FORMAT["description"],
}
RESPONSE_PART = record(
    {
        "type": {"type": "string", "enum": ["input_text", "output_text"]},
        "text": STRING,
        "annotations": neutral([]),
        "logprobs": neutral([]),
    },
    "type",
    "text",
)
RESPONSE_MESSAGE = record(
    {
        "type": {"type": "string", "enum": ["message"]},
        "role": MESSAGE["properties"]["role"],
        "content": {"anyOf": [STRING, items(RESPONSE_PART)]},
        "id": string(256, "The id of an earlier reply; nothing is looked up by it."),
        "status": neutral("completed", "incomplete"),
    },
    "role",
    "content",
)
RESPONSE = record(
    {
        "model": MODEL,
        "input": {"anyOf": [STRING, items(RESPONSE_MESSAGE)], "description": "A text, or messages."},
        "instructions": {"type": "string", "description": "A system message before the input."},
        "max_output_tokens": COUNT,
        **SAMPLING,
        "stop": ENDING["stop"],  # vLLM accepts this and the next parameter here, too
        "ignore_eos": ENDING["ignore_eos"],
        "text": record({"format": TEXT_FORMAT, "verbosity": neutral("medium")}),
        "stream": STREAMING["stream"],
        "stream_options": record({"include_obfuscation": neutral(False)}),
        **NOTED,
        "store": neutral(False),
        "service_tier": NEUTRAL["service_tier"],
        "prompt_cache_retention": NEUTRAL["prompt_cache_retention"],
        "background": neutral(False),
        "include": neutral([]),
        "parallel_tool_calls": neutral(True, False),
        "reasoning": neutral({}),
        "tools": neutral([]),
        "tool_choice": neutral("auto", "none"),
        "top_logprobs": neutral(0),
        "truncation": neutral("disabled"),
    },
    "model",
    "input",
)
