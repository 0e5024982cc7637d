"""Switches of chat templates, such as enable_thinking of Qwen3: what the template reads, a request can set."""

import httpx
import pytest

from palm_rlhf.data.templates import JinjaTemplate
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.http.app import create_app
from palm_rlhf.serving.http.run_server import running
from palm_rlhf.serving.served_model import ServedModel
from tests.factories import palm_of

SOURCE = """\
{%- for m in messages %}<|user|>{{ m.content }}<|endoftext|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
    {%- if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
    {%- if loud and tools is none %}{{ pad_token }}{% endif %}
{%- endif %}"""
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def model() -> ServedModel:
    tokenizer = ByteTokenizer()
    return ServedModel(
        name="m",
        palm=palm_of(num_tokens=tokenizer.num_tokens),
        tokenizer=tokenizer,
        template=JinjaTemplate(SOURCE, {"pad_token": "<|pad|>"}),
    )


@pytest.fixture(scope="module")
def post(model):
    with Engine(model.palm, model.tokenizer, EngineConfig()) as engine, running(create_app(model, engine)) as url:
        with httpx.Client(base_url=url, timeout=60) as http:
            yield lambda path, **body: http.post(path, json={"model": "m", **CHAT, **body})


def test_a_template_tells_what_it_reads(model):
    assert model.template.options == {"enable_thinking", "loud"}
    assert model.template.with_options({}) is model.template
    for unknown in ("messages", "tools", "pad_token", "strftime_now", "else"):
        with pytest.raises(
            ValueError, match=rf"options \['{unknown}'\], expected some of \['enable_thinking', 'loud'\]"
        ):
            model.template.with_options({unknown: True})


def test_a_prompt_has_what_the_request_asks_for(model, post):
    tokenizer = model.tokenizer
    plain = model.encode_chat(CHAT["messages"])
    for options, text in (
        ({}, ""),
        ({"enable_thinking": True}, ""),
        ({"enable_thinking": False}, "<think></think>"),
        ({"enable_thinking": False, "loud": True}, "<think></think><|pad|>"),
    ):
        expected = tokenizer.decode(plain, with_special_tokens=True) + text
        reply = post("/tokenize", model="m", chat_template_kwargs=options).json()
        assert tokenizer.decode(reply["tokens"], with_special_tokens=True) == expected
        usage = post("/v1/chat/completions", chat_template_kwargs=options, max_tokens=1).json()["usage"]
        assert usage["prompt_tokens"] == len(reply["tokens"])
    assert model.encode_chat(CHAT["messages"]) == plain  # and later requests have their own


def test_the_longest_token_is_not_looked_for_again(model):
    """Of a real vocabulary that takes a tenth of a second, in every request with options."""
    known = ServedModel(name="m", palm=model.palm, tokenizer=model.tokenizer, template=model.template)
    vars(known)["longest_token"] = 77  # as if it had been found before
    assert known.with_template_options({"loud": True}).longest_token == 77


@pytest.mark.parametrize(
    "options", [{"thinking": True}, {"enable_thinking": "no"}, {"messages": True}, {"pad_token": True}, ["a"], 5]
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_what_the_template_does_not_read_is_refused(post, path, options):
    reply = post(path, chat_template_kwargs=options)
    assert reply.status_code == 400 and reply.json()["error"]["param"].startswith("chat_template_kwargs")


def test_a_model_without_such_a_template_has_no_options(model):
    plain = ServedModel(name="m", palm=model.palm, tokenizer=model.tokenizer)
    with pytest.raises(ValueError, match=r"got the options \['enable_thinking'\].*it has none"):
        plain.with_template_options({"enable_thinking": False})
