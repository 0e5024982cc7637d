"""The best of several responses by a reward."""

from collections.abc import Mapping
from typing import Any

import torch
from beartype import BeartypeConf, beartype
from torch import Tensor

from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.rewards import Rewards, score
from palm_rlhf.policy.rollout import ResponseSampling, collect
from palm_rlhf.policy.turns import Turns


@torch.no_grad()
@beartype(conf=BeartypeConf(is_pep484_tower=True))
def best_of_n(
    palm: PaLM,
    reward: Rewards,
    prompt: Tensor,
    sampling: ResponseSampling,
    *,
    num_samples: int,
    tokenizer: Any = None,
    weights: Mapping[str, float] | None = None,
    timeout: float | None = None,
    columns: Mapping[str, Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
    finetune_scope: str | None = None,
    generator: torch.Generator | None = None,
    turns: Turns | None = None,
) -> Tensor:
    """Return the response with the highest score among `num_samples`: prompt `n` -> `t`, its EOS included.

    With `turns` the response is all that follows the prompt, the replies of the environment included. Reward, weights,
    timeout and keywords are those of `score`; `columns` has one value of each further column of the prompt. Raises
    ValueError where the reward returns None for every response.
    """
    rollout = collect(
        palm,
        [prompt],
        sampling,
        num_samples=num_samples,
        batch_size=num_samples,
        columns={name: [value] for name, value in (columns or {}).items()},
        finetune_scope=finetune_scope,
        generator=generator,
        turns=turns,
    )
    scores, valid, _ = score(
        reward,
        rollout.sequences,
        tokenizer=tokenizer,
        eos_token=sampling.eos_token,
        weights=weights,
        timeout=timeout,
        keywords={**(keywords or {}), **rollout.keywords},
    )
    if not valid.any():
        raise ValueError(f"the reward returned None for all {num_samples} responses; expected a number for one of them")
    best = int(scores.masked_fill(~valid, -torch.inf).argmax())
    response = rollout.sequences.select(slice(best, best + 1))
    return response.tokens[0, int(response.prompt_lengths[0]) :]
