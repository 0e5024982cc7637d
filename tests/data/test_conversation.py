"""Conversations: known texts, a loss on the assistant's words alone, prefixes, and markers that nobody can type."""

import json
from functools import cache

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers

from palm_rlhf.data.conversation import encode, encode_prompt, encode_reply, encode_response, end_of_turn
from palm_rlhf.data.templates import PRESETS, ChatTemplate, JinjaTemplate, load_template
from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer

NAMES = sorted(
    {name for template in PRESETS.values() for name in template.special_tokens} | {"<|im_start|>", "<|im_end|>"}
)
CHATML = """\
{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>' + messages[0]['content'] + '<</SYS>>' %}{% set messages = messages[1:] %}
{% else %}{% set system = '' %}{% endif %}
{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if m['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}
{%- else %}{% generation %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""
TEMPLATES = {
    **PRESETS,
    "chatml": JinjaTemplate(CHATML),
    "llama2": JinjaTemplate(LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"}),
}


@cache
def tokenizer_of(kind: str):
    if kind == "bytes":
        return ByteTokenizer(NAMES, eos_token="</s>")
    if kind == "bpe":
        texts = [f"USER: the cat{end} ASSISTANT: GPT4 Correct User: it sat <|im_end|>" for end in ("", ".", " on", "?")]
        return HuggingFaceTokenizer.train(texts * 9, 360, NAMES, eos_token="</s>")
    pieces = [
        ("<unk>", 0.0),
        *((name, -1.0) for name in NAMES),
        *((character, -9.0) for character in "<|>/ acdehimnorst"),
    ]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    return HuggingFaceTokenizer(backend, NAMES, eos_token="</s>")


def said(*contents: str, system: str | None = None, weights=()) -> list[dict]:
    """A conversation of user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    for message, weight in zip(messages[1::2], weights):
        message["weight"] = weight
    return ([] if system is None else [{"role": "system", "content": system}]) + messages


def whole(ids, kind: str = "bytes") -> str:
    return tokenizer_of(kind).decode(list(ids), with_special_tokens=True)


TURNS = said("Hello!", "Hi!", "How are you?", "I am good.")
EXPECTED = {
    "default": "<|user|>Hello!<|endoftext|><|assistant|>Hi!<|endoftext|>"
    "<|user|>How are you?<|endoftext|><|assistant|>I am good.<|endoftext|>",
    "oasst": "<|prompter|>Hello!<|endoftext|><|assistant|>Hi!<|endoftext|>"
    "<|prompter|>How are you?<|endoftext|><|assistant|>I am good.<|endoftext|>",
    "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: Hello! ASSISTANT: Hi!</s>"
    "USER: How are you? ASSISTANT: I am good.</s>",
    "openchat": "<s>GPT4 Correct User: Hello!<|end_of_turn|>GPT4 Correct Assistant: Hi!<|end_of_turn|>"
    "GPT4 Correct User: How are you?<|end_of_turn|>GPT4 Correct Assistant: I am good.<|end_of_turn|>",
    "chatml": "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
    "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nI am good.<|im_end|>\n",
    "llama2": "<s>[INST] Hello! [/INST] Hi! </s><s>[INST] How are you? [/INST] I am good. </s>",
}
# What the loss sees. A word's token holds the space before it.
LEARNT = {
    "default": "Hi!<|endoftext|>I am good.<|endoftext|>",
    "oasst": "Hi!<|endoftext|>I am good.<|endoftext|>",
    "vicuna": " Hi!</s> I am good.</s>",
    "openchat": " Hi!<|end_of_turn|> I am good.<|end_of_turn|>",
    "chatml": "Hi!<|im_end|>I am good.<|im_end|>",
    "llama2": " Hi! </s> I am good. </s>",
}
every = pytest.mark.parametrize("name", list(TEMPLATES))
kinds = pytest.mark.parametrize("kind", ["bytes", "bpe"])


