"""Rewards and environments of the command line: folders of reward models, and functions in Python files."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from beartype import beartype

from palm_rlhf.commands.start_models import ChatModel, open_reward_model
from palm_rlhf.data.conversation import encode_reply
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.rewards import Reward

MAIN = "reward_model"  # the name of the reward model given by --reward-model


@beartype
def open_rewards(
    reward_model: str | None,
    named_sources: Sequence[str],
    policy: ChatModel,
    name: str,
    *,
    share_base: bool = False,
) -> dict[str, Reward]:
    """Open the rewards of a policy. Raises ValueError without any, or if a source is no reward.

    Args:
        reward_model: The folder or hub id of a reward model, named MAIN in the result.
        named_sources: Rewards as NAME=FOLDER or NAME=FILE.py:FUNCTION.
        policy: The policy, whose tokens the reward models read.
        name: The policy's name in errors.
        share_base: Open the reward models over the weights of the policy.
    """
    rewards: dict[str, Reward] = {}
    if reward_model is not None:
        rewards[MAIN] = open_reward_model(reward_model, policy, name, share_base=share_base)
    for given in named_sources:
        own_name, _, source = given.partition("=")
        if not own_name or not source:
            raise ValueError(f"got the reward {given!r}, expected NAME=FILE.py:FUNCTION, or NAME=FOLDER")
        if own_name in rewards:
            raise ValueError(f"got two rewards called {own_name!r}, expected different names: rename one of them")
        file, _, function = source.rpartition(":")
        if file.endswith(".py"):
            rewards[own_name] = read_function(Path(file), function)
        else:
            rewards[own_name] = open_reward_model(source, policy, name, share_base=share_base)
    if not rewards:
        raise ValueError(
            "got no reward, expected --reward-model FOLDER, --rewards NAME=FILE.py:FUNCTION, or both: train a reward "
            "model by palm-rlhf reward"
        )
    return rewards


def has_functions(rewards: Mapping[str, Reward]) -> bool:
    """Return whether a reward is a function, which may ask for other columns of the prompts."""
    return any(not isinstance(reward, RewardModel) for reward in rewards.values())


def without_name(rewards: Mapping[str, Reward]) -> Reward | Mapping[str, Reward]:
    """Return the reward model alone if it is the only reward, so that a trainer logs it without a name."""
    return rewards[MAIN] if rewards.keys() == {MAIN} else rewards


@beartype
def read_environment(source: str, policy: ChatModel) -> Callable:
    """Open an environment given as FILE.py:FUNCTION. The texts that it returns become messages of the user."""
    file, _, name = source.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(f"got the environment {source!r}, expected FILE.py:FUNCTION")
    function = read_function(Path(file), name)

    @functools.wraps(function)  # keeps the signature, which names the columns that the function needs
    def answer(messages: list, **columns: Any) -> Any:
        reply = function(messages, **columns)
        return encode_reply(reply, policy.tokenizer, policy.template) if isinstance(reply, str) else reply

    return answer


@beartype
def read_function(file: Path, name: str) -> Callable:
    """Run a Python file and return one of its functions. The file can import the files beside it.

    Raises ValueError if it has no such function, and FileNotFoundError if there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}, expected a Python file with the function {name}")
    spec = importlib.util.spec_from_file_location(f"palm_rlhf_reward_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"got the file {file}, expected a Python file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up here
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        functions = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"{file} has no function {name!r}, expected one of {functions}")
    return function
