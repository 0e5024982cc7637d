"""Text that goes on after a prompt: the words of Llama-like tokenizers keep their spaces."""

import httpx
import pytest
import torch

from palm_rlhf.data.stream_decoder import StreamDecoder
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.served_model import ServedModel
from tests.data.test_tokenizer_blanks import KINDS, LLAMA2, tokenizer_of

WHOLE = "Name a colour, red Rome hello"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [len("Name"), len("Name a colour,"), len("Name a colour, red")])
def test_a_continuation_keeps_its_first_space_and_a_message_does_not(kind, cut):
    tokenizer = tokenizer_of(kind)
    before, rest = tokenizer.encode(WHOLE[:cut]), tokenizer.encode_continuation(WHOLE[cut:])
    assert before + rest == tokenizer.encode(WHOLE), "the cut was to be between two words"

    def streamed(after):
        decoder = StreamDecoder(tokenizer, after)
        return "".join(map(decoder.push, rest)) + decoder.finish()

    assert streamed(before) == WHOLE[cut:]
    assert streamed([*before, tokenizer.eos_token]) == streamed([]) == tokenizer.decode(rest)


def test_a_prompt_that_ends_inside_a_character_does_not_swallow_the_next():
    tokenizer = tokenizer_of("normaliser")
    *first, last = tokenizer.encode("日")
    decoder = StreamDecoder(tokenizer, first)
    assert decoder.push(last) + decoder.push(tokenizer.backend.token_to_id("e")) + decoder.finish() == "\ufffde"


@pytest.fixture(scope="module")
def parrot():
    """A model that says " a" after every token."""
    tokenizer = tokenizer_of("normaliser")
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=16, depth=1, heads=1, dim_head=8)
    (word,) = tokenizer.encode("a")
    with torch.no_grad():
        for parameter in (*palm.layers.parameters(), palm.token_emb.weight):
            parameter.zero_()
        direction = torch.linspace(-100, 100, 16)
        palm.token_emb.weight += 0.1 * direction
        palm.token_emb.weight[word] = 2 * direction
    return palm.eval(), tokenizer


@pytest.mark.parametrize(
    "path, body, expected",
    [
        ("completions", {"prompt": "Name a colour,"}, " a a"),
        ("completions", {"prompt": "Name a colour,", "echo": True}, "Name a colour, a a"),
        ("chat/completions", {"messages": [{"role": "user", "content": "Name"}]}, "a a"),
        (
            "chat/completions",
            {
                "messages": [{"role": "user", "content": "Name"}, {"role": "assistant", "content": "In"}],
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
            " a a",
        ),
    ],
)
def test_a_server_replies_so(parrot, start_server, path, body, expected):
    url, _ = start_server(ServedModel("parrot", *parrot, LLAMA2), context=64)
    answer = httpx.post(f"{url}/v1/{path}", json={"model": "parrot", "max_tokens": 2, "temperature": 0, **body}).json()
    choice = answer["choices"][0]
    assert (choice["text"] if "text" in choice else choice["message"]["content"]) == expected
