"""litellm: chats whole and streaming, JSON by a schema, a tool that has to be called, text completions, responses."""

import json
import sys

import litellm

url, model = sys.argv[1:]
options = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "num_retries": 0}
hello = [{"role": "user", "content": "Hello"}]
animal = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "legs": {"enum": [2, 4]}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}

whole = litellm.completion(messages=hello, **options)
said = whole.choices[0].message.content
assert said == "Hi there! How are you?", said
assert whole.usage.completion_tokens > 0

chunks = list(litellm.completion(messages=hello, stream=True, stream_options={"include_usage": True}, **options))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said

form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": animal, "strict": True}}
reply = json.loads(litellm.completion(messages=hello, response_format=form, **options).choices[0].message.content)
assert reply["kind"] in ("cat", "dog") and reply["legs"] in (2, 4), reply

tool = {"type": "function", "function": {"name": "describe", "parameters": animal}}
called = litellm.completion(
    messages=hello, tools=[tool], tool_choice="required", parallel_tool_calls=False, **options
).choices[0]
assert called.finish_reason == "tool_calls", called
[call] = called.message.tool_calls
assert json.loads(call.function.arguments)["legs"] in (2, 4)

text = litellm.text_completion(**{**options, "model": f"text-completion-openai/{model}"}, prompt="Hello", max_tokens=3)
assert text.usage.completion_tokens == 3

response = litellm.responses(input="Hello", **{key: value for key, value in options.items() if key != "num_retries"})
assert response.output[0].content[0].text == said, response
print("chat, stream, json_schema, tools, completion, responses")
