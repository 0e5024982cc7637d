"""examples/sft.py as a user runs it: conversations in, a rate of replies that stop, a model that opens, and a chat."""

import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch

from palm_rlhf.data.conversation import encode_prompt, end_of_turn
from palm_rlhf.data.templates import PRESETS, load_template
from palm_rlhf.data.tokenizer import ByteTokenizer, load_tokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.rollout import ResponseSampling

SMALL = [
    *("--fresh.dim", "32", "--fresh.depth", "1", "--fresh.heads", "2", "--seq-len", "128", "--num-prompts", "6"),
    *(
        "--max-new-tokens",
        "12",
        "--num-epochs",
        "1",
        "--warmup-steps",
        "2",
        "--plot",
        "False",
        "--max-seconds",
        "0.001",
    ),
]
NUMBERS = {
    "stop_rate_before",
    "stop_rate_after",
    "valid_loss",
    "steps",
    "seconds",
    "output_dir",
    "model",
    "stopped_early",
}


@pytest.fixture(scope="module")
def run(root):
    """`run("--chat", said="Hello\\n")` is a finished process of the example."""

    def start(*args, said: str = "") -> subprocess.CompletedProcess:
        command = [sys.executable, str(root / "examples/sft.py"), *map(str, args)]
        environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONIOENCODING": "utf-8"}
        return subprocess.run(
            command, env=environment, input=said, capture_output=True, text=True, encoding="utf-8", check=False
        )

    return start


