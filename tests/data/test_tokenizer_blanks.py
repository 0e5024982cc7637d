"""Tokenizers that put a blank before the first word: text that a template cuts gains none that nobody wrote."""

import json
from functools import cache

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from palm_rlhf.data.conversation import encode, encode_prompt, encode_response
from palm_rlhf.data.corpora.token_store import StoredText, tokens_of
from palm_rlhf.data.templates import PRESETS, JinjaTemplate
from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.protocol.engine_requests import score_tokens
from palm_rlhf.serving.served_model import ServedModel

NAMES = ["<s>", "</s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|prompter|>", "<|end_of_turn|>"]
TEXTS = ["USER: Where is Rome? ASSISTANT: In Italy. [INST] hello [/INST] hi", "GPT4 Correct User: Name a colour, red"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA2 = JinjaTemplate(
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
    {"bos_token": "<s>", "eos_token": "</s>"},
)
TURNS = [
    {"role": "user", "content": "Where is Rome?"},
    {"role": "assistant", "content": "In Italy."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "Hi, red Rome"},
]
KINDS = ["normaliser", "metaspace first", "metaspace always", "unigram", "byte level"]
MESSAGE = st.lists(st.sampled_from(["Rome", " ", "red", "é", "日", "\n", "x", "."]), min_size=1, max_size=8)
WORDS = MESSAGE.map("".join).filter(str.strip)


@cache
def tokenizer_of(kind: str) -> HuggingFaceTokenizer:
    """The forms in which Llama's tokenizers are saved, and GPT-2's with `add_prefix_space`, learnt from a few words."""
    if kind == "byte level":
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(TEXTS * 9, trainer)
        return HuggingFaceTokenizer(backend, NAMES, eos_token="</s>")
    scheme = "always" if kind == "metaspace always" else "first"
    if kind == "unigram":
        backend = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"])
    else:
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", *BYTES], show_progress=False)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.train_from_iterator(TEXTS * 9, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:1]  # bytes are no special tokens
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    if kind == "normaliser":  # as the conversion of Llama 2 has it: no word boundaries, blanks made visible first
        backend = tokenizers.Tokenizer.from_str(json.dumps({**state, "pre_tokenizer": None}))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return HuggingFaceTokenizer(backend, NAMES, eos_token="</s>")


def by_transformers(kind: str, template, messages, folder, **options) -> list[int]:
    transformers = pytest.importorskip("transformers")
    tokenizer_of(kind).save_pretrained(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.bos_token = "<s>"
    source = template.source if isinstance(template, JinjaTemplate) else template.to_jinja()
    text = theirs.apply_chat_template(messages, chat_template=source, tokenize=False, **options)
    return theirs(text, add_special_tokens=False)["input_ids"]


def text_of(kind: str, ids) -> list[str]:
    return [tokenizer_of(kind).backend.id_to_token(int(index)) for index in ids]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama2", "default", "oasst", "vicuna", "openchat"])
def test_a_conversation_has_the_tokens_of_transformers(kind, name, tmp_path):
    template = LLAMA2 if name == "llama2" else PRESETS[name]
    tokenizer = tokenizer_of(kind)
    ours = encode(TURNS, tokenizer, template).tokens.tolist()
    theirs = by_transformers(kind, template, TURNS, tmp_path)
    assert text_of(kind, ours) == text_of(kind, theirs)
    said = TURNS[:3]
    prompt = encode_prompt(said, tokenizer, template).tolist()
    assert ours[: len(prompt)] == prompt
    assert encode_response(said, TURNS[3]["content"], tokenizer, template).tolist() == ours[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
@given(before=WORDS, after=WORDS)
@settings(max_examples=40, deadline=None)
def test_a_text_cut_before_a_blank_is_whole_again(kind, before, after):
    tokenizer, before, after = tokenizer_of(kind), before.strip(), " " + after.strip()
    whole = tokenizer.encode(before + after)
    assert text_of(kind, tokenizer.encode(before) + tokenizer.encode_continuation(after)) == text_of(kind, whole)


@pytest.mark.parametrize("kind", KINDS)
@given(contents=st.lists(WORDS, min_size=1, max_size=2).flatmap(lambda words: st.just(words * 2)))
@settings(max_examples=25, deadline=None)
def test_no_blank_comes_where_a_template_cuts_inside_of_text(kind, contents):
    """The tokens spell what was rendered, with a blank more only where the backend itself begins anew."""
    tokenizer, template = tokenizer_of(kind), PRESETS["vicuna"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    expected = template.render(messages)
    if kind in ("normaliser", "metaspace always", "byte level"):
        expected = expected.replace("<s>", "<s> ").replace("</s>U", "</s> U")
    ids = encode(messages, tokenizer, template).tokens.tolist()
    if kind == "unigram":  # it has no bytes to spell characters that it does not know
        assert "".join(text_of(kind, ids)).count("▁") == expected.count(" ")
    else:
        assert tokenizer.backend.decode(ids, skip_special_tokens=False) == expected


def test_a_continuation_is_the_text_itself_where_no_blank_is_gained():
    for tokenizer in (ByteTokenizer(), HuggingFaceTokenizer.train(TEXTS, 300)):
        assert tokenizer.encode_continuation("Rome is") == tokenizer.encode("Rome is")
        assert tokenizer.encode_continuation("Rome", after_special=True) == tokenizer.encode("Rome")


@pytest.mark.parametrize("kind", KINDS[:3])
def test_what_a_name_is_cut_into_gains_no_blank(kind):
    """A text that spells a special token's name is text: it comes back as it was written."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("a</s>b")
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == "a</s>b"


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_document_that_is_read_in_pieces_gains_no_blank(kind, tmp_path):
    text = "Name a colour, red Rome hello. " * 40 + "Rome"
    (tmp_path / "text").write_text(text)
    tokenizer = tokenizer_of(kind)
    stored = StoredText(tmp_path / "text", "fingerprint", len(text), np.array([len(text)]), [(0, "text")])
    whole, pieces = (
        tokens_of(stored, [0, len(text)], tokenizer, tmp_path / str(piece), piece=piece).splits[0].tolist()
        for piece in (10 * len(text), 64)
    )
    assert whole == tokenizer.encode(text)
    assert text_of(kind, pieces) == text_of(kind, whole)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_reply_to_be_scored_goes_on_after_the_prompt(kind):
    tokenizer = tokenizer_of(kind)
    served_model = ServedModel(
        palm=PaLM(num_tokens=tokenizer.num_tokens, dim=8, depth=1), tokenizer=tokenizer, name="m", template=None
    )
    prompt, (reply,) = score_tokens(served_model, 64, "Name a colour,", [" red"])
    assert text_of(kind, prompt + reply) == text_of(kind, tokenizer.encode("Name a colour, red"))
    chat = [{"role": "user", "content": "hello"}]
    assert served_model.encode_reply(chat, "red") == tokenizer.encode_continuation("red") != tokenizer.encode("red")
