"""A reply that was cut goes on where it ended, as vLLM's `continue_final_message` has it."""

import json

import httpx
import pytest

from palm_rlhf.data.conversation import encode
from palm_rlhf.data.templates import PRESETS, JinjaTemplate
from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.served_model import ServedModel

CHATS = "/v1/chat/completions"
CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}
TEXTS = ["USER: Where is Rome? ASSISTANT: In Italy, on the Tiber.", "[INST] Where is Rome? [/INST] In Italy."]
LLAMA2 = JinjaTemplate(
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def ask(server):
    """Posts messages for the parrot, greedily."""
    with httpx.Client(base_url=server[0], timeout=900) as http:
        yield lambda messages, **body: http.post(
            CHATS, json={"model": "parrot", "temperature": 0, "messages": messages, **body}
        )


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(contents)]


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_a_reply_goes_on_where_it_was_cut(ask, dialogues, cut):
    for question in ("Count to ten.", "Hello", "What is the capital of France?"):
        reply = dialogues[question]
        said = ask(turns(question, reply[:cut]), **CONTINUED).json()
        assert said["choices"][0]["message"]["content"] == reply[cut:], reply[:cut]
        assert said["choices"][0]["finish_reason"] == "stop"
    streamed = ask(turns("Count to ten.", "1 2 3"), stream=True, **CONTINUED)
    chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    words = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert words == dialogues["Count to ten."][5:]


def test_its_tokens_can_be_counted(server):
    messages = turns("Count to ten.", "1 2 3")
    reply = httpx.post(f"{server[0]}/tokenize", json={"messages": messages, **CONTINUED}, timeout=900).json()
    assert bytes(reply["tokens"][-5:]) == b"1 2 3"


def test_without_it_the_assistant_begins_a_message_of_its_own(ask, dialogues):
    messages = turns("Count to ten.", "1 2 3")
    assert ask(messages).json()["choices"][0]["message"]["content"] != dialogues["Count to ten."][5:]
    said = ask(turns("Hello"), add_generation_prompt=True, continue_final_message=False).json()
    assert said["choices"][0]["message"]["content"] == dialogues["Hello"]


@pytest.mark.parametrize(
    ("messages", "body", "param"),
    [
        (turns("Hello"), CONTINUED, "continue_final_message"),
        (turns("Hello", "Hi"), {**CONTINUED, "response_format": {"type": "json_object"}}, "continue_final_message"),
        (turns("Hello"), {"add_generation_prompt": False}, "add_generation_prompt"),
        ([{"role": "assistant", "content": "Hi"}], CONTINUED, "messages"),
    ],
)
def test_what_cannot_go_on_is_refused_by_name(ask, messages, body, param):
    reply = ask(messages, **body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


def served_model(template, tokenizer) -> ServedModel:
    return ServedModel(
        "m", PaLM(num_tokens=tokenizer.num_tokens, dim=8, depth=1, heads=1, dim_head=8), tokenizer, template
    )


@pytest.mark.parametrize("name", ["default", "oasst", "vicuna", "openchat", "llama2"])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_tokens_are_the_beginning_of_the_whole_reply(name, kind):
    template = LLAMA2 if name == "llama2" else PRESETS[name]
    names = sorted({*template.special_tokens, "<s>", "</s>"})
    tokenizer = (
        ByteTokenizer(names, eos_token="</s>")
        if kind == "bytes"
        else HuggingFaceTokenizer.train(TEXTS * 5, 330, names, eos_token="</s>")
    )
    model, reply = served_model(template, tokenizer), "In Italy, on the Tiber."
    whole = encode(turns("Where is Rome?", reply), tokenizer, template).tokens.tolist()
    for cut in (len("In Italy"), len("In Italy, on"), len(reply)):
        found = model.encode_continued(turns("Where is Rome?", reply[:cut]))
        assert found == whole[: len(found)]
        assert tokenizer.decode(found).endswith(reply[:cut])


def test_a_transcript_goes_on_too():
    model = served_model(None, ByteTokenizer())
    assert bytes(model.encode_continued(turns("Hi", "Hel"))) == b"User:\nHi\n\nAssistant:\nHel"
