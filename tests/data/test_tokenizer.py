"""Tokenizers: nothing is lost, no text makes a special token, what is saved is found, models make room."""

import json
from functools import cache, partial

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from palm_rlhf.data.corpora import token_store as store
from palm_rlhf.data.stream_decoder import StreamDecoder
from palm_rlhf.data.tokenizer import (
    DEFAULT_SPECIAL_TOKENS,
    ByteTokenizer,
    HuggingFaceTokenizer,
    add_special_tokens,
    load_tokenizer,
)
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import resize_token_embeddings
from tests.factories import palm_of

TEXTS = [
    f"the <|user|> said {word}, and the cat sat on the mat {number} times" for number in range(30) for word in "äb日"
]
NAMES = [*DEFAULT_SPECIAL_TOKENS, "</s>"]
# Whole names, their pieces and what they could be glued from.
WRITTEN = st.lists(st.sampled_from([*NAMES, *"<|>/ s", "＜/s＞", "user", "日", "end", "oftext"]), max_size=12).map(
    "".join
)


def bpe() -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.train(TEXTS, 320, NAMES, eos_token="</s>")


def knows_names_as_words() -> HuggingFaceTokenizer:
    """A unigram model with the names of its special tokens among its pieces, which full-width letters become too."""
    pieces = [
        ("<unk>", 0.0),
        *((name, -1.0) for name in NAMES),
        *((character, -9.0) for character in "<|>/sendoftxur "),
    ]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens(["<unk>", *NAMES])
    return HuggingFaceTokenizer(backend, eos_token="</s>")


def ignores_merges() -> HuggingFaceTokenizer:
    """A BPE that takes words of its vocabulary whole, whatever its merges are; it splits nothing."""
    backend = tokenizers.Tokenizer.from_str(bpe().backend.to_str())
    state = json.loads(backend.to_str())
    state["model"]["vocab"] |= {name: len(state["model"]["vocab"]) + place for place, name in enumerate(NAMES)}
    state["model"]["ignore_merges"], state["added_tokens"] = True, []
    state["pre_tokenizer"]["use_regex"] = False
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens(NAMES)
    return HuggingFaceTokenizer(backend, eos_token="</s>")