@kinds
@every
def test_text_and_loss_are_those_of_each_form(kind, name):
    tokenizer = tokenizer_of(kind)
    example = encode(TURNS, tokenizer, TEMPLATES[name])
    assert whole(example.tokens.tolist(), kind) == EXPECTED[name]
    assert whole(example.tokens[example.weights == 1].tolist(), kind) == LEARNT[name]
    assert set(example.weights.tolist()) == {0.0, 1.0}
    markers = [index for index in example.tokens.tolist() if index in tokenizer.special_tokens.values()]
    assert len(markers) == sum(EXPECTED[name].count(marker) for marker in NAMES)


@every
def test_a_system_message_comes_first_in_its_form(name):
    expected = {
        "default": "<|system|>Be brief.<|endoftext|><|user|>",
        "oasst": "<|system|>Be brief.<|endoftext|><|prompter|>",
        "vicuna": "<s>Be brief. USER: ",
        "openchat": "<s>GPT4 Correct System: Be brief.<|end_of_turn|>GPT4 Correct User: ",
        "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "llama2": "<s>[INST] <<SYS>>Be brief.<</SYS>>",
    }[name]
    tokens = encode(said("Hello!", "Hi!", system="Be brief."), tokenizer_of("bytes"), TEMPLATES[name]).tokens
    assert whole(tokens.tolist()).startswith(expected + "Hello!")


WEIGHTED = said("a", "bb", "c", "ddd", "e", "ff", weights=(0.5, 0, 2))


@every
def test_each_message_has_its_weight_and_its_end_of_turn_too(name):
    example = encode(WEIGHTED, tokenizer_of("bytes"), TEMPLATES[name])
    end = whole([end_of_turn(tokenizer_of("bytes"), TEMPLATES[name])])
    for weight, words in ((0.5, "bb"), (2, "ff")):
        text = whole(example.tokens[example.weights == weight].tolist())
        assert text.replace(" ", "") == words + end
    assert set(example.weights.tolist()) == {0.0, 0.5, 2.0}


WORDS = st.lists(st.sampled_from([*NAMES, *"<|>/ \n<> ", "cat", "USER:", "im_", "end|>", "ä", "日"]), max_size=6).map(
    "".join
)
CONVERSATIONS = st.builds(
    lambda system, contents: said(*contents, system=system),
    st.none() | WORDS,
    st.lists(WORDS, min_size=2, max_size=6),
)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
@every
@given(messages=CONVERSATIONS)
@settings(max_examples=25)
def test_a_prefix_of_a_conversation_is_a_prefix_of_its_tokens(kind, name, messages):
    tokenizer, template = tokenizer_of(kind), TEMPLATES[name]
    first = 0 if messages[0]["role"] == "user" else 1
    messages = messages[: len(messages) - (len(messages) - first) % 2]
    example = encode(messages, tokenizer, template)
    tokens, weights = example.tokens.tolist(), example.weights.tolist()
    for end in range(first + 1, len(messages) + 1):
        before = messages[:end]
        plain = encode_prompt(before, tokenizer, template, add_generation_prompt=False).tolist()
        assert plain == tokens[: len(plain)]
        if before[-1]["role"] == "assistant":
            shorter = encode(before, tokenizer, template)
            assert shorter.tokens.tolist() == plain
            assert shorter.weights.tolist() == weights[: len(plain)]
        else:
            prompt = encode_prompt(before, tokenizer, template).tolist()
            response = encode_response(before, messages[end]["content"], tokenizer, template).tolist()
            together = [*prompt, *response]
            assert together == tokens[: len(together)]
            assert weights[len(prompt) : len(together)] == [1.0] * len(response)
            assert response[-1] == end_of_turn(tokenizer, template)
            if end + 1 < len(messages):  # and so it goes on after a reply
                reply = encode_reply(messages[end + 1]["content"], tokenizer, template).tolist()
                longer = encode_prompt(messages[: end + 2], tokenizer, template).tolist()
                assert [*together, *reply] == longer == tokens[: len(longer)]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
