"""The trainer of reward models: rankings or ratings in; a RewardModel, its metrics and its checkpoints out."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.ops.pinned_copy import upload
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import Sequences, batches_by_length, join
from palm_rlhf.training.epoch_sampler import EpochSampler, micro_batches
from palm_rlhf.training.ranked_data import Item, Ranking, Rating, checked, fingerprint
from palm_rlhf.training.reward_config import RewardConfig
from palm_rlhf.training.reward_metrics import RatingMetrics, RewardMetrics, correlation, ranking_metrics
from palm_rlhf.training.reward_objective import loss_denominator, ranking_objective
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.loop import Loop
from palm_rlhf.training.run.optimizer import adamw, warmup_cosine
from palm_rlhf.training.run.run import Run

Data = Sequence[Ranking] | Sequence[Rating]

CURVES = {"loss": "training loss", "learning_rate": "learning rate"}
SHOWN = ("loss", "accuracy")  # behind the progress bar
RANKING_CURVES = {"accuracy": "training pairs ranked right", "valid_accuracy": "validation pairs ranked right"}
RATING_CURVES = {"valid_loss": "validation loss", "valid_label_correlation": "validation correlation with labels"}


class RewardModelTrainer:
    """The trainer of a RewardModel on rankings or ratings, on one process or those of `accelerate launch`.

    All responses to a prompt are in one batch, and each is read once, however many pairs it is in. Losses are of scores
    before their normalisation. Seeds the random generators of Python, NumPy and PyTorch. Loop over `steps` to act
    between steps, or call `train`.

    Args:
        reward_model: the model, trained in place.
        train_data: rankings, or ratings, to learn from.
        valid_data: the same, for evaluations.
        config: all settings that are numbers.
        output_dir: the folder of all that is saved.
        resume: go on from the newest checkpoint in `output_dir`, if there is one.
    """

    @beartype
    def __init__(
        self,
        reward_model: RewardModel,
        *,
        train_data: Data,
        valid_data: Data | None = None,
        config: RewardConfig = RewardConfig(),  # noqa: B008 (it is frozen)
        output_dir: str | Path | None = None,
        resume: bool = False,
    ):
        self.reward_model, self.config = reward_model, config
        self.train_items = self._checked(train_data, "train_data")
        self.loss = self._loss_of_data()
        self.valid_items = None if valid_data is None else self._checked(valid_data, "valid_data")
        self.sampler = EpochSampler(len(self.train_items), config.seed)

        self.run = Run(config, output_dir=output_dir, resume=resume)
        self.accelerator = self.run.accelerator
        reward_model.to(self.run.device)
        optimizer = adamw(reward_model, config.learning_rate, config.betas, config.eps, config.weight_decay)
        self.run.prepare(reward_model, optimizer, self.num_steps * config.grad_accum)
        self._resume()
        settings = {**dataclasses.asdict(reward_model.palm.config), **dataclasses.asdict(config)}
        self.run.open_log(settings, CURVES | (RATING_CURVES if self.loss == "labels" else RANKING_CURVES))

    def _checked(self, data: Data, name: str) -> list[Item]:
        model = self.reward_model
        return checked(
            data,
            name,
            num_tokens=model.palm.num_tokens,
            max_seq_len=self.config.max_seq_len,
            num_bins=model.num_binned_output,
        )

    def _loss_of_data(self) -> str:
        """Return the loss, with "auto" decided. Raises ValueError for a loss of other data."""
        rated, config = isinstance(self.train_items[0], Rating), self.config
        loss = ("labels" if rated else "ranking") if config.loss == "auto" else config.loss
        if rated != (loss == "labels"):
            kind, losses = ("Ratings", "labels") if rated else ("Rankings", "ranking, bradley_terry or plackett_luce")
            raise ValueError(f"the loss is {loss} and train_data holds {kind}, expected {losses}, or auto")
        if rated and config.centering:
            raise ValueError(f"centering is {config.centering} and train_data holds Ratings, expected 0")
        if (
            not rated
            and loss != "bradley_terry"
            and any(isinstance(item, Ranking) and any(item.pair_margins) for item in self.train_items)
        ):
            raise ValueError(f"train_data has margins and the loss is {loss}, which has none: choose bradley_terry")
        return loss

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.config.num_epochs * len(self.train_items) // self._items_per_step)

    @property
    def _items_per_step(self) -> int:
        return self.config.batch_size * self.config.grad_accum * self.run.num_processes

    def train(self) -> Result:
        """Take the steps that are left, with a progress bar on standard error, and return the result of `finish`."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """Yield the metrics of one optimiser step after another until the schedule ends; evaluate and save when due.

        `loss`, and for rankings `accuracy`, the share of pairs in the right order, are of the step's data before its
        update. The others are `epoch`, `learning_rate`, `grad_norm` before clipping and `responses_per_second`; steps
        with an evaluation have the fields of RewardMetrics or RatingMetrics as `valid_accuracy` and so on. Raises
        FloatingPointError where the loss or the gradient is not finite.
        """
        self.reward_model.train()
        with Loop(self.run, self.num_steps, SHOWN, progress_bar) as loop:
            while loop.goes_on:
                metrics = self.update()
                evaluates = self.valid_items is not None and self.run.is_due(self.config.eval_every)
                if evaluates:
                    metrics |= self._validation()
                if loop.finish_step(metrics, must_log=evaluates):
                    self.save()
                yield metrics

    def finish(self) -> Result:
        """Evaluate on the validation data, log the result, draw the curves and close the trackers.

        Returns the metrics as `valid_accuracy` and so on, `steps`, `seconds` with this evaluation included, and
        `stopped_early` where `max_seconds` ended the run before its last step.
        """
        started = time.perf_counter()
        return self.run.finish(self._validation(), started=started)

    def update(self) -> Metrics:
        """Take one optimiser step on the next batch_size * grad_accum items of every process.

        The loss is the weighted mean over all of them, or over their pairs.
        """
        config, run, readings = self.config, self.run, self.run.readings
        started = readings.mark()
        factor = warmup_cosine(self.step, self.step / self.num_steps, config.warmup_steps, config.min_lr_ratio)
        drawn = [self.train_items[index] for index in self.sampler.draw(self._items_per_step)]
        num_pairs = sum(item.num_pairs for item in drawn)
        denominator = loss_denominator(drawn, self.loss)
        num_right = torch.zeros((), device=run.device)
        with run.optimizer_step(rate_factor=factor) as step:
            for items in step.micro_batches(micro_batches(drawn, config.batch_size, run.shard)):
                with run.autocast():
                    if self.loss == "labels":
                        loss = self._label_loss(run.model, cast(Sequence[Rating], items), len(drawn))
                    else:
                        loss, right = self._ranking_loss(cast(Sequence[Ranking], items), denominator)
                        num_right += right
                step.backward(loss)
        run.step += 1
        metrics: dict[str, Any] = {
            "step": self.step,
            "epoch": self.sampler.num_drawn / self.sampler.num_items,
            "loss": step.loss,
        }
        if num_pairs:
            metrics["accuracy"] = readings.number(self.accelerator.reduce(num_right, "sum").double() / num_pairs)
        num_responses = sum(len(item.responses) for item in drawn)
        metrics |= {
            "learning_rate": config.learning_rate * factor,
            "grad_norm": step.norms[0],
            "responses_per_second": readings.rate(num_responses, started),
        }
        return readings.metrics(metrics)

    def _ranking_loss(self, rankings: Sequence[Ranking], denominator: float) -> tuple[Tensor, Tensor]:
        """Return the share of some rankings in a step's loss, and how many of their pairs are in the right order."""
        block = self._block(rankings)
        scores = self.run.model(block.tokens, block.key_mask, prompt_mask=block.prompt_mask, raw=True)
        return ranking_objective(scores, rankings, self.loss, centering=self.config.centering, denominator=denominator)

    def _label_loss(self, model: nn.Module, ratings: Sequence[Rating], num_ratings: int) -> Tensor:
        """Return the share of some ratings in the mean loss of `num_ratings`."""
        block = self._block(ratings)
        dtype = torch.long if self.reward_model.num_binned_output else torch.float32
        labels = upload(torch.tensor([rating.label for rating in ratings], dtype=dtype), self.run.device)
        return model(
            block.tokens, block.key_mask, prompt_mask=block.prompt_mask, labels=labels, denominator=num_ratings
        )

    def _block(self, items: Sequence[Item]) -> Sequences:
        """Return all responses as rows of one forward; responses to one prompt are next to each other."""
        pairs = [(item.prompt, response) for item in items for response in item.responses]
        return join(*zip(*pairs, strict=True)).to(self.run.device)

    @beartype
    def evaluate(self, data: Data | None = None) -> RewardMetrics | RatingMetrics:
        """Measure the model on the validation data, or on other `data`."""
        items = self.valid_items if data is None else self._checked(data, "data")
        if items is None:
            raise ValueError("there is nothing to evaluate on: give the trainer valid_data, or evaluate(data)")
        model, raw_scores = self.reward_model, self._raw_scores(items)
        lengths = [torch.tensor([len(response) for response in item.responses]) for item in items]
        mean, std = float(model.score_mean), float(model.score_std)
        if isinstance(items[0], Ranking):
            return ranking_metrics(raw_scores, lengths, score_mean=mean, score_std=std)
        ratings, scores = cast(Sequence[Rating], items), (torch.cat(raw_scores).double() - mean) / std
        return RatingMetrics(
            num_ratings=len(ratings),
            loss=self._mean_label_loss(ratings),
            label_correlation=correlation(scores, torch.tensor([float(rating.label) for rating in ratings])),
            length_correlation=correlation(scores, torch.cat(lengths)),
            score_mean=float(scores.mean()),
            score_std=float(scores.std(correction=0)),
        )

    @torch.no_grad()
    def _raw_scores(self, items: Sequence[Item]) -> list[Tensor]:
        """Return the scores of each item's responses before normalisation; every process reads its share."""
        pairs = [(item.prompt, response) for item in items for response in item.responses]
        result = torch.zeros(len(pairs), device=self.run.device)
        lengths, size = torch.tensor([sum(map(len, pair)) for pair in pairs]), self.config.eval_batch_size
        for batch in batches_by_length(lengths, size, self.run.shard):
            with self.run.autocast():
                block = join(*zip(*(pairs[index] for index in batch.tolist()), strict=True))
                result[batch] = self.reward_model.score(block, batch_size=size, raw=True)
        return list(self.accelerator.reduce(result, "sum").cpu().split([len(item.responses) for item in items]))

    @torch.no_grad()
    def _mean_label_loss(self, ratings: Sequence[Rating]) -> float:
        total = torch.zeros((), device=self.run.device)
        for batch in micro_batches(ratings, self.config.eval_batch_size, self.run.shard):
            with self.run.autocast():
                total += self._label_loss(self.reward_model, batch, len(ratings))
        return float(self.accelerator.reduce(total, "sum"))

    def _validation(self) -> Metrics:
        numbers = self.evaluate().numbers() if self.valid_items else {}
        return {f"valid_{key}": value for key, value in numbers.items()}

    @beartype
    def normalise(self, data: Data) -> None:
        """Normalise scores to mean 0 and deviation 1 over all responses in `data`, and save the model."""
        raw = torch.cat(self._raw_scores(self._checked(data, "data"))).to(self.run.device)
        self.reward_model.normalise((raw - self.reward_model.score_mean) / self.reward_model.score_std)
        self.save()

    def save(self) -> None:
        """Write the checkpoint of this step, whole or not at all, and remove all but the newest `keep_checkpoints`.

        `RewardModel.from_pretrained` opens its folder `model`. Raises OSError where the disk is full; the checkpoints
        before it stay.
        """
        state = {"sampler": self.sampler.state_dict(), "data": fingerprint(self.train_items)}
        with self.run.new_checkpoint(state) as folder:
            if folder is not None:
                self.reward_model.save_pretrained(folder / "model")

    def _resume(self) -> None:
        with self.run.newest_checkpoint() as saved:
            if saved is None:
                return
            self.sampler.load_state_dict(saved.state["sampler"])
            if saved.state["data"] != fingerprint(self.train_items):
                raise ValueError(
                    f"train_data has changed since {saved.folder}: resume with the same, or start another run"
                )
            self.reward_model.load(saved.folder / "model")