def falls_back_to_bytes() -> HuggingFaceTokenizer:
    """The form of SentencePiece models: words begin with a visible space, unknown characters become bytes."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlorw", "▁w", "▁h", "ll"]
    merges = [("▁", "w"), ("▁", "h"), ("l", "l")]
    backend = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return HuggingFaceTokenizer(backend, NAMES, eos_token="</s>")


MAKERS = {
    "bytes": partial(ByteTokenizer, NAMES, eos_token="</s>"),
    "bpe": bpe,
    "unigram": knows_names_as_words,
    "ignore_merges": ignores_merges,
    "byte_fallback": falls_back_to_bytes,
}
tokenizer_of = cache(lambda name: MAKERS[name]())
LOSSLESS = ["bytes", "bpe", "ignore_merges", "byte_fallback"]
every = pytest.mark.parametrize("name", list(MAKERS))


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=st.text())
@settings(max_examples=60)
def test_any_text_comes_back(name, text):
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.num_tokens for index in ids)


@given(data=st.binary())
@settings(max_examples=60)
def test_any_bytes_come_back(data):
    tokenizer = tokenizer_of("bytes")
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    assert tokenizer.decode(tokenizer.encode(data)) == data.decode(errors="replace")


def test_half_a_surrogate_pair_is_no_text():
    tokenizer = tokenizer_of("bytes")
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffd\ufffd\ufffdb"
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tokenizer_of("bpe").encode("a\ud83db")


@every
@given(text=WRITTEN)
@settings(max_examples=100)
def test_no_text_makes_a_special_token(name, text):
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert all(name in tokenizer.special_tokens for name in NAMES)


@pytest.mark.parametrize("name", ["bpe", "unigram", "ignore_merges", "byte_fallback"])
def test_the_law_rejects_the_library_as_it_comes_and_its_own_switch_alone(name):
    backend = tokenizers.Tokenizer.from_str(tokenizer_of(name).backend.to_str())
    eos = tokenizer_of(name).eos_token
    assert eos in backend.encode("a</s>b").ids or name == "bpe"
    assert name != "bpe" or tokenizer_of(name).special_tokens["<|user|>"] in backend.encode("a<|user|>b").ids
    backend.encode_special_tokens = True
    assert (eos in backend.encode("</s>").ids) == (name in ("unigram", "ignore_merges"))


def test_many_forgeries_are_cut_as_few():
    assert tokenizer_of("unigram").decode(tokenizer_of("unigram").encode("</s>" * 3000)).count("</s>") == 0
    assert tokenizer_of("bpe").decode(tokenizer_of("bpe").encode("</s>" * 3000)) == "</s>" * 3000


@every
def test_special_tokens_are_left_out_unless_asked(name):
    tokenizer = tokenizer_of(name)
    ids = [tokenizer.special_tokens["<|user|>"], *tokenizer.encode("so"), tokenizer.eos_token]
    assert tokenizer.decode(ids).split() == tokenizer.decode(tokenizer.encode("so")).split()
    assert tokenizer.decode(ids, with_special_tokens=True).replace(" ", "") == "<|user|>so</s>"
    with pytest.raises(ValueError, match="got the token id -1, expected"):
        tokenizer.decode([0, -1])


@every
def test_ids_that_pad_a_vocabulary_decode_to_nothing(name):
    tokenizer = tokenizer_of(name)
    ids = tokenizer.encode("so so")
    padded = [tokenizer.num_tokens, *ids[:1], tokenizer.num_tokens + 7, *ids[1:]]
    for with_special_tokens in (False, True):
        assert tokenizer.decode(padded, with_special_tokens=with_special_tokens) == tokenizer.decode(ids)
    assert name not in LOSSLESS or streamed(tokenizer, padded) == tokenizer.decode(ids)


def test_the_token_for_unknown_text_is_no_special_token_of_ours():
    tokenizer = tokenizer_of("unigram")
    assert "<unk>" not in tokenizer.special_tokens
    assert 0 in tokenizer.encode("日")


def test_a_bpe_learns_words_and_keeps_its_size():
    tokenizer = tokenizer_of("bpe")
    assert 256 + len(NAMES) < tokenizer.num_tokens <= 320
    assert len(tokenizer.encode("the cat sat on the mat")) < 15
    with pytest.raises(ValueError, match="at least 262"):
        HuggingFaceTokenizer.train(TEXTS, 261, special_tokens=NAMES)


@every
def test_what_is_saved_is_found_again(name, tmp_path):
    tokenizer = MAKERS[name]()
    tokenizer.add_special_tokens(["<|new|>"])
    tokenizer.save_pretrained(tmp_path / "model")
    again = load_tokenizer(tmp_path / "model")
    assert type(again) is type(tokenizer)
    for attribute in ("special_tokens", "eos_token", "pad_token", "num_tokens", "vocab_size", "fingerprint"):
        assert getattr(again, attribute) == getattr(tokenizer, attribute)
    text = "the cat <|new|> 日 </s>"
    assert again.encode(text) == tokenizer.encode(text)
    assert tokenizer.fingerprint != MAKERS[name]().fingerprint
    assert not [path for path in (tmp_path / "model").iterdir() if path.name.startswith(".")]


def test_each_kind_can_take_the_place_of_the_other(tmp_path):
    for name in ("bytes", "bpe", "bytes", "unigram", "bpe"):
        tokenizer_of(name).save_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).fingerprint == tokenizer_of(name).fingerprint


def test_transformers_opens_what_is_saved(tmp_path):
    from transformers import AutoTokenizer

    tokenizer_of("bpe").save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer_of("bpe").eos_token
    text = "the cat sat, 日 and ä"
    assert theirs.encode(text, add_special_tokens=False) == tokenizer_of("bpe").encode(text)


def test_transformers_is_told_what_ends_a_reply_and_keeps_its_other_settings(tmp_path):
    from transformers import GenerationConfig

    GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(tmp_path)
    tokenizer_of("bpe").save_pretrained(tmp_path)
    theirs = GenerationConfig.from_pretrained(tmp_path)
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer_of("bpe").eos_token
    assert theirs.temperature == 0.3


@pytest.mark.parametrize("ends", ["several", "another"])
def test_settings_of_generation_go_along_with_a_foreign_tokenizer(tmp_path, ends):
    tokenizer = tokenizer_of("bpe")
    eos, other = tokenizer.eos_token, tokenizer.special_tokens["<|user|>"]
    tokenizer.save_pretrained(tmp_path / "theirs")
    settings = {"temperature": 0.6, "bos_token_id": other, "eos_token_id": [other, eos] if ends == "several" else other}
    (tmp_path / "theirs/generation_config.json").write_text(json.dumps(settings))
    load_tokenizer(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours/generation_config.json").read_text())
    expected_ends = [other, eos] if ends == "several" else eos
    assert written == {**settings, "eos_token_id": expected_ends, "pad_token_id": tokenizer.pad_token}


def test_a_foreign_folder_opens_by_what_it_says(tmp_path):
    backend = tokenizers.Tokenizer.from_str(tokenizer_of("bpe").backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="names no eos_token"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json", eos_token="</s>").eos_token == backend.token_to_id("</s>")
    config = {"eos_token": {"content": "</s>"}, "bos_token": "<|user|>", "pad_token": "<|pad|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the cat sat") == tokenizer_of("bpe").encode("the cat sat")
    assert tokenizer.pad_token == tokenizer_of("bpe").special_tokens["<|pad|>"]
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(config | {"eos_token": "<|user|>"}))
    assert load_tokenizer(tmp_path).eos_token == tokenizer.special_tokens["<|user|>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eos_token == tokenizer.eos_token  # that of tokenizer_config.json counts
    tokenizer.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/tokenizer_config.json").read_text())["bos_token"] == "<|user|>"


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path, eos_token="</s>")
    with pytest.raises(ValueError, match="expected one of the special tokens"):
        ByteTokenizer(["<|a|>"])
    with pytest.raises(ValueError, match="expected names such as"):
        ByteTokenizer([""])


def test_a_corpus_can_be_tokenized_by_each():
    assert all(isinstance(tokenizer_of(name), store.TextTokenizer) for name in MAKERS)


def streamed(tokenizer, ids: list[int]) -> str:
    decoder = StreamDecoder(tokenizer)
    return "".join([decoder.push(index) for index in ids]) + decoder.finish()


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=st.text())
@settings(max_examples=60)
def test_streamed_text_adds_up(name, text):
    tokenizer = tokenizer_of(name)
    assert streamed(tokenizer, [tokenizer.eos_token, *tokenizer.encode(text), tokenizer.eos_token]) == text


@pytest.mark.parametrize("name", ["bytes", "bpe", "ignore_merges"])
@given(ids=st.lists(st.integers(0, 262), max_size=20))
@settings(max_examples=60)
def test_streamed_nonsense_adds_up(name, ids):
    tokenizer = tokenizer_of(name)
    ids = [index for index in ids if index < tokenizer.num_tokens]
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", LOSSLESS)
def test_characters_are_streamed_when_they_are_whole_and_no_later(name):
    tokenizer = tokenizer_of(name)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(index) for index in tokenizer.encode("hello world 日€a")]
    assert "".join(pieces) == "hello world 日€a"
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] and pieces[-1] == "a"


def lost_nats(palm: PaLM, before: torch.Tensor, tokens: torch.Tensor) -> float:
    after = palm(tokens).log_softmax(-1)[..., : before.shape[-1]]
    return (before - after).max().item()


def test_new_tokens_hardly_change_a_trained_model():
    tokenizer, palm = ByteTokenizer(["</s>"], eos_token="</s>"), palm_of(depth=1, num_tokens=257).eval()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 257, (2, 30)))
    old, before = palm.token_emb.weight.detach().clone(), palm(tokens).log_softmax(-1)
    add_special_tokens(palm, tokenizer, ["<|user|>", "</s>", "<|x|>"])
    assert tokenizer.special_tokens == {"</s>": 256, "<|user|>": 257, "<|x|>": 258}
    assert palm.num_tokens == palm.config.num_tokens == 259
    assert torch.equal(palm.token_emb.weight[:257], old)
    torch.testing.assert_close(palm.token_emb.weight[257:], old.mean(0).expand(2, -1))
    # exp(mean) <= mean(exp): each new token takes at most one share of 257
    assert 0 < lost_nats(palm, before, tokens) <= np.log(1 + 2 / 257) + 1e-5
    mutant = palm_of(depth=1, num_tokens=257).eval()
    resize_token_embeddings(mutant, 259)
    with torch.no_grad():
        mutant.token_emb.weight[257:].normal_(std=5)
    assert lost_nats(mutant, before, tokens) > np.log(1 + 2 / 257) + 1e-2


def test_rows_that_no_token_had_are_set_too_and_names_that_are_there_change_nothing():
    tokenizer, palm = ByteTokenizer(["</s>"], eos_token="</s>"), palm_of(depth=1, num_tokens=300)
    weights = palm.token_emb.weight
    add_special_tokens(palm, tokenizer, ["</s>"])
    assert palm.token_emb.weight is weights
    add_special_tokens(palm, tokenizer, ["<|user|>"])
    assert palm.num_tokens == 300
    torch.testing.assert_close(palm.token_emb.weight[257], weights[:257].mean(0))


def test_a_resized_model_trains_saves_and_keeps_what_is_frozen(tmp_path):
    palm = palm_of(depth=1, num_tokens=257)
    palm.add_finetune_params("default", 2)
    resize_token_embeddings(palm, 260)
    assert not palm.token_emb.weight.requires_grad
    palm.save_pretrained(tmp_path)
    tokens = torch.tensor([[259, 1, 258]])
    assert torch.equal(PaLM.from_pretrained(tmp_path)(tokens), palm(tokens))
    half = palm_of(depth=1, num_tokens=257).to(torch.bfloat16)
    resize_token_embeddings(half, 258)
    assert half.dtype == torch.bfloat16 and half.token_emb.weight.requires_grad
    half(tokens[:, 1:2], return_loss=False).sum().backward()


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_take_the_padding_first_and_both_matrices_have_their_rows(tied):
    """A vocabulary of 270 rows whose last 12 pad it, as in Qwen2, with rows that were never trained."""
    tokenizer = ByteTokenizer(["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
    palm = palm_of(depth=1, num_tokens=270, tie_embeddings=tied, block="serial", norm="rms").eval()
    matrices = ("token_emb",) if tied else ("token_emb", "lm_head")
    old = {name: getattr(palm, name).weight.detach().clone() for name in matrices}
    if not tied:
        assert not torch.equal(*old.values())
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 258, (2, 30)))
    before = palm(tokens)[..., :258]
    for names, num_tokens in ((["<|user|>"], 270), (["<|user|>", *(f"<|{number}|>" for number in range(13))], 272)):
        add_special_tokens(palm, tokenizer, names)
        assert palm.num_tokens == palm.output_weight.shape[0] == num_tokens
        assert tokenizer.special_tokens["<|user|>"] == 258
        for name in matrices:
            weight = getattr(palm, name).weight
            assert weight.requires_grad and torch.equal(weight[:258], old[name][:258])
            torch.testing.assert_close(weight[258], old[name][:258].mean(0))
        torch.testing.assert_close(palm(tokens)[..., :258], before)
    assert tokenizer.num_tokens == 272


def test_a_new_token_never_takes_the_id_of_another():
    """The library counts its tokens for a new id: with gaps between the ids, that is the id of another token."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2, "c": 4, "d": 5, "e": 9}, []))
    backend.add_special_tokens(["</s>"])
    tokenizer, palm = HuggingFaceTokenizer(backend, eos_token="</s>"), palm_of(depth=1, num_tokens=10)
    with pytest.raises(ValueError, match=r"gaps between its ids, in which '<x>' would take the id 6"):
        add_special_tokens(palm, tokenizer, ["</s>", "<x>"])
    assert tokenizer.special_tokens == {"</s>": 2} and tokenizer.num_tokens == palm.num_tokens == 10


@pytest.mark.parametrize("arguments", [{"num_tokens": 256}, {"num_tokens": 300, "num_known": 258}])
def test_tokens_are_not_taken_away(arguments):
    with pytest.raises(ValueError, match="tokens can be added, not taken away"):
        resize_token_embeddings(palm_of(depth=1, num_tokens=257), **arguments)
    with pytest.raises(ValueError, match="expected at most 200"):
        add_special_tokens(palm_of(depth=1, num_tokens=200), ByteTokenizer(), ["<|x|>"])


def test_a_token_that_is_there_as_a_word_becomes_special():
    backend = tokenizers.Tokenizer.from_str(tokenizer_of("bpe").backend.to_str())
    backend.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer = HuggingFaceTokenizer(backend, eos_token="</s>")
    assert backend.token_to_id("<tool>") in tokenizer.encode("<tool>")
    size = tokenizer.num_tokens
    tokenizer.add_special_tokens(["<tool>"])
    assert tokenizer.num_tokens == size
    assert tokenizer.special_tokens["<tool>"] == backend.token_to_id("<tool>")
    assert tokenizer.special_tokens["<tool>"] not in tokenizer.encode("a <tool> b")