@pytest.fixture(scope="module")
def example(root):
    """The example as a module, and its half that has the dialogues."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "examples")
        yield importlib.import_module("sft"), importlib.import_module("sft_data")


def checked(done: subprocess.CompletedProcess, folder) -> tuple[dict, list[str]]:
    """The numbers, and the lines that came after them; the model opens, with its tokenizer and template."""
    assert done.returncode == 0, done.stderr
    numbers, *replies = done.stdout.split("\n")[:-1]
    result = json.loads(numbers)
    assert set(result) == NUMBERS
    assert 0 <= result["stop_rate_before"] <= 1
    assert 0 <= result["stop_rate_after"] <= 1
    assert 0 < result["valid_loss"] < 7
    assert result["model"] == str(folder / "model")
    palm, tokenizer, template = (
        load(folder / "model") for load in (PaLM.from_pretrained, load_tokenizer, load_template)
    )
    assert palm.num_tokens == tokenizer.num_tokens
    prompt = encode_prompt([{"role": "user", "content": "Hello"}], tokenizer, template)
    assert 1 <= len(palm.generate(prompt=prompt, max_new_tokens=3, eos_token=end_of_turn(tokenizer, template))) <= 3
    return result, replies


@pytest.fixture(scope="module")
def fine_tuned(run, tmp_path_factory):
    """The process that fine-tuned on the default data, and its folder."""
    folder = tmp_path_factory.mktemp("sft")
    return run(*SMALL, "--output-dir", folder, "--template", "oasst"), folder


def test_it_fine_tunes_on_the_dialogues(fine_tuned):
    done, folder = fine_tuned
    result, replies = checked(done, folder)
    assert (result["steps"], result["stopped_early"]) == (1, "max_seconds")
    assert re.search(r"stopped early, after step 1 of \d+", done.stderr)  # of an estimate
    assert replies == []  # standard input is no terminal
    assert all(word in done.stderr for word in ("held out", "--- ", "before: ", "after: ", "end by themselves now"))


def test_it_goes_on_from_what_it_saved_on_trees_by_adapters_and_chats(fine_tuned, run, shared_data, tmp_path):
    trees, model = shared_data("oasst_en_100_tree.jsonl"), fine_tuned[1] / "model"
    options = ("--model", model, "--data", trees, "--lora-r", "2", "--output-dir", tmp_path, "--chat")
    done = run(*SMALL, *options, said="Hello?\nBye\n")
    result, replies = checked(done, tmp_path)
    assert result["steps"] > 0
    assert len(replies) >= 2
    assert len("\n".join(replies)) <= 2 * 12 + 1  # two replies of at most twelve bytes
    assert load_template(tmp_path / "model") == PRESETS["oasst"]  # the model's own
    assert not PaLM.from_pretrained(tmp_path / "model").finetune_modules


@pytest.fixture
def run_here(root, example, monkeypatch):
    """`run_here("--resume")` runs the example in this process, where its imports are there already."""

    def start(*args) -> None:
        monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        runpy.run_path(str(root / "examples/sft.py"), run_name="__main__")

    return start


def test_a_model_that_exists_gets_adapters_unless_told_otherwise(fine_tuned, run_here, tmp_path):
    """The embeddings stay as they are, which training of all weights changes."""
    folder = fine_tuned[1] / "model"
    old = PaLM.from_pretrained(folder)
    for more, is_same in (((), True), (("--lora-r", "0"), False)):
        output = tmp_path / str(is_same)
        run_here("--model", folder, "--output-dir", output, *SMALL, *more)
        new = PaLM.from_pretrained(output / "model")
        assert not torch.equal(new.layers[0].in_proj.weight, old.layers[0].in_proj.weight)
        assert torch.equal(new.token_emb.weight, old.token_emb.weight) == is_same


def test_it_resumes_from_where_the_time_was_over(fine_tuned, run_here, capsys):
    _, folder = fine_tuned
    run_here(*SMALL, "--output-dir", folder, "--template", "oasst", "--resume")
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_what_cannot_be_read_is_one_clear_line(run_here, tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"text": "no conversation"}\n')
    with pytest.raises(SystemExit, match=r"^sft\.py: .*notes\.jsonl, line 1"):
        run_here("--data", tmp_path / "notes.jsonl", "--output-dir", tmp_path / "run", *SMALL)
    assert not (tmp_path / "run").exists()


class Watched(PaLM):
    """A PaLM that says one token after the mark of the assistant and after itself, and notes what it was given."""

    def __init__(self, mark: int, says: int):
        super().__init__(num_tokens=261, dim=16, depth=1, heads=1, dim_head=8)
        self.prompts: list[list[int]] = []
        direction = torch.linspace(-1, 1, 16)
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.zero_()
            self.token_emb.weight.zero_()
            self.token_emb.weight[mark] = direction
            self.token_emb.weight[says] = 2 * direction

    def stream(self, prompt, **options):
        self.prompts.append(prompt.tolist())
        return super().stream(prompt, **options)


def test_the_stop_rate_is_that_of_the_replies_that_end(example):
    sft, _ = example
    tokenizer, template = ByteTokenizer(), PRESETS["default"]
    end = end_of_turn(tokenizer, template)
    prompts = [encode_prompt([{"role": "user", "content": text}], tokenizer, template) for text in ("a", "hello")]
    sampling = ResponseSampling(5, temperature=0.0, eos_token=end)
    for says, rate, reply in ((end, 1.0, ""), (ord("!"), 0.0, "!!!!!")):
        palm = Watched(int(prompts[0][-1]), says)
        assert sft.measure(palm, prompts, tokenizer, sampling) == (rate, [reply] * 2)


def test_the_chat_remembers_what_there_is_room_for(example, monkeypatch, capsys):
    sft, _ = example
    tokenizer, template = ByteTokenizer(), PRESETS["default"]
    palm = Watched(tokenizer.special_tokens["<|assistant|>"], ord("!"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nand three\n" + "x" * 50 + "\n"))
    sampling = ResponseSampling(4, temperature=0.0, eos_token=end_of_turn(tokenizer, template))
    sft.converse(palm, tokenizer, template, sampling, room=29)
    assert capsys.readouterr().out == "!!!!\n" * 4
    shown = [tokenizer.decode(prompt, with_special_tokens=True).replace("<|endoftext|>", "") for prompt in palm.prompts]
    assert shown == [
        "<|user|>one<|assistant|>",
        "<|user|>one<|assistant|>!!!!<|user|>two<|assistant|>",
        "<|user|>two<|assistant|>!!!!<|user|>and three<|assistant|>",
        "<|user|>" + "x" * 50 + "<|assistant|>",
    ]


def test_the_dialogues_are_conversations_of_a_user_and_the_assistant(example):
    _, data = example
    conversations = [record["messages"] for record in data.dialogues()]
    assert len(conversations) > 500
    for messages in conversations:
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert not any("\n" in message["content"] for message in messages)
