"""What clients send where they ask for nothing is taken, and what they ask for beyond OpenAI's parameters is done."""

import json
import shutil

import httpx
import pytest
import torch

from palm_rlhf.data.conversation import encode_prompt
from palm_rlhf.data.templates import JinjaTemplate
from palm_rlhf.serving.protocol.openai_parameters import ASSISTANT_MESSAGE, CHAT, COMPLETION
from palm_rlhf.serving.served_model import load

HELLO = [{"role": "user", "content": "Hello"}]
CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
# In no order of ours: what the clients of OpenAI, LangChain, LiteLLM, guidellm and vLLM send where nothing is set.
NOTHING = {
    "n": 1,
    "best_of": 1,
    "stop": [],
    "seed": None,
    "user": "",
    "logit_bias": {},
    "stream": False,
    "stream_options": {"include_usage": False},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "store": False,
    "service_tier": "auto",
    "metadata": {},
    "safety_identifier": "",
    "prompt_cache_key": "",
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "use_beam_search": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "stop_token_ids": [],
    "bad_words": [],
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "priority": 0,
    "truncate_prompt_tokens": None,
    "typical_p": 1,
    "early_stopping": False,
    "vllm_xargs": {},
    "allowed_token_ids": None,
}
NO_CHAT = {
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "logprobs": False,
    "top_logprobs": 0,
    "modalities": ["text"],
    "reasoning_effort": None,
    "verbosity": None,
    "echo": False,
    "audio": None,
    "prediction": None,
    "web_search_options": None,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "chat_template_kwargs": {},
}
NO_TEXT = {"suffix": "", "echo": False, "prompt_logprobs": None, "logprobs": None, "add_special_tokens": True}
PATHS = [(CHATS, {"messages": HELLO}, NO_CHAT, CHAT), (TEXTS, {"prompt": "Hello"}, NO_TEXT, COMPLETION)]


@pytest.fixture(scope="module")
def post(server):
    """Posts a body for the parrot, greedily unless told otherwise, and returns the reply."""
    with httpx.Client(base_url=server[0], timeout=900) as http:
        yield lambda path, **body: http.post(path, json={"model": "parrot", "temperature": 0, **body})


def said(reply) -> str:
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.mark.parametrize("path, prompt, nothing, schema", PATHS)
def test_what_asks_for_nothing_changes_nothing(post, path, prompt, nothing, schema):
    plain = said(post(path, **prompt))
    everything = {**NOTHING, **nothing}
    assert said(post(path, **prompt, **everything)) == plain
    for name, value in everything.items():
        assert said(post(path, **prompt, **{name: value})) == plain, name


@pytest.mark.parametrize("path, prompt, nothing, schema", PATHS)
def test_what_is_not_supported_is_taken_at_its_neutral_values_alone(post, path, prompt, nothing, schema):
    plain = said(post(path, **prompt))
    table = {
        name: value["enum"] for name, value in schema["properties"].items() if "type" not in value if "enum" in value
    }
    assert {"store", "length_penalty", "stop_token_ids"} < set(table)
    for name, values in table.items():
        for value in values:
            assert said(post(path, **prompt, **{name: value})) == plain, (name, value)
        for other in ("something", 7, ["something"], {"some": "thing"}):
            reply = post(path, **prompt, **{name: other})
            assert reply.status_code == 400, (name, other)
            error = reply.json()["error"]
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
            assert name in error["message"] and json.dumps(values[0]) in error["message"]


@pytest.mark.parametrize("name, value", [("store", True), ("store", 0), ("priority", False), ("use_beam_search", 0)])
def test_a_number_is_no_switch(post, name, value):
    assert post(TEXTS, prompt="a", **{name: value}).json()["error"]["param"] == name


def test_what_a_client_sends_back_of_a_reply_is_a_message(post, client, dialogues):
    first = client.chat.completions.create(model="parrot", messages=HELLO, temperature=0).choices[0].message
    more = {"annotations": [], "tool_calls": [], "refusal": None, "reasoning_content": "", "audio": None}
    messages = [*HELLO, {**first.model_dump(), **more}, {"role": "user", "content": "Count to ten."}]
    plain = [*HELLO, {"role": "assistant", "content": dialogues["Hello"]}, messages[2]]
    assert said(post(CHATS, messages=messages)) == said(post(CHATS, messages=plain))
    assert set(more) - {"audio"} <= set(ASSISTANT_MESSAGE["properties"])
    error = post(CHATS, messages=[{**HELLO[0], "tool_calls": [{"id": "a"}]}]).json()["error"]
    assert error["param"] == "messages[0].tool_calls"


