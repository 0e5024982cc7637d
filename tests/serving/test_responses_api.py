"""The Responses API: OpenAI's own client understands what is answered, whole and streamed."""

import json

import httpx
import jsonschema
import openai
import pytest

PATH = "/v1/responses"
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
FORM = {"format": {"type": "json_schema", "name": "answer", "schema": SCHEMA, "strict": True}}


@pytest.fixture
def respond(client):
    """Asks OpenAI's own client for a response, greedily."""
    return lambda **options: client.responses.create(
        **{"model": "parrot", "temperature": 0, "input": "Hello", **options}
    )


@pytest.fixture
def refused(server):
    """The error that a body is answered with."""

    def post(**body) -> dict:
        reply = httpx.post(server[0] + PATH, json={"model": "parrot", "input": "Hello", **body})
        assert reply.status_code == 400, reply.text
        return reply.json()["error"]

    return post


def test_a_text_is_answered(respond, client, dialogues):
    found = respond(metadata={"a": "b"})
    assert (found.output_text, found.status, found.object) == (dialogues["Hello"], "completed", "response")
    assert (found.temperature, found.store, found.metadata) == (0, False, {"a": "b"})
    chat = client.chat.completions.create(model="parrot", messages=HELLO, temperature=0).usage
    assert (found.usage.input_tokens, found.usage.output_tokens) == (chat.prompt_tokens, chat.completion_tokens)
    assert found.usage.total_tokens == chat.total_tokens
    [item] = found.output
    assert (item.type, item.role, item.status, item.content[0].type) == (
        "message",
        "assistant",
        "completed",
        "output_text",
    )


def test_messages_and_instructions_are_those_of_a_chat(respond, client, dialogues):
    first = respond()
    history = [*HELLO, *first.output, {"role": "user", "content": [{"type": "input_text", "text": "Count to ten."}]}]
    found = respond(input=history, instructions="Be brief.")
    messages = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": dialogues["Hello"]},
        {"role": "user", "content": "Count to ten."},
    ]
    chat = client.chat.completions.create(model="parrot", messages=messages, temperature=0)
    assert found.output_text == chat.choices[0].message.content
    assert (found.usage.input_tokens, found.instructions) == (chat.usage.prompt_tokens, "Be brief.")


def test_a_cut_response_is_incomplete(respond):
    found = respond(max_output_tokens=3)
    assert (found.status, found.incomplete_details.reason, found.output_text) == (
        "incomplete",
        "max_output_tokens",
        "Hi ",
    )
    assert (found.output[0].status, found.max_output_tokens, found.usage.output_tokens) == ("incomplete", 3, 3)


@pytest.mark.parametrize("limit, status", [(None, "completed"), (3, "incomplete")])
def test_a_stream_has_the_events_in_their_order(respond, limit, status):
    whole = respond(max_output_tokens=limit)
    events = list(respond(max_output_tokens=limit, stream=True))
    kinds = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{status}",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert deltas and "".join(deltas) == whole.output_text == events[-1].response.output_text
    last = events[-1].response
    assert (last.status, last.id, last.usage.output_tokens) == (
        status,
        events[0].response.id,
        whole.usage.output_tokens,
    )
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {last.output[0].id}


def test_the_client_s_own_stream_helper_follows(client, dialogues):
    with client.responses.stream(model="parrot", input="Hello", temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text == dialogues["Hello"]


def test_a_format_is_kept(respond, client):
    found = respond(text=FORM, extra_body={"logit_bias": {"32": -100, "10": -100}})
    jsonschema.validate(json.loads(found.output_text), SCHEMA)
    assert found.text.format.name == "answer"
    assert respond(text={"format": {"type": "json_object"}}, max_output_tokens=1).output_text == "{"

    from pydantic import BaseModel

    class Answer(BaseModel):
        ok: bool

    parsed = client.responses.parse(model="parrot", input="Hello", temperature=0, text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)


@pytest.mark.parametrize(
    "body, param",
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": "x" * 5000}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}}, "text.format"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "input"),
        ({"background": True}, "background"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(refused, body, param):
    assert refused(**body)["param"] == param


def test_a_load_generator_gets_as_many_tokens_as_it_asks_for(respond):
    found = respond(max_output_tokens=40, extra_body={"ignore_eos": True})
    assert (found.status, found.usage.output_tokens) == ("incomplete", 40)
    assert respond(extra_body={"stop": ["there"]}).output_text == "Hi "


def test_parameters_that_ask_for_nothing_are_taken(respond, dialogues):
    nothing = {
        "store": False,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "truncation": "disabled",
        "include": [],
        "background": False,
        "service_tier": "auto",
        "text": {"format": {"type": "text"}},
        "user": "me",
        "previous_response_id": None,
        "top_logprobs": 0,
    }
    assert respond(**nothing).output_text == dialogues["Hello"]


def test_an_error_in_a_stream_is_an_event(start_server):
    url, _ = start_server(timeout=1e-6)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        events = list(client.responses.create(model="parrot", input="Hello", stream=True))
    assert events[-1].type == "response.failed"
    assert (events[-1].response.status, events[-1].response.error.code) == ("failed", "timeout")
    assert "longer than" in events[-1].response.error.message
