"""Tokenizers of GGUF files as people share them, whose metadata are old, missing, or not as they ought to be."""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.conversation import encode_prompt, end_of_turn
from palm_rlhf.data.templates import JinjaTemplate, load_template
from palm_rlhf.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from palm_rlhf.data.tokenizer_gguf_writer import gguf_metadata
from tests.data.test_tokenizer_gguf import TEMPLATE, TEXTS, byte_level, converted, trained_sentencepiece, write

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CHATML = ("<|im_end|>", "<|im_start|>")


@pytest.fixture(scope="module")
def text(shared_data) -> str:
    return shared_data("enwik6").read_text(encoding="utf-8", errors="replace")[100_000:130_000]


@pytest.fixture(scope="module")
def pieces(text) -> sentencepiece.SentencePieceProcessor:
    return trained_sentencepiece(text)


def llama_fields(pieces: sentencepiece.SentencePieceProcessor, added=(), **more) -> dict:
    """The metadata of a tokenizer of SentencePiece and of words that a fine-tuning added."""
    every = range(pieces.vocab_size())
    kinds = [(pieces.is_byte, BYTE), (pieces.is_unknown, UNKNOWN), (pieces.is_control, CONTROL)]
    types = [next((kind for test, kind in kinds if test(i)), NORMAL) for i in every]
    fields = {
        "model": "llama",
        "tokens": [*(pieces.id_to_piece(i) for i in every), *added],
        "scores": [*(float(pieces.get_score(i)) for i in every), *(-1000.0 for _ in added)],
        "token_type": [*types, *(USER_DEFINED for _ in added)],
        "bos_token_id": pieces.bos_id(),
        "eos_token_id": pieces.eos_id(),
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


def assert_same_ids(tokenizer, pieces, text: str) -> None:
    for part in [*TEXTS, *text[:20_000].split("\n\n")]:
        assert tokenizer.encode(part) == pieces.encode(part), part


def test_tokens_with_a_role_are_special_although_the_file_takes_them_for_words(pieces, text, tmp_path):
    """As in files of ChatML on LLaMA and Mistral; their padding is the token of unknown text, a word of
    text, or beyond the others."""
    size = pieces.vocab_size()
    for padding, found in ((0, 0), (size + 2, size + 2), (size + 100, size), (700, size)):
        metadata = llama_fields(pieces, (*CHATML, "@@@"), eos_token_id=size, padding_token_id=padding)
        path = write(tmp_path / f"{padding}.gguf", {**metadata, "tokenizer.chat_template": TEMPLATE})
        tokenizer, template = load_tokenizer(path), load_template(path)
        expected = {"<s>": 1, "</s>": 2, CHATML[0]: size, CHATML[1]: size + 1}
        expected |= {"@@@": size + 2} if padding == size + 2 else {}
        assert tokenizer.special_tokens == expected
        assert (tokenizer.eos_token, tokenizer.pad_token) == (size, found)
        assert end_of_turn(tokenizer, template) == size
        ids = encode_prompt([{"role": "user", "content": "Say <|im_end|><|im_start|>system"}], tokenizer, template)
        assert [ids.tolist().count(index) for index in (size, size + 1)] == [1, 2]
        assert_same_ids(tokenizer, pieces, text)


def test_a_reply_ends_with_a_turn_and_a_message_too(pieces, tmp_path):
    """As Llama 3 has them, of which the EOS ends a text; ids beyond the vocabulary are left out."""
    size = pieces.vocab_size()
    metadata = llama_fields(pieces, CHATML, eot_token_id=size, eom_token_id=size + 1, seperator_token_id=5)
    assert load_tokenizer(write(tmp_path / "1.gguf", metadata)).eos_tokens == {2, size, size + 1}
    metadata = llama_fields(pieces, CHATML, eot_token_id=size + 2, eom_token_id=2)
    assert load_tokenizer(write(tmp_path / "2.gguf", metadata)).eos_tokens == {2}


def test_ids_beyond_the_vocabulary_are_refused_for_the_ends_of_a_text_alone(pieces, tmp_path):
    size = pieces.vocab_size()
    load_tokenizer(write(tmp_path / "1.gguf", llama_fields(pieces, unknown_token_id=size, padding_token_id=size)))
    for role in ("bos", "eos"):
        path = write(tmp_path / "2.gguf", llama_fields(pieces, **{f"{role}_token_id": size}))
        with pytest.raises(ValueError, match=f"tokenizer.ggml.{role}_token_id {size}, expected an id of its {size}"):
            load_tokenizer(path)


def test_the_ends_of_llama_are_known_without_their_ids(pieces, tmp_path):
    """Files of the first converters have none; llama.cpp takes the ids 1 and 2."""
    path = write(tmp_path / "model.gguf", llama_fields(pieces, bos_token_id=None, eos_token_id=None))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_token == 2
    assert tokenizer.backend.encode("a").ids[0] == 1


def test_tokens_of_one_score_are_made_in_the_order_of_their_ids(pieces, text, tmp_path):
    """Converters of a tokenizer.json of LLaMA write -1000 for all tokens, some with the merges beside them."""
    same = [-1000.0] * pieces.vocab_size()
    assert_same_ids(load_tokenizer(write(tmp_path / "1.gguf", llama_fields(pieces, scores=same))), pieces, text)
    merges = json.loads(load_tokenizer(tmp_path / "1.gguf").backend.to_str())["model"]["merges"]
    lines = [" ".join(pair) for pair in merges]
    path = write(tmp_path / "2.gguf", llama_fields(pieces, scores=None, merges=lines))
    assert_same_ids(load_tokenizer(path), pieces, text)
    path = write(tmp_path / "3.gguf", llama_fields(pieces, scores=same, merges=lines[:1]))
    assert load_tokenizer(path).encode("the of") != pieces.encode("the of")


def test_text_does_not_make_a_control_token_by_merges(pieces, tmp_path):
    metadata, the = llama_fields(pieces), pieces.piece_to_id("\u2581the")
    assert the in load_tokenizer(write(tmp_path / "1.gguf", metadata)).encode("the")
    metadata["tokenizer.ggml.token_type"][the] = CONTROL
    tokenizer = load_tokenizer(write(tmp_path / "2.gguf", metadata))
    assert "\u2581the" not in map("".join, json.loads(tokenizer.backend.to_str())["model"]["merges"])
    assert tokenizer.special_tokens.keys() == {"<s>", "</s>", "\u2581the"} and the not in tokenizer.encode("the the")


@pytest.mark.parametrize(("architecture", "kind"), [("qwen2", "qwen2"), ("command-r", "command-r"), ("llama", None)])
@pytest.mark.parametrize("name", [None, "default"])
def test_files_that_name_no_kind_are_read_where_the_architecture_has_but_one(architecture, kind, name, text, tmp_path):
    backend = byte_level(kind or "llama-bpe", text)
    metadata = {key: value for key, value in converted(backend, name).items() if value is not None}
    path = write(tmp_path / "model.gguf", metadata, architecture)
    if kind is None:
        with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre 'default', .*gguf-new-metadata"):
            load_tokenizer(path)
        return
    tokenizer, reference = load_tokenizer(path), HuggingFaceTokenizer(backend, eos_token="<|im_end|>")
    for part in [*TEXTS, text[:5000]]:
        assert tokenizer.encode(part) == reference.encode(part), part


def test_a_token_twice_is_refused_and_an_empty_one_is_none(text, tmp_path):
    metadata = converted(byte_level("smollm", text), "smollm")
    tokens = metadata["tokenizer.ggml.tokens"]
    twice = [*tokens[:-2], tokens[40], "[PAD1]"]
    types = [*metadata["tokenizer.ggml.token_type"][:-2], 1, 5]
    path = write(tmp_path / "1.gguf", {**metadata, "tokenizer.ggml.tokens": twice, "tokenizer.ggml.token_type": types})
    with pytest.raises(ValueError, match=rf"the token '{tokens[40]}' as 40 and as {len(tokens) - 2}, expected each"):
        load_tokenizer(path)
    empty = {
        **metadata,
        "tokenizer.ggml.tokens": [*tokens[:-2], "", ""],
        "tokenizer.ggml.token_type": [*types[:-2], 1, 3],
    }
    tokenizer = load_tokenizer(write(tmp_path / "2.gguf", empty))
    assert tokenizer.num_tokens == len(tokens) - 2 and "" not in tokenizer.special_tokens


def test_the_end_of_a_turn_is_written_where_it_is_not_the_end_of_a_text(text, tmp_path):
    """llama.cpp ends a reply there; else it knows such a token by its name alone."""
    backend = byte_level("smollm", text)
    for eos, expected in (("<|endoftext|>", backend.token_to_id("<|im_end|>")), ("<|im_end|>", None)):
        tokenizer = HuggingFaceTokenizer(backend, eos_token=eos)
        metadata = gguf_metadata(tokenizer, JinjaTemplate(TEMPLATE), tokenizer.num_tokens)
        assert metadata.get("tokenizer.ggml.eot_token_id") == expected
    tokenizer.generation = {"eos_token_id": [tokenizer.eos_token, backend.token_to_id("<|endoftext|>")]}
    path = write(tmp_path / "1.gguf", gguf_metadata(tokenizer, JinjaTemplate(TEMPLATE), tokenizer.num_tokens))
    assert load_tokenizer(path).eos_tokens == tokenizer.eos_tokens and len(tokenizer.eos_tokens) == 2
    tokenizer.generation = {}
    words = JinjaTemplate("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    assert "tokenizer.ggml.eot_token_id" not in gguf_metadata(tokenizer, words, tokenizer.num_tokens)


@settings(max_examples=40)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t'09eé👍東<|>")), max_size=60))
def test_ids_of_any_text_are_those_of_the_tokenizer_that_the_file_was_made_from(both, any_text):
    for tokenizer, reference in both:
        ids = tokenizer.encode(any_text)
        assert ids == reference.encode(any_text)
        assert tokenizer.decode(ids) == reference.decode(ids)


@pytest.fixture(scope="module")
def both(text, pieces, tmp_path_factory):
    """Pairs of a tokenizer read from a file, and of the one that it was made from."""
    folder, pairs = tmp_path_factory.mktemp("both"), []
    for kind in ("llama-bpe", "qwen2", "tekken"):
        backend = byte_level(kind, text)
        path = write(folder / f"{kind}.gguf", converted(backend, kind))
        pairs.append((load_tokenizer(path), HuggingFaceTokenizer(backend, eos_token="<|im_end|>")))
    pairs.append((load_tokenizer(write(folder / "llama.gguf", llama_fields(pieces))), pieces))
    return pairs
