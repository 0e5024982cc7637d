"""Tools in chats: what the template is shown, the calls that are found in replies, and those that have to come."""

import json
from pathlib import Path

import httpx
import jsonschema
import openai
import pytest
import torch

from palm_rlhf.data.templates import PRESETS, JinjaTemplate
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.call_form import call_form
from palm_rlhf.serving.generation import Piece, TokenLogprob
from palm_rlhf.serving.protocol.tool_calls import MOST_CALLS, CallReader
from palm_rlhf.serving.served_model import ServedModel

TEMPLATE = JinjaTemplate(Path(__file__).with_name("tools.jinja").read_text())
LLAMA = JinjaTemplate(
    """{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }}{% endfor %} {"name": , "parameters": }\
<|endoftext|>{% endif %}{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>{% else %}\
<|user|>{{ message.role.replace('tool', 'ipython') }} {% endif %}{{ message.content }}<|endoftext|>{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}, "unit": {"$ref": "#/$defs/unit"}},
            "required": ["city", "unit"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["C", "F"]}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "The time."}}
QUESTION = [{"role": "user", "content": "How is it in Paris?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "unit": "C"}}\n</tool_call>'
ANSWERED = [
    *QUESTION,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Paris", "unit": "C"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
]
LEARNT = [
    (QUESTION, [WEATHER, TIME], f"Let me see.{CALL}"),
    (QUESTION, [], "I cannot know."),
    (ANSWERED, [WEATHER, TIME], "It is sunny."),
]
NO_BLANKS = {"9": -100, "10": -100, "32": -100}


@pytest.fixture(scope="module")
def with_tools():
    """A model that has learnt a few replies by heart, of a template that knows tools."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=64, depth=2, heads=4, dim_head=16, max_seq_len=1024)
    served_model = ServedModel("caller", palm, tokenizer, TEMPLATE)
    optimizer = torch.optim.AdamW(palm.parameters(), lr=1e-2, betas=(0.9, 0.95))
    rows = [
        (served_model.encode_chat(messages_of(messages), tools), tokenizer.encode(said))
        for messages, tools, said in LEARNT
    ]
    for _ in range(200):
        losses = []
        for prompt, reply in rows:
            tokens = torch.tensor([[*prompt, *reply, tokenizer.eos_token]])
            mask = torch.arange(tokens.shape[1])[None] >= len(prompt)
            losses.append(palm(tokens, return_loss=True, loss_mask=mask))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        if float(torch.stack(losses).detach().max()) < 0.1:
            break
    return served_model


def messages_of(messages: list[dict]) -> list[dict]:
    """As templates are shown them."""
    shown = json.loads(json.dumps(messages))
    for message in shown:
        message["content"] = message["content"] or ""
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return shown


@pytest.fixture
def ask(with_tools, start_server):
    """Asks OpenAI's own client of a server of that model, greedily."""
    url, _ = start_server(with_tools)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        def create(messages=QUESTION, **options):
            return client.chat.completions.create(
                model="caller", messages=messages, **{"temperature": 0, "max_tokens": 300, **options}
            )

        yield create


def test_a_call_is_returned_and_its_result_answered(ask):
    choice = ask(tools=[WEATHER, TIME]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Paris", "unit": "C"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    answered = ask([*QUESTION, choice.message.model_copy(update={"content": None}), result], tools=[WEATHER, TIME])
    assert (answered.choices[0].message.content, answered.choices[0].finish_reason) == ("It is sunny.", "stop")
    assert answered.choices[0].message.tool_calls is None


def test_a_stream_has_the_same_call(ask):
    text, calls, reasons = "", [], []
    for chunk in ask(tools=[WEATHER, TIME], stream=True, tool_choice="auto", logprobs=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        calls += delta.tool_calls or []
        reasons.append(chunk.choices[0].finish_reason)
    assert (text, reasons[-1]) == ("Let me see.", "tool_calls")
    assert [(call.index, call.function.name) for call in calls] == [(0, "weather")]
    assert json.loads(calls[0].function.arguments) == {"city": "Paris", "unit": "C"}


def test_no_tools_are_no_tools(ask):
    for options in ({}, {"tools": []}, {"tools": [WEATHER, TIME], "tool_choice": "none"}):
        choice = ask(**options).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("I cannot know.", "stop")


@pytest.mark.parametrize("template", [TEMPLATE, LLAMA], ids=["tags", "json"])
def test_calls_that_have_to_come_conform(with_tools, start_server, template):
    """Of a model that has learnt nothing: greedy and sampled."""
    torch.manual_seed(0)
    palm = PaLM(num_tokens=with_tools.palm.num_tokens, dim=32, depth=1, heads=2, dim_head=16, max_seq_len=1024)
    url, _ = start_server(ServedModel("caller", palm, ByteTokenizer(), template))
    named = {"type": "function", "function": {"name": "weather"}}
    schemas = {"weather": WEATHER["function"]["parameters"], "time": {"type": "object"}}
    short = {"type": "function", "function": {"name": "time", "parameters": {"const": {"a": 1}}}}
    for choice, names in ((named, {"weather"}), ("required", {"weather", "time"})):
        for options in ({"temperature": 0}, {"seed": 1, "n": 3}):
            body = {
                "model": "caller",
                "messages": QUESTION,
                "tools": [WEATHER, short],
                "tool_choice": choice,
                "parallel_tool_calls": False,
                "logit_bias": NO_BLANKS,
                **options,
            }
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=900)
            assert reply.status_code == 200, reply.text
            for one in reply.json()["choices"]:
                assert one["finish_reason"] == "tool_calls" and one["message"]["content"] is None
                [call] = one["message"]["tool_calls"]
                assert call["function"]["name"] in names
                jsonschema.validate(json.loads(call["function"]["arguments"]), schemas[call["function"]["name"]])


def test_a_model_that_goes_on_calling_is_stopped_in_the_end(with_tools, start_server):
    torch.manual_seed(0)
    palm = PaLM(num_tokens=with_tools.palm.num_tokens, dim=32, depth=1, heads=2, dim_head=16, max_seq_len=2048)
    url, _ = start_server(ServedModel("caller", palm, ByteTokenizer(), TEMPLATE))
    now = {"type": "function", "function": {"name": "now-2_B", "parameters": {"const": {}}}}
    body = {"model": "caller", "messages": QUESTION, "tools": [now], "tool_choice": "required", "logit_bias": NO_BLANKS}
    no_end = {"logit_bias": {"9": -100, "32": -100, str(ByteTokenizer().eos_token): -100}}
    reply = httpx.post(f"{url}/v1/chat/completions", json={**body, **no_end}, timeout=900)
    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    assert (choice["finish_reason"], len(choice["message"]["tool_calls"])) == ("tool_calls", MOST_CALLS)


def test_a_strict_function_is_called_by_its_parameters_or_not_at_all(ask, with_tools):
    """The model has learnt to say "Paris", which a strict function does not allow."""
    strict = json.loads(json.dumps(WEATHER))
    strict["function"] |= {"strict": True}
    strict["function"]["parameters"]["properties"]["city"] = {"enum": ["Perth", "Oslo"]}
    plain = [WEATHER, TIME]
    choice = ask(tools=[strict, TIME], logit_bias={}).choices[0]
    for call in choice.message.tool_calls or []:
        if call.function.name == "weather":
            jsonschema.validate(json.loads(call.function.arguments), strict["function"]["parameters"])
    assert ask(tools=plain).choices[0].message.tool_calls[0].function.arguments.count("Paris") == 1


def named(name: str) -> list[dict]:
    return [{"type": "function", "function": {"name": name}}]


def large(number: int) -> dict:
    parameters = {"type": "object", "properties": {"a": {"enum": ["x" * 9000]}}}
    return {"type": "function", "function": {"name": f"f{number}", "parameters": parameters}}


LARGE = [large(number) for number in range(8)]  # none of them is too large alone
DEEP = json.loads('{"a":' * 400 + "1" + "}" * 400)
REFUSED = [
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": DEEP}}]}, "tools", "deeper"),
    (
        {
            "messages": [
                {**ANSWERED[1], "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": json.dumps(DEEP)}}]}
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
        "deeper",
    ),
    ({"tools": LARGE, "tool_choice": "required"}, "tools", "characters in all"),
    ({"tools": named('a "b"')}, "tools[0].function.name", "a-z"),
    ({"tools": named("a\n")}, "tools[0].function.name", "a-z"),
    ({"tools": [WEATHER, WEATHER]}, "tools", "each once"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "weather"),
    ({"tool_choice": "required"}, "tool_choice", "without tools"),
    ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice", "required"),
    ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "response_format", "tools"),
    (
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
            "tool_choice": "required",
        },
        "tools",
        "tool f",
    ),
    ({"messages": [{"role": "assistant"}, *QUESTION]}, "messages[0].content", "missing"),
    ({"messages": [*QUESTION, {**ANSWERED[1], "tool_calls": []}]}, "messages[1].content", "missing"),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]},
                *QUESTION,
            ]
        },
        "messages[0].tool_calls[0].function.arguments",
        "object of JSON",
    ),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "messages[0].tool_calls", "not supported"),
]


