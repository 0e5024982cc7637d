"""Tokenizers and chat templates in GGUF files: their ids are those of the tokenizers that the files were made from."""

import io
import json

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from palm_rlhf.data.conversation import encode_prompt
from palm_rlhf.data.templates import PRESETS, JinjaTemplate, load_template
from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from palm_rlhf.data.tokenizer_gguf_writer import gguf_metadata
from palm_rlhf.model.interop.gguf_header import GGUFHeader

TEXTS = [
    "Hello, world!  It's 12345.678 o'clock; WE'RE late.\n\n\n  Two spaces,\ttabs\r\nand lines.   ",
    "naïve café, e\u0301 composed; Здравствуй мир, 東京へ行く ４２ ½ Ⅷ, 👍🏽 \u200d and <|im_end|> as text",
    "def f(x):\n    return x**2  # don't\n",
    " a", "", "\n", "  ", "I'll I'LL 's'S 1000000 1st",
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])


def after(expression: str) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), behavior="isolated"), last])


UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+"]
# As in the tokenizer.json of GPT-2, SmolLM2, Command R, Llama 3, Smaug, Qwen2, Mistral Nemo and DeepSeek Coder: the
# words, the normaliser, whole words.
KINDS = {
    "gpt-2": (BYTE_LEVEL, None, False),
    "smollm": (DIGITS, None, False),
    "command-r": (DIGITS, normalizers.NFC(), False),
    "llama-bpe": (after(CONTRACTIONS + "{1,3}" + REST), None, True),
    "smaug-bpe": (after(CONTRACTIONS + "{1,3}" + REST), None, False),
    "qwen2": (after(CONTRACTIONS + REST), normalizers.NFC(), False),
    "tekken": (after(TEKKEN + REST.replace("[\\r\\n]*", "[\\r\\n/]*", 1)), None, True),
    "deepseek-coder": (
        pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(one), behavior="isolated") for one in CODER),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        None,
        False,
    ),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(kind: str, training_text: str) -> tokenizers.Tokenizer:
    """A small tokenizer of the kind, with a word that is never cut."""
    words, normalizer, whole_words = KINDS[kind]
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer, backend.decoder = words, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([training_text], trainer)
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    backend.add_tokens([AddedToken("o'clock", normalized=False)])
    return backend


def write(path, metadata: dict, architecture: str = "llama"):
    """A file with a header alone."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def converted(backend: tokenizers.Tokenizer, kind: str, **more) -> dict:
    """The metadata of a byte-level tokenizer, as llama.cpp's converter writes them, with two ids of padding."""
    state = json.loads(backend.to_str())
    tokens = {index: token for token, index in backend.get_vocab(with_added_tokens=True).items()}
    types = dict.fromkeys(tokens, 1) | {token["id"]: 3 if token["special"] else 4 for token in state["added_tokens"]}
    size = len(tokens)
    fields = {
        "model": "gpt2",
        "pre": kind,
        "tokens": [tokens[index] for index in range(size)] + ["[PAD0]", "[PAD1]"],
        "token_type": [types[index] for index in range(size)] + [5, 5],
        "merges": [" ".join(merge) for merge in state["model"]["merges"]],
        "eos_token_id": backend.token_to_id("<|im_end|>"),
        "bos_token_id": backend.token_to_id("<|endoftext|>"),
        **more,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()} | {"tokenizer.chat_template": TEMPLATE}


