"""The options of sampling: `Sampling` has each once, and each place that offers some offers all, or says which not."""

import ast
import dataclasses
import inspect
import math

import pytest
import torch

from palm_rlhf import PaLM, PPOConfig
from palm_rlhf.cli import main
from palm_rlhf.model import generate as generation
from palm_rlhf.ops.sampling import RANGES, Sampling, sampling_logprobs
from palm_rlhf.policy.rollout import ResponseSampling, collect
from palm_rlhf.serving.chat import chat as chat_command
from palm_rlhf.serving.dialogue import Dialogue
from palm_rlhf.serving.generation import Request
from palm_rlhf.serving.protocol.openai_parameters import CHAT, COMPLETION
from palm_rlhf.serving.protocol.responses_parameters import RESPONSE
from palm_rlhf.training.rollout_config import RolloutConfig

DEFAULTS = {
    "temperature": 1.0,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
OUT_OF_RANGE = {
    "temperature": (-0.5, math.inf, math.nan),
    "top_k": (0, -1),
    "top_p": (-0.1, 1.5, math.nan),
    "min_p": (-0.1, 1.5),
    "repetition_penalty": (0.0, -1.0, math.inf),
    "presence_penalty": (math.nan, math.inf),
    "frequency_penalty": (math.nan, -math.inf),
}
CASES = [(name, value) for name, values in OUT_OF_RANGE.items() for value in values]
# An update of training computes the log-probabilities of responses again, for these options only.
LEFT_OUT_IN_TRAINING = {"min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
PROMPT = torch.tensor([1, 2, 3])
# Files and folders with some of the options and not all, and why. In data/, top_k is another thing: a rank of answers.
NOT_ALL = {
    "commands/train_command.py": "samples of a run of training are there to be looked at, and have a temperature alone",
    "evaluation/": "judges may be behind an API; the reference is sampled as the run was, at its temperature",
    "feedback/learning/learning_settings.py": "texts of its own: answers and PPO share its temperature and top-p",
    "ops/logprobs.py": "log-probabilities are computed again for temperature, top-k and top-p only",
    "ops/nucleus.py": "the cuts of top-k and top-p alone",
    "ops/sampling.py": "truncation, which comes after the penalties",
    "policy/actor_critic.py": "log-probabilities are computed again for temperature, top-k and top-p only",
    "policy/sequences.py": "the same",
    "serving/dialogue.py": "a default of its own for the temperature, beside what Sampling has",
    "training/rlhf/config.py": "a text of its own for the temperature, beside what SamplingConfig has",
    "training/rlhf/trainer.py": "its train() takes the arguments of palm-rlhf-pytorch's",
    "training/sampling_config.py": "training computes log-probabilities again",
}


@pytest.fixture(scope="module")
def palm():
    torch.manual_seed(0)
    return PaLM(num_tokens=256, dim=8, depth=1, heads=2, dim_head=4)


def defaults_of(function) -> dict:
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def fields_of(kind) -> dict:
    return {field.name: field.default for field in dataclasses.fields(kind)}


def test_sampling_has_the_defaults_that_change_nothing():
    assert fields_of(Sampling) == DEFAULTS
    logits = torch.randn(2, 9)
    assert torch.equal(sampling_logprobs(logits, Sampling()), logits.log_softmax(dim=-1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sampling().temperature = 2.0


@pytest.mark.parametrize("function", [PaLM.generate, PaLM.stream, generation.generate, generation.stream])
def test_generate_shows_every_option_with_its_default(function):
    assert defaults_of(function).items() >= DEFAULTS.items()
    parameters = inspect.signature(function).parameters.values()
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    assert "palm_rlhf.ops.sampling.Sampling" in PaLM.generate.__doc__  # which explains them


@pytest.mark.parametrize("kind", [ResponseSampling, Request])
def test_rollouts_and_requests_have_every_option_with_its_default(kind):
    assert issubclass(kind, Sampling)
    assert fields_of(kind).items() >= DEFAULTS.items()


@pytest.mark.parametrize("kind", [PPOConfig, RolloutConfig])
def test_training_leaves_out_the_options_that_it_says(kind):
    offered = fields_of(kind)
    assert {name: offered[name] for name in offered if name in DEFAULTS} == {
        name: default for name, default in DEFAULTS.items() if name not in LEFT_OUT_IN_TRAINING
    }


@pytest.mark.parametrize("schema", [CHAT, COMPLETION, RESPONSE], ids=["chat", "completion", "response"])
def test_the_server_takes_every_option_by_its_name(schema):
    assert schema["properties"].keys() >= DEFAULTS.keys()


def offered_together(path) -> list[set[str]]:
    """The options of sampling that each function of a file has as parameters, and each class as fields."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            found.append({argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)})
        elif isinstance(node, ast.ClassDef):
            targets = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            found.append({target.id for target in targets if isinstance(target, ast.Name)})
    return [names & DEFAULTS.keys() for names in found if names & DEFAULTS.keys()]


def test_who_offers_some_of_the_options_offers_all_or_is_known_not_to(root):
    package, partial, whole = root / "palm_rlhf", set(), set()
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        if not name.startswith("data/"):
            for names in offered_together(path):
                (whole if names == DEFAULTS.keys() else partial).add(name)
    assert whole == {"ops/sampling.py", "model/generate.py"}
    assert [name for name in partial if not name.startswith(tuple(NOT_ALL))] == []


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_commands_take_and_explain_every_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for name in DEFAULTS:
        assert f"--{name.replace('_', '-')} " in shown
    for words in ("0 is greedy", "this many of the likeliest tokens", "arXiv:1904.09751", "arXiv:1909.05858"):
        assert words in shown
    sampling = inspect.signature(chat_command).parameters["sampling"].default
    assert sampling.over({}) == Sampling(temperature=0.7)
    assert inspect.signature(Dialogue).parameters["sampling"].default == sampling.over({})


DOORS = {
    "Sampling": lambda palm, **option: Sampling(**option),
    "PaLM.generate": lambda palm, **option: palm.generate(prompt=PROMPT, max_new_tokens=1, **option),
    "PaLM.stream": lambda palm, **option: palm.stream(PROMPT, max_new_tokens=1, **option),
    "generate": lambda palm, **option: generation.generate(palm, 9, PROMPT, **option),
    "stream": lambda palm, **option: generation.stream(palm, PROMPT, seq_len=9, **option),
    "rollouts": lambda palm, **option: ResponseSampling(max_new_tokens=1, **option),
    "Request": lambda palm, **option: Request([1], 1, **option),
}


@pytest.mark.parametrize("name, value", CASES)
@pytest.mark.parametrize("door", DOORS)
def test_a_value_out_of_range_gives_the_same_error_everywhere(palm, door, name, value):
    with pytest.raises(ValueError) as refused:
        DOORS[door](palm, **{name: value})
    _, expected = RANGES[name]
    assert f"got {name}={value}, expected {expected}" in str(refused.value)


@pytest.mark.parametrize("name, value", CASES)
@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["chat"]], ids=["generate", "chat"])
def test_commands_refuse_the_value_with_the_same_error(tmp_path, command, name, value):
    with pytest.raises(SystemExit) as stopped:
        main([*command, str(tmp_path), f"--{name.replace('_', '-')}={value}"])
    _, expected = RANGES[name]
    assert stopped.value.code == f"palm-rlhf: got {name}={value}, expected {expected}"


@pytest.mark.parametrize("name, value", [case for case in CASES if case[0] not in LEFT_OUT_IN_TRAINING])
@pytest.mark.parametrize("kind", [PPOConfig, RolloutConfig])
def test_training_expects_the_same_range(kind, name, value):
    with pytest.raises(ValueError) as refused:
        kind(**{name: value})
    _, expected = RANGES[name]
    assert str(refused.value).endswith(f"expected {expected}")
    assert f"{kind.__name__}.{name}" in str(refused.value) and str(value) in str(refused.value)


@pytest.mark.parametrize("option", [{"min_p": 0.1}, {"repetition_penalty": 1.3}, {"presence_penalty": 0.5},
                                    {"frequency_penalty": 0.5}], ids=str)  # fmt: skip
def test_rollouts_take_every_option_and_refuse_to_compute_again_what_they_cannot(palm, option):
    sampling = ResponseSampling(max_new_tokens=40, **option)
    drawn, plain = (
        collect(palm, [PROMPT], one, generator=torch.Generator().manual_seed(0))
        for one in (sampling, ResponseSampling(max_new_tokens=40))
    )
    assert not torch.equal(drawn.logprobs, plain.logprobs)
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"got {name}={value}, expected .*: .*temperature, top_k, top_p only"):
        _ = sampling.truncation
