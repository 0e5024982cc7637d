"""A tiny model, files to train it on, and the console script in this process."""

import json
from pathlib import Path

import pytest

from palm_rlhf.cli import main

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


@pytest.fixture
def command(capsys):
    """`command("sft", ...)` runs a command: the JSON of its last line, and what it said on standard error."""

    def run(*arguments: object) -> tuple[dict, str]:
        main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return json.loads(captured.out.splitlines()[-1]), captured.err

    return run
