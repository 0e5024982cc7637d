"""`palm-rlhf chat`: what it remembers of a conversation, and what it reads."""

import io
import json
import os
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.cli import main
from palm_rlhf.data.conversation import encode_prompt, end_of_turn
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.sampling import Sampling
from palm_rlhf.serving.dialogue import Dialogue, recommended_sampling
from palm_rlhf.serving.generation import EngineError
from palm_rlhf.serving.served_model import load
from palm_rlhf.serving.terminal import read_message

MAX_TOKENS = 40
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def oracle(served_model):
    """`oracle(messages)` is the greedy reply of `PaLM.generate`."""
    tokenizer, template = served_model.tokenizer, served_model.template

    def reply(messages: list[dict], max_new_tokens: int = MAX_TOKENS) -> str:
        prompt = encode_prompt(messages, tokenizer, template)
        options = {"max_new_tokens": max_new_tokens, "eos_token": end_of_turn(tokenizer, template)}
        tokens = served_model.palm.generate(prompt=prompt, temperature=0.0, **options)
        return tokenizer.decode(tokens.tolist()).rstrip("\ufffd")

    return reply


@pytest.fixture(scope="module")
def conversation_with(oracle):
    """The messages of a conversation in which a user says these things."""

    def extended(*texts: str, messages: list[dict] | None = None) -> list[dict]:
        messages = list(messages or [])
        for text in texts:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": oracle(messages)})
        return messages

    return extended


