"""Evaluation on held-out prompts during training: rewards, KL, win rate, the best checkpoint, over-optimisation."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from beartype import beartype
from torch import Tensor
from tqdm import tqdm

from palm_rlhf.algorithms.overoptimization import LEVEL, Overoptimization, overoptimization
from palm_rlhf.algorithms.win_rate import win_rate
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.policy.rewards import Rewards, check_rewards, named
from palm_rlhf.policy.rollout import Rollout, collect
from palm_rlhf.training.rlhf.experience import by_length, in_batches
from palm_rlhf.training.rlhf.prompts import Prompt, Prompts, check_room, read_prompts
from palm_rlhf.training.rlhf.scoring import keyword_names, score_rollout
from palm_rlhf.training.run.checkpoints import rng_state, set_rng_state
from palm_rlhf.training.run.log import Metrics
from palm_rlhf.training.run.sharding import whole

if TYPE_CHECKING:
    from palm_rlhf.training.rlhf.trainer import RLHFTrainer

SCORE = "score"  # the weighted sum that is learnt from; the others by their names
HELD_OUT = "held_out"  # the name of an evaluation reward that is given without one
PANELS = {"eval_score": "score on held-out prompts", "eval_win_rate": "win rate against the reference"}
Table = dict[str, list[list[float | None]]]  # of each reward: prompts, and the scores of their responses


class Evaluator:
    """Measures the policy on prompts that it does not learn from, and keeps what the run's evaluations found so far.

    All that it draws comes from generators of its own, seeded alike in every evaluation; those of the training are put
    back. `eval_reward` is asked in evaluations alone. It and the training's rewards of weight 0 are held out: the first
    of them tells which checkpoint is the best (the score does, where there is none), and each of them is watched for
    over-optimisation of the score.
    """

    def __init__(self, trainer: "RLHFTrainer", prompts: Prompts, eval_reward: Rewards | None):
        config, reward = trainer.config, trainer.reward_model
        self.prompts, self.reward, self.eval_reward = prompts, reward, eval_reward
        if eval_reward is not None and not isinstance(eval_reward, Mapping):
            self.eval_reward = {HELD_OUT: eval_reward}
        added = list(self.eval_reward or ())
        if twice := sorted({SCORE, *(named(reward) if isinstance(reward, Mapping) else ())} & set(added)):
            raise ValueError(f"eval_reward has the names {twice}, which are the training's; expected others")
        weights = config.reward_weights or {}
        self.held_out = [*added, *(name for name in named(reward) if name and not weights.get(name, 1.0))]
        names = keyword_names(prompts.columns, trainer.environment)
        for rewards in filter(None, (reward, self.eval_reward)):
            check_rewards(rewards, num_tokens=trainer.palm.num_tokens, keywords=names)
        self.reference: Table | None = None  # the scores of its responses
        self.history: Table = {}  # of each reward: evaluations, the reference's first, and the prompts' means
        self.best: dict[str, Any] | None = None
        self.has_warned = False

    @property
    def best_metric(self) -> str:
        """What tells the best checkpoint."""
        return f"eval_score/{self.held_out[0]}" if self.held_out else "eval_score"

    def begin(self, trainer: "RLHFTrainer") -> None:
        """Score the reference's responses, unless that is done; without a reference, those of the policy as it is."""
        check_room(self.prompts.token_ids, trainer.config.max_seq_len)
        if (count := len(self.prompts.token_ids)) < trainer.run.num_processes:
            raise ValueError(f"got {count} eval_prompts for {trainer.run.num_processes} processes; expected as many")
        if self.reference is not None:
            return
        reference = trainer.reference
        with undisturbed(), trainer.run.autocast(), whole(trainer.actor_critic):
            if reference is None:
                rollout = self._collect(trainer, trainer.palm, trainer.actor_critic.actor_scope)
            else:
                rollout = self._collect(trainer, reference.palm, None)
            rows = self._scored(trainer, rollout)
        self.reference = _table(gather_object(rows))
        self._remember(self.reference)

    def evaluate(self, trainer: "RLHFTrainer") -> Metrics:
        """The metrics of the policy as it is, by names that begin with eval_, the same on every process."""
        with undisturbed(), trainer.run.autocast(), whole(trainer.actor_critic):
            rollout = self._collect(trainer, trainer.palm, trainer.actor_critic.actor_scope)
            rows = self._scored(trainer, rollout)
            measures = self._measures(trainer, rollout)
        measures = gather_object(measures)
        table = _table(gather_object(rows))
        self._remember(table)
        metrics: Metrics = {f"eval_{name}": _mean(row[name] for row in measures) for name in measures[0]}
        for name, scores in table.items():
            if said := [number for row in scores for number in row if number is not None]:
                metrics["eval_score" if name == SCORE else f"eval_score/{name}"] = _mean(said)
        if found := win_rate(_tensor(table[SCORE]), _tensor(self.reference[SCORE])):
            metrics |= {"eval_win_rate": found.rate, "eval_win_rate_low": found.low, "eval_win_rate_high": found.high}
        if self.held_out:
            metrics["eval_overoptimized"] = self._watch(trainer)
        value = metrics.get(self.best_metric)
        if value is not None and (self.best is None or value > self.best["value"]):
            self.best = {"step": trainer.run.step, "metric": self.best_metric, "value": value}
            metrics["save"] = True
        return {**metrics, "log": True}

    def state_dict(self) -> dict[str, Any]:
        """What later evaluations need of those before, as JSON."""
        return {name: getattr(self, name) for name in ("reference", "history", "best", "has_warned")}

    @beartype
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict()`; ValueError where that is of other prompts or rewards."""
        there = {name: len(rows) for name, rows in (state["reference"] or {}).items()}
        here = dict.fromkeys((SCORE, *self._names()), len(self.prompts.token_ids))
        if there and there != here:
            raise ValueError(
                f"the evaluation has the rewards and numbers of prompts {here}, that of the checkpoint {there}: resume "
                "with the eval_prompts and rewards that the run had"
            )
        for name, value in state.items():
            setattr(self, name, value)

    def _names(self) -> list[str]:
        return [*(name for name in named(self.reward) if name), *(self.eval_reward or ())]

    def _collect(self, trainer: "RLHFTrainer", palm: PaLM, scope: str | None) -> Rollout:
        """Responses to this process's share of the prompts."""
        config, run = trainer.config, trainer.run
        mine = slice(run.rank, None, run.num_processes)
        sampling = trainer.sampling
        if config.eval_temperature is not None:
            sampling = replace(sampling, temperature=config.eval_temperature)
        return collect(
            palm,
            self.prompts.token_ids[mine],
            sampling,
            num_samples=config.eval_samples,
            batch_size=config.rollout_batch_size,
            columns={name: values[mine] for name, values in self.prompts.columns.items()},
            finetune_scope=scope,
            generator=torch.Generator(run.device).manual_seed(config.seed + run.rank),
            turns=trainer.turns,
        )

    def _scored(self, trainer: "RLHFTrainer", rollout: Rollout) -> list[dict[str, Any]]:
        """For each prompt of this process its place, and each reward's scores of its responses."""
        config, run = trainer.config, trainer.run
        said = score_rollout(trainer, self.reward, rollout, config.reward_weights)
        numbers = {SCORE: said.numbers(), **{name: part.numbers() for name, part in said.by_name.items()}}
        if self.eval_reward is not None:
            more = score_rollout(trainer, self.eval_reward, rollout).by_name
            numbers |= {name: part.numbers() for name, part in more.items()}
        size = config.eval_samples
        return [
            {"place": place, **{name: row[size * index : size * (index + 1)] for name, row in numbers.items()}}
            for index, place in enumerate(range(run.rank, len(self.prompts.token_ids), run.num_processes))
        ]

    @torch.no_grad()
    def _measures(self, trainer: "RLHFTrainer", rollout: Rollout) -> list[dict[str, float]]:
        """What is measured of each response of this process beside its scores."""
        sequences, mask = rollout.sequences, rollout.sequences.action_mask
        found = {"response_length": mask.sum(dim=-1)}
        if trainer.config.eos_token is not None:
            found["eos_rate"] = ~rollout.truncated
        if trainer.reference is not None:
            options, batches = trainer.sampling.truncation, by_length(sequences, trainer.forward_size)
            policy, reference = trainer.actor_critic, trainer.reference
            (ours,) = in_batches(lambda part: policy(part, values=False, **options)[:1], sequences, batches)
            (theirs,) = in_batches(lambda part: reference.logprobs(part, **options)[:1], sequences, batches)
            found["kl"] = masked_sum(ours - theirs, mask, dim=-1)
        columns = {name: numbers.double().tolist() for name, numbers in found.items()}
        return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]

    def _remember(self, table: Table) -> None:
        for name, scores in table.items():
            self.history.setdefault(name, []).append([_mean_or_none(row) for row in scores])

    def _watch(self, trainer: "RLHFTrainer") -> int:
        """Whether the score has just been found to rise at the cost of a held-out reward; says so once in a run."""
        proxy, level = _tensor(self.history[SCORE]), LEVEL / len(self.held_out)
        found = {name: overoptimization(proxy, _tensor(self.history[name]), level=level) for name in self.held_out}
        alarms = {name: alarm for name, alarm in found.items() if alarm is not None}
        if alarms and not self.has_warned:
            self.has_warned = True
            if trainer.run.is_main:
                name, alarm = next(iter(alarms.items()))
                tqdm.write(_warning(name, alarm, trainer), file=sys.stderr)
        return int(bool(alarms))


@beartype
def make_evaluator(
    trainer: Any, prompts: Sequence[Prompt] | str | Path | None, eval_reward: Rewards | None
) -> Evaluator | None:
    """The evaluator of a trainer that has prompts for it; ValueError where other settings of evaluations have none."""
    if prompts is None:
        if eval_reward is not None:
            raise ValueError("got eval_reward without eval_prompts, on whose responses it is asked: give both")
        trainer.config.expect_default("without eval_prompts", "eval_every", "eval_samples", "eval_temperature")
        return None
    given = {"prompts_path" if isinstance(prompts, str | Path) else "prompts": prompts}
    read = read_prompts(trainer.palm.num_tokens, **given, tokenizer=trainer.tokenizer, name="eval_prompts")
    return Evaluator(trainer, read, eval_reward)


def _warning(name: str, alarm: Overoptimization, trainer: "RLHFTrainer") -> str:
    every, step = trainer.config.eval_every, trainer.run.step
    since = "the reference" if not alarm.best else f"evaluation {alarm.best}, of every {every} steps"
    return (
        f"over-optimisation at step {step}: on the held-out prompts the score, which is learnt from, is "
        f"{alarm.proxy_rise:.3g} higher than that of {since}, and {name!r}, which is not, {alarm.gold_fall:.3g} lower "
        f"(standard scores {alarm.proxy_z:.1f} and {alarm.gold_z:.1f}, beyond the {alarm.bound:.1f} that chance stays "
        "below). The policy seems to please the reward rather than what it stands for: stop here, take the best "
        "checkpoint, or give more kl_coef or a better reward"
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves the random generators of the training as they were, whatever the block draws."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The scores of all prompts in their order, whichever process had them."""
    ordered = sorted(rows, key=lambda row: row["place"])
    return {name: [row[name] for row in ordered] for name in ordered[0] if name != "place"}


def _tensor(rows: Sequence[Sequence[float | None]]) -> Tensor:
    numbers = [[math.nan if number is None else number for number in row] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64)


def _mean(numbers: Iterator[float] | Sequence[float]) -> float:
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers)


def _mean_or_none(row: Sequence[float | None]) -> float | None:
    said = [number for number in row if number is not None]
    return _mean(said) if said else None
