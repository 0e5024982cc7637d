"""Rewards and environments as the command line names them: folders of reward models, functions in Python files."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from beartype import beartype

from palm_rlhf.commands.start_models import ChatModel, open_reward_model
from palm_rlhf.data.conversation import encode_reply
from palm_rlhf.policy.rewards import Reward

MAIN = "reward_model"  # the name of the one that is given by --reward-model


@beartype
def open_rewards(
    reward_model: str | None, named_sources: Sequence[str], policy: ChatModel, name: str
) -> dict[str, Reward]:
    """The rewards of a policy called `name`: a reward model, and those given as NAME=FOLDER or NAME=FILE.py:FUNCTION.

    ValueError where there is none, or what is named is none.
    """
    rewards: dict[str, Reward] = {}
    if reward_model is not None:
        rewards[MAIN] = open_reward_model(reward_model, policy, name)
    for given in named_sources:
        own_name, _, source = given.partition("=")
        if not own_name or not source:
            raise ValueError(f"got the reward {given!r}, expected NAME=FILE.py:FUNCTION, or NAME=FOLDER")
        if own_name in rewards:
            raise ValueError(f"got two rewards called {own_name!r}, expected a name of its own for each")
        file, _, function = source.rpartition(":")
        if file.endswith(".py"):
            rewards[own_name] = read_function(Path(file), function)
        else:
            rewards[own_name] = open_reward_model(source, policy, name)
    if not rewards:
        raise ValueError(
            "got no reward; expected --reward-model FOLDER, --rewards NAME=FILE.py:FUNCTION, or both: a reward model "
            "is made by palm-rlhf reward"
        )
    return rewards


@beartype
def read_environment(source: str, policy: ChatModel) -> Callable:
    """What answers a policy's turns, given as FILE.py:FUNCTION; the texts it returns become messages of the user."""
    file, _, name = source.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"got the environment {source!r}, expected FILE.py:FUNCTION")
    function = read_function(Path(file), name)

    @functools.wraps(function)  # and with its signature, which tells what columns it asks for
    def answer(messages: list, **columns: Any) -> Any:
        reply = function(messages, **columns)
        return encode_reply(reply, policy.tokenizer, policy.template) if isinstance(reply, str) else reply

    return answer


@beartype
def read_function(file: Path, name: str) -> Callable:
    """A function of a file, which is run; ValueError where it has none of that name, FileNotFoundError without a file.

    The file can import those beside it, as when Python runs it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}, expected one of Python with the function {name}")
    spec = importlib.util.spec_from_file_location(f"palm_rlhf_reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        functions = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"{file} has no function {name!r}, expected one of {functions}")
    return function
