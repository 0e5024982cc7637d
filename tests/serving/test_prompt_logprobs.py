"""The log-probabilities of prompts: those of the training forward, in the forms of OpenAI's and of vLLM's servers."""

import json

import httpx
import openai
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.cross_entropy import CHUNK
from palm_rlhf.serving.engine.batch import Batch
from palm_rlhf.serving.engine.prompt_logprobs import score_prompt
from palm_rlhf.serving.engine.sampler import Sampler
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.generation import Generation, Request
from palm_rlhf.serving.token_text import TextStream, spelled

TEXT = "What is the capital of France?"
TEXTS = "/v1/completions"


def expected(palm, tokens, size=None):
    """Of the tokens from the second on: log-probabilities of all tokens in their places, by the training forward."""
    with torch.no_grad():
        return palm(torch.tensor([tokens]))[0, :-1, :size].double().log_softmax(-1)


def require_equal(found, palm, tokens, most, size=None):
    logprobs = expected(palm, tokens, size)
    assert [one.token for one in found] == tokens[1:]
    for one, row in zip(found, logprobs, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-5)
        best = row.topk(most)
        assert [value for _, value in one.alternatives] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert all(value == pytest.approx(float(row[token]), abs=1e-5) for token, value in one.alternatives)
        greater = [int((row > row[one.token] + slack).sum()) + 1 for slack in (1e-5, -1e-5)]
        assert greater[0] <= one.rank <= greater[1]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_they_are_those_of_the_training_forward(served_model, start_engine, chunk):
    engine = start_engine(prefill_chunk=chunk)
    torch.manual_seed(chunk)
    for length in (1, 2, 40, 150):
        prompt = torch.randint(0, 261, (length,)).tolist()
        generation = engine.submit(Request(prompt, max_new_tokens=2, prompt_logprobs=3))
        generation.text()
        require_equal(generation.prompt_logprobs, served_model.palm, prompt, 3)


def test_neither_company_nor_what_is_known_of_a_prompt_changes_them(served_model, start_engine):
    engine = start_engine(max_batch=8, prefill_chunk=256)
    prompts = [list(f"{TEXT} {'and so on ' * count}".encode()) for count in range(6)]
    for _ in range(2):  # the second time everything is known
        wanted = [None, 2, 0, 5, None, 2]
        requests = [Request(p, max_new_tokens=6, prompt_logprobs=most) for p, most in zip(prompts, wanted, strict=True)]
        generations = engine.submit_all(requests)
        for generation, most in zip(generations, wanted, strict=True):
            generation.text()
            if most is None:
                assert generation.prompt_logprobs == []
            else:
                assert generation.num_cached == 0
                require_equal(generation.prompt_logprobs, served_model.palm, generation.request.prompt, most)


def test_a_reply_that_made_way_keeps_them(served_model, start_engine):
    per_token = SlotCache.bytes_per_token(served_model.palm)
    engine = start_engine(context=600, cache_memory=700 * per_token, prefill_chunk=16, prefix_memory=0)
    prompts = [list(f"{number} {TEXT}".encode()) for number in range(2)]
    requests = [Request(p, max_new_tokens=400, prompt_logprobs=1) for p in prompts]
    generations = engine.submit_all(requests)
    for generation in generations:
        generation.text()
        require_equal(generation.prompt_logprobs, served_model.palm, generation.request.prompt, 1)
    assert engine.counts["preempted"] > 0


def test_a_chunk_that_is_read_again_is_not_noted_again(served_model):
    tokens = list(TEXT.encode())
    generation = Generation(
        Request(tokens, 1, prompt_logprobs=2), TextStream(served_model.tokenizer), None, lambda: None
    )
    with torch.no_grad():
        embeds = served_model.palm(torch.tensor([tokens]), return_only_embedding=True)[0]
    for start, stop in ((0, 5), (3, 4), (2, 11), (0, len(tokens)), (len(tokens) - 1, len(tokens))):
        score_prompt(generation, start, embeds[start:stop], served_model.palm, Sampler())
        assert generation.num_reusable == (len(tokens) - 1 if stop == len(tokens) else len(generation.prompt_logprobs))
    require_equal(generation.prompt_logprobs, served_model.palm, tokens, 2)