@pytest.fixture
def enwik(shared_data) -> str:
    return shared_data("enwik6").read_text(encoding="utf-8", errors="replace")[:300_000]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_tokenizer_that_the_file_was_made_from(kind, enwik, tmp_path):
    backend = byte_level(kind, enwik[:50_000])
    path = write(tmp_path / "model.gguf", converted(backend, kind))
    tokenizer = load_tokenizer(path)
    reference = HuggingFaceTokenizer(backend, eos_token="<|im_end|>")
    for text in [*TEXTS, *enwik[200_000:230_000].split("\n\n")]:
        assert tokenizer.encode(text) == reference.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text))
    assert tokenizer.encode("o'clock") == [backend.token_to_id("o'clock")]
    assert tokenizer.special_tokens == {name: backend.token_to_id(name) for name in SPECIAL}
    assert (tokenizer.eos_token, tokenizer.pad_token) == (backend.token_to_id("<|im_end|>"),) * 2
    assert tokenizer.num_tokens == backend.get_vocab_size()  # and not those of padding
    assert "[PAD0]" not in tokenizer.backend.get_vocab()


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2"])
def test_ids_are_those_of_transformers_which_reads_the_same_file(kind, enwik, tmp_path):
    """Whose expressions for these two are those of the models; for others it takes GPT-2's."""
    path = write(tmp_path / "model.gguf", converted(byte_level(kind, enwik[:150_000]), kind), "qwen2")
    theirs, tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name), load_tokenizer(path)
    for text in [*TEXTS, *enwik[200_000:230_000].split("\n\n")]:
        text = text.replace("e\u0301", "\u00e9").replace(SPECIAL[2], "")  # transformers neither composes nor guards
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize(
    ("kind", "fields", "before", "after"),
    [
        ("smollm", {}, [], []),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, ["<|endoftext|>"], ["<|im_end|>"]),
        ("llama-bpe", {}, ["<|endoftext|>"], []),
        ("llama-bpe", {"add_bos_token": False}, [], []),
    ],
)
def test_the_bos_and_the_eos_are_put_where_the_metadata_say_so(kind, fields, before, after, enwik, tmp_path):
    path = write(tmp_path / "model.gguf", converted(byte_level(kind, enwik[:20_000]), kind, **fields))
    backend = load_tokenizer(path).backend
    plain = backend.encode("a b", add_special_tokens=False).tokens
    assert backend.encode("a b").tokens == [*before, *plain, *after]


