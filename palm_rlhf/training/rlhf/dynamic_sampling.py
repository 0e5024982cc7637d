"""Dynamic sampling: a prompt whose responses all have the same score is replaced by the next prompt."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.algorithms.advantages import varied_groups
from palm_rlhf.policy.rewards import Scores
from palm_rlhf.policy.rollout import Rollout
from palm_rlhf.training.run.log import Metrics

if TYPE_CHECKING:
    from palm_rlhf.training.rlhf.trainer import RLHFTrainer


class Sampled(NamedTuple):
    """The responses of a step, and the metrics of their sampling."""

    rollout: Rollout
    scores: Scores
    all_scores: Scores  # of all responses that were drawn, replaced ones included
    metrics: Metrics  # redrawn_groups and equal_groups


def replace_equal_groups(trainer: "RLHFTrainer", rollout: Rollout, scores: Scores) -> Sampled:
    """Draw again where all responses to a prompt score the same (DAPO: Yu et al. 2025, section 3.2, algorithm 1).

    The responses to the next prompt take the place of each such group, until there is no such group, or this was done
    `max_redraws` times.

    Prompts are dealt out to the processes in turn. The next ones take the places of the equal groups in that order,
    whatever the number of processes.
    """
    config, run, max_redraws = trainer.config, trainer.run, trainer.config.variant.max_redraws
    drawn, num_redrawn = [scores], 0
    for redraws in range(max_redraws + 1):
        equal = ~varied_groups(scores.scores, config.num_samples, valid=scores.valid)
        of_all = run.accelerator.gather(equal[:: config.num_samples]).view(run.num_processes, -1).T.flatten()
        places = of_all.nonzero().flatten().tolist()
        if not places or redraws == max_redraws:
            break
        num_redrawn += len(places)
        prompts = zip(places, trainer.sampler.draw(len(places)), strict=True)
        fresh = trainer.respond([prompt for place, prompt in prompts if place % run.num_processes == run.rank])
        if fresh is not None:
            rows = equal.nonzero().flatten()
            drawn.append(trainer.ask(trainer.reward_model, fresh, config.reward_weights))
            rollout, scores = _splice(rollout, fresh, rows), _splice(scores, drawn[-1], rows)
    metrics: Metrics = {"redrawn_groups": num_redrawn, "equal_groups": len(places)}
    return Sampled(_cut(rollout), scores, _joined(drawn), metrics)


def _splice(old: Any, new: Any, rows: Tensor) -> Any:
    """Return a rollout, scores or a part of them, with some rows replaced by all rows of another."""
    if dataclasses.is_dataclass(old) and not isinstance(old, type):
        names = [field.name for field in dataclasses.fields(old)]
        return dataclasses.replace(
            old, **{name: _splice(getattr(old, name), getattr(new, name), rows) for name in names}
        )
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
    """Return the scores of several rollouts, one after the other."""
    by_name = {name: _joined([part.by_name[name] for part in parts]) for name in parts[0].by_name}
    return Scores(torch.cat([part.scores for part in parts]), torch.cat([part.valid for part in parts]), by_name)


def _cut(rollout: Rollout) -> Rollout:
    """Return the rollout without the columns that only replaced rows needed."""
    sequences = rollout.sequences.select(slice(None))
    width = sequences.action_mask.shape[1]
    return dataclasses.replace(rollout, sequences=sequences, logprobs=rollout.logprobs[:, :width])
