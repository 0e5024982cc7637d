"""Templates that write earlier replies without their reasoning, as those of Qwen3 and DeepSeek-R1 do."""

import json

import pytest
from transformers import AutoTokenizer

from palm_rlhf.data.conversation import encode, encode_all, encode_prompt, encode_reply, encode_response, end_of_turn
from palm_rlhf.data.templates import JinjaTemplate, load_template
from palm_rlhf.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.served_model import ServedModel

NAMES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|User|>", "<|Assistant|>"]
# Reasoning stays in replies after the last question, where it may be empty.
LIKE_QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set parts = m.content.split('</think>') %}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {%- set thought = parts[0].split('<think>')[-1].strip('\\n') if parts | length > 1 else '' %}
        {{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + parts[-1].lstrip('\\n') }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\\n' + (parts[-1].lstrip('\\n') if m.role == 'assistant' else m.content) }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
# The generation prompt opens the reasoning, which no conversation has.
LIKE_R1 = """\
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|User|>' + m.content }}
    {%- else %}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|endoftext|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{%- endif %}"""
CHAT = [
    {"role": "user", "content": "Is 7 a prime?"},
    {"role": "assistant", "content": "<think>\nonly 1 and 7\n</think>\n\nYes, 7 is."},
    {"role": "user", "content": "And <|im_end|> 8?"},
    {"role": "assistant", "content": "<think>\n2 times 4\n</think>\n\nNo."},
]


@pytest.fixture(scope="module", params=[LIKE_QWEN3, LIKE_R1], ids=["qwen3", "r1"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("reasoning")
    texts = [message["content"] for message in CHAT] * 3
    HuggingFaceTokenizer.train(texts, 300, NAMES, eos_token="<|endoftext|>").save_pretrained(place)
    (place / "chat_template.jinja").write_text(request.param)
    return place


@pytest.fixture(scope="module")
def parts(folder):
    return load_tokenizer(folder), load_template(folder)


def text_of(tokenizer, ids) -> str:
    return tokenizer.decode(ids, with_special_tokens=True)


@pytest.mark.parametrize("length", [1, 3])
def test_a_prompt_is_that_of_transformers_and_a_served_model_reads_it(folder, parts, length):
    tokenizer, template = parts
    messages = [{**m, "content": m["content"].replace("<|im_end|> ", "")} for m in CHAT[:length]]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(messages, tokenizer, template).tolist() == theirs
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=8, depth=1)
    served = ServedModel(name="m", palm=palm, tokenizer=tokenizer, template=template)
    assert served.encode_chat(messages) == theirs
    end = "<|im_end|>" if "im_end" in template.source else "<|endoftext|>"
    assert served.turn_ends == {tokenizer.special_tokens[end], tokenizer.eos_token}


def test_a_name_in_an_earlier_message_stays_text(parts):
    tokenizer, template = parts
    tokens = encode_prompt(CHAT[:3], tokenizer, template).tolist()
    assert "And <|im_end|> 8?" in text_of(tokenizer, tokens)
    assert tokens.count(tokenizer.special_tokens["<|im_end|>"]) == 3 * ("im_end" in template.source)
    assert "only 1" not in text_of(tokenizer, tokens)


@pytest.mark.parametrize("folder", [LIKE_QWEN3], indirect=True, ids=["qwen3"])
def test_each_reply_is_learnt_after_the_prompt_that_generation_has(parts):
    tokenizer, template = parts
    first, second = encode_all([{"messages": CHAT}], tokenizer, template)
    for example, at in ((first, 1), (second, 3)):
        prompt = encode_prompt(CHAT[:at], tokenizer, template).tolist()
        response = encode_response(CHAT[:at], CHAT[at]["content"], tokenizer, template).tolist()
        assert example.tokens.tolist()[: len(prompt + response)] == prompt + response
        assert example.weights.tolist()[: len(prompt + response)] == [0.0] * len(prompt) + [1.0] * len(response)
        assert text_of(tokenizer, response) == CHAT[at]["content"] + "<|im_end|>"
    (only,) = encode_all([{"messages": [{**CHAT[0]}, {**CHAT[1], "weight": 0}, *CHAT[2:]]}], tokenizer, template)
    assert only.tokens.tolist() == second.tokens.tolist() and only.weights.tolist() == second.weights.tolist()
    with pytest.raises(ValueError, match=r"changes the text of earlier messages.*an example of each reply"):
        encode(CHAT, tokenizer, template)
    with pytest.raises(ValueError, match=r"changes the text of earlier messages.*environment"):
        encode_reply("Go on.", tokenizer, template)


@pytest.mark.parametrize("folder", [LIKE_R1], indirect=True, ids=["r1"])
def test_what_no_prompt_of_generation_begins_is_not_learnt(parts):
    tokenizer, template = parts
    with pytest.raises(ValueError, match="the prompts of training differ from those of generation"):
        list(encode_all([{"messages": CHAT[:2]}], tokenizer, template))


def test_a_template_without_an_end_of_turn_is_refused():
    source = LIKE_R1.replace(" + '<|endoftext|>'", "").replace("'<|User|>' + ", "")
    tokenizer = HuggingFaceTokenizer.train(["a ? !"], 300, NAMES, eos_token="<|endoftext|>")
    with pytest.raises(ValueError, match="no special token after a reply"):
        end_of_turn(tokenizer, JinjaTemplate(source))


def test_tools_may_not_be_lost_where_earlier_messages_are_rewritten(parts):
    tokenizer, template = parts
    call = [{"id": "1", "type": "function", "function": {"name": "look", "arguments": json.dumps({})}}]
    messages = [*CHAT[:2], CHAT[2], {"role": "assistant", "content": "", "tool_calls": call}, CHAT[2]]
    with pytest.raises(ValueError, match="leaves out calls of tools"):
        encode_prompt(messages, tokenizer, template)
