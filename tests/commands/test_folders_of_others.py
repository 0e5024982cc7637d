"""Commands on a folder of LLaMA's architecture with a tokenizer and a chat template, as transformers writes it."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palm_rlhf.cli import main
from palm_rlhf.data.conversation import encode_prompt
from palm_rlhf.data.templates import load_template
from palm_rlhf.data.tokenizer import load_tokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.served_model import load
from tests.commands.conftest import CHATML

MESSAGES = [{"role": "user", "content": "What is 7?"}]
SHORT = ["--plot", "False", "--warmup-steps", "1", "--num-epochs", "1", "--batch-size", "8", "--seq-len", "64"]


@pytest.mark.parametrize("inside", [False, True], ids=["chat_template.jinja", "tokenizer_config.json"])
def test_the_tokenizer_and_the_chat_template_are_theirs(llama, tmp_path, inside):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_text((llama / name).read_text())
    if inside:  # as transformers 4 wrote it
        (tmp_path / "chat_template.jinja").unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML}))
    ours, theirs, template = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path), load_template(tmp_path)
    for text in ("The cat saw the dog again.", "Ünïcode, 日 and 7", " \n\n x"):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(MESSAGES, ours, template).tolist() == expected
    assert ours.eos_token == theirs.eos_token_id == 2


def test_generate_continues_a_text_as_transformers_does(llama, capsys):
    tokenizer, model = AutoTokenizer.from_pretrained(llama), AutoModelForCausalLM.from_pretrained(llama)
    prompt = tokenizer("The cat", add_special_tokens=False, return_tensors="pt").input_ids
    padding = list(range(len(tokenizer), 320))  # rows of no token
    ids = model.generate(prompt, max_new_tokens=12, do_sample=False, suppress_tokens=padding)[0, prompt.shape[1] :]
    main(["generate", str(llama), "--prompt", "The cat", "--temperature", "0", "--max-new-tokens", "12"])
    out = capsys.readouterr().out
    assert out == tokenizer.decode(ids, skip_special_tokens=True) + "\n" and len(out) > 5


def test_what_sft_saves_opens_here_and_in_transformers(llama, files, tmp_path, command):
    run = tmp_path / "run"
    command("sft", files["conversations"], "--model", llama, "--output-dir", run, "--learning-rate", "1e-2", *SHORT)
    palm, base = PaLM.from_pretrained(run), PaLM.from_pretrained(llama)
    assert palm.config == base.config and palm.config.block == "serial"
    assert (palm.state_dict()["lm_head.weight"] != base.state_dict()["lm_head.weight"]).any()
    assert load_tokenizer(run / "model").fingerprint == load_tokenizer(llama).fingerprint
    assert load_template(run / "model") == load_template(llama)
    generation = [json.loads((folder / "generation_config.json").read_text()) for folder in (run / "model", llama)]
    assert generation[0] == generation[1] and generation[0]["top_k"] == 7
    served = load(run)
    assert served.turn_ends == {2} and served.template == load_template(llama)

    palm.save_pretrained(run / "model", format="hf")  # beside its tokenizer
    theirs = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(palm.eval()(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    assert theirs.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(run / "model").chat_template == CHATML
    assert torch.equal(PaLM.from_pretrained(run).eval()(tokens), palm(tokens))


def test_a_tokenizer_that_does_not_fit_the_vocabulary_is_refused(llama, files, tmp_path):
    PaLM(num_tokens=300, dim=16, depth=1, heads=1, dim_head=8).save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "small" / name).write_text((llama / name).read_text())
    known = load_tokenizer(llama).num_tokens
    for arguments in (
        ["generate", tmp_path / "small", "--prompt", "The"],
        ["sft", files["conversations"], "--model", tmp_path / "small", "--output-dir", tmp_path / "new"],
        ["evaluate", "lm", tmp_path / "small", "--data", files["text"]],
    ):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        message = rf"the tokenizer in .*small has {known} tokens, and the model 300; expected at most as many"
        assert re.search(message, str(end.value.code)), arguments
    assert not (tmp_path / "new").exists()
