"""Scores of responses by reward models and reward functions, one of them or several by name."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from time import monotonic
from typing import Any, NamedTuple

import torch
from beartype import BeartypeConf, beartype
from torch import Tensor

from palm_rlhf.policy.model_checks import check_vocabulary
from palm_rlhf.policy.reward_functions import Numbers, arguments_of, call, shown, start
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import Sequences, spoken

Reward = RewardModel | Callable
Rewards = Reward | Mapping[str, Reward]
GIVEN = ("prompts", "completions", "prompt_ids", "completion_ids")  # every function can ask for them
LARGEST = torch.finfo(torch.float32).max  # absolute value of a score


class Scores(NamedTuple):
    """Scores of responses: `b` float32, and which of them are valid; the score of an invalid one is 0.

    With named rewards, a score is the weighted sum of those that returned a number. It is invalid if no reward with a
    weight did. `by_name` has the scores of each reward, without weights.
    """

    scores: Tensor
    valid: Tensor
    by_name: Mapping[str, "Scores"] = {}

    def numbers(self) -> Numbers:
        """Return the scores as a list, with None for invalid ones."""
        return [
            score if valid else None for score, valid in zip(self.scores.tolist(), self.valid.tolist(), strict=True)
        ]


@torch.no_grad()
@beartype(conf=BeartypeConf(is_pep484_tower=True))
def score(
    reward: Rewards,
    sequences: Sequences,
    *,
    tokenizer: Any = None,
    eos_token: int | None = None,
    batch_size: int = 64,
    weights: Mapping[str, float] | None = None,
    timeout: float | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> Scores:
    """Score responses by RewardModels and functions: one, or several by name with their `weights` (1 if not listed).

    A function returns a number for each completion, or None if it cannot tell. It is called with two lists, `prompts`
    and `completions`: texts if there is a tokenizer (completions without the end-of-sequence token), else 1-d tensors.
    Further parameters of its signature are passed by name: `prompt_ids` and `completion_ids` (lists of ids, with the
    end-of-sequence token), and `keywords`, such as the prompts' other columns. A function with `**kwargs` gets all of
    these. It may be a coroutine function. Several functions run at the same time, each in a thread, for up to `timeout`
    seconds. A thread cannot be stopped: a function that takes longer runs on, and its answer is dropped.

    Raises ValueError if a function returns anything else or asks for an unknown parameter; RuntimeError if a function
    raises, naming the prompt if it can be told (it is not called again); TimeoutError if a function takes too long;
    FloatingPointError if a score is not finite in float32.
    """
    rewards = named(reward)
    prompts, completions = spoken(sequences, tokenizer, eos_token)
    ids = (tuple(part.tolist() for part in parts) for parts in spoken(sequences))
    given = {**(keywords or {}), **dict(zip(GIVEN, (prompts, completions, *map(list, ids)), strict=True))}
    calls = {
        name: functools.partial(call, label_of(name), function, given)
        for name, function in rewards.items()
        if not isinstance(function, RewardModel)
    }
    answers = _answers(calls, rewards, sequences, batch_size, timeout)
    for name, numbers in answers.items():
        _check_finite(label_of(name), numbers, sequences, tokenizer)
    if not isinstance(reward, Mapping):
        return _as_scores(answers[""], sequences)
    total = weighted_sum(answers, weights or {})
    _check_finite("the weighted sum of the rewards", total, sequences, tokenizer)
    each = {name: _as_scores(numbers, sequences) for name, numbers in answers.items()}
    return Scores(*_as_scores(total, sequences)[:2], each)


def named(reward: Rewards) -> Mapping[str, Reward]:
    """Return rewards by name; a single reward has an empty name."""
    return reward if isinstance(reward, Mapping) else {"": reward}


def move(reward: Rewards, device: torch.device) -> None:
    """Move the reward models among rewards to a device."""
    for model in named(reward).values():
        if isinstance(model, RewardModel):
            model.to(device)


def label_of(name: str) -> str:
    """Return the words for a reward in error messages."""
    return f"the reward {name!r}" if name else "the reward function"


@beartype(conf=BeartypeConf(is_pep484_tower=True))
def weighted_sum(answers: Mapping[str, Numbers], weights: Mapping[str, float]) -> Numbers:
    """Return each response's weighted sum of the rewards that returned a number; None if none with a weight did."""
    counted = {name: weights.get(name, 1.0) for name in answers}
    rows = zip(*([(counted[name], number) for number in numbers] for name, numbers in answers.items()), strict=True)
    counted_rows = ([(weight, number) for weight, number in row if weight and number is not None] for row in rows)
    return [math.fsum(weight * number for weight, number in row) if row else None for row in counted_rows]


