"""The way out: a chat model saved as a Cohere model is one for transformers, with its tokenizer and chat template."""

import json

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf.data.conversation import encode
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import HuggingFaceTokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.serving.engine import Engine, EngineConfig
from palm_rlhf.serving.generation import Request
from palm_rlhf.serving.served_model import load

MAX_NEW_TOKENS = 100


@pytest.fixture(scope="module")
def folder(dialogues, tmp_path_factory):
    """A model of words that has learnt the dialogues by heart, as a Cohere model."""
    torch.manual_seed(0)
    template = PRESETS["default"]
    tokenizer = HuggingFaceTokenizer.train([*dialogues, *dialogues.values()], 320)
    conversations = [
        [{"role": "user", "content": said}, {"role": "assistant", "content": reply}]
        for said, reply in dialogues.items()
    ]
    examples = [encode(messages, tokenizer, template) for messages in conversations]
    tokens = pad_sequence([example.tokens.long() for example in examples], batch_first=True)
    loss_mask = pad_sequence([example.weights > 0 for example in examples], batch_first=True)
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=64, depth=2, heads=4, dim_head=16, max_seq_len=256)
    optimizer = torch.optim.AdamW(palm.parameters(), lr=1e-2, betas=(0.9, 0.95))
    loss = torch.tensor(torch.inf)
    while loss > 0.02:
        optimizer.zero_grad()
        loss = palm(tokens, return_loss=True, loss_mask=loss_mask)
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("beyond") / "parrot"
    palm.save_pretrained(folder, format="cohere")
    tokenizer.save_pretrained(folder)
    template.save_pretrained(folder)
    return folder


def test_transformers_answers_alike(folder, dialogues):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["CohereForCausalLM"]
    served_model = load(folder, device="cpu")
    with Engine(served_model.palm, served_model.tokenizer, EngineConfig(max_batch=1)) as engine:
        for said, reply in dialogues.items():
            messages = [{"role": "user", "content": said}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
            assert inputs.input_ids[0].tolist() == served_model.encode_chat(messages)
            theirs = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
            assert tokenizer.decode(theirs[0, inputs.input_ids.shape[1] :], skip_special_tokens=True) == reply
            request = Request(
                served_model.encode_chat(messages), MAX_NEW_TOKENS, temperature=0.0, stop_tokens=served_model.turn_ends
            )
            assert engine.submit(request).text() == reply
