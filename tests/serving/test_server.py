"""The server as OpenAI's own client sees it: plain and streaming, in threads and in asyncio."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from palm_rlhf.data.conversation import encode_prompt, encode_response
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.sequences import join
from palm_rlhf.serving.served_model import load

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def chat(client):
    """Asks the parrot, greedily unless told otherwise."""

    def create(said="Hello", **options):
        messages = said if isinstance(said, list) else [{"role": "user", "content": said}]
        return client.chat.completions.create(model="parrot", messages=messages, **{"temperature": 0, **options})

    return create


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("parrot", "model", 256)
    assert client.models.retrieve("parrot") == model


def test_a_chat_is_answered(chat, dialogues):
    for said, reply in dialogues.items():
        answer = chat(said)
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", reply)
        assert choice.finish_reason == "stop"
        assert answer.object == "chat.completion"
        assert answer.usage.prompt_tokens == len(said.encode()) + 3  # the role, the end of turn, the assistant's role
        assert answer.usage.completion_tokens == len(reply.encode()) + 1
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_in_whole_characters(chat, dialogues):
    for said, reply in dialogues.items():
        chunks = list(chat(said, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == reply
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(pieces) > len(reply) / 2  # it came in pieces
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
        assert len({chunk.id for chunk in chunks}) == 1
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        assert not any(chunk.usage for chunk in chunks)


def test_the_stream_is_server_sent_events_that_end_in_done(server):
    body = {"model": "parrot", "messages": HELLO, "temperature": 0, "stream": True, "max_tokens": 5}
    with httpx.stream("POST", f"{server[0]}/v1/chat/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        text = reply.read().decode()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for line in events[:-2]:
        assert json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk"


def test_usage_comes_at_the_end_of_a_stream_if_asked_for(chat):
    *chunks, last = chat(stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == chat().usage.model_copy(update={"prompt_tokens_details": last.usage.prompt_tokens_details})
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("length", range(1, 12))
def test_a_reply_is_cut_between_characters(chat, dialogues, length):
    said, reply = "Which animals are there?", dialogues["Which animals are there?"]
    expected = reply.encode()[:length].decode(errors="ignore")
    answer = chat(said, max_tokens=length)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == length
    streamed = [chunk.choices[0].delta.content or "" for chunk in chat(said, max_completion_tokens=length, stream=True)]
    assert "".join(streamed) == expected


def test_asyncio_clients_are_answered_together(server, dialogues):
    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="none") as client:

            async def ask(said, stream):
                messages = [{"role": "user", "content": said}]
                options = {"model": "parrot", "messages": messages, "temperature": 0, "stream": stream}
                answer = await client.chat.completions.create(**options)
                if not stream:
                    return answer.choices[0].message.content
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            return await asyncio.gather(*(ask(said, stream) for stream in (False, True) for said in dialogues))

    assert asyncio.run(ask_all()) == [*dialogues.values()] * 2


def test_threads_are_answered_together(chat, dialogues):
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda said: chat(said).choices[0].message.content, [*dialogues] * 4))
    assert replies == [*dialogues.values()] * 4


def test_earlier_turns_are_not_read_again(chat, server):
    first = chat("Hello")
    messages = [*HELLO, first.choices[0].message, {"role": "user", "content": "Count to ten."}]
    second = chat(messages, max_tokens=3)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.total_tokens - 1


@pytest.mark.parametrize("stop, expected", [("you", "Hi there! How are "), (["nothing", "e!"], "Hi ther"), ("H", "")])
def test_stop_strings_end_a_reply_and_do_not_leak(chat, stop, expected):
    answer = chat(stop=stop)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (expected, "stop")
    pieces = [chunk.choices[0].delta.content or "" for chunk in chat(stop=stop, stream=True)]
    assert "".join(pieces) == expected


def test_n_replies_differ_by_their_random_numbers_and_are_repeatable(chat):
    options = {"n": 4, "seed": 11, "temperature": 2, "max_tokens": 12}
    answer = chat(**options)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert [choice.message.content for choice in chat(**options).choices] == texts
    assert chat(**{**options, "n": 1}).choices[0].message.content == texts[0]
    streamed = [""] * 4
    for chunk in chat(**options, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert answer.usage.completion_tokens <= 48
    assert answer.usage.prompt_tokens == 8


def test_logprobs_are_those_of_the_model(chat, served_model, dialogues):
    answer = chat(logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    text = bytes(octet for entry in entries for octet in entry.bytes).decode()
    assert text == answer.choices[0].message.content == dialogues["Hello"]
    prompt = served_model.encode_chat(HELLO)
    with torch.no_grad():
        logits = served_model.palm(torch.tensor([prompt + list(text.encode())]))[0, len(prompt) - 1 :]
    expected = logits.log_softmax(-1)
    for entry, token, row in zip(entries, text.encode(), expected):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(float(row.max()), abs=1e-4)
    streamed = [
        entry
        for chunk in chat(logprobs=True, top_logprobs=3, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_bias_and_penalties_change_what_is_said(chat):
    assert "H" not in chat(logit_bias={"72": -100}).choices[0].message.content
    assert chat(logit_bias={"90": 100}, max_tokens=4).choices[0].message.content == "ZZZZ"
    penalties = {"frequency_penalty": 2, "presence_penalty": 2}
    penalised = chat(logit_bias={"90": 100}, max_tokens=60, **penalties).choices[0].message.content
    assert penalised.startswith("ZZZZ")
    assert 40 < penalised.count("Z") < 60  # 100 are used up after some 45 of them


def test_messages_may_come_in_other_forms(chat, dialogues):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    nothing = {"name": None, "tool_calls": None}
    assert chat([{"role": "user", "content": parts, **nothing}]).choices[0].message.content == dialogues["Hello"]
    developer = chat([{"role": "developer", "content": "Be kind."}, *HELLO]).usage.prompt_tokens
    assert developer == chat([{"role": "system", "content": "Be kind."}, *HELLO]).usage.prompt_tokens
    assert chat(response_format={"type": "text"}, user="me", extra_body={"tools": None}).choices


def test_completions_continue_texts_and_token_ids(client, served_model):
    prompt = served_model.tokenizer.decode(served_model.encode_chat(HELLO), with_special_tokens=True)
    tokens = served_model.encode_chat(HELLO)
    options = {"model": "parrot", "temperature": 0, "max_tokens": 9}
    text = client.completions.create(prompt=tokens, **options)
    assert text.object == "text_completion"
    assert (text.choices[0].text, text.choices[0].finish_reason) == ("Hi there!", "length")
    several = client.completions.create(prompt=[tokens, tokens[:3]], n=2, **options)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == "Hi there!"
    assert several.usage.prompt_tokens == len(tokens) + 3
    streamed = client.completions.create(prompt=tokens, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Hi there!"
    # the names of special tokens in a text are a text
    assert client.completions.create(prompt=prompt, **options).usage.prompt_tokens == len(prompt.encode())
    assert client.completions.create(model="parrot", prompt="a", temperature=0).usage.completion_tokens <= 16
    assert client.completions.create(prompt="", **options).usage.prompt_tokens == 1


def test_logprobs_of_completions(client, served_model):
    tokens = served_model.encode_chat([{"role": "user", "content": "Tell me of Crème brûlée"}])
    answer = client.completions.create(model="parrot", prompt=tokens, temperature=0, max_tokens=25, logprobs=2)
    logprobs, text = answer.choices[0].logprobs, answer.choices[0].text
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 25
    for token, offset in zip(logprobs.tokens, logprobs.text_offset):
        assert token.startswith("bytes:") or text[offset] == token
    assert all(len(top) == 2 and token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs))


def test_best_of_is_chosen_by_the_reward_model(chat, served_model):
    options = {"seed": 3, "temperature": 2, "max_tokens": 15}
    everything = chat(n=6, **options)
    prompt = encode_prompt(HELLO, served_model.tokenizer, served_model.template)
    texts = [choice.message.content for choice in everything.choices]
    best = chat(n=2, extra_body={"best_of": 6}, **options)
    assert best.usage.completion_tokens == everything.usage.completion_tokens
    # the same by hand: the ids are sampled again, since texts do not tell the tokens that are no text
    again = chat(n=6, logprobs=True, **options).choices
    ids = [[named(logprob.token) for logprob in choice.logprobs.content] for choice in again]
    ends = [[256] if choice.finish_reason == "stop" else [] for choice in everything.choices]
    rows = [torch.tensor(reply + end) for reply, end in zip(ids, ends)]
    scores = served_model.reward_model.score(join([prompt] * 6, rows))
    expected = [texts[index] for index in scores.argsort(descending=True)[:2]]
    assert [choice.message.content for choice in best.choices] == expected


def named(token: str) -> int:
    """The id of a token by how it is shown."""
    special = ByteTokenizer().special_tokens
    if token in special:
        return special[token]
    return int(token[-2:], 16) if token.startswith("bytes:") else token.encode()[0]


def test_replies_are_scored(server, served_model):
    replies = ["Hi there! How are you?", "Go away.", ""] * 5
    body = {"model": "parrot", "messages": HELLO, "replies": replies}
    answer = httpx.post(f"{server[0]}/v1/score", json=body).json()
    prompt = encode_prompt(HELLO, served_model.tokenizer, served_model.template)
    rows = [encode_response(HELLO, reply, served_model.tokenizer, served_model.template) for reply in replies]
    expected = served_model.reward_model.score(join([prompt] * 15, rows)).tolist()
    assert [entry["score"] for entry in answer["data"]] == pytest.approx(expected, abs=1e-5)
    assert [entry["index"] for entry in answer["data"]] == list(range(15))
    text = httpx.post(f"{server[0]}/v1/score", json={"prompt": "Hello", "replies": ["a", "b"]}).json()
    assert len({entry["score"] for entry in text["data"]}) == 2


def test_a_model_of_bytes_without_a_tokenizer_is_served(tmp_path, start_server):
    PaLM(num_tokens=256, dim=16, depth=1, heads=2, dim_head=8, max_seq_len=200).save_pretrained(tmp_path / "bytes")
    what = load(tmp_path / "bytes", device="cpu")
    assert what.template is None
    url, _ = start_server(what)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="bytes", messages=HELLO, max_tokens=20)
        assert answer.usage.prompt_tokens == len(b"User:\nHello\n\nAssistant:\n")
        assert answer.choices[0].message.content is not None
        assert client.completions.create(model="bytes", prompt="Once", max_tokens=5).usage.completion_tokens == 5
        with pytest.raises(openai.BadRequestError, match="empty"):
            client.completions.create(model="bytes", prompt="")


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path):
    PaLM(num_tokens=200, dim=16, depth=1).save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match="200 tokens are too few for bytes"):
        load(tmp_path / "few")


def test_what_does_not_fit_together_is_refused(tmp_path, checkpoint, reward_folder):
    PaLM(num_tokens=257, dim=16, depth=1).save_pretrained(tmp_path / "small")
    ByteTokenizer().save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"the tokenizer in .* has 261 tokens, and the model 257"):
        load(tmp_path / "small")
    PaLM(num_tokens=256, dim=16, depth=1).save_pretrained(tmp_path / "bytes")
    with pytest.raises(ValueError, match="has 261 tokens, and the model 256"):
        load(tmp_path / "bytes", reward_model=reward_folder)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="template='other'"):
        load(checkpoint, template="other")


def test_a_lora_scope_is_merged(tmp_path, checkpoint):
    palm = PaLM.from_pretrained(checkpoint)
    palm.add_finetune_params("pirate", r=2)
    with torch.no_grad():
        for parameter in palm.finetune_parameters("pirate"):
            parameter.normal_()
    palm.save_pretrained(tmp_path / "pirate")
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = palm(tokens, finetune_scope="pirate")
        found = load(tmp_path / "pirate", lora_scope="pirate", device="cpu").palm(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
