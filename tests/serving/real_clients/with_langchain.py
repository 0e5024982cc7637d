"""langchain-openai: a chat, its stream, structured output by a schema and by a function, tools, the Responses API."""

import sys
from typing import Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

url, model = sys.argv[1:]
options = {"model": model, "base_url": f"{url}/v1", "api_key": "none", "temperature": 0, "max_retries": 0}
chat = ChatOpenAI(**options)


class Animal(BaseModel):
    """An animal."""

    kind: Literal["cat", "dog"]
    legs: Literal[2, 4]


@tool
def weather(city: Literal["Paris", "Oslo"]) -> str:
    """The weather of a city."""
    return f"It rains in {city}."


whole = chat.invoke("Hello")
assert whole.content == "Hi there! How are you?", whole
assert whole.usage_metadata["output_tokens"] > 0
assert "".join(chunk.content for chunk in chat.stream("Hello")) == whole.content

for method in ("json_schema", "function_calling"):
    animal = chat.with_structured_output(Animal, method=method).invoke("Hello")
    assert isinstance(animal, Animal), animal

called = chat.bind_tools([weather], tool_choice="any", parallel_tool_calls=False).invoke("Hello")
[call] = called.tool_calls
result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
assert chat.bind_tools([weather]).invoke([HumanMessage("Hello"), called, result], max_tokens=5) is not None

assert OpenAI(**options, max_tokens=3).invoke("Hello")

responses = ChatOpenAI(**options, use_responses_api=True)
assert responses.invoke("Hello").text == whole.content
assert "".join(chunk.text for chunk in responses.stream("Hello")) == whole.content
assert isinstance(responses.with_structured_output(Animal, method="json_schema").invoke("Hello"), Animal)
print("chat, stream, structured output, tools, completion, responses")