def test_the_chat_template_is_that_of_the_file(enwik, tmp_path):
    path = write(tmp_path / "model.gguf", converted(byte_level("smollm", enwik[:20_000]), "smollm"))
    template, tokenizer = load_template(path), load_tokenizer(path)
    assert template == JinjaTemplate(TEMPLATE, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"})
    conversation = [{"role": "user", "content": "Say <|im_end|>"}]
    ids = encode_prompt(conversation, tokenizer, template).tolist()
    assert ids.count(tokenizer.eos_token) == 1  # the words of the user do not become a special token
    assert tokenizer.decode(ids, with_special_tokens=True) == template.render(conversation, add_generation_prompt=True)


def test_a_file_without_a_template_or_a_tokenizer_is_like_a_folder_without_one(enwik, tmp_path):
    metadata = converted(byte_level("smollm", enwik[:20_000]), "smollm")
    del metadata["tokenizer.chat_template"]
    with pytest.raises(FileNotFoundError, match="no chat_template"):
        load_template(write(tmp_path / "model.gguf", metadata))
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_tokenizer(write(tmp_path / "model.gguf", {"tokenizer.ggml.model": "none"}))
    del metadata["tokenizer.ggml.eos_token_id"]
    path = write(tmp_path / "model.gguf", metadata)
    with pytest.raises(ValueError, match="names no eos_token"):
        load_tokenizer(path)
    assert load_tokenizer(path, eos_token="<|im_end|>").special_tokens.keys() == set(SPECIAL)


def trained_sentencepiece(text: str, **options) -> sentencepiece.SentencePieceProcessor:
    """A BPE with byte tokens, as that of Llama 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")),
        model_writer=model,
        vocab_size=800,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.999,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("prefix", [True, False], ids=["space before the text", "none"])
def test_ids_of_a_llama_tokenizer_are_those_of_sentencepiece(prefix, enwik, tmp_path):
    pieces = trained_sentencepiece(enwik[:150_000], add_dummy_prefix=prefix)
    every = range(pieces.vocab_size())
    types = [6 if pieces.is_byte(i) else 2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 1 for i in every]
    fields = {
        "model": "llama",
        "pre": "default",
        "tokens": [pieces.id_to_piece(i) for i in every],
        "scores": [float(pieces.get_score(i)) for i in every],
        "token_type": types,
        "bos_token_id": pieces.bos_id(),
        "eos_token_id": pieces.eos_id(),
        "unknown_token_id": pieces.unk_id(),
        "add_space_prefix": prefix,
    }
    path = write(tmp_path / "model.gguf", {f"tokenizer.ggml.{name}": value for name, value in fields.items()})
    tokenizer = load_tokenizer(path)
    assert tokenizer.special_tokens == {"<s>": pieces.bos_id(), "</s>": pieces.eos_id()}
    for text in [*TEXTS, *enwik[200_000:240_000].split("\n\n")]:
        ids = tokenizer.encode(text)
        assert ids == pieces.encode(text), text
        assert tokenizer.decode(ids) == pieces.decode(ids), text
    assert tokenizer.backend.encode("a").ids[0] == pieces.bos_id()  # which llama.cpp puts unless it is told not to
    again = gguf_metadata(tokenizer, None, tokenizer.num_tokens)
    second = load_tokenizer(write(tmp_path / "again.gguf", again))
    for text in [*TEXTS, enwik[200_000:220_000]]:
        assert second.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_metadata_of_a_tokenizer_are_those_of_the_converter(kind, enwik):
    backend = byte_level(kind, enwik[:20_000])
    config = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"}
    tokenizer = HuggingFaceTokenizer(backend, eos_token="<|im_end|>", config=config)
    expected = converted(backend, kind, padding_token_id=backend.token_to_id("<|im_end|>"))
    size = backend.get_vocab_size() + 2
    expected["tokenizer.ggml.tokens"][-2:] = [f"[PAD{size - 2}]", f"[PAD{size - 1}]"]
    found = gguf_metadata(tokenizer, JinjaTemplate(TEMPLATE), size)
    assert (found.pop("tokenizer.ggml.add_bos_token"), found.pop("tokenizer.ggml.add_eos_token")) == (False, False)
    assert found == expected


def test_ends_and_our_own_templates_are_written(enwik, tmp_path):
    backend = byte_level("smollm", enwik[:20_000])
    ids = [(name, backend.token_to_id(name)) for name in SPECIAL]
    backend.post_processor = processors.TemplateProcessing(single=[SPECIAL[0], "$A"], special_tokens=ids)
    names = PRESETS["default"].special_tokens
    tokenizer = HuggingFaceTokenizer(backend, names, eos_token=SPECIAL[2], config={"bos_token": SPECIAL[0]})
    path = write(tmp_path / "model.gguf", gguf_metadata(tokenizer, PRESETS["default"], tokenizer.num_tokens))
    assert load_tokenizer(path).backend.encode("a b").ids == tokenizer.backend.encode("a b").ids
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert load_template(path).render(turns) == PRESETS["default"].render(turns)


def test_tokenizers_that_llama_cpp_lacks_are_refused(enwik):
    with pytest.raises(ValueError, match="a tokenizer of bytes"):
        gguf_metadata(ByteTokenizer(), None, 300)
    backend = byte_level("smollm", enwik[:20_000])
    with pytest.raises(ValueError, match="expected at most 100: take that of the model"):
        gguf_metadata(HuggingFaceTokenizer(backend, eos_token=SPECIAL[2]), None, 100)
    for change in (
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), BYTE_LEVEL])},
        {"normalizer": normalizers.Lowercase()},
        {"model": models.BPE(backend.get_vocab(with_added_tokens=False), [], ignore_merges=True)},
    ):
        other = tokenizers.Tokenizer.from_str(backend.to_str())
        for name, part in change.items():
            setattr(other, name, part)
        with pytest.raises(ValueError, match=r"expected one of the tokenizers that llama\.cpp knows"):
            gguf_metadata(HuggingFaceTokenizer(other, eos_token=SPECIAL[2]), None, 1000)
    with pytest.raises(ValueError, match="a tokenizer without merges"):
        gguf_metadata(HuggingFaceTokenizer.train(["ab"], 261), None, 300)
    unigram = tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("<x>", -2.0)], 0, False))
    with pytest.raises(ValueError, match="of the type Unigram, expected BPE"):
        gguf_metadata(HuggingFaceTokenizer(unigram, ["<x>"], eos_token="<x>"), None, 10)
    wrapped = tokenizers.Tokenizer.from_str(backend.to_str())
    wrapped.post_processor = processors.TemplateProcessing(
        single=[SPECIAL[1], "$A"], special_tokens=[(SPECIAL[1], backend.token_to_id(SPECIAL[1]))]
    )
    with pytest.raises(ValueError, match="before a text"):
        gguf_metadata(HuggingFaceTokenizer(wrapped, eos_token=SPECIAL[2]), None, 1000)


BROKEN = {
    "unknown words": ({"pre": "gemma4"}, "tokenizer.ggml.pre 'gemma4', expected one of"),
    "no words": ({"pre": None}, "tokenizer.ggml.pre 'default'"),
    "unknown model": ({"model": "t5"}, "tokenizer.ggml.model 't5', expected gpt2 or llama"),
    "no tokens": ({"tokens": None}, "no list of strings tokenizer.ggml.tokens"),
    "tokens of another type": ({"tokens": [1, 2]}, "no list of strings tokenizer.ggml.tokens"),
    "no merges": ({"merges": None}, "no list of strings tokenizer.ggml.merges"),
    "a merge of one": ({"merges": ["ab"]}, "the merge 'ab', expected two tokens"),
    "a merge of unknown tokens": ({"merges": ["qqqq zzzz"]}, "a damaged tokenizer"),
    "types": ({"token_type": [1, 1]}, "not as many types"),
    "an id": ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id 1000000, expected an id of its"),
    "an id of another type": ({"eos_token_id": "end"}, "tokenizer.ggml.eos_token_id 'end'"),
    "scores": ({"model": "llama", "scores": [0.5], "merges": None}, "and 1 scores, expected as many"),
    "a long token": (
        {"model": "llama", "tokens": ["x" * 10**6], "token_type": [1], "scores": [0.0], "merges": None}
        | {"eos_token_id": None, "bos_token_id": None},
        "of 1000000 characters, expected at most 512",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tokenizer_is_refused_by_name(case, enwik, tmp_path):
    fields, message = BROKEN[case]
    metadata = converted(byte_level("smollm", enwik[:5000]), "smollm", **fields)
    path = write(tmp_path / "model.gguf", {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_a_template_that_is_not_jinja_is_refused_and_one_that_reaches_out_is_not_run(enwik, tmp_path):
    metadata = converted(byte_level("smollm", enwik[:5000]), "smollm")
    for source, message in (
        ("{% for %}", "not valid Jinja"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses the conversation: SecurityError"),
    ):
        path = write(tmp_path / "model.gguf", {**metadata, "tokenizer.chat_template": source})
        with pytest.raises(ValueError, match=message):
            load_template(path).render([{"role": "user", "content": "Hi"}])


def test_the_metadata_of_smollm2_are_written_as_they_were_read(smollm2_file):
    """Which llama.cpp's own converter wrote; SmolLM2 was trained on digits one by one."""
    tokenizer, template = load_tokenizer(smollm2_file), load_template(smollm2_file)
    expected = GGUFHeader(smollm2_file).metadata
    found = gguf_metadata(tokenizer, template, tokenizer.num_tokens)
    assert found.pop("tokenizer.ggml.add_eos_token") is False  # the default
    assert found == {key: value for key, value in expected.items() if key in found}
    assert {key for key in expected if key.startswith("tokenizer.")} - set(found) == {"tokenizer.ggml.add_space_prefix"}
    assert tokenizer.backend.encode("in 1859").tokens == ["in", "Ġ", "1", "8", "5", "9"]