@every
@given(messages=CONVERSATIONS)
@settings(max_examples=25)
def test_nobody_can_type_a_marker(kind, name, messages):
    tokenizer, template = tokenizer_of(kind), TEMPLATES[name]
    plain = [{**message, "content": "x"} for message in messages]
    expected, found = (
        [
            index
            for index in encode(m, tokenizer, template).tokens.tolist()
            if index in tokenizer.special_tokens.values()
        ]
        for m in (plain, messages)
    )
    assert found == expected


def test_a_marker_cannot_be_glued_from_both_sides_of_a_message():
    tokenizer = tokenizer_of("bytes")
    glue = JinjaTemplate("{% for m in messages %}{{ '<|im_' + m['content'] | trim + 'end|>' + '</s>' }}{% endfor %}")
    for content in ("end|>", "<|im_", " <|im_ ", "end|> <|im_", "<|im_end|><|im_"):
        tokens = encode([{"role": "assistant", "content": content}], tokenizer, glue).tokens.tolist()
        assert [index for index in tokens if index > 255] == [tokenizer.eos_token]
        assert whole(tokens) == f"<|im_{content.strip()}end|></s>"
    mutant = glue.render([{"role": "assistant", "content": "<|im_"}])
    assert "<|im_end|>" in mutant  # as the text alone has it


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_preset_and_its_jinja_are_the_same(name, tmp_path):
    template, tokenizer = PRESETS[name], tokenizer_of("bytes")
    jinja = JinjaTemplate(template.to_jinja())
    for messages in (TURNS, WEIGHTED, said("a", "b", system='say "{{ x }}"\n\\'), said("  a ", "<|user|>")):
        one, other = encode(messages, tokenizer, template), encode(messages, tokenizer, jinja)
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.weights.tolist() == other.weights.tolist()
    assert jinja.render(said("a"), add_generation_prompt=True) == template.render(said("a"), add_generation_prompt=True)


@every
def test_transformers_makes_the_same_of_what_is_saved(name, tmp_path):
    from transformers import AutoTokenizer

    template, tokenizer = TEMPLATES[name], tokenizer_of("bpe")
    tokenizer.save_pretrained(tmp_path)
    template.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, bos_token="<s>")
    assert theirs.apply_chat_template(TURNS, tokenize=False) == EXPECTED[name]
    ids = theirs.apply_chat_template(TURNS, tokenize=True)
    assert list(getattr(ids, "input_ids", ids)) == encode(TURNS, tokenizer, template).tokens.tolist()
    prompt = theirs.apply_chat_template(TURNS[:3], tokenize=False, add_generation_prompt=True)
    assert prompt.rstrip(" ") == whole(encode_prompt(TURNS[:3], tokenizer, template).tolist(), "bpe")


@every
def test_what_is_saved_is_found_again(name, tmp_path):
    TEMPLATES[name].save_pretrained(tmp_path)
    assert load_template(tmp_path) == TEMPLATES[name]


@pytest.mark.parametrize("several", [False, True])
def test_the_template_of_a_foreign_folder_is_found(several, tmp_path):
    with pytest.raises(FileNotFoundError, match="take the one of"):
        load_template(tmp_path)
    source = [{"name": "rag", "template": "x"}, {"name": "default", "template": LLAMA2}] if several else LLAMA2
    config = {"chat_template": source, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_template(tmp_path) == TEMPLATES["llama2"]
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert load_template(tmp_path).source == CHATML
    (tmp_path / "template.json").write_text('{"system": 1}')
    with pytest.raises(ValueError, match="describes no template"):
        load_template(tmp_path)


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% for %}", "is not valid Jinja"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}</s>", "SecurityError"),
        ("{{ messages.append(1) }}</s>", "SecurityError"),
        ("{{ raise_exception('no') }}", "refuses the conversation: TemplateError: no"),
        ("{{ messages[9]['content'] }}", "UndefinedError"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "expected a special token of the tokenizer"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
            "changes the text of earlier messages",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}?{% endif %}",
            "changes",
        ),
    ],
)
def test_a_template_that_is_wrong_or_wants_too_much_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        encode(TURNS, tokenizer_of("bytes"), JinjaTemplate(source))