def test_an_empty_stop_string_stops_nothing(post, dialogues):
    assert said(post(CHATS, messages=HELLO, stop="")) == dialogues["Hello"]


def test_many_stop_strings_are_looked_for(post, dialogues):
    stops = [f"nothing {number}" for number in range(63)]
    assert said(post(CHATS, messages=HELLO, stop=[*stops, "How"])) == "Hi there! "
    assert said(post(CHATS, messages=HELLO, stop=[*stops, "never"])) == dialogues["Hello"]
    assert post(CHATS, messages=HELLO, stop=[*stops, "a", "b"]).json()["error"]["param"] == "stop"


def test_equal_limits_of_both_names_are_one(post):
    assert said(post(CHATS, messages=HELLO, max_tokens=5, max_completion_tokens=5)) == "Hi th"
    for limits in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        assert post(TEXTS, prompt="Hello", ignore_eos=True, **limits).json()["usage"]["completion_tokens"] == 3
    reply = post(TEXTS, prompt="Hello", max_tokens=3, max_completion_tokens=4)
    assert reply.json()["error"]["param"] == "max_tokens"


def test_the_names_of_speakers_reach_templates_that_show_them(start_server, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "named")
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.name %}{{ m.name }}: {% endif %}"
        "{{ m.content }}<|endoftext|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    JinjaTemplate(source).save_pretrained(tmp_path / "named")
    url, _ = start_server(load(tmp_path / "named", device="cpu"))

    def text(**message):
        body = {"messages": [{"role": "user", "content": "Hello", **message}]}
        return httpx.post(f"{url}/tokenize", json={**body, "return_token_strs": True}).json()["token_strs"]

    assert "".join(text(name="Ann")) == "<|user|>Ann: Hello<|endoftext|><|assistant|>"
    assert "".join(text()) == "".join(text(name="")) == "<|user|>Hello<|endoftext|><|assistant|>"
    assert text(name="<|assistant|>").count("<|assistant|>") == 1  # the other one is a text of so many characters


def test_the_end_of_a_turn_may_be_ignored(post, dialogues):
    reply = post(CHATS, messages=HELLO, ignore_eos=True, max_tokens=100).json()
    assert reply["usage"]["completion_tokens"] == 100
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["choices"][0]["message"]["content"].startswith(dialogues["Hello"])
    again = post(CHATS, messages=HELLO, ignore_eos=True, max_tokens=100, stop=["How"])
    assert said(again) == "Hi there! "


@pytest.mark.parametrize("path, prompt", [(CHATS, {"messages": HELLO}), (TEXTS, {"prompt": "Hello"})])
def test_usage_comes_with_every_chunk_if_asked_for(post, path, prompt):
    def chunks(**options):
        text = post(path, **prompt, n=2, max_tokens=7, ignore_eos=True, stream=True, **options).text
        return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")]

    *found, last = chunks(stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert counts == sorted(counts)
    assert counts[0] <= 1 and counts[-1] == last["usage"]["completion_tokens"] == 14
    assert len(set(counts)) > 5
    for chunk in found:
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert all(chunk["usage"] is None for chunk in chunks(stream_options={"include_usage": True})[:-1])
    assert not any("usage" in chunk for chunk in chunks(stream_options={"continuous_usage_stats": True}))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"min_p": 1}, {"top_p": 0}])
def test_a_truncation_to_one_token_is_greedy(post, dialogues, options):
    assert said(post(CHATS, messages=HELLO, temperature=2, seed=1, **options)) == dialogues["Hello"]
    assert said(post(CHATS, messages=HELLO, temperature=2, seed=1, max_tokens=20)) != dialogues["Hello"][:20]


@pytest.mark.parametrize("penalty", [0.02, 3, 20])
def test_a_penalised_reply_is_that_of_generate(post, served_model, penalty):
    prompt = encode_prompt(HELLO, served_model.tokenizer, served_model.template)
    options = {"temperature": 0, "max_new_tokens": 40, "repetition_penalty": penalty}
    expected = served_model.palm.generate(prompt=prompt, eos_token=served_model.tokenizer.eos_token, **options)
    text = served_model.tokenizer.decode(expected.tolist()).rstrip("\ufffd")
    assert said(post(CHATS, messages=HELLO, max_tokens=40, repetition_penalty=penalty)) == text
    unpenalised = served_model.palm.generate(prompt=prompt, **{**options, "repetition_penalty": 1.0})
    assert not torch.equal(expected, unpenalised[: len(expected)])
