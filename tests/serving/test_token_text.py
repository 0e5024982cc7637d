"""Text as tokens come: up to the stop string that is whole first, in whole characters, and nothing leaks before."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.tokenizer import EOS, ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.serving.protocol.token_display import token_text
from palm_rlhf.serving.token_text import TextStream

BYTES = ByteTokenizer()
SOME_TEXT = st.text(alphabet="abé🙂", max_size=30)


def until_stop(text: str, stops: tuple[str, ...]) -> str:
    """By looking at every beginning of the text: the first that ends in a stop string ends the reply before it."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return text


@settings(max_examples=300)
@given(SOME_TEXT, st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=4), max_size=3).map(tuple))
def test_all_pieces_are_the_text_before_the_first_stop(text, stops):
    stream, given_out = TextStream(BYTES, stops), ""
    for token in BYTES.encode(text):
        given_out += stream.push(token)
        assert until_stop(text, stops).startswith(given_out)  # nothing of a stop has leaked
        if stream.stopped:
            break
    else:
        given_out += stream.finish()
    assert given_out == until_stop(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)
    assert stream.finish() == ""


def test_tokens_of_many_characters_stop_as_those_of_one_do():
    tokenizer = HuggingFaceTokenizer.train(["abcd abcd xyz " * 20], 300, [EOS], eos_token=EOS)
    tokens = tokenizer.encode("xyz abcd abcd")
    assert len(tokens) < 6
    stream = TextStream(tokenizer, ("abcd", "bc"))
    pieces = []
    while not stream.stopped:
        pieces.append(stream.push(tokens.pop(0)))
    assert "".join(pieces) == "xyz a"


@pytest.mark.parametrize("end", range(1, 14))
def test_a_reply_that_ends_inside_of_a_character_ends_before_it(end):
    octets = "aé🙂 é🙂".encode()[:end]
    stream = TextStream(BYTES)
    pieces = [*map(stream.push, octets), stream.finish()]
    assert "".join(pieces) == octets.decode(errors="ignore")


def test_what_may_become_a_stop_is_held_back_and_given_out_if_it_does_not():
    stream = TextStream(BYTES, ("abc",))
    assert [stream.push(token) for token in b"xababd"] == ["x", "", "", "ab", "", "abd"]
    stream = TextStream(BYTES, ("abc",))
    assert [stream.push(token) for token in b"xab"] + [stream.finish()] == ["x", "", "", "ab"]


def test_special_tokens_are_no_text():
    stream = TextStream(BYTES)
    assert "".join(map(stream.push, [97, 256, 260, 98])) == "ab"


def test_tokens_are_shown_with_their_bytes():
    assert token_text(BYTES, 97) == ("a", [97])
    assert token_text(BYTES, 0xE2) == ("bytes:\\xe2", [0xE2])
    assert token_text(BYTES, 256) == (EOS, list(EOS.encode()))
    learnt = HuggingFaceTokenizer.train(["é" * 9], 256 + 5, [EOS], eos_token=EOS)
    whole, part = learnt.encode("é"), learnt.backend.token_to_id("Ã")
    assert token_text(learnt, whole[0]) == ("é", list("é".encode()))
    assert token_text(learnt, part) == ("Ã", None)
