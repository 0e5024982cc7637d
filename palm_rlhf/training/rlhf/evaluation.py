"""Evaluation on held-out prompts during training: rewards, KL, win rate, the best checkpoint, over-optimisation."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from palm_rlhf.policy.rewards import Reward, Rewards, check_rewards, named
from palm_rlhf.policy.rollout import Rollout, collect
from palm_rlhf.policy.sequences import batches_by_length
from palm_rlhf.training.rlhf.experience import in_row_order
from palm_rlhf.training.rlhf.prompts import Prompt, Prompts, check_room, read_prompts
from palm_rlhf.training.rlhf.reward_keywords import keyword_names
from palm_rlhf.training.run.log import Metrics
from palm_rlhf.training.run.random_state import undisturbed
from palm_rlhf.training.run.sharding import whole

if TYPE_CHECKING:
    from palm_rlhf.training.rlhf.trainer import RLHFTrainer

SCORE = "score"  # the weighted sum that is learnt from; the others by their names
HELD_OUT = "held_out"  # the name of an evaluation reward that is given without one
PANELS = {"eval_score": "score on held-out prompts", "eval_win_rate": "win rate against the reference"}
Table = dict[str, list[list[float | None]]]  # of each reward: prompts, and the scores of their responses


class Evaluator:
    """Evaluations of the policy on prompts that it does not learn from, and their history in a run.

    Its random generators are its own, with the same seed in every evaluation; those of the training are left as they
    were. `eval_reward`, which is asked in evaluations alone, and the training's rewards of weight 0 are held out. The
    first held-out reward decides which checkpoint is the best (without one, the score does), and each of them is
    watched for over-optimisation of the score.
    """

    def __init__(self, trainer: "RLHFTrainer", prompts: Prompts, eval_reward: Rewards | None):
        config, reward = trainer.config, trainer.reward_model
        self.prompts, self.reward = prompts, reward
        self.eval_reward: Mapping[str, Reward] = {}
        if eval_reward is not None:
            self.eval_reward = eval_reward if isinstance(eval_reward, Mapping) else {HELD_OUT: eval_reward}
        added = list(self.eval_reward)
        if twice := sorted({SCORE, *(named(reward) if isinstance(reward, Mapping) else ())} & set(added)):
            raise ValueError(f"eval_reward has the names {twice}, which are the training's; expected others")
        weights = config.reward_weights or {}
        self.held_out = [*added, *(name for name in named(reward) if name and not weights.get(name, 1.0))]
        names = keyword_names(prompts.columns, trainer.environment)
        for rewards in (reward, self.eval_reward) if self.eval_reward else (reward,):
            check_rewards(rewards, num_tokens=trainer.palm.num_tokens, keywords=names)
        self.reference: Table | None = None  # the scores of its responses
        self.history: Table = {}  # of each reward: evaluations, the reference's first, and the prompts' means
        self.best: dict[str, Any] | None = None
        self.has_warned = False

    @property
    def best_metric(self) -> str:
        """The metric that decides which checkpoint is the best."""
        return f"eval_score/{self.held_out[0]}" if self.held_out else "eval_score"

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint so far; None before the first evaluation."""
        return None if self.best is None else self.best["step"]

    def begin(self, trainer: "RLHFTrainer") -> None:
        """Score the responses of the reference, or without one of the policy as it is, unless that is done."""
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
        """Return the metrics of the policy as it is, with names that begin with eval_, the same in every process."""
        with undisturbed(), trainer.run.autocast(), whole(trainer.actor_critic):
            rollout = self._collect(trainer, trainer.palm, trainer.actor_critic.actor_scope)
            rows = self._scored(trainer, rollout)
            measures = self._measures(trainer, rollout)
        measures = gather_object(measures)
        table = _table(gather_object(rows))
        self._remember(table)
        assert self.reference is not None  # since `begin`
        metrics: Metrics = {f"eval_{name}": _mean(row[name] for row in measures) for name in measures[0]}
        for name, scores in table.items():
            if known := [number for row in scores for number in row if number is not None]:
                metrics["eval_score" if name == SCORE else f"eval_score/{name}"] = _mean(known)
        if found := win_rate(_tensor(table[SCORE]), _tensor(self.reference[SCORE])):
            metrics |= {"eval_win_rate": found.rate, "eval_win_rate_low": found.low, "eval_win_rate_high": found.high}
        if self.held_out:
            metrics["eval_overoptimized"] = self._watch(trainer)
        value = metrics.get(self.best_metric)
        if value is not None and (self.best is None or value > self.best["value"]):
            self.best = {"step": trainer.run.step, "metric": self.best_metric, "value": value}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later evaluations need, as JSON."""
        return {name: getattr(self, name) for name in ("reference", "history", "best", "has_warned")}

    @beartype
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError where it is of other prompts or rewards."""
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
        return [*(name for name in named(self.reward) if name), *self.eval_reward]

    def _collect(self, trainer: "RLHFTrainer", palm: PaLM, scope: str | None) -> Rollout:
        """Draw responses to this process's share of the prompts."""
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
        """Return, for each prompt of this process, its place and the scores of its responses by each reward."""
        config, run = trainer.config, trainer.run
        judged = trainer.ask(self.reward, rollout, config.reward_weights)
        numbers = {SCORE: judged.numbers(), **{name: part.numbers() for name, part in judged.by_name.items()}}
        if self.eval_reward:
            more = trainer.ask(self.eval_reward, rollout).by_name
            numbers |= {name: part.numbers() for name, part in more.items()}
        size = config.eval_samples
        return [
            {"place": place, **{name: row[size * index : size * (index + 1)] for name, row in numbers.items()}}
            for index, place in enumerate(range(run.rank, len(self.prompts.token_ids), run.num_processes))
        ]

    @torch.no_grad()
    def _measures(self, trainer: "RLHFTrainer", rollout: Rollout) -> list[dict[str, float]]:
        """Return the measures of each response of this process, beside its scores."""
        sequences, mask = rollout.sequences, rollout.sequences.action_mask
        found = {"response_length": mask.sum(dim=-1)}
        if trainer.config.eos_token is not None:
            found["eos_rate"] = ~rollout.truncated
        if trainer.reference is not None:
            sampling, ratios = trainer.sampling.truncation, []
            batches = batches_by_length(sequences.lengths, trainer.forward_size)
            for part in map(sequences.select, batches):
                logprobs = trainer.actor_critic(part, values=False, **sampling).logprobs
                ratios.append(logprobs - trainer.reference.logprobs(part, **sampling).logprobs)
            found["kl"] = masked_sum(in_row_order(ratios, batches), mask, dim=-1)
        columns = {name: numbers.double().tolist() for name, numbers in found.items()}
        return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]

    def _remember(self, table: Table) -> None:
        for name, scores in table.items():
            self.history.setdefault(name, []).append([_mean_or_none(row) for row in scores])

    def _watch(self, trainer: "RLHFTrainer") -> int:
        """Return 1 if the score is found to rise at the cost of a held-out reward, else 0; warn once in a run."""
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
    """Return a trainer's evaluator, None without prompts. Raises ValueError for other settings without prompts."""
    if prompts is None:
        if eval_reward is not None:
            raise ValueError("got eval_reward without eval_prompts, on whose responses it is asked: give both")
        trainer.config.expect_default("without eval_prompts", "eval_every", "eval_samples", "eval_temperature")
        return None
    given: dict[str, Any] = {"prompts_path" if isinstance(prompts, str | Path) else "prompts": prompts}
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


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the scores of all prompts, of all processes, in the order of the prompts."""
    ordered = sorted(rows, key=lambda row: row["place"])
    return {name: [row[name] for row in ordered] for name in ordered[0] if name != "place"}


def _tensor(rows: Sequence[Sequence[float | None]]) -> Tensor:
    numbers = [[math.nan if number is None else number for number in row] for row in rows]
    return torch.tensor(numbers, dtype=torch.float64)


def _mean(numbers: Iterator[float] | Sequence[float]) -> float:
    numbers = list(numbers)
    return math.fsum(numbers) / len(numbers)


def _mean_or_none(row: Sequence[float | None]) -> float | None:
    known = [number for number in row if number is not None]
    return _mean(known) if known else None
