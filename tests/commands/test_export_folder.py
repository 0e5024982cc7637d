"""`palm-rlhf export MODEL --format hf`: the folder is the model for transformers, and nothing else is written over."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palm_rlhf.cli import main
from palm_rlhf.data.conversation import encode_prompt
from palm_rlhf.data.templates import PRESETS, load_template
from palm_rlhf.data.tokenizer import ByteTokenizer, load_tokenizer
from palm_rlhf.model.palm import PaLM
from tests.factories import wandering_palm

MESSAGES = [{"role": "user", "content": "What is 7?"}]
SERIAL = {"block": "serial", "norm": "rms", "tie_embeddings": False, "qkv_bias": True}


@pytest.fixture
def bytes_model(tmp_path):
    """`bytes_model(**fields)` is the folder of a small model of bytes, in our own format."""

    def make(**fields):
        folder = tmp_path / "model"
        tokenizer = ByteTokenizer()
        wandering_palm(17, num_tokens=tokenizer.num_tokens, **fields).save_pretrained(folder)
        for part in (tokenizer, PRESETS["default"]):
            part.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize(("fields", "architecture"), [({}, "cohere"), (SERIAL, "qwen2")], ids=["parallel", "serial"])
def test_transformers_opens_the_folder_and_says_the_same(bytes_model, tmp_path, capsys, fields, architecture):
    """A tokenizer of bytes becomes one that transformers has, with the same ids."""
    folder, out = bytes_model(**fields), tmp_path / "out"
    main(["export", str(folder), "--format", "hf", "--output", str(out), "--max-shard-size", "20KB"])
    shards = [*out.glob("model-*.safetensors")]
    numbers = {"type": "f32", "bytes": sum(file.stat().st_size for file in shards), "files": len(shards)}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"architecture": architecture, **numbers}
    assert len(shards) > 1
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    ours, palm = load_tokenizer(folder), PaLM.from_pretrained(folder).eval()
    for text in ("Ünïcode, 日 and 7", " \n\n x\x00\x7f", "".join(map(chr, range(256)))):
        assert tokenizer(text, add_special_tokens=False).input_ids == ours.encode(text)
        assert tokenizer.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    assert ids[0].tolist() == encode_prompt(MESSAGES, ours, load_template(folder)).tolist()
    expected = palm.generate(prompt=ids, max_new_tokens=24, temperature=0.0, eos_token=ours.eos_token)[0].tolist()
    said = theirs.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    assert said == expected and len(set(said)) > 4
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id == ours.eos_token
    again = load_tokenizer(out)
    assert again.encode("日 x") == ours.encode("日 x") and again.special_tokens == ours.special_tokens


def test_what_was_opened_from_others_goes_back_in_the_type_asked_for(llama, tmp_path):
    main(["export", str(llama), "--format", "hf", "--type", "bf16", "--output", str(tmp_path / "out")])
    theirs, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", llama))
    assert theirs.dtype == torch.bfloat16 and not (tmp_path / "out/model.safetensors.index.json").exists()
    for (name, one), other in zip(theirs.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other.bfloat16()), name
    for name in ("tokenizer_config.json", "generation_config.json"):
        new, old = (json.loads((folder / name).read_text()) for folder in (tmp_path / "out", llama))
        assert {key: new.get(key) for key in ("eos_token", "eos_token_id", "top_k")} == {
            key: old.get(key) for key in ("eos_token", "eos_token_id", "top_k")
        }
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == load_template(llama).source


def test_only_an_earlier_export_is_written_over(bytes_model, llama, tmp_path, capsys):
    folder, out = bytes_model(), tmp_path / "out"
    words = ["--format", "hf", "--output", str(out)]
    main(["export", str(llama), *words])
    with pytest.raises(SystemExit, match=r"out exists already: .*--overwrite"):
        main(["export", str(folder), *words])
    (folder / "template.json").unlink()
    (folder / "chat_template.jinja").unlink()
    main(["export", str(folder), *words, "--overwrite"])
    assert "has no chat template, and so the export has none" in capsys.readouterr().err
    assert PaLM.from_pretrained(out).num_tokens == load_tokenizer(out).num_tokens == 261
    assert not [*out.glob("*template*")]
    assert "top_k" not in json.loads((out / "generation_config.json").read_text())  # of the llama
    (out / "notes.txt").write_text("precious")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for source, place, message in (
        (folder, out, r"has \['notes.txt'\], which no export writes"),
        (folder, tmp_path, r"has \['model', 'out'\], which no export writes"),
        (folder, folder, "the model itself, expected another folder"),
        (folder, out / "notes.txt", "is a file, expected a new folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["export", str(source), "--format", "hf", "--output", str(place), "--overwrite"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "hf", "--output", "new", "--type", "q8_0"], "got --type q8_0 with --format hf, expected one of"),
        (["--format", "hf"], "expected the place of a model: --output FOLDER"),
        (["--format", "gguf", "--output", "new", "--max-shard-size", "1GB"], "expected none: it is one file"),
        (["new.jsonl", "--to", "trees", "--max-shard-size", "1GB"], "got --max_shard_size in an export of a database"),
        (["--format", "hf", "--output", "new", "--max-shard-size", "much"], "max_shard_size is 'much'"),
    ],
)
def test_options_that_mean_nothing_are_refused(bytes_model, tmp_path, monkeypatch, words, message):
    folder = bytes_model()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["export", str(folder), *words])
    assert not [*tmp_path.glob("new*")]


def test_a_model_without_a_tokenizer_is_exported_without_one(tmp_path, capsys):
    wandering_palm(3).save_pretrained(tmp_path / "model")
    main(["export", str(tmp_path / "model"), "--format", "hf", "--output", str(tmp_path / "out")])
    assert "has no tokenizer, and so the folder has none" in capsys.readouterr().err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 13