@pytest.mark.parametrize("body, param, named", REFUSED, ids=[param for _, param, _ in REFUSED])
def test_what_is_not_supported_is_refused_by_name(with_tools, start_server, body, param, named):
    url, _ = start_server(with_tools)
    reply = httpx.post(f"{url}/v1/chat/completions", json={"model": "caller", "messages": QUESTION, **body})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert named in error["message"]


def test_a_template_without_tools_refuses_them(with_tools, start_server):
    url, _ = start_server(ServedModel("caller", with_tools.palm, with_tools.tokenizer, PRESETS["default"]))
    for body, param in (({"tools": [WEATHER]}, "tools"), ({"messages": ANSWERED}, "messages")):
        reply = httpx.post(f"{url}/v1/chat/completions", json={"model": "caller", "messages": QUESTION, **body})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
        assert "template" in reply.json()["error"]["message"]
    for body in ({"tools": []}, {"tools": [WEATHER], "tool_choice": "none"}):
        body = {"model": "caller", "messages": QUESTION, "max_tokens": 1, **body}
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200


def read(text: str, form: str = "tags", size: int = 1) -> tuple[str, list[tuple[str, dict]], str]:
    """What a reader makes of a reply that comes in pieces of so many characters."""
    reader, said, calls = CallReader(form), "", []
    cuts = [text[start : start + size] for start in range(0, len(text), size)]
    for piece in [*map(Piece, cuts), Piece("", finish_reason="stop")]:
        found = reader.read(piece)
        said += found.text
        assert [call.number for call in found.calls] == list(range(len(calls), len(calls) + len(found.calls)))
        calls += [(call.name, json.loads(call.arguments)) for call in found.calls]
    return said, calls, found.finish_reason


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    "form, text, said, calls",
    [
        ("tags", "Hello < there <tool", "Hello < there <tool", []),
        ("tags", CALL, "", [("weather", {"city": "Paris", "unit": "C"})]),
        (
            "tags",
            f"{CALL}\n{CALL.replace('Paris', 'é')}",
            "",
            [("weather", {"city": c, "unit": "C"}) for c in ("Paris", "é")],
        ),
        ("tags", 'a<tool_call>{"name": "f"}</tool_call>b', "ab", [("f", {})]),
        ("tags", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", {})]),  # ended by a stop string, or its turn
        ("tags", "<tool_call>{]</tool_call>", "<tool_call>{]</tool_call>", []),
        ("tags", '<tool_call>{"name": 1}</tool_call> and', '<tool_call>{"name": 1}</tool_call> and', []),
        ("tags", '<tool_call>["f"]', '<tool_call>["f"]', []),
        ("json", '{"name": "f", "parameters": {"a": 1}}', "", [("f", {"a": 1})]),
        ("json", '{"a": 1}', '{"a": 1}', []),
        ("json", " {no", " {no", []),
        ("json", "Hello {", "Hello {", []),
    ],
)
def test_calls_are_found_however_the_text_is_cut(form, text, said, calls, size):
    assert read(text, form, size) == (said, calls, "tool_calls" if calls else "stop")


def test_text_that_cannot_become_a_call_is_not_held_back():
    reader = CallReader("tags")
    assert reader.read(Piece("1 < 2 <b")).text == "1 < 2 <b"
    assert reader.read(Piece(" <too")).text == " "
    assert reader.read(Piece("th>")).text == "<tooth>"


def test_log_probabilities_wait_for_their_text_and_are_all_given():
    reader, given = CallReader("tags"), []
    entries = [TokenLogprob(token, -1.0, ()) for token in range(len(CALL))]
    for text, entry in zip(CALL, entries):
        given += reader.read(Piece(text, (entry,))).logprobs
    assert [*given, *reader.read(Piece("", finish_reason="stop")).logprobs] == entries


def test_a_reply_that_was_cut_says_so():
    reader = CallReader("tags")
    assert reader.read(Piece(f"{CALL}a", finish_reason="length")).finish_reason == "length"


def test_the_form_of_calls_is_read_from_the_template():
    assert (call_form(TEMPLATE.source), call_form(LLAMA.source)) == ("tags", "json")
    assert call_form("{{ tools }}") is None
