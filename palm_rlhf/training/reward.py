"""The trainer of reward models: rankings or ratings in; a RewardModel, its metrics and its checkpoints out."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from palm_rlhf.algorithms.preferences import bradley_terry_loss, plackett_luce_loss, ranking_loss
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import Sequences, join
from palm_rlhf.training.epoch_sampler import EpochSampler, micro_batches
from palm_rlhf.training.ranked_data import Ranking, Rating, checked, fingerprint
from palm_rlhf.training.reward_config import RewardConfig
from palm_rlhf.training.reward_metrics import RatingMetrics, RewardMetrics, correlation, ranking_metrics
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.optimizer import adamw, warmup_cosine
from palm_rlhf.training.run.run import Run

Data = Sequence[Ranking] | Sequence[Rating]

CURVES = {"loss": "training loss", "learning_rate": "learning rate"}
RANKING_CURVES = {"accuracy": "training pairs ranked right", "valid_accuracy": "validation pairs ranked right"}
RATING_CURVES = {"valid_loss": "validation loss", "valid_label_correlation": "validation correlation with labels"}


class RewardModelTrainer:
    """Trains a RewardModel on rankings or ratings, on one process or on those of `accelerate launch`.

    All responses of a prompt are in one batch, and each is read once, whatever number of pairs it is in. Losses are on
    scores before their normalisation. All that is saved goes to `output_dir`; `resume=True` goes on from the newest
    checkpoint there, if there is one. Seeds the random generators of Python, NumPy and PyTorch. The user's loop over
    `steps()` is the callback.
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

        self.run = Run(reward_model, self._make_optimizer, config, output_dir=output_dir, resume=resume)
        self.accelerator = self.run.accelerator
        self.run.load_newest(self._read_model)
        settings = {**dataclasses.asdict(reward_model.palm.config), **dataclasses.asdict(config)}
        self.run.open_log(settings, CURVES | (RATING_CURVES if self.loss == "labels" else RANKING_CURVES))

    def _make_optimizer(self, reward_model: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        return adamw(reward_model, c.learning_rate, c.betas, c.eps, c.weight_decay)

    def _checked(self, data: Data, name: str) -> list[Ranking] | list[Rating]:
        model = self.reward_model
        return checked(
            data,
            name,
            num_tokens=model.palm.num_tokens,
            max_seq_len=self.config.max_seq_len,
            num_bins=model.num_binned_output,
        )

    def _loss_of_data(self) -> str:
        """The loss, with "auto" decided; ValueError where it is not for such data."""
        rated, config = isinstance(self.train_items[0], Rating), self.config
        loss = ("labels" if rated else "ranking") if config.loss == "auto" else config.loss
        if rated != (loss == "labels"):
            kind, losses = ("Ratings", "labels") if rated else ("Rankings", "ranking, bradley_terry or plackett_luce")
            raise ValueError(f"the loss is {loss} and train_data holds {kind}, expected {losses}, or auto")
        if rated and config.centering:
            raise ValueError(f"centering is {config.centering} and train_data holds Ratings, expected 0")
        if not rated and loss != "bradley_terry" and any(any(item.pair_margins) for item in self.train_items):
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
        """Runs what is left of the schedule with a progress bar on standard error; returns what `finish` returns."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """The metrics of one optimiser step after another until the schedule ends; evaluates and saves when due.

        `loss`, and for rankings `accuracy`, the share of pairs ranked right, are of the step's data before its update.
        Then `epoch`, `learning_rate`, `grad_norm` before clipping and `responses_per_second`; after evaluations the
        fields of RewardMetrics or RatingMetrics as `valid_accuracy` and so on. FloatingPointError where the loss or
        the gradient is not finite.
        """
        self.reward_model.train()
        return self.run.drive(
            self._optimizer_step,
            lambda: self.step >= self.num_steps,
            self.save,
            num_steps=lambda: self.num_steps,
            show=lambda metrics: {key: metrics[key] for key in ("loss", "accuracy") if key in metrics},
            progress_bar=progress_bar,
        )

    def finish(self) -> Result:
        """Evaluates on the validation data, logs that, draws the curves and closes the trackers.

        Returns the metrics as `valid_accuracy` and so on, `steps`, `seconds` with this evaluation included, and
        `stopped_early` where `max_seconds` ended the run before its last step.
        """
        return self.run.finish(self._validation)

    def _optimizer_step(self) -> Metrics:
        """One step on batch_size * grad_accum items of every process, every loss divided by what all of them hold."""
        config, run, started = self.config, self.run, time.perf_counter()
        factor = warmup_cosine(self.step, self.step / self.num_steps, config.warmup_steps, config.min_lr_ratio)
        drawn = [self.train_items[index] for index in self.sampler.draw(self._items_per_step)]
        num_pairs = sum(item.num_pairs for item in drawn)
        num_right = torch.zeros((), device=run.device)

        def loss_of(items: Sequence[Ranking] | Sequence[Rating]) -> Tensor:
            if self.loss == "labels":
                return self._label_loss(run.model, items, len(drawn))
            loss, right = self._ranking_loss(items, len(drawn), num_pairs)
            num_right.add_(right)
            return loss

        batches = micro_batches(drawn, config.batch_size, (run.rank, run.num_processes))
        loss, (norm,) = run.optimizer_step(batches, loss_of, rate_factor=factor)
        run.step += 1
        metrics = {"step": self.step, "epoch": self.sampler.num_drawn / self.sampler.num_items, "loss": loss}
        if num_pairs:
            metrics["accuracy"] = float(self.accelerator.reduce(num_right, "sum")) / num_pairs
        num_responses = sum(len(item.responses) for item in drawn)
        metrics |= {
            "learning_rate": config.learning_rate * factor,
            "grad_norm": norm,
            "responses_per_second": num_responses / (time.perf_counter() - started),
        }
        if self.valid_items and run.is_due(config.eval_every):
            metrics |= {**self._validation(), "log": True}
        return metrics

    def _ranking_loss(self, rankings: Sequence[Ranking], num_rankings: int, num_pairs: int) -> tuple[Tensor, Tensor]:
        """The rankings' part of the loss of so many rankings and pairs, and how many of their own pairs are right."""
        block, config = self._block(rankings), self.config
        scores = self.run.model(block.tokens, block.key_mask, prompt_mask=block.prompt_mask, raw=True)
        rows = scores.split([len(ranking.responses) for ranking in rankings])
        mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        scores = pad_sequence(rows, batch_first=True)  # b k
        # In the order of itertools.combinations, row by row, as margins are.
        row, better, worse = (mask.unsqueeze(-1) & mask.unsqueeze(-2)).triu(1).nonzero(as_tuple=True)
        chosen, rejected = scores[row, better], scores[row, worse]
        if self.loss == "ranking":
            loss = ranking_loss(scores, mask, centering=config.centering, denominator=num_rankings)
        elif self.loss == "plackett_luce":
            loss = plackett_luce_loss(scores, mask, denominator=num_rankings)
        else:
            margin = torch.tensor([m for ranking in rankings for m in ranking.pair_margins], device=scores.device)
            loss = bradley_terry_loss(
                chosen, rejected, margin=margin, centering=config.centering, denominator=num_pairs
            )
        return loss, (chosen > rejected).sum()

    def _label_loss(self, model: nn.Module, ratings: Sequence[Rating], num_ratings: int) -> Tensor:
        """The ratings' part of the loss of so many."""
        block = self._block(ratings)
        dtype = torch.long if self.reward_model.num_binned_output else torch.float32
        labels = torch.tensor([rating.label for rating in ratings], dtype=dtype, device=self.run.device)
        return model(
            block.tokens, block.key_mask, prompt_mask=block.prompt_mask, labels=labels, denominator=num_ratings
        )

    def _block(self, items: Sequence[Ranking] | Sequence[Rating]) -> Sequences:
        """All responses as rows of one forward, those of one prompt next to each other."""
        pairs = [(item.prompt, response) for item in items for response in item.responses]
        return join(*zip(*pairs, strict=True)).to(self.run.device)

    @beartype
    def evaluate(self, data: Data | None = None) -> RewardMetrics | RatingMetrics:
        """How good the model is on the validation data, or other `data`: see the two classes of metrics."""
        if data is None and self.valid_items is None:
            raise ValueError("there is nothing to evaluate on: give the trainer valid_data, or evaluate(data)")
        items = self.valid_items if data is None else self._checked(data, "data")
        model, scores = self.reward_model, self._raw_scores(items)
        lengths = [torch.tensor([len(response) for response in item.responses]) for item in items]
        mean, std = float(model.score_mean), float(model.score_std)
        if isinstance(items[0], Ranking):
            return ranking_metrics(scores, lengths, score_mean=mean, score_std=std)
        scores = (torch.cat(scores).double() - mean) / std
        return RatingMetrics(
            num_ratings=len(items),
            loss=self._mean_label_loss(items),
            label_correlation=correlation(scores, torch.tensor([float(item.label) for item in items])),
            length_correlation=correlation(scores, torch.cat(lengths)),
            score_mean=float(scores.mean()),
            score_std=float(scores.std(correction=0)),
        )

    @torch.no_grad()
    def _raw_scores(self, items: Sequence[Ranking] | Sequence[Rating]) -> list[Tensor]:
        """The scores of each item's responses before their normalisation, every process reading its share."""
        pairs = [(item.prompt, response) for item in items for response in item.responses]
        result = torch.zeros(len(pairs), device=self.run.device)
        by_length = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))  # so few pads are read
        size = self.config.eval_batch_size
        for batch in micro_batches(by_length, size, (self.run.rank, self.run.num_processes)):
            with self.run.autocast():
                block = join(*zip(*(pairs[index] for index in batch), strict=True))
                result[batch] = self.reward_model.score(block, batch_size=size, raw=True)
        return list(self.accelerator.reduce(result, "sum").cpu().split([len(item.responses) for item in items]))

    @torch.no_grad()
    def _mean_label_loss(self, ratings: Sequence[Rating]) -> float:
        total = torch.zeros((), device=self.run.device)
        for batch in micro_batches(ratings, self.config.eval_batch_size, (self.run.rank, self.run.num_processes)):
            with self.run.autocast():
                total += self._label_loss(self.reward_model, batch, len(ratings))
        return float(self.accelerator.reduce(total, "sum"))

    def _validation(self) -> Metrics:
        numbers = self.evaluate().numbers() if self.valid_items else {}
        return {f"valid_{key}": value for key, value in numbers.items()}

    @beartype
    def normalise(self, data: Data) -> None:
        """Gives the scores of all responses in `data` mean 0 and deviation 1, and saves the model so."""
        raw = torch.cat(self._raw_scores(self._checked(data, "data"))).to(self.run.device)
        self.reward_model.normalise((raw - self.reward_model.score_mean) / self.reward_model.score_std)
        self.save()

    def save(self) -> None:
        """Writes the checkpoint of this step, whole or not at all, and removes all but the newest `keep_checkpoints`.

        Its folder `model` opens by `RewardModel.from_pretrained`. OSError where the disk is full; what was saved before
        stays.
        """
        state = {"sampler": self.sampler.state_dict(), "data": fingerprint(self.train_items)}
        self.run.save(lambda folder: self.reward_model.save_pretrained(folder / "model"), state)

    def _read_model(self, folder: Path, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        if state["data"] != fingerprint(self.train_items):
            raise ValueError(f"train_data has changed since {folder}: resume with the same, or start another run")
        self.reward_model.load(folder / "model")
