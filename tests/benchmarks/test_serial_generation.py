"""The benchmark of the serial block: it compares tokens and logits first, and what is not right is not timed."""

import importlib
import json
from importlib.util import find_spec

import pytest
import torch

from palm_rlhf.model.interop.gguf_writer import write_gguf


@pytest.fixture
def benchmark_module(root, monkeypatch):
    """The benchmark as a module."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("serial_generation")


def test_its_rows(benchmark_module, capsys):
    benchmark_module.main(depth=2, dim=192, vocabulary=300, prompt_len=6, num_tokens=12, rounds=2)
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    rows = [f"{name}, {dtype}" for dtype in ("float32", "bfloat16") for name in ("palm-rlhf", "transformers")]
    assert [*result["seconds"]][:4] == rows
    ratios = ["float32 than transformers, float32", "bfloat16 than transformers, bfloat16"]
    assert [*result["speedups"]][:2] == ratios
    assert len(result["seconds"]) == 4 + bool(find_spec("llama_cpp"))
    (parity,) = [line for line in out.splitlines() if line.startswith("parity: transformers")]
    assert int(parity.split(", ")[2].split()[0]) > 3  # different tokens, so that a wrong one would show


def test_other_logits_and_other_tokens_are_refused(benchmark_module):
    palm = benchmark_module.model_of(None, 1, 192, 300)
    model, prompt = benchmark_module.make_hugging_face(palm.config, palm).eval(), [1, 2, 3]
    benchmark_module.check_transformers(palm, model, prompt, 4)
    model.model.norm.weight.data.mul_(1.01)
    with pytest.raises(AssertionError, match="the logits of transformers differ"):
        benchmark_module.check_transformers(palm, model, prompt, 4)
    model.model.norm.weight.data.div_(1.01)
    model.generation_config.repetition_penalty = 1e6
    with pytest.raises(AssertionError, match="the tokens of transformers differ"):
        benchmark_module.check_transformers(palm, model, prompt, 8)


def test_less_likely_tokens_of_llama_cpp_are_refused(benchmark_module, tmp_path, capsys):
    pytest.importorskip("gguf")
    palm, path, prompt = benchmark_module.model_of(None, 1, 192, 300), tmp_path / "model.gguf", [1, 2, 3]
    write_gguf(palm, path, type="f32", name="a model", tokenizer=benchmark_module.vocabulary_of(None, palm))
    said = benchmark_module.by_palm(palm, prompt)(5)
    benchmark_module.check_llama_cpp(path, said, prompt)
    assert "5 of 5 as we do" in capsys.readouterr().out
    logits = palm(torch.tensor([prompt + said]))[0, -2]
    other = int(logits.argsort()[-30])
    with pytest.raises(AssertionError, match="less likely"):
        benchmark_module.check_llama_cpp(path, [*said[:-1], other], prompt)
