"""Which conversations are chosen, which are repeated, and how long ones are cut."""

import hashlib
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palm_rlhf.data.curation.context_length import fit_context
from palm_rlhf.data.curation.deduplicate import conversation_digest, drop_duplicates, drop_near_duplicates
from palm_rlhf.data.curation.filters import (
    drop_blocked_words,
    drop_provider_errors,
    drop_repeated_digits,
    drop_short,
    keep_languages,
    keep_model,
)

WORDS = "the of and a to in is was that for as on with by at from his an are which this have or has been not".split()


def talk(*contents, system=None, **fields):
    """A conversation of a user and an assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {**fields, "messages": [{"role": "system", "content": system}] * (system is not None) + messages}


def verdict(step, conversation, *options, **more):
    """None if the step keeps the conversation, unchanged, else the reason that it counts."""
    rejected = Counter()
    kept = list(step([conversation], *options, **more, rejected=rejected))
    if kept:
        assert kept == [conversation] and not rejected
        return None
    (reason,) = rejected.elements()
    return reason


@pytest.mark.parametrize(
    "model, wanted, reason",
    [
        ("GPT-4", "gpt-4", None),
        ("Model: GPT-4", "gpt-4", None),
        ("gpt-4-0314", "GPT 4", None),
        ("Default (GPT-3.5)", "gpt-3.5", None),
        ("Default (GPT-3.5)", "gpt-4", "another model"),
        ("gpt-4o", "gpt-4", "another model"),
        ("gpt-4.1", "gpt-4", "another model"),
        ("gpt-45", "gpt-4", "another model"),
        ("GPT-4", "gpt-4-0314", "another model"),
        (4, "gpt-4", "model unknown"),
    ],
)
def test_conversations_of_a_model(model, wanted, reason):
    assert verdict(keep_model, talk("a", "b", model=model), wanted) == reason


def test_a_model_that_is_not_named_is_unknown():
    assert verdict(keep_model, talk("a", "b"), "gpt-4") == "model unknown"
    with pytest.raises(ValueError, match="expected a name"):
        keep_model([], "-")


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("Too many requests in 1 hour. Try again later.", "provider error"),
        ("!Too many requests in 1 hour. Try again later.", "provider error"),
        ("The answer is\n\n**network error**\n", "provider error"),
        ("Half a reply\nThere was an error generating a response", "provider error"),
        ("network error\n\nA network error happens when a cable is cut.", "provider error"),
        ("A network error happens when a cable is cut.", None),
        ("It may say:\n\nThere was an error generating a response\n\nThen reload the page.", None),
        ("", None),
    ],
)
def test_errors_of_providers(reply, reason):
    assert verdict(drop_provider_errors, talk("a", "b", "c", reply)) == reason
    assert verdict(drop_provider_errors, talk(reply, "b")) is None  # a user may ask what it means


@pytest.mark.parametrize(
    "content, reason",
    [
        ("I am ChatGPT.", "blocked word"),
        ("看ChatGPT的回答", "blocked word"),
        ("see api.openai.com", "blocked word"),
        ("I chat, GPT", None),
    ],
)
def test_blocked_words(content, reason):
    for conversation in (talk(content, "b"), talk("a", content), talk("a", "b", system=content)):
        assert verdict(drop_blocked_words, conversation, ["chatgpt", "OpenAI"]) == reason


@pytest.mark.parametrize("digits, reason", [("1" * 8, None), ("1" * 9, "repeated digits"), ("123456789" * 3, None)])
def test_repeated_digits(digits, reason):
    assert verdict(drop_repeated_digits, talk("a", f"x{digits}y")) == reason


def test_length_is_counted_in_bytes_or_as_told():
    conversation = talk("é", "three short words")
    assert verdict(drop_short, conversation, 19) is None
    assert verdict(drop_short, conversation, 20) == "too short"
    assert verdict(drop_short, conversation, 4, count_tokens=lambda text: len(text.split())) is None
    assert verdict(drop_short, conversation, 5, count_tokens=lambda text: len(text.split())) == "too short"


SPOKEN = {
    "en": ("Where can I buy a ticket for the train?", "At the counter next to the entrance of the station."),
    "de": ("Wo kann ich eine Fahrkarte für den Zug kaufen?", "Am Schalter neben dem Eingang des Bahnhofs."),
    "fr": ("Où puis-je acheter un billet de train ?", "Au guichet, à côté de l'entrée de la gare."),
    "zh": ("我在哪里可以买到火车票？", "在车站入口旁边的售票处。"),
}


@pytest.mark.parametrize("language", SPOKEN)
def test_languages(language):
    code = "```python\nfor the_word in these_words: print('this is English', the_word)\n```\n" * 20
    conversation = talk(*(code * (language != "en") + content for content in SPOKEN[language]))
    assert verdict(keep_languages, conversation, [language]) is None
    assert verdict(keep_languages, conversation, ["es", "it"]) == "another language"


def test_code_alone_has_no_language():
    assert verdict(keep_languages, talk("```\nx = 1\n```", "```\ny"), ["en"]) == "language unknown"
    with pytest.raises(ValueError, match="expected some of af ar"):
        keep_languages([], ["xx"])


def test_the_digest_is_that_of_a_written_rule():
    rule = hashlib.blake2b("user 3 hé".encode() + b"assistant 1 !", digest_size=16)
    assert conversation_digest(talk("hé", "!", id=5, model="m")) == rule.digest()
    assert (
        len({conversation_digest(talk(*parts)) for parts in (("a", "b"), ("ab", ""), ("", "ab"), ("a", "b", ""))}) == 4
    )


@given(st.lists(st.lists(st.sampled_from(["a", "b", "a b"]), min_size=1, max_size=2), max_size=12))
def test_the_first_of_equal_conversations_is_kept(contents):
    conversations = [talk(*parts, id=place) for place, parts in enumerate(contents)]
    rejected = Counter()
    kept = list(drop_duplicates(conversations, rejected=rejected))
    firsts = {tuple(parts): place for place, parts in reversed(list(enumerate(contents)))}
    assert [conversation["id"] for conversation in kept] == sorted(firsts.values())
    assert rejected["duplicate"] == len(contents) - len(firsts)


def essay(seed, num_words=200):
    return random.Random(seed).choices(WORDS, k=num_words)


def test_near_duplicates_are_found_and_others_kept():
    originals = [essay(seed) for seed in range(40)]
    edited = [[*words[:100], "banana", *words[101:]] for words in originals]  # shares 195 of 201 shingles
    halves = [words[:100] + essay(1000 + seed, 100) for seed, words in enumerate(originals)]  # about a third
    texts = [" ".join(words) for words in originals + edited + halves]
    rejected = Counter()
    kept = list(drop_near_duplicates([talk("x", text, id=i) for i, text in enumerate(texts)], 0.8, rejected=rejected))
    assert [conversation["id"] for conversation in kept] == [*range(40), *range(80, 120)]
    assert rejected == {"near-duplicate": 40}


def test_near_duplicates_of_scripts_without_spaces_are_found():
    text = "今天天气很好我们去公园散步看见了许多花和小鸟孩子们在草地上玩得很开心" * 2
    assert len(list(drop_near_duplicates([talk(text), talk(text.replace("许多", "很多"))], 0.6))) == 1
    assert len(list(drop_near_duplicates([talk(""), talk(" "), talk("a")], 0.8))) == 2


EXCHANGES = st.lists(st.tuples(st.text("abé", max_size=12), st.text("xyzé", max_size=12)), min_size=1, max_size=8)


def length(messages, overhead=0):
    return sum(len(message["content"].encode()) + overhead for message in messages)


@given(EXCHANGES, st.none() | st.text("s", max_size=5), st.integers(1, 60), st.integers(0, 3))
def test_pieces_fit_and_together_are_the_conversation(exchanges, system, context, overhead):
    conversation = talk(*(content for exchange in exchanges for content in exchange), system=system, id="c")
    rejected, mended = Counter(), Counter()
    pieces = list(fit_context([conversation], context, overhead=overhead, rejected=rejected, mended=mended))
    head = [] if system is None else conversation["messages"][:1]
    turns = [piece["messages"][len(head) :] for piece in pieces]
    assert all(piece["messages"][: len(head)] == head for piece in pieces)
    assert all(length(piece["messages"], overhead) <= context for piece in pieces)
    # Nothing is lost but exchanges that cannot fit, and those are counted.
    pairs = list(zip(*[iter(conversation["messages"][len(head) :])] * 2))
    room = context - length(head, overhead)
    fitting = [pair for pair in pairs if length(pair, overhead) <= room]
    assert [message for piece in turns for message in piece] == [message for pair in fitting for message in pair]
    assert rejected["exchange longer than the context"] == len(pairs) - len(fitting)
    # Two pieces that follow each other do not fit into one.
    if not rejected:
        assert all(length(a, overhead) + length(b[:2], overhead) > room for a, b in pairwise(turns))
    assert [piece["id"] for piece in pieces] == (["c"] if len(pieces) == 1 else [f"c_{i}" for i in range(len(pieces))])
    assert mended["conversations split"] == (len(pieces) > 1)


@given(EXCHANGES, st.none() | st.text("s", max_size=5), st.integers(1, 60))
def test_truncation_keeps_the_start(exchanges, system, context):
    conversation = talk(*(content for exchange in exchanges for content in exchange), system=system, id="c")
    rejected = Counter()
    pieces = list(fit_context([conversation], context, overlong="truncate", rejected=rejected))
    assert len(pieces) + rejected["question longer than the context"] == 1
    if not pieces:
        assert length(conversation["messages"][: 2 if system is None else 3]) > context
        return
    whole, kept = conversation["messages"], pieces[0]["messages"]
    assert length(kept) <= context and pieces[0]["id"] == "c"
    assert [message["role"] for message in kept] == [message["role"] for message in whole[: len(kept)]]
    assert kept[:-1] == whole[: len(kept) - 1]
    assert kept[-1]["role"] == "assistant"
    if kept[-1] != whole[len(kept) - 1]:  # only the first reply is cut, and not by a character too many
        assert len(kept) == 2 + (system is not None)
        cut, reply = kept[-1]["content"], whole[len(kept) - 1]["content"]
        assert cut and reply.startswith(cut)
        assert length(kept) + len(reply[len(cut)].encode()) > context
    elif len(kept) < len(whole):
        assert length(whole[: len(kept) + 2]) > context


TURNS = st.lists(st.tuples(st.sampled_from("suat"), st.text("ab ", max_size=9)), max_size=6)
LETTERS = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


@given(TURNS, st.integers(1, 30), st.sampled_from(["split", "truncate"]))
def test_any_conversation_is_fitted_or_counted_and_no_question_is_cut(turns, context, overlong):
    messages = [{"role": LETTERS[letter], "content": content} for letter, content in turns]
    rejected = Counter()
    pieces = list(fit_context([{"messages": messages}], context, overlong=overlong, rejected=rejected))
    assert pieces or rejected.total() >= 1
    for piece in pieces:
        assert any(message["role"] != "system" for message in piece["messages"])
        assert all(message in messages for message in piece["messages"] if message["role"] != "assistant")


@pytest.mark.parametrize("overlong", ["split", "truncate"])
@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "no exchange"),
        ([{"role": "system", "content": "Be brief."}], "no exchange"),
        ([{"role": "user", "content": "a question longer than ten bytes"}], "longer than the context"),
    ],
)
def test_nothing_to_fit_is_counted(overlong, messages, reason):
    rejected = Counter()
    assert list(fit_context([{"messages": messages}], 10, overlong=overlong, rejected=rejected)) == []
    assert len(rejected) == rejected.total() == 1 and reason in next(iter(rejected))


def test_empty_conversations_pass_every_step_or_are_counted():
    for messages in ([], [{"role": "system", "content": "Be brief."}]):
        conversation = {"messages": messages}
        assert verdict(keep_languages, conversation, ["en"]) in (None, "language unknown", "another language")
        assert verdict(drop_provider_errors, conversation) is None
        assert verdict(drop_blocked_words, conversation, ["x"]) is None
        assert verdict(drop_repeated_digits, conversation, 2) is None
        assert verdict(drop_short, conversation, 100) == "too short"
        assert list(drop_near_duplicates([conversation])) == [conversation]
    assert verdict(keep_languages, {"messages": []}, ["en"]) == "language unknown"


def test_calls_of_tools_count_for_length_and_for_likeness():
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    with_call, without = {"messages": messages}, {"messages": [messages[0], {"role": "assistant", "content": ""}]}
    assert list(drop_duplicates([with_call, without, with_call])) == [with_call, without]
    assert list(fit_context([without], 10)) == [without] and list(fit_context([with_call], 10)) == []
    assert list(fit_context([with_call], 100)) == [with_call]


def test_length_by_a_tokenizer_of_ones_own():
    def count_words(text):
        return len(text.split())

    conversation = talk("one two", "three", "four", "five six seven")
    assert len(list(fit_context([conversation], 7, count_tokens=count_words))) == 1
    assert len(list(fit_context([conversation], 6, count_tokens=count_words))) == 2
    assert len(list(fit_context([conversation], 7, count_tokens=count_words, overhead=1))) == 2