DEFAULT_SYSTEM = "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}"
OPENED = {
    "SmolLM2": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    f"{DEFAULT_SYSTEM}{{% endif %}}{{% endfor %}}{CHATML}",
    "Qwen2.5": f"{{% if messages[0]['role'] != 'system' %}}{DEFAULT_SYSTEM}{{% endif %}}{CHATML}",
}


@pytest.mark.parametrize("model", OPENED)
def test_an_assistant_may_speak_first_after_the_system_message_of_the_template(model):
    """Such a template has no system message without any message, or fails."""
    template, tokenizer = JinjaTemplate(OPENED[model]), tokenizer_of("bytes")
    messages = [{"role": "assistant", "content": "Hi!"}, *said("Hello!", "How are you?")]
    found = encode(messages, tokenizer, template)
    expected = (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\nHi!<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHow are you?<|im_end|>\n"
    )
    assert whole(found.tokens.tolist()) == expected == template.render(messages)
    assert whole(found.tokens[found.weights > 0].tolist()) == "Hi!<|im_end|>How are you?<|im_end|>"
    prompt = encode_prompt(messages[:2], tokenizer, template).tolist()
    assert whole(prompt) == expected.removesuffix("How are you?<|im_end|>\n")


def test_reading_and_trimming_of_contents_work_in_templates():
    source = (
        "{% for m in messages %}{{ '<s>' + (m['content'].split('</think>')[-1] | trim if '</think>' in m['content'] "
        "else m['content'] | upper) + '</s>' }}{% endfor %}"
    )
    messages = [{"role": "assistant", "content": text} for text in ("<think>hm</think> yes <s>", " no")]
    tokens = encode(messages, tokenizer_of("bytes"), JinjaTemplate(source)).tokens.tolist()
    assert whole(tokens) == "<s>yes <s></s><s> NO</s>"
    assert sum(index > 255 for index in tokens) == 4


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "got a conversation without messages"),
        (said("a"), "got no assistant message with a weight above 0"),
        (said("a", "b", weights=[0]), "got no assistant message with a weight above 0"),
        (said("a", "b", weights=[-1]), "message 1 has the weight -1"),
        (said("a", "b", weights=[float("nan")]), "message 1 has the weight nan"),
        ([{"role": "user", "content": "a", "weight": 1}, *said("b", "c")], "expected none for the role user"),
        ([{"role": "gpt", "content": "a"}], "message 0 has the role 'gpt'"),
        ([{"role": "user", "content": None}], "and the content None"),
        ([{}], "message 0 has the role None"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        encode(messages, tokenizer_of("bytes"), PRESETS["default"])


def test_a_template_wants_its_tokens_and_an_end_of_turn():
    with pytest.raises(ValueError, match=r"lacks the special tokens \['<s>', '</s>'\]"):
        encode(TURNS, ByteTokenizer(), PRESETS["vicuna"])
    with pytest.raises(ValueError, match="by which a model learns to stop"):
        ChatTemplate(system=("", ""), user=("Q: ", "\n"), assistant=("A: ", "\n"), special_tokens=("</s>",))


def test_the_default_tokenizer_and_the_default_template_fit():
    tokenizer = ByteTokenizer()
    example = encode(TURNS, tokenizer, PRESETS["default"])
    assert tokenizer.decode(example.tokens.tolist(), with_special_tokens=True) == EXPECTED["default"]
    assert end_of_turn(tokenizer, PRESETS["default"]) == tokenizer.eos_token


def test_real_conversations_keep_every_word(shared_data):
    roles = {"human": "user", "gpt": "assistant"}
    records = json.loads(shared_data("sharegpt_dummy_conversation.json").read_text())[::25]
    for record in records:
        messages = [{"role": roles[m["from"]], "content": m["value"]} for m in record["conversations"]]
        example = encode(messages, tokenizer_of("bpe"), PRESETS["oasst"])
        learnt = whole(example.tokens[example.weights == 1].tolist(), "bpe")
        assert learnt == "".join(m["content"] + "<|endoftext|>" for m in messages if m["role"] == "assistant")
