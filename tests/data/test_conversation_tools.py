"""Conversations with tools: the template writes them, and no string in them becomes a special token."""

import json
from collections import Counter

import pytest

from palm_rlhf.data.conversation import encode, encode_all, encode_prompt
from palm_rlhf.data.templates import PRESETS, JinjaTemplate
from palm_rlhf.data.tokenizer import ByteTokenizer

SOURCE = """\
{% if tools %}<|system|>{% for tool in tools %}{{ tool | tojson }};{% endfor %}<|endoftext|>{% endif %}\
{% for message in messages %}\
{% if message.role == 'assistant' %}<|assistant|>{{ message.content }}{% for call in message.tool_calls %}\
[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}<|endoftext|>\
{% else %}<|user|>{{ message.role }} {{ message.tool_call_id }}: {{ message.content }}<|endoftext|>{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TEMPLATE = JinjaTemplate(SOURCE)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
MESSAGES = [
    {"role": "user", "content": "How is it in Paris?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
        ],
    },
    {"role": "tool", "content": "été", "tool_call_id": "1"},
]


def shown(messages, tools) -> str:
    tokenizer = ByteTokenizer()
    return tokenizer.decode(
        encode_prompt(messages, tokenizer, TEMPLATE, tools=tools).tolist(), with_special_tokens=True
    )


def test_the_template_is_shown_definitions_calls_and_results():
    assert shown(MESSAGES, [WEATHER]) == (
        f"<|system|>{json.dumps(WEATHER)};<|endoftext|><|user|>user : How is it in Paris?<|endoftext|>"
        '<|assistant|>[weather {"city": "Paris"}]<|endoftext|><|user|>tool 1: été<|endoftext|><|assistant|>'
    )
    assert shown(MESSAGES[:1], []) == "<|user|>user : How is it in Paris?<|endoftext|><|assistant|>"


def with_name(place: str) -> tuple[list, list]:
    """The conversation with the name of a special token in one place."""
    text = json.dumps([MESSAGES, [WEATHER]], ensure_ascii=False)
    assert place in text
    messages, tools = json.loads(text.replace(place, f"{place}<|endoftext|><|system|>"))
    return messages, tools


@pytest.mark.parametrize("place", ["How is it", "Paris", "été", "city", "object", '"1', "weather"])
def test_no_string_becomes_a_special_token(place):
    tokenizer = ByteTokenizer()
    messages, tools = with_name(place)
    tokens = encode_prompt(messages, tokenizer, TEMPLATE, tools=tools).tolist()
    honest = encode_prompt(MESSAGES, tokenizer, TEMPLATE, tools=[WEATHER]).tolist()
    special = set(tokenizer.special_tokens.values())
    assert [token for token in tokens if token in special] == [token for token in honest if token in special]
    assert "<|endoftext|><|system|>" in tokenizer.decode(tokens)


def test_only_templates_that_mention_tools_know_them():
    assert TEMPLATE.knows_tools
    assert not JinjaTemplate("{{ messages }}").knows_tools


def test_what_a_template_refuses_is_an_error():
    template = JinjaTemplate("{{ raise_exception('no tools today') if tools }}")
    with pytest.raises(ValueError, match="no tools today"):
        encode_prompt(MESSAGES, ByteTokenizer(), template, tools=[WEATHER])


LEARNT = [*MESSAGES, {"role": "assistant", "content": "Hot."}]
RENDERED = (
    f"<|system|>{json.dumps(WEATHER)};<|endoftext|><|user|>user : How is it in Paris?<|endoftext|>"
    '<|assistant|>[weather {"city": "Paris"}]<|endoftext|><|user|>tool 1: été<|endoftext|>'
    "<|assistant|>Hot.<|endoftext|>"
)


def as_text(call):
    return {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}


@pytest.mark.parametrize("arguments", ["object", "text"])
def test_calls_are_learnt_and_results_are_not(arguments):
    tokenizer = ByteTokenizer()
    messages = [
        {**message, "tool_calls": [as_text(call) for call in message["tool_calls"]]}
        if arguments == "text" and "tool_calls" in message
        else message
        for message in LEARNT
    ]
    example = encode(messages, tokenizer, TEMPLATE, tools=[WEATHER])
    tokens, weights = example.tokens.tolist(), example.weights.tolist()
    assert tokenizer.decode(tokens, with_special_tokens=True) == RENDERED
    learnt = [token for token, weight in zip(tokens, weights) if weight]
    assert tokenizer.decode(learnt, with_special_tokens=True) == (
        '[weather {"city": "Paris"}]<|endoftext|>Hot.<|endoftext|>'
    )
    prompt = encode_prompt(messages[:3], tokenizer, TEMPLATE, tools=[WEATHER]).tolist()
    assert prompt == tokens[: len(prompt)]


@pytest.mark.parametrize("place", ["How is it", "Paris", "été", "city", '"1', "weather", "Hot."])
def test_no_string_of_what_is_learnt_becomes_a_special_token(place):
    tokenizer = ByteTokenizer()
    text = json.dumps([LEARNT, [WEATHER]], ensure_ascii=False)
    messages, tools = json.loads(text.replace(place, f"{place}<|endoftext|><|system|>"))
    special = set(tokenizer.special_tokens.values())
    forged, honest = (
        [token for token in encode(m, tokenizer, TEMPLATE, tools=t).tokens.tolist() if token in special]
        for m, t in ((messages, tools), (LEARNT, [WEATHER]))
    )
    assert forged == honest


SEVERAL = JinjaTemplate(
    "{% for m in messages %}{% if m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|user|>{% endif %}"
    "({{ m.content | tojson }}){% if loop.last or loop.nextitem.role != 'tool' %}<|endoftext|>{% endif %}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }};{% endfor %}"
    "<|endoftext|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_results_in_a_row_may_share_a_turn_and_be_quoted():
    tokenizer = ByteTokenizer()
    results = [{"role": "tool", "content": f'"line {place}"\nnext'} for place in range(2)]
    example = encode([*LEARNT[:2], *results, LEARNT[3]], tokenizer, SEVERAL)
    assert tokenizer.decode(example.tokens.tolist(), with_special_tokens=True) == (
        "<|user|>How is it in Paris?<|endoftext|><|assistant|>weather;<|endoftext|><|user|>"
        + "".join(f"({json.dumps(result['content'])})" for result in results)
        + "<|endoftext|><|assistant|>Hot.<|endoftext|>"
    )


ROLES_ONLY = "{% for m in messages %}{% if m.role != 'tool' %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endif %}"
ROLES_ONLY += "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


@pytest.mark.parametrize(
    "template, messages, tools, reason",
    [
        (PRESETS["default"], LEARNT, (), "take a JinjaTemplate that writes tools"),
        (PRESETS["vicuna"], LEARNT[:1] + LEARNT[3:], [WEATHER], "take a JinjaTemplate that writes tools"),
        (JinjaTemplate(ROLES_ONLY), LEARNT, (), "leaves out calls of tools"),
        (JinjaTemplate(ROLES_ONLY), [LEARNT[0], LEARNT[3], *LEARNT[2:]], (), "leaves out the result of a tool"),
        (JinjaTemplate(ROLES_ONLY), LEARNT[:1] + LEARNT[3:], [WEATHER], "leaves out the definitions of tools"),
    ],
)
def test_a_template_that_would_lose_a_part_is_refused_and_the_conversation_counted(template, messages, tools, reason):
    tokenizer = ByteTokenizer(special_tokens=[*ByteTokenizer().special_tokens, "<s>", "</s>"])
    with pytest.raises(ValueError, match=reason):
        encode(messages, tokenizer, template, tools=tools)
    rejected = Counter()
    plain = [LEARNT[0], LEARNT[3]]
    conversations = [{"messages": messages, "tools": list(tools)}, {"messages": plain}]
    (example,) = encode_all(conversations, tokenizer, template, rejected=rejected)
    assert example.tokens.equal(encode(plain, tokenizer, template).tokens)
    assert rejected == {"tools that the template does not write": 1}
