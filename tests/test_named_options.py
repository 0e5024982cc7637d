"""An option that an error names is one of the command that raises it."""

import ast
import re
from functools import cache

import pytest

from palm_rlhf import cli
from palm_rlhf.data.data_command import COMMANDS as DATA
from palm_rlhf.evaluation.evaluate_command import COMMANDS as EVALUATE

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*\b")
OFFERED = re.compile(
    r"^[│\s]*((?:-\w, )?--[^│]*)", re.MULTILINE
)  # help explains an option on a line that starts with it

# The commands that the folders of the package make up; the floors below are of Python's users too, and name none.
COMMANDS = {
    "data": [("data", name) for name in DATA],
    "evaluation": [("evaluate", name) for name in EVALUATE],
    "serving": [("serve",), ("chat",)],
    "feedback": [("collect",), ("learn",), ("serve",), ("sft",)],  # learn says how the others lead to it
    "commands": [(name,) for name, command in cli.COMMANDS.items() if command.module.startswith("palm_rlhf.commands.")],
}


@pytest.fixture(scope="module")
def options_of():
    """The options in the help of a command."""

    @cache
    def options(*command):
        printed = []
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setenv("COLUMNS", "200")
            patch.setattr("sys.stdout.write", printed.append)
            cli.main([*command, "--help"])
        return set(OPTION.findall(" ".join(OFFERED.findall("".join(printed)))))

    return options


def named_in_errors(path):
    """The options in what a file raises, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise):
            texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            for text in filter(lambda text: isinstance(text, str), texts):
                yield from ((option, node.lineno) for option in OPTION.findall(text))


def test_errors_name_options_of_their_own_commands(root, options_of):
    assert {"--generator", "--regularizer"} <= options_of("evaluate", "alpaca")
    assert "--generator" not in options_of("evaluate", "ranking")
    num_named, wrong = 0, []
    for path in sorted((root / "palm_rlhf").rglob("*.py")):
        folder = path.relative_to(root / "palm_rlhf").parts[0]
        for option, line in named_in_errors(path):
            num_named += 1
            if not any(option in options_of(*command) for command in COMMANDS.get(folder, ())):
                wrong.append(f"{path.name}:{line} names {option}")
    assert wrong == []
    assert num_named > 10  # the walk finds them


NOT_READ = {
    "NaN in an array": '[{"a": NaN}, {"a": 1}]',
    "a line cut short": '{"a": 1}\n{"a": ',
    "other keys": '{"x": 1}\n',
    "nulls": '{"messages": null, "preference": null, "winner": null, "question_id": null, "text": null}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "models": "".join(f'{{"preference": 1, "generator_1": "a", "generator_2": "{name}"}}\n' for name in "bc"),
    "nothing": "",
}
READING = {
    ("data", "clean"): ["FILE", "--out", "OUT"],
    ("data", "filter"): ["FILE", "--out", "OUT"],
    ("data", "convert"): ["FILE", "--to", "sft", "--out", "OUT"],
    ("evaluate", "reviews"): ["FILE"],
    ("evaluate", "alpaca"): ["FILE"],
    ("evaluate", "outputs"): ["FILE"],
    ("evaluate", "ranking"): ["FILE"],
    ("evaluate", "report"): ["FILE", "--out", "OUT.html"],
    ("evaluate", "study"): ["--questions", "FILE", "--answers", "FILE", "FILE", "--out", "OUT"],
    ("evaluate", "judge"): [*"--questions FILE --answers FILE FILE --judge person --out OUT".split()],
}


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_a_command_names_its_own_options_for_a_file_that_it_cannot_read(tmp_path, options_of, command):
    errors = {}
    for name, content in NOT_READ.items():
        path = tmp_path / "file.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        places = {"FILE": str(path), "OUT": str(tmp_path / "out.jsonl"), "OUT.html": str(tmp_path / "out.html")}
        try:
            cli.main([*command, *(places.get(argument, argument) for argument in READING[command])])
        except SystemExit as error:
            errors[name] = str(error.code)
    for name in ("NaN in an array", "a line cut short", "UTF-16"):
        assert "file.jsonl" in errors[name]
    named = {option for error in errors.values() for option in OPTION.findall(error)}
    assert named <= options_of(*command), errors
    if command[0] == "data":
        assert "--skip-broken" in errors["NaN in an array"]
