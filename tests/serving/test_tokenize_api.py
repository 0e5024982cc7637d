"""Texts and conversations as tokens and back, as vLLM's server tells them."""

import httpx
import pytest
from tokenizers.processors import TemplateProcessing

from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import DEFAULT_SPECIAL_TOKENS, HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.served_model import load

HELLO = [{"role": "user", "content": "Hello"}]
BOS = "<|start|>"


@pytest.fixture(scope="module")
def post(server):
    """Posts a body to a path, and returns the JSON."""
    with httpx.Client(base_url=server[0], timeout=900) as http:

        def ask(path, status=200, **body):
            reply = http.post(path, json=body)
            assert reply.status_code == status, reply.text
            return reply.json()

        yield ask


def test_a_text_is_told_in_tokens(post, served_model):
    text = "Crème 🐈"
    found = post("/tokenize", model="parrot", prompt=text)
    tokens = list(text.encode())
    assert found == {"count": len(tokens), "max_model_len": 256, "tokens": tokens, "token_strs": None}
    assert post("/detokenize", model="parrot", tokens=tokens) == {"prompt": text}
    strings = post("/tokenize", prompt="Cè", return_token_strs=True)["token_strs"]
    assert strings == ["C", "bytes:\\xc3", "bytes:\\xa8"]
    assert (
        post("/tokenize", prompt="")["tokens"] == post("/tokenize", prompt="", add_special_tokens=False)["tokens"] == []
    )
    assert post("/detokenize", tokens=[]) == {"prompt": ""}
    assert post("/tokenize", prompt="<|user|>")["count"] == len("<|user|>")  # a text never becomes a special token


def test_a_conversation_is_told_as_a_chat_reads_it(post, client, served_model):
    found = post("/tokenize", messages=HELLO, add_generation_prompt=True, add_special_tokens=False)
    assert found["tokens"] == served_model.encode_chat(HELLO)
    usage = client.chat.completions.create(model="parrot", messages=HELLO, max_tokens=1).usage
    assert found["count"] == usage.prompt_tokens
    assert post("/detokenize", tokens=found["tokens"])["prompt"] == "<|user|>Hello<|endoftext|><|assistant|>"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]
    assert post("/tokenize", messages=parts) == found


def test_a_text_may_be_longer_than_the_context(post):
    assert post("/tokenize", prompt="x" * 100_000)["count"] == 100_000
    assert post("/tokenize", 400, messages=HELLO * 1000)["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/tokenize", {}, "messages"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": HELLO, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": HELLO, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"prompt": "a", "whatever": 1}, "whatever"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [261]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_what_cannot_be_told_is_named(post, path, body, param):
    assert post(path, 400, **body)["error"]["param"] == param


def test_another_model_has_other_tokens(post):
    assert post("/tokenize", 404, model="other", prompt="a")["error"]["param"] == "model"
    assert post("/detokenize", 404, model="other", tokens=[1])["error"]["param"] == "model"


def test_a_key_is_asked_for(start_server):
    url, _ = start_server(api_keys=("secret",))
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
        assert httpx.post(url + path, json=body).status_code == 401
        assert httpx.post(url + path, json=body, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_text_begins_as_its_tokenizer_begins_one(tmp_path, start_server):
    tokenizer = HuggingFaceTokenizer.train(["some words"], 300, (*DEFAULT_SPECIAL_TOKENS, BOS))
    start = tokenizer.special_tokens[BOS]
    tokenizer.backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, start)])
    PaLM(num_tokens=300, dim=16, depth=1, heads=2, dim_head=8, max_seq_len=100).save_pretrained(tmp_path / "m")
    for part in (tokenizer, PRESETS["default"]):
        part.save_pretrained(tmp_path / "m")
    url, _ = start_server(load(tmp_path / "m", device="cpu"))
    words = tokenizer.encode("some words")
    for options, expected in (({}, [start, *words]), ({"add_special_tokens": False}, words)):
        told = httpx.post(f"{url}/tokenize", json={"prompt": "some words", **options}).json()
        assert told["tokens"] == expected
        body = {"model": "m", "prompt": "some words", "max_tokens": 0, "echo": True, "logprobs": 0, **options}
        choice = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]
        assert choice["text"] == "some words"
        assert choice["logprobs"]["tokens"] == [
            tokenizer.decode([token], with_special_tokens=True) for token in expected
        ]
    empty = {"model": "m", "prompt": "", "max_tokens": 1}
    assert httpx.post(f"{url}/v1/completions", json=empty).json()["usage"]["prompt_tokens"] == 1
