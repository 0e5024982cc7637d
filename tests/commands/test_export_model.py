"""`palm-rlhf export MODEL --format gguf`: the file opens here, and in llama.cpp, as the model that was exported."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from palm_rlhf.cli import main
from palm_rlhf.data.templates import PRESETS, load_template
from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.served_model import load
from tests.conftest import NEEDS_LLAMA_CPP

SERIAL = {"block": "serial", "norm": "rms", "logit_scale": 1.0}
LONG = {"factor": 8.0, "original_max_position_embeddings": 64}
MODELS = {
    "palm": {},
    "multi-query": {"kv_heads": 1},
    "llama": SERIAL,
    "llama3": SERIAL | {"rotary_scaling": {"rope_type": "llama3", **LONG}},
    "yarn": SERIAL | {"rotary_scaling": {"rope_type": "yarn", **LONG}},
    "qwen2": SERIAL | {"qkv_bias": True, "tie_embeddings": False},
    "qwen3": SERIAL | {"qk_norm": True, "dim_head": 24},
}
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom; 1859, naïve: «épaisse». " * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(**fields)` is that of a small model with a tokenizer and a chat template."""

    def make(seed: int = 0, **fields):
        path = tmp_path_factory.mktemp("run") / "tiny"
        tokenizer = HuggingFaceTokenizer.train([TEXT], 300)
        torch.manual_seed(seed)
        palm = PaLM(**{"num_tokens": 320, "dim": 64, "depth": 2, "heads": 4, "dim_head": 16, "kv_heads": 2, **fields})
        for name, parameter in palm.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.data.uniform_(0.5, 1.5)
            elif "out" in name:
                parameter.data.mul_(8)  # a tied model repeats its last token otherwise
        palm.save_pretrained(path)
        tokenizer.save_pretrained(path)
        PRESETS["default"].save_pretrained(path)
        return path

    return make


def test_the_file_is_served_as_the_folder_is(folder, tmp_path, capsys):
    path, out = folder(), tmp_path / "tiny.gguf"
    main(["export", str(path), "--format", "gguf", "--type", "f32", "--output", str(out)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "architecture": "command-r",
        "type": "f32",
        "bytes": out.stat().st_size,
    }
    there, here = load(path), load(out)
    conversation = [{"role": "user", "content": "It was the worst?"}]
    ids = here.encode_chat(conversation)
    assert ids == there.encode_chat(conversation)
    assert here.turn_ends == there.turn_ends
    prompt = torch.tensor([ids])
    theirs, ours = (model.palm.generate(prompt=prompt, max_new_tokens=20, temperature=0.0) for model in (there, here))
    assert torch.equal(theirs[0], ours[0])


def test_f16_is_the_default_and_a_file_is_exported_again(folder, tmp_path, capsys):
    main(["export", str(folder(**SERIAL)), "--format", "gguf", "--output", str(tmp_path / "first.gguf")])
    main(["export", str(tmp_path / "first.gguf"), "--format", "gguf", "--output", str(tmp_path / "second.gguf")])
    assert [json.loads(line)["type"] for line in capsys.readouterr().out.splitlines()] == ["f16", "f16"]
    first, second = (PaLM.from_pretrained(tmp_path / f"{name}.gguf").state_dict() for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load_template(tmp_path / "first.gguf") == load_template(tmp_path / "second.gguf")
    tokenizers = [load_tokenizer(tmp_path / f"{name}.gguf") for name in ("first", "second")]
    assert tokenizers[0].encode(TEXT) == tokenizers[1].encode(TEXT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected one of them: --to for a database of feedback, --format for a model"),
        (["--format", "gguf", "--to", "trees"], "expected one of them"),
        (["--format", "gguf"], "expected the place of a model: --output FILE.gguf"),
        (["out.gguf", "--format", "gguf"], "expected the place of a model: --output FILE.gguf"),
        (["--format", "gguf", "--output", "x.gguf", "--lang", "en"], "got --lang in an export of a model"),
        (["out.jsonl", "--to", "trees", "--type", "f16"], "got --type in an export of a database"),
        (["--to", "trees"], "got no file to write"),
    ],
)
def test_options_of_the_other_kind_of_export_are_refused(words, message, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(["export", str(tmp_path), *words])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_exists_is_written_over_only_if_told_so(folder, tmp_path):
    path, out = folder(), tmp_path / "tiny.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(SystemExit, match=r"got --output .*tiny\.bin, expected a file that ends in \.gguf"):
        main(["export", str(path), "--format", "gguf", "--output", str(out.with_suffix(".bin"))])
    words = ["export", str(path), "--format", "gguf", "--output", str(out)]
    with pytest.raises(SystemExit, match=r"exists already.*--overwrite"):
        main(words)
    assert out.read_bytes() == b"precious"
    main([*words, "--overwrite"])
    assert PaLM.from_pretrained(out).num_tokens == 320


def test_a_model_without_a_tokenizer_or_of_bytes_is_refused(folder, tmp_path):
    path = folder()
    words = ["export", str(path), "--format", "gguf", "--output", str(tmp_path / "x.gguf")]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    with pytest.raises(SystemExit, match=r"has no tokenizer\.json"):
        main(words)
    ByteTokenizer().save_pretrained(path)
    with pytest.raises(SystemExit, match="got a tokenizer of bytes"):
        main(words)
    assert list(tmp_path.iterdir()) == []


# Seeds of models whose most likely tokens are ahead of the second by far more than the two libraries differ.
SEEDS = {
    ("palm", "f16"): 0,
    ("multi-query", "f16"): 7,
    ("llama", "f16"): 3,
    ("llama3", "f16"): 0,
    ("yarn", "f16"): 1,
    ("qwen2", "f16"): 9,
    ("qwen3", "f16"): 2,
    ("palm", "q8_0"): 0,
    ("llama", "q8_0"): 5,
}


@pytest.mark.parametrize(("name", "type"), SEEDS)
def test_llama_cpp_generates_the_same_tokens(name, type, folder, tmp_path):
    """Its cache is float32 here (type 0); its products still round the activations, to float16 or to 8 bits."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip(f"{NEEDS_LLAMA_CPP}: pip install llama-cpp-python")
    from llama_cpp import Llama

    path, out = folder(SEEDS[name, type], **MODELS[name]), tmp_path / "tiny.gguf"
    main(["export", str(path), "--format", "gguf", "--type", type, "--output", str(out)])
    tokenizer, palm = load_tokenizer(out), PaLM.from_pretrained(out).eval()
    prompt = tokenizer.encode(TEXT[:80])
    theirs = Llama(str(out), n_ctx=128, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
    assert theirs.tokenize(TEXT.encode(), add_bos=False, special=False) == tokenizer.encode(TEXT)
    theirs.eval(prompt)
    with torch.inference_mode():
        logits = palm(torch.tensor([prompt]))[0].numpy()
    differences = np.abs(np.array(theirs.scores[: len(prompt)]) - logits)
    assert differences.max() < (0.01 if type == "f16" else 0.15) * logits.std()
    tokens = []
    for _ in range(16):
        tokens.append(int(theirs.scores[theirs.n_tokens - 1].argmax()))
        theirs.eval(tokens[-1:])
    assert len(set(tokens)) > 4
    assert palm.generate(prompt=torch.tensor([prompt]), max_new_tokens=16, temperature=0.0)[0].tolist() == tokens
