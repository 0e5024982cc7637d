"""Dynamic sampling: a prompt whose responses all score the same teaches nothing, and makes room for the next one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.algorithms.advantages import varied_groups
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.run.log import Metrics
from palm_rlhf.training.run.run import Run


class Sampled(NamedTuple):
    """The responses of a step, and how they were come by."""

    rollout: Rollout
    scores: Scores
    all_scores: Scores  # of all responses that were drawn, those that were replaced too
    metrics: Metrics  # redrawn_groups and equal_groups


def replace_equal_groups(
    config: PPOConfig,
    run: Run,
    rollout: Rollout,
    scores: Scores,
    draw: Callable[[int], list[int]],
    respond: Callable[[list[int]], Rollout | None],
    score: Callable[[Rollout], Scores],
) -> Sampled:
    """Draw again where all responses to a prompt score the same (DAPO: Yu et al. 2025, section 3.2, algorithm 1).

    Each such group gives its place to the responses to a prompt that is drawn next, until there is no such group or it
    was done `max_redraws` times. `draw` names that many prompts, the same ones in every process; `respond` returns this
    process's responses to the prompts named, or None to none.

    Prompts are dealt out to the processes in turn. The next ones take the places of the equal groups in that order, so
    that which prompt goes where does not depend on the number of processes.
    """
    drawn, num_redrawn, max_redraws = [scores], 0, config.variant.max_redraws
    if not max_redraws:
        return Sampled(rollout, scores, scores, {})
    for redraws in range(max_redraws + 1):
        equal = ~varied_groups(scores.scores, config.num_samples, valid=scores.valid)
        of_all = run.accelerator.gather(equal[:: config.num_samples]).view(run.num_processes, -1).T.flatten()
        places = of_all.nonzero().flatten().tolist()
        if not places or redraws == max_redraws:
            break
        num_redrawn += len(places)
        prompts = zip(places, draw(len(places)), strict=True)
        fresh = respond([prompt for place, prompt in prompts if place % run.num_processes == run.rank])
        if fresh is not None:
            rows = equal.nonzero().flatten()
            drawn.append(score(fresh))
            rollout, scores = _splice(rollout, fresh, rows), _splice(scores, drawn[-1], rows)
    metrics = {"redrawn_groups": num_redrawn, "equal_groups": len(places)}
    return Sampled(_cut(rollout), scores, _joined(drawn), metrics)


def _splice(old: Any, new: Any, rows: Tensor) -> Any:
    """A rollout, scores or a part of them, some of whose rows are replaced by all of another's."""
    if dataclasses.is_dataclass(old):
        names = [field.name for field in dataclasses.fields(old)]
        return type(old)(**{name: _splice(getattr(old, name), getattr(new, name), rows) for name in names})
    if isinstance(old, Scores):
        return Scores(*(_splice(*pair, rows) for pair in zip(old, new, strict=True)))
    if isinstance(old, Mapping):
        return {name: _splice(part, new[name], rows) for name, part in old.items()}
    if old is None:
        return None
    if isinstance(old, Tensor):
        if old.ndim > 1:
            width = max(old.shape[1], new.shape[1])
            old, new = (F.pad(part, (0, width - part.shape[1])) for part in (old, new))
        return old.index_copy(0, rows, new)
    by_row = dict(zip(rows.tolist(), new, strict=True))
    return [by_row.get(row, part) for row, part in enumerate(old)]


def _joined(parts: Sequence[Scores]) -> Scores:
    """The scores of several rollouts, one after the other."""
    by_name = {name: _joined([part.by_name[name] for part in parts]) for name in parts[0].by_name}
    return Scores(torch.cat([part.scores for part in parts]), torch.cat([part.valid for part in parts]), by_name)


def _cut(rollout: Rollout) -> Rollout:
    """Without the columns that only replaced rows needed."""
    sequences = rollout.sequences.select(slice(None))
    width = sequences.action_mask.shape[1]
    return dataclasses.replace(rollout, sequences=sequences, logprobs=rollout.logprobs[:, :width])
