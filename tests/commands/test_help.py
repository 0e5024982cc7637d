"""--help of every command and example: no option without a word about what it does."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator

import pytest
import tyro

from palm_rlhf.cli import COMMANDS
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.palm import PaLM

EXAMPLES = ("sft", "rlhf", "guessing_game", "serve_and_ask")  # train.py is the command


def functions() -> dict[str, tuple[str, str | None]]:
    """For each command its module, and the name that it has among those of `data` or `evaluate`."""
    found = {name: (command.module, None) for name, command in COMMANDS.items()}
    for group in ("data", "evaluate"):
        module, _ = found.pop(group)
        found |= {f"{group} {name}": (module, name) for name in importlib.import_module(module).COMMANDS}
    return found


def unexplained(function: Callable, capsys) -> Iterator[str]:
    """The options whose help is a default or nothing."""
    with pytest.raises(SystemExit) as end:
        tyro.cli(function, args=["--help"], prog="x")
    assert end.value.code == 0
    lines = [line.strip(" │") for line in capsys.readouterr().out.splitlines()]
    options = 0
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if option := re.match(r"--[a-z][\w.-]*", line):
            options += 1
            _, *beside = re.split(r"\s{2,}", line, maxsplit=1)
            words = beside[0] if beside else following
            if not words or words.startswith(("(default", "(required", "--")):
                yield option.group()
    assert options or function.__name__ == "info"


@pytest.mark.parametrize("name", functions())
def test_every_option_of_a_command_is_explained(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    module, key = functions()[name]
    module = importlib.import_module(module)
    function = module.COMMANDS[key] if key else getattr(module, COMMANDS[name].function)
    assert list(unexplained(function, capsys)) == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_option_of_an_example_is_explained(name, root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.syspath_prepend(root / "examples")
    assert list(unexplained(importlib.import_module(name).main, capsys)) == []


def test_an_option_without_a_word_is_found(capsys):
    def command(told: int = 1, untold: int = 2) -> None:
        """Does nothing.

        Args:
            told: What it is.
        """

    assert list(unexplained(command, capsys)) == ["--untold"]


def test_the_keywords_of_a_model_are_explained_once():
    config = inspect.getdoc(PaLMConfig).partition("Args:")[2]
    assert [line.split(":")[0].strip() for line in config.strip().splitlines()] == list(PaLMConfig.__dataclass_fields__)
    assert set(inspect.signature(PaLM).parameters) == set(PaLMConfig.__dataclass_fields__)
    assert "`PaLMConfig`" in inspect.getdoc(PaLM)
