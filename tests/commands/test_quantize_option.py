"""`--quantize` of the commands: they compute with the weights that the numbers in fewer bits stand for."""

import json
import os
import re
import subprocess
import sys

import httpx
import pytest
import torch

from palm_rlhf import PaLM
from palm_rlhf.cli import main

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install -e '.[quantize]'")

SERVE = "import sys, tyro; from palm_rlhf.commands.serve_command import serve; tyro.cli(serve, args=sys.argv[1:])"
STEPS = ["--plot", "False", "--warmup-steps", "1", "--precision", "float32"]
WORDS = "The cat saw the dog again."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of bytes, and the plain weights that its int4 numbers stand for."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(5)
    palm = PaLM(
        num_tokens=256, dim=64, depth=2, heads=2, dim_head=32, max_seq_len=256, tie_embeddings=False, logit_scale=1
    )
    palm.save_pretrained(folder / "plain")
    palm.quantize_("int4")
    palm.save_pretrained(folder / "int4")
    return folder / "plain", folder / "int4"


def matrices(folder):
    return {name: tensor for name, tensor in PaLM.from_pretrained(folder).state_dict().items() if "ff_out" in name}


@pytest.mark.parametrize(
    "arguments",
    [["generate", "--prompt", WORDS, "--max-new-tokens", "20"], ["chat", "--once", WORDS]],
    ids=lambda a: a[0],
)
def test_texts_are_those_of_the_dequantised_weights(folders, capsys, arguments):
    plain, int4 = folders
    command, *options = arguments
    options += ["--temperature", "0"] + (["--max-tokens", "20"] if command == "chat" else [])

    def text(*more):
        main([command, *map(str, more), *options])
        return capsys.readouterr().out

    assert text(plain, "--quantize", "int4") == text(int4) != text(plain)


