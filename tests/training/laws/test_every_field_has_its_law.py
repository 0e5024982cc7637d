"""No option is inert: each field of each trainer's config has a test that fails where the field does nothing."""

import ast
import dataclasses

import pytest

from palm_rlhf import training
from palm_rlhf.training.rollout_config import RolloutConfig
from palm_rlhf.training.run.config import FineTuningConfig, RunConfig, Settings
from palm_rlhf.training.sampling_config import SamplingConfig

from .trainers import CONFIGS

BASES = {Settings, RunConfig, FineTuningConfig, SamplingConfig}  # their fields are walked in their heirs
WALKED = (*CONFIGS, RolloutConfig)

WHAT_TO_DO = """{names}: no law is found.
A law is a test that gives the field another value than its default and asserts what differs: a loss, a gradient, an
optimiser's group, a draw, a file or a refusal, by a value worked out by hand wherever there is one.
1. Write it under tests/training/ beside the tests of its topic (tests/training/laws/ has the options' own), or take a
   test that is there already, and put above it: @pytest.mark.law("{first}")
   Where several configs share the field: @law_of_each_config("{field}"), of tests/training/laws/trainers.py.
2. Take the field out where the package reads it, and see the test fail; then put it back."""


def laws_of(function: ast.FunctionDef) -> list[tuple[str, ...]]:
    """The (config, field) pairs that a test's decorators name; the config is "*" for those of every config."""
    found = []
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call):
            names = [ast.literal_eval(argument) for argument in decorator.args if isinstance(argument, ast.Constant)]
            match ast.unparse(decorator.func).rpartition(".")[2]:
                case "law":
                    found += [tuple(name.split(".")) for name in names]
                case "law_of_each_config":
                    found += [("*", name) for name in names]
    return found


def words_of(tree: ast.Module) -> set[str]:
    """The keywords and texts of a file that can give a field its value, without the names of laws."""
    named = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("law", "law_of_each_config"))
        for argument in node.args
    }
    nodes = [node for node in ast.walk(tree) if id(node) not in named]
    words = {node.arg for node in nodes if isinstance(node, ast.keyword)}
    return words | {node.value for node in nodes if isinstance(node, ast.Constant)}


@pytest.fixture(scope="module")
def trees(root) -> dict[str, ast.Module]:
    """The sources of the tests' files in which a law may stand; nothing has to be imported."""
    sources = {path: path.read_text(encoding="utf-8") for path in sorted((root / "tests").rglob("test_*.py"))}
    return {str(path.relative_to(root)): ast.parse(text) for path, text in sources.items() if "law" in text}


@pytest.fixture(scope="module")
def laws(trees) -> dict[tuple[str, ...], list[tuple[str, str]]]:
    """(config, field) -> the file and the name of each test that is its law."""
    found = {}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for law in laws_of(node):
                    found.setdefault(law, []).append((path, node.name))
    return found


def fields_of(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("kind", WALKED, ids=lambda kind: kind.__name__)
def test_every_field_has_its_law(kind, laws):
    names = [name for name in fields_of(kind) if not {(kind.__name__, name), ("*", name)} & laws.keys()]
    text = {"names": ", ".join(f"{kind.__name__}.{name}" for name in names)}
    assert not names, WHAT_TO_DO.format(**text, first=f"{kind.__name__}.{names[0]}", field=names[0])


def test_every_law_is_of_a_field_that_it_sets(laws, trees):
    known = {(kind.__name__, name) for kind in WALKED for name in fields_of(kind)}
    known |= {("*", name) for _, name in known}
    unknown = [f"{'.'.join(law)}: {tests}" for law, tests in laws.items() if law not in known]
    assert not unknown, f"laws of fields that no config has: {unknown}"
    words = {path: words_of(tree) for path, tree in trees.items()}
    for (_, field), tests in laws.items():
        for path, test in tests:
            assert field in words[path], f"{path}::{test} is a law of {field}, but nothing in its file sets that field"


def test_all_configs_are_walked():
    def kinds(base):
        return {base}.union(*map(kinds, base.__subclasses__()))

    configs = {kind for kind in kinds(Settings) - BASES if kind.__module__.startswith(training.__name__)}
    of_runs = {kind for kind in configs if issubclass(kind, RunConfig)}
    assert set(CONFIGS) == of_runs, "add the config to SETTINGS in tests/training/laws/trainers.py, and its trainer"
    assert set(WALKED) == configs, "add the config to WALKED, which is walked here"


@pytest.mark.parametrize(
    "source, found",
    [
        ('@pytest.mark.law("PPOConfig.gamma", "PPOConfig.eps")', [("PPOConfig", "gamma"), ("PPOConfig", "eps")]),
        ('@law_of_each_config("betas")', [("*", "betas")]),
        ("@pytest.mark.slow", []),
        ('@pytest.mark.parametrize("law", [1])', []),
    ],
)
def test_the_walk_reads_marks(source, found):
    function = ast.parse(f"{source}\ndef test_of_a_law():\n    pass\n").body[0]
    assert laws_of(function) == found
