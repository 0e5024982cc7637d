"""Files of every kind as what a trainer learns from; conversations with tools only where the template writes them."""

import pytest

from palm_rlhf.cli import main
from palm_rlhf.commands.start_models import ChatModel
from palm_rlhf.commands.training_data import examples_of, fit_to_context, read_prompts, read_records_for
from palm_rlhf.data.conversation import encode, encode_prompt
from palm_rlhf.data.files.records import write_records
from palm_rlhf.data.templates import PRESETS, JinjaTemplate
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM

WITH_TOOLS = JinjaTemplate(
    "{% if tools %}{{ tools | tojson }}<|endoftext|>{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
PLAIN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
CALLING = [
    {"role": "user", "content": "How is it in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "Rain"},
    {"role": "assistant", "content": "It rains."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
READ = [{**turn, "content": turn["content"] or ""} for turn in CALLING]


def model_of(template) -> ChatModel:
    tokenizer = ByteTokenizer()
    return ChatModel(PaLM(num_tokens=tokenizer.num_tokens, dim=16, depth=1, heads=1, dim_head=16), tokenizer, template)


@pytest.fixture(params=["jsonl", "csv", "parquet"])
def file(tmp_path, request):
    path = tmp_path / f"conversations.{request.param}"
    write_records(path, [{"messages": PLAIN}, {"messages": CALLING, "tools": TOOLS}])
    return path


def test_conversations_with_tools_are_learnt_where_the_template_writes_them(file):
    model = model_of(WITH_TOOLS)
    examples = examples_of(fit_to_context(read_records_for(file, "sft"), 1000, model), model)
    expected = [encode(PLAIN, model.tokenizer, WITH_TOOLS), encode(READ, model.tokenizer, WITH_TOOLS, tools=TOOLS)]
    assert [example.tokens.tolist() for example in examples] == [example.tokens.tolist() for example in expected]
    prompts = read_prompts(file, model)
    assert [prompt.tolist() for prompt in prompts] == [
        encode_prompt(PLAIN[:1], model.tokenizer, WITH_TOOLS).tolist(),
        encode_prompt(CALLING[:1], model.tokenizer, WITH_TOOLS, tools=TOOLS).tolist(),
    ]


def test_elsewhere_they_are_left_out_and_counted_aloud(file, capsys):
    model = model_of(PRESETS["default"])
    (example,) = examples_of(fit_to_context(read_records_for(file, "sft"), 1000, model), model)
    assert example.tokens.equal(encode(PLAIN, model.tokenizer, model.template).tokens)
    assert "left out 1 conversations: tools that the template does not write" in capsys.readouterr().err
    (prompt,) = read_prompts(file, model)
    assert prompt.equal(encode_prompt(PLAIN[:1], model.tokenizer, model.template))
    assert "left out 1 prompts with tools" in capsys.readouterr().err


def test_nothing_but_tools_is_an_error(tmp_path):
    model = model_of(PRESETS["default"])
    write_records(tmp_path / "a.jsonl", [{"messages": CALLING}, {"messages": CALLING[:2], "tools": TOOLS}])
    with pytest.raises(ValueError, match="got only conversations with tools"):
        examples_of(read_records_for(tmp_path / "a.jsonl", "sft"), model)
    write_records(tmp_path / "b.jsonl", [{"messages": CALLING, "tools": TOOLS}])
    with pytest.raises(ValueError, match="only prompts with tools"):
        read_prompts(tmp_path / "b.jsonl", model)


def test_the_prompts_that_convert_writes_are_read(file, tmp_path):
    model = model_of(WITH_TOOLS)
    out = tmp_path / f"prompts{file.suffix}"
    main(["data", "convert", str(file), "--to", "prompts", "--out", str(out)])
    expected = [prompt.tolist() for prompt in read_prompts(file, model)]
    assert [prompt.tolist() for prompt in read_prompts(out, model)] == expected