def test_the_server_answers_with_the_dequantised_weights(folders, root, tmp_path):
    plain, int4 = folders
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(plain), "--port", "0", "--quantize", "int4", "--device", "cpu"],
        env={**os.environ, "PYTHONPATH": str(root)}, cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        url = re.search(r" answers at (http://\S+)\n", server.stdout.readline()).group(1)
        body = {"model": "plain", "prompt": WORDS, "max_tokens": 8, "temperature": 0, "logprobs": 1}
        got = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"][0]["logprobs"]
    finally:
        server.kill()
        server.communicate()
    tokens, _ = PaLM.from_pretrained(int4).generate(
        prompt=torch.tensor(list(WORDS.encode())), max_new_tokens=8, temperature=0.0, return_logprobs=True
    )
    assert len(got["token_logprobs"]) == len(tokens) == 8
    palm = PaLM.from_pretrained(int4)
    row = torch.cat([torch.tensor(list(WORDS.encode())), tokens])
    expected = palm(row[None, :-1]).log_softmax(-1)[0, -8:].gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert got["token_logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_an_evaluation_measures_both_in_one_table(folders, tmp_path, capsys):
    plain, int4 = folders
    (tmp_path / "text.txt").write_text(WORDS * 8)
    options = ["--data", str(tmp_path / "text.txt"), "--seq-len", "64"]
    main(["evaluate", "lm", str(plain), *options, "--quantize", "int4"])
    out = capsys.readouterr().out
    numbers = json.loads(out.splitlines()[-1])
    main(["evaluate", "lm", str(int4), *options])
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    main(["evaluate", "lm", str(plain), *options])
    before = json.loads(capsys.readouterr().out.splitlines()[-1])
    fewer = numbers["quantized"]
    assert fewer["kind"] == "int4" and fewer["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    assert numbers["bits_per_byte"] == pytest.approx(before["bits_per_byte"], rel=1e-6) != fewer["bits_per_byte"]
    assert fewer["perplexity_increase"] == pytest.approx(expected["perplexity"] / before["perplexity"] - 1, abs=1e-5)
    assert numbers["weights_bytes"] == sum(
        tensor.nbytes for tensor in PaLM.from_pretrained(plain).state_dict().values()
    )
    assert re.search(r"plain .*\n *int4 ", out) and f"{fewer['weights_bytes']:,}" in out


def test_fine_tuning_learns_adapters_over_the_frozen_numbers(folders, files, tmp_path, command):
    plain, int4 = folders
    options = ["--num-epochs", "1", "--batch-size", "8", "--seq-len", "64", "--learning-rate", "1e-2", *STEPS]
    arguments = ["sft", files["conversations"], "--model", plain, "--output-dir", tmp_path / "run", *options]
    result, _ = command(*arguments, "--lora-r", 2, "--quantize", "int4")
    expected = matrices(int4)  # which have no adapters
    saved = PaLM.from_pretrained(result["model"])
    assert not saved.finetune_modules and expected
    for name, tensor in expected.items():
        assert torch.equal(saved.state_dict()[name], tensor) and not torch.equal(tensor, matrices(plain)[name])
    attn_out = "layers.0.attn_out.weight"
    assert not torch.equal(saved.state_dict()[attn_out], PaLM.from_pretrained(int4).state_dict()[attn_out])


def test_a_resumed_run_ends_as_an_uninterrupted_one(folders, files, tmp_path, command):
    options = ["--batch-size", "8", "--seq-len", "64", "--lora-r", "2", "--quantize", "int8", *STEPS]
    arguments = ["sft", files["conversations"], "--model", folders[0], *options, "--held-out", "0", "--save-every", "2"]
    whole, _ = command(*arguments, "--output-dir", tmp_path / "whole", "--num-epochs", 1)
    last = max((tmp_path / "whole" / "checkpoints").iterdir())
    kept = PaLM.from_pretrained(whole["model"]).state_dict()
    for path in (tmp_path / "whole" / "checkpoints").glob(last.name):
        path.rename(tmp_path / "gone")
    again, _ = command(*arguments, "--output-dir", tmp_path / "whole", "--num-epochs", 1, "--resume")
    assert all(
        torch.equal(kept[name], tensor) for name, tensor in PaLM.from_pretrained(again["model"]).state_dict().items()
    )


def test_ppo_learns_adapters_over_the_frozen_numbers(folders, files, tmp_path, command):
    plain, int4 = folders
    (tmp_path / "reward.py").write_text(
        "def reward(prompts, completions):\n    return [float(len(c)) for c in completions]\n"
    )
    options = ["--num-steps", "1", "--rollouts-per-step", "4", "--minibatch-size", "4", "--max-new-tokens", "4", *STEPS]
    arguments = ["rlhf", files["prompts"], "--model", plain, "--rewards", f"length={tmp_path / 'reward.py'}:reward"]
    arguments += ["--output-dir", tmp_path / "run", *options, "--quantize", "int4", "--actor-lora-r", 2]
    with pytest.raises(SystemExit, match=r"got weights in int4, expected plain ones to train; train adapters"):
        command(*arguments, "--critic-lora-r", 0)
    result, _ = command(*arguments, "--critic-lora-r", 2)
    saved = PaLM.from_pretrained(result["model"]).state_dict()
    for name, tensor in matrices(int4).items():
        assert torch.equal(saved[name], tensor)


@pytest.mark.parametrize("name, option", [("sft", "--lora-r"), ("rlhf", "--actor-lora-r")])
def test_frozen_weights_without_adapters_are_refused(folders, files, tmp_path, name, option):
    data = files["conversations" if name == "sft" else "prompts"]
    (tmp_path / "reward.py").write_text("def reward(prompts, completions):\n    return [0.0 for _ in completions]\n")
    more = ["--rewards", f"zero={tmp_path / 'reward.py'}:reward"] if name == "rlhf" else []
    arguments = [name, data, "--model", folders[0], "--output-dir", tmp_path / "run", *more, "--quantize", "int8"]
    with pytest.raises(SystemExit, match=rf"got --quantize int8 without {option}, expected adapters"):
        main([*map(str, arguments)])