def replies(messages: list[dict]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


@pytest.fixture
def chat(checkpoint, monkeypatch, capsys):
    """`chat("Hello", "/quit")` is what a chat with these lines of input writes to its output and beside it."""

    def run(*lines: str, folder=checkpoint, options=("--temperature", "0", "--max-tokens", str(MAX_TOKENS))):
        stdin = io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        main(["chat", str(folder), *map(str, options)])
        return capsys.readouterr()

    return run


# What it remembers


def test_it_remembers_what_was_said(chat, conversation_with):
    said = ("Hello", "Tell me of Crème brûlée", "Which animals are there?")
    captured = chat(*said)
    assert captured.out == "".join(f"{reply}\n" for reply in replies(conversation_with(*said)))
    assert "> " not in captured.out + captured.err


def test_a_byte_order_mark_in_the_input_is_no_part_of_a_message(chat):
    assert chat("\ufeff/system Be kind.", "Hello") == chat("/system Be kind.", "Hello")


def test_reset_forgets_but_not_the_system_message(chat, conversation_with):
    captured = chat("/system Be kind.", "Hello", "/reset", "Hello", "/system", "/reset", "Hello")
    kind = replies(conversation_with("Hello", messages=[{"role": "system", "content": "Be kind."}]))
    assert captured.out.splitlines() == [*kind, *kind, *replies(conversation_with("Hello"))]
    assert captured.err.splitlines().count("(forgotten)") == 2


def test_the_system_message_can_be_an_option(chat, conversation_with):
    captured = chat("Hello", options=("--system", "Be kind.", "--temperature", "0", "--max-tokens", MAX_TOKENS))
    assert captured.out.splitlines() == replies(
        conversation_with("Hello", messages=[{"role": "system", "content": "Be kind."}])
    )


def test_saved_is_all_that_was_said_and_no_file_is_written_over(chat, conversation_with, tmp_path):
    path = tmp_path / "new file.jsonl"
    (tmp_path / "mine.jsonl").write_text("mine")
    lines = ("/save nothing.jsonl", "/system Be kind.", "Hello", f"/save {path}", f"/save {path}", "/save")
    captured = chat(*lines, f"/save {tmp_path}/mine.jsonl", f"/save {tmp_path}/no/such.jsonl")
    opening = [{"role": "system", "content": "Be kind."}]
    saved = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert saved == [{"messages": conversation_with("Hello", messages=opening)}]
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["mine.jsonl", "new file.jsonl"]
    wanted = (
        "nothing was said",
        "is set",
        "saved to",
        "stays as it is",
        "name a file",
        "stays as it is",
        "not be written",
    )
    notes = captured.err.splitlines()
    assert len(notes) == len(wanted)
    assert all(word in note for word, note in zip(wanted, notes))


def test_the_first_exchanges_are_forgotten_when_the_context_is_full(chat, served_model, oracle):
    context, said = 120, ["Hello", "Count to ten.", "Hello", "Tell me of Crème brûlée", "Count to ten."]
    captured = chat(*said, options=("--temperature", "0", "--context", context, "--max-tokens", MAX_TOKENS))
    messages, forgotten, notes, lines = [], 0, [], []

    def length(first: int) -> int:
        return len(encode_prompt(messages[2 * first :], served_model.tokenizer, served_model.template))

    for text in said:
        messages.append({"role": "user", "content": text})
        before = forgotten
        while length(forgotten) + context // 4 > context and 2 * forgotten + 1 < len(messages):
            forgotten += 1
        room = min(MAX_TOKENS, context - length(forgotten))
        lines.append(oracle(messages[2 * forgotten :], room))
        if forgotten > before:
            notes.append(f"first {'exchange is' if forgotten == 1 else f'{forgotten} exchanges are'} forgotten")
        messages.append({"role": "assistant", "content": lines[-1]})
    assert forgotten > 1 and len(notes) > 1
    assert captured.out == "".join(f"{line}\n" for line in lines)
    told = [note for note in captured.err.splitlines() if "forgotten" in note]
    assert len(told) == len(notes) and all(part in note for part, note in zip(notes, told))


def test_a_message_that_does_not_fit_is_refused_and_nothing_is_forgotten_for_it(chat, conversation_with):
    captured = chat("Hello", "x" * 300, "Hello")
    assert captured.out.splitlines() == replies(conversation_with("Hello", "Hello"))
    told = captured.err.splitlines()
    assert re.fullmatch(r"\(the message has 30\d tokens .* 256 .* fewer words\)", told[0])
    assert not any("forgotten" in note for note in told)


def test_a_reply_can_be_said_anew_by_other_chances_that_repeat(chat):
    options = ("--temperature", "3", "--max-tokens", 20, "--seed", "1")
    first = chat("/regenerate", "Hello", "/regenerate", "Hello", options=options)
    assert "nothing was said yet" in first.err
    replies = first.out.split("\n")
    assert replies[0] != replies[1]
    assert chat("Hello", "/regenerate", "Hello", options=options).out == first.out
    assert chat("Hello", options=(*options[:-1], "2")).out.split("\n")[0] != replies[0]
    greedy = ("--temperature", "0", "--max-tokens", 20)
    assert chat("Hello", options=(*options, "--top-p", "1e-9")).out == chat("Hello", options=greedy).out


def test_saying_anew_replaces_the_reply(served_model, start_engine, oracle):
    conversation = Dialogue(served_model, start_engine(), sampling=GREEDY, max_tokens=MAX_TOKENS)
    for text in ("Hello", "Count to ten."):
        "".join(conversation.say(text))
    before = conversation.messages
    assert "".join(conversation.say_again()) == oracle(before[:-1])
    assert conversation.messages == before


def test_whoever_stops_listening_keeps_what_was_said(served_model, start_engine, dialogues):
    conversation = Dialogue(served_model, start_engine(), sampling=GREEDY)
    reply = conversation.say("Which animals are there?")
    heard = next(reply) + next(reply) + next(reply)
    reply.close()
    assert conversation.messages[1] == {"role": "assistant", "content": heard}
    assert dialogues["Which animals are there?"].startswith(heard) and heard
    again = conversation.say_again()
    again.close()  # before its first word: nothing is lost for it
    assert conversation.messages[1]["content"] == heard


def test_characters_come_whole(served_model, start_engine, dialogues):
    conversation = Dialogue(served_model, start_engine(), sampling=GREEDY)
    pieces = [piece for piece in conversation.say("Which animals are there?") if piece]
    assert "".join(pieces) == dialogues["Which animals are there?"]
    assert {"🐈", "🐕"} <= set(pieces) and len(pieces) > 10


def test_a_reply_that_breaks_off_is_told_and_the_chat_goes_on(checkpoint, chat, tmp_path, served_model):
    palm = PaLM.from_pretrained(checkpoint)
    with torch.no_grad():
        palm.token_emb.weight[ord("!")] = 3e38  # whatever reads it overflows
    for part in (palm, served_model.tokenizer, served_model.template):
        part.save_pretrained(tmp_path)
    captured = chat("Count!", "/help", folder=tmp_path)
    assert "not finite" in captured.err and "/regenerate" in captured.err
    assert issubclass(EngineError, RuntimeError)


# What is read


def reader(*lines: str):
    rest = iter(lines)

    def read_line(prompt: str) -> str:
        for line in rest:
            return line
        raise EOFError

    return read_line


@pytest.mark.parametrize(
    "lines, text, quoted",
    [
        (["one"], "one", False),
        (["  one  "], "one", False),
        ([""], "", False),
        (["one\\", "two\\", "three", "four"], "one\ntwo\nthree", False),
        (["one\\"], "one\\", False),
        (['"""one"""', "two"], "one", True),
        (['"""', "one", "", "two\\", '"""'], "one\n\ntwo\\", True),
        (['"""one', 'two"""', "three"], "one\ntwo", True),
        (['"""', "/reset", '"""'], "/reset", True),
        (['"""', "the input ends"], "the input ends", True),
        (['say """ twice'], 'say """ twice', False),
    ],
)
def test_a_message_may_have_several_lines(lines, text, quoted):
    assert read_message(reader(*lines)) == (text, quoted)


@given(st.text(alphabet="a\\/ \n'", max_size=30))
def test_what_stands_in_quotes_is_the_message(text):
    assert read_message(reader('"""', *text.split("\n"), '"""')) == (text.strip(), True)


def test_the_end_of_the_input_is_no_message():
    with pytest.raises(EOFError):
        read_message(reader())


def test_what_is_no_command_is_refused_unless_it_is_quoted(chat, conversation_with):
    captured = chat("/rset", "", "   ", '"""/rset"""', "/quit", "Hello")
    assert captured.out.splitlines() == replies(conversation_with("/rset"))
    assert captured.err == "(there is no such command: /help lists those there are)\n"


def test_help_names_every_command(chat):
    for name in ("/reset", "/regenerate", "/system", "/save", "/help", "/quit", "Ctrl-C", "Ctrl-D", '"""', "backslash"):
        assert name in chat("/help").err


def test_the_length_of_replies_is_limited_and_told(chat, dialogues):
    captured = chat("Hello", options=("--temperature", "0", "--max-tokens", "5"))
    assert captured.out == dialogues["Hello"][:5] + "\n"
    assert "cut" in captured.err


def test_once_answers_one_message_and_ends(chat, conversation_with):
    more = ("--temperature", "0", "--max-tokens", MAX_TOKENS)
    captured = chat("Tell me more", options=("--once", "Hello", *more))
    assert (captured.out, captured.err) == (f"{replies(conversation_with('Hello'))[0]}\n", "")
    opening = [{"role": "system", "content": "Be kind."}]
    kind = replies(conversation_with("Hello\nyou", messages=opening))[0]
    assert chat("\ufeffHello", "you", options=("--once", "-", "--system", "Be kind.", *more)).out == f"{kind}\n"
    assert chat(options=("--once", "/help", *more)).out == f"{replies(conversation_with('/help'))[0]}\n"


def test_once_obeys_the_seed_and_the_limit(chat):
    options = ("--once", "Hello", "--temperature", "3", "--max-tokens", "12", "--seed")
    first, again, other = (chat(options=(*options, seed)) for seed in ("1", "1", "2"))
    assert first.out == again.out != other.out
    assert "cut" in first.err


def test_what_once_cannot_answer_is_an_error(chat):
    for text, options, words in (
        (" ", (), "got a blank message"),
        ("-", (), "got a blank message"),
        ("Hello " * 60, ("--context", "64"), "the message has .* tokens"),
    ):
        with pytest.raises(SystemExit, match=f"^palm-rlhf: .*{words}"):
            chat(options=("--once", text, *options))


def test_a_model_of_bytes_without_a_tokenizer_is_talked_to(chat, tmp_path):
    PaLM(num_tokens=256, dim=16, depth=1, heads=1, dim_head=8).save_pretrained(tmp_path)
    captured = chat("Hello", folder=tmp_path, options=("--max-tokens", "8", "--seed", "0"))
    assert captured.out.endswith("\n") and len(captured.out) > 1


@pytest.mark.parametrize(
    "options, words",
    [
        (("--temperature", "-1"), "got temperature=-1"),
        (("--top-p", "2"), "got top_p=2"),
        (("--max-tokens", "0"), "max_tokens=0"),
        (("--context", "1"), "context=1"),
        (("--lora-scope", "none"), "none"),
    ],
)
def test_wrong_options_are_one_clear_line(chat, options, words):
    with pytest.raises(SystemExit, match=rf"^palm-rlhf: .*{words}"):
        chat("Hello", options=options)


def test_a_folder_that_is_missing_is_named(chat, tmp_path):
    with pytest.raises(SystemExit, match=r"^palm-rlhf: .*there is no folder .*nowhere"):
        chat("Hello", folder=tmp_path / "nowhere")


# How it samples


@pytest.fixture
def foreign_folder(tmp_path):
    """A folder in the form of Hugging Face, of a model that has learnt nothing."""
    torch.manual_seed(0)
    template = PRESETS["default"]
    tokenizer = HuggingFaceTokenizer.train(
        ["Hello there"], 270, template.special_tokens, eos_token=template.special_tokens[0]
    )
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=16, depth=1, heads=1, dim_head=8)
    for part in (palm, tokenizer, template):
        part.save_pretrained(tmp_path / "foreign")
    return tmp_path / "foreign"