def test_ids_without_a_token_have_no_part_of_them(start_engine):
    palm = PaLM(num_tokens=300, dim=16, depth=1, heads=2, dim_head=8, max_seq_len=64)
    engine = start_engine(palm, ByteTokenizer())
    generation = engine.submit(Request(list(b"padded"), max_new_tokens=1, prompt_logprobs=20))
    generation.text()
    require_equal(generation.prompt_logprobs, palm, list(b"padded"), 20, size=261)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any result of torch has."""

    num_numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        self.num_numbers = max(self.num_numbers, *sizes, 0)
        return result


def test_the_logits_of_a_long_prompt_are_never_held_at_once():
    palm = PaLM(num_tokens=100_000, dim=8, depth=1, heads=1, dim_head=8).eval()
    slots = SlotCache(palm, max_tokens=1024, max_rows=1)
    batch = Batch(palm, Sampler(), slots, prefix_bytes=0)
    prompt = torch.randint(0, 100_000, (200,)).tolist()
    assert len(prompt) * palm.num_tokens > 2 * CHUNK
    generation = Generation(Request(prompt, 1, prompt_logprobs=1), TextStream(ByteTokenizer()), None, lambda: None)
    with torch.inference_mode(), Largest() as largest:
        assert batch.admit(generation, 1000)
        batch.read(1000)
    assert palm.num_tokens <= largest.num_numbers <= CHUNK
    require_equal(generation.prompt_logprobs, palm, prompt, 1)


@pytest.fixture(scope="module")
def post(server):
    """Asks for completions and returns the JSON."""
    with httpx.Client(base_url=server[0], timeout=900) as http:

        def ask(status=200, **body):
            reply = http.post(TEXTS, json={"model": "parrot", "temperature": 0, "max_tokens": 4, **body})
            assert reply.status_code == status, reply.text
            return reply.json() if not body.get("stream") else reply.text

        yield ask


def require_echo(choice, served_model, tokens, num_new):
    """A choice that begins with its prompt, with one alternative to each token."""
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(tokens) + num_new}
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    rows = expected(served_model.palm, tokens)
    assert logprobs["token_logprobs"][1 : len(tokens)] == pytest.approx(
        [float(row[token]) for row, token in zip(rows, tokens[1:], strict=True)], abs=1e-5
    )
    for value, top, row in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], rows):
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-5)
        assert value in top.values()  # the very number, by which harnesses tell a greedy token
    assert choice["text"].startswith(spelled(served_model.tokenizer, tokens)[0])
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
        assert token.startswith(("bytes:", "<|")) or choice["text"][offset : offset + len(token)] == token


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_has_the_logprobs_of_the_prompt(post, served_model, max_tokens, as_ids):
    text = "Tell me of Crème brûlée"
    tokens = served_model.tokenizer.encode(text)
    answer = post(prompt=tokens if as_ids else text, echo=True, logprobs=1, max_tokens=max_tokens)
    (choice,) = answer["choices"]
    num_new = answer["usage"]["completion_tokens"]
    require_echo(choice, served_model, tokens, num_new)
    assert choice["text"].startswith(text)
    assert num_new == max_tokens or choice["finish_reason"] == "stop"
    plain = post(prompt=text, max_tokens=max_tokens)["choices"][0]["text"]
    assert choice["text"] == text + plain


def test_batches_of_prompts_are_echoed_each_by_itself(post, served_model):
    chats = [
        served_model.encode_chat([{"role": "user", "content": said}]) for said in ("Hello", TEXT, "Write a long line")
    ]
    answer = post(prompt=chats, echo=True, logprobs=1, max_tokens=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice, tokens in zip(answer["choices"], chats, strict=True):
        require_echo(choice, served_model, tokens, 1)
        assert choice["text"].startswith("<|user|>")
    several = post(prompt=["ab", "cde"], n=2, echo=True, max_tokens=0)
    assert [choice["text"] for choice in several["choices"]] == ["ab", "ab", "cde", "cde"]
    assert all(choice["logprobs"] is None for choice in several["choices"])
    require_echo(
        post(prompt=[chats[0]], echo=True, logprobs=1)["choices"][0], served_model, chats[0], 4
    )  # a list of one


def test_the_token_that_ends_a_completion_is_told_of(post, client, served_model, dialogues):
    """Harnesses leave out the last entry, which is that of the token sampled, whatever it is."""
    said = "Write a long line"
    tokens = served_model.encode_chat([{"role": "user", "content": said}]) + served_model.tokenizer.encode(
        dialogues[said]
    )
    answer = post(prompt=tokens, echo=True, logprobs=1, max_tokens=1)
    require_echo(answer["choices"][0], served_model, tokens, 1)
    assert answer["choices"][0]["logprobs"]["tokens"][-1] == "<|endoftext|>"
    assert answer["choices"][0]["finish_reason"] == "stop"
    messages = [{"role": "user", "content": said}]
    chat = client.chat.completions.create(model="parrot", messages=messages, temperature=0, logprobs=True)
    assert "".join(entry.token for entry in chat.choices[0].logprobs.content) == dialogues[said]


def test_an_echo_streams_the_same(post, served_model):
    options = {"prompt": ["Hello", "Crème"], "echo": True, "logprobs": 2, "max_tokens": 6, "n": 2}
    whole = post(**options)["choices"]
    found = [{"text": "", "logprobs": {}} for _ in whole]
    for line in post(**options, stream=True).split("\n\n"):
        if line.startswith("data: {"):
            (choice,) = json.loads(line.removeprefix("data: "))["choices"]
            into = found[choice["index"]]
            into["text"] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                into["logprobs"].setdefault(name, []).extend(values)
    for streamed, choice in zip(found, whole, strict=True):
        assert streamed["text"] == choice["text"]
        assert streamed["logprobs"] == {
            name: pytest.approx(values, abs=1e-5) if name == "token_logprobs" else values
            for name, values in choice["logprobs"].items()
        } or [set(top or ()) for top in streamed["logprobs"]["top_logprobs"]] == [
            set(top or ()) for top in choice["logprobs"]["top_logprobs"]
        ]


def test_the_longest_prompt_is_read_without_a_reply(post):
    assert len(post(prompt=[65] * 256, echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]["tokens"]) == 256
    assert len(post(prompt=[65] * 255, echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]["tokens"]) == 256
    assert post(400, prompt=[65] * 257, max_tokens=0)["error"]["code"] == "context_length_exceeded"
    assert post(400, prompt=[65] * 256, max_tokens=1)["error"]["code"] == "context_length_exceeded"
    one = post(prompt=[65], echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    assert one == {"tokens": ["A"], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}


def test_prompt_logprobs_come_in_the_form_of_vllm(post, client, served_model):
    tokens = served_model.tokenizer.encode(TEXT)
    (choice,) = post(prompt=TEXT, prompt_logprobs=2, max_tokens=1)["choices"]
    first, *others = choice["prompt_logprobs"]
    assert first is None and choice["logprobs"] is None
    rows = expected(served_model.palm, tokens)
    for entries, token, row in zip(others, tokens[1:], rows, strict=True):
        best = row.topk(2)
        assert list(entries) == list(dict.fromkeys(map(str, (token, *best.indices.tolist()))))
        for number, entry in entries.items():
            assert set(entry) == {"logprob", "rank", "decoded_token"}
            assert entry["logprob"] == pytest.approx(float(row[int(number)]), abs=1e-5)
            assert entry["rank"] == int((row > row[int(number)]).sum()) + 1
        assert entries[str(token)]["decoded_token"] == chr(token)
    both = post(prompt=TEXT, prompt_logprobs=0, echo=True, logprobs=3, max_tokens=0)["choices"][0]
    assert [len(entries) for entries in both["prompt_logprobs"][1:]] == [1] * (len(tokens) - 1)
    assert {len(top) for top in both["logprobs"]["top_logprobs"][1:]} <= {3, 4}
    messages = [{"role": "user", "content": "Hello"}]
    options = {"model": "parrot", "messages": messages, "max_tokens": 1, "extra_body": {"prompt_logprobs": 1}}
    chat = client.chat.completions.create(**options)
    assert [int(next(iter(entries))) for entries in chat.prompt_logprobs[1:]] == served_model.encode_chat(messages)[1:]
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
        client.chat.completions.create(**options, stream=True)


def test_what_is_known_of_a_prompt_is_used_where_its_logprobs_are_not_asked_for(post):
    prompt = "Nothing of this has been said before."
    for name, cached in (("first", 0), ("again", len(prompt) - 1)):
        usage = post(prompt=prompt, max_tokens=1, user=name)["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == cached
    again = post(prompt=prompt, echo=True, logprobs=0, max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("text", ["Hello you", "Crème brûlée", "🐈 and 🐕", "a\n\n  b", ""])
def test_tokens_are_spelled_with_their_places(text):
    learnt = HuggingFaceTokenizer.train(["Hello you and others, Crème"] * 3, 300)
    for tokenizer in (ByteTokenizer(), learnt):
        user, end = tokenizer.special_tokens["<|user|>"], tokenizer.eos_token
        tokens = [user, *tokenizer.encode(text), end, *tokenizer.encode(text)]
        found, offsets = spelled(tokenizer, tokens)
        assert found == f"<|user|>{text}<|endoftext|>{text}"
        assert offsets[:2] == [0, len("<|user|>")]
        assert offsets == sorted(offsets)
        for token, offset in zip(tokens, offsets, strict=True):
            name = tokenizer.decode([token], with_special_tokens=True)
            assert "\ufffd" in name or found[offset:].startswith(name)
