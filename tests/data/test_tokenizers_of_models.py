"""Tokenizers as the folders of well-known models have them: their BOS, their several EOS, their padding."""

import json

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, normalizers, processors
from transformers import AutoTokenizer

from palm_rlhf.cli import main
from palm_rlhf.data.conversation import encode, encode_prompt
from palm_rlhf.data.templates import load_template
from palm_rlhf.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.served_model import ServedModel, load
from tests.factories import palm_of

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "h", "i", "t", "e", "o", "▁h", "▁hi", "▁t", "he", "▁the"]
MERGES = [("▁", "h"), ("▁h", "i"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
TEXT = "the hi"


def llama_2(folder, config: dict, *, bos: bool = True, names: tuple[str, ...] = ("<unk>", "<s>", "</s>")) -> None:
    """Write a tokenizer of SentencePiece as transformers converts Llama 2's."""
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *WORDS])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizerFast"}


def served(folder) -> ServedModel:
    """The tokenizer of a folder beside a small model."""
    tokenizer = load_tokenizer(folder)
    return ServedModel(name="m", palm=palm_of(num_tokens=tokenizer.num_tokens), tokenizer=tokenizer)


@pytest.mark.parametrize("in_config", [True, False])
@pytest.mark.parametrize("in_file", [True, False])
def test_a_text_begins_as_in_transformers(tmp_path, in_config, in_file):
    """What tokenizer.json says counts in transformers 5, whatever `add_bos_token` is."""
    llama_2(tmp_path, LLAMA | {"add_bos_token": in_config}, bos=in_file)
    theirs = AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert served(tmp_path).encode_text(TEXT, add_special_tokens=True) == theirs
    assert (theirs[0] == 1) == in_file


def test_generate_puts_the_bos_before_the_prompt_and_stops_at_every_end(tmp_path, capsys):
    llama_2(tmp_path, LLAMA)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    palm = palm_of(num_tokens=259 + len(WORDS), block="serial", norm="rms", tie_embeddings=False)
    palm.save_pretrained(tmp_path, format="llama")
    prompt = [1, *load_tokenizer(tmp_path).encode(TEXT)]
    greedy = palm.generate(None, [torch.tensor(prompt)], max_new_tokens=8, temperature=0.0)[0].tolist()
    shown = [token for token in greedy if token > 2]
    for end in (shown[-1], 9):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
        main(["generate", str(tmp_path), "--prompt", TEXT, "--temperature", "0", "--max-new-tokens", "8"])
        expected = greedy[: greedy.index(end) + 1] if end in greedy else greedy
        tokenizer = load_tokenizer(tmp_path)
        whole = tokenizer.decode(prompt + expected)
        assert tokenizer.decode(prompt) + capsys.readouterr().out == whole + "\n"


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_end_of_a_folder_ends_a_reply(tmp_path, file):
    llama_2(tmp_path, LLAMA)
    ends = {"eos_token_id": [2, 5, 9, 10**6, True, None]}  # Llama 3.1 has three; ids of no token are left out
    (tmp_path / file).write_text(json.dumps(ends))
    model = served(tmp_path)
    assert model.eos_tokens == model.turn_ends == model.tokenizer.eos_tokens == {2, 5, 9}
    assert model.encode_text("") == [2]
    model.tokenizer.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").eos_tokens == {2, 5, 9}


def test_the_token_for_unknown_text_may_pad(tmp_path):
    """As in Vicuna, Yi and many others."""
    llama_2(tmp_path, LLAMA | {"pad_token": "<unk>"})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token, tokenizer.eos_token, sorted(tokenizer.special_tokens)) == (0, 2, ["</s>", "<s>"])
    tokenizer.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").pad_token == 0
    llama_2(tmp_path, LLAMA | {"eos_token": "<unk>"})
    with pytest.raises(ValueError, match="eos_token='<unk>', expected one of the special tokens"):
        load_tokenizer(tmp_path)


def test_special_tokens_that_only_the_config_marks_are_special(tmp_path):
    llama_2(tmp_path, LLAMA, names=("<unk>",), bos=False)
    tokenizer, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2}
    assert tokenizer.encode(TEXT) == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert not {1, 2} & set(tokenizer.encode("<s>the</s>"))


def test_the_template_knows_names_that_only_special_tokens_map_has(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    llama_2(tmp_path, {"chat_template": template, "bos_token": None})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(LLAMA | {"eos_token": {"content": "</s>"}}))
    tokenizer, messages = load_tokenizer(tmp_path), [{"role": "user", "content": "hi"}]
    expected = [1, *tokenizer.encode("hi"), 2]
    assert encode_prompt(messages, tokenizer, load_template(tmp_path)).tolist() == expected
    tokenizer.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").bos_token == "<s>"


@pytest.mark.parametrize("templates", [["x"], [{"name": "tool_use", "template": "x"}], [{"template": 3}], {}])
def test_a_list_without_a_default_template_is_none(tmp_path, templates):
    llama_2(tmp_path, LLAMA | {"chat_template": templates})
    with pytest.raises(FileNotFoundError, match=r"no chat_template in its tokenizer_config\.json"):
        load_template(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json", "tokenizer_config.json"])
def test_a_tokenizer_of_another_form_is_not_taken_for_bytes(tmp_path, name):
    PaLM(num_tokens=300, dim=8, depth=1).save_pretrained(tmp_path)
    (tmp_path / name).write_text(json.dumps(LLAMA))
    message = (
        r"tokenizer\.json: let transformers write it, by AutoTokenizer\.from_pretrained\(folder\)\.save_pretrained"
    )
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["generate", str(tmp_path), "--prompt", "hi"])


@pytest.mark.parametrize("value", [5, ["</s>"], {"content": 7}, {"x": "</s>"}])
def test_a_name_that_is_no_text_is_none(tmp_path, value):
    llama_2(tmp_path, LLAMA | {"eos_token": value, "bos_token": value})
    with pytest.raises(ValueError, match=r"tokenizer_config\.json names no eos_token"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, eos_token="</s>").eos_token == 2


@pytest.mark.parametrize("left, right", [(True, True), (True, False), (False, True), (False, False)])
def test_special_tokens_may_remove_white_space_beside_them(tmp_path, left, right):
    """As those of Phi 3 and Phi 4 do, which are also saved as models of LLaMA's architecture."""
    backend = HuggingFaceTokenizer.train([TEXT, "user assistant \n"], 280, ["</s>"], eos_token="</s>").backend
    backend.add_special_tokens(
        [AddedToken("<|im_sep|>", lstrip=left, rstrip=right), AddedToken("<|im_end|>", rstrip=right)]
    )
    template = (
        "{% for m in messages %}{{ m.role + ' <|im_sep|>\\n' + m.content + ' <|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant <|im_sep|>\n{% endif %}"
    )
    HuggingFaceTokenizer(backend, eos_token="</s>").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate([" hi ", "\nthe", "hi"])
    ]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    tokenizer, chat = load_tokenizer(tmp_path), load_template(tmp_path)
    ours = encode_prompt(messages, tokenizer, chat).tolist()
    assert ours == theirs
    assert encode(messages[:2], tokenizer, chat).tokens.tolist() == ours[: len(encode(messages[:2], tokenizer, chat))]
