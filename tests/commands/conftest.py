"""A tiny model, files to train it on, and the console script in this process."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from palm_rlhf.cli import main

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = ("cat", "dog", "hill", "mat", "rain")


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One file for each command."""
    folder = tmp_path_factory.mktemp("files")
    text = "".join(
        f"== {number} ==\nThe {WORDS[number % 5]} saw the {WORDS[number % 3]} again.\n" for number in range(150)
    )
    (folder / "text.txt").write_text(text)
    (folder / "prompts.txt").write_text("What is 1?\n\nWhat is 2?\nWhat is 1?\n")
    questions = [{"role": "user", "content": f"What is {number}?"} for number in range(40)]
    replies = [f"The {WORDS[number % 5]}" for number in range(40)]
    return {
        "text": folder / "text.txt",
        "prompts": folder / "prompts.txt",
        "conversations": write_lines(
            folder / "conversations.jsonl",
            [
                {"messages": [question, {"role": "assistant", "content": reply}]}
                for question, reply in zip(questions, replies, strict=True)
            ],
        ),
        "rankings": write_lines(
            folder / "rankings.jsonl",
            [
                {"prompt": question["content"], "responses": [f"{reply} {word}" for word in ("good", "fair", "bad")]}
                for question, reply in zip(questions, replies, strict=True)
            ],
        ),
        "preferences": write_lines(
            folder / "preferences.jsonl",
            [
                {"prompt": question["content"], "chosen": f"{reply} good", "rejected": f"{reply} bad"}
                for question, reply in zip(questions, replies, strict=True)
            ],
        ),
        "unpaired": write_lines(
            folder / "unpaired.jsonl",
            [
                {"prompt": question["content"], "completion": f"{reply} {word}", "label": word == "good"}
                for question, reply in zip(questions, replies, strict=True)
                for word in ("good", "bad")
            ],
        ),
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory, files):
    """The folder of a llama of transformers: a vocabulary padded to 320 rows, and settings of generation."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([files["text"].read_text()], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, num_key_value_heads=2, **sizes, **ids)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.lm_head.weight.data[tokenizer.vocab_size :] *= 10  # the rows of no token would be sampled most
    model.generation_config.do_sample, model.generation_config.top_k = True, 7
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file() and (folder / "chat_template.jinja").is_file()
    return folder


@pytest.fixture
def command(capsys):
    """`command("sft", ...)` runs a command: the JSON of its last line, and what it said on standard error."""

    def run(*arguments: object) -> tuple[dict, str]:
        main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return json.loads(captured.out.splitlines()[-1]), captured.err

    return run