def test_without_options_it_samples_as_the_makers_of_the_model_do(chat, foreign_folder):
    def said(*options) -> str:
        return chat("Hello", folder=foreign_folder, options=("--max-tokens", "9", "--seed", "1", *options)).out

    greedy, varied, narrow = (said(*o) for o in (("--temperature", "0"), (), ("--top-k", "1")))
    assert greedy == narrow != varied == said("--temperature", "0.7")
    for recommended in ({"temperature": 0}, {"top_k": 1}):
        (foreign_folder / "generation_config.json").write_text(json.dumps(recommended))
        assert said() == greedy
        assert said("--temperature", "0.7", "--top-k", "1000") == varied


@pytest.mark.parametrize(
    "recommended, expected",
    [
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1}, ["min_p", "temperature", "top_k", "top_p"]),
        ({"do_sample": True, "top_k": 0, "temperature": None, "top_p": "high", "max_new_tokens": 3}, []),
    ],
)
def test_what_the_makers_recommend_is_read_from_the_folder(foreign_folder, recommended, expected):
    (foreign_folder / "generation_config.json").write_text(json.dumps(recommended))
    tokenizer = load(foreign_folder, device="cpu").tokenizer
    assert recommended_sampling(tokenizer) == {name: recommended[name] for name in expected}