@beartype(conf=BeartypeConf(is_pep484_tower=True))
def check_rewards(
    reward: Rewards, *, num_tokens: int, keywords: Sequence[str] = (), weights: Mapping[str, float] | None = None
) -> None:
    """Raise ValueError, before a run begins, for rewards that cannot be called and weights without effect.

    Args:
        num_tokens: size of the policy's vocabulary.
        keywords: names that functions can ask for, besides GIVEN.
    """
    rewards = named(reward)
    if not rewards:
        raise ValueError("got no reward; expected at least one")
    names = (*GIVEN, *keywords)
    if taken := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"the prompts have the columns {taken}, names under which functions get other values: rename them"
        )
    for name, one in rewards.items():
        if isinstance(one, RewardModel):
            check_vocabulary(f"reward model {name!r}" if name else "reward model", one, num_tokens)
        else:
            arguments_of(label_of(name), one, dict.fromkeys(names))
    if weights is None:
        return
    if not isinstance(reward, Mapping):
        raise ValueError(f"got reward_weights={weights} for one reward without a name; expected rewards by name")
    if unknown := weights.keys() - rewards.keys():
        raise ValueError(
            f"reward_weights has {sorted(unknown)}; expected names of rewards, which are {sorted(rewards)}"
        )
    if not any(weights.get(name, 1.0) for name in rewards):
        raise ValueError(f"got reward_weights={weights}, all of them 0; expected at least one other weight")


def _answers(
    calls: Mapping[str, Callable[[], Numbers]],
    rewards: Mapping[str, Reward],
    sequences: Sequences,
    batch_size: int,
    timeout: float | None,
) -> dict[str, Numbers]:
    """Return each reward's numbers. Functions run in threads while the models compute in this one."""
    if len(rewards) == len(calls) == 1 and timeout is None:
        return {name: ask() for name, ask in calls.items()}
    end = None if timeout is None else monotonic() + timeout
    device = sequences.tokens.device.type
    futures = {name: start(ask, device) for name, ask in calls.items()}
    answers = {
        name: model.score(sequences, batch_size=batch_size).tolist()
        for name, model in rewards.items()
        if isinstance(model, RewardModel)
    }
    done, late = wait(futures.values(), None if end is None else max(end - monotonic(), 0), FIRST_EXCEPTION)
    answers |= {name: future.result() for name, future in futures.items() if future in done}
    if late:
        names = " and ".join(label_of(name) for name, future in futures.items() if future in late)
        raise TimeoutError(
            f"{names} did not answer within reward_timeout={timeout:g} seconds for {len(sequences)} completions; "
            "expected a number, or None, for each by then: raise reward_timeout, or return None for what takes too long"
        )
    return {name: answers[name] for name in rewards}


def _check_finite(label: str, numbers: Numbers, sequences: Sequences, tokenizer: Any) -> None:
    for row, number in enumerate(numbers):
        if number is not None and not abs(number) <= LARGEST:
            prompt, completion = (part[0] for part in spoken(sequences.select(slice(row, row + 1)), tokenizer))
            raise FloatingPointError(
                f"{label.removesuffix(' function')} is {number}, expected a finite number or None: for the prompt "
                f"{shown(prompt)} and the completion {shown(completion)}"
            )


def _as_scores(numbers: Numbers, sequences: Sequences) -> Scores:
    device = sequences.tokens.device
    return Scores(
        torch.tensor([number or 0.0 for number in numbers], dtype=torch.float32, device=device),
        torch.tensor([number is not None for number in numbers], device=device),
    )
