"""The trainer on examples of what to say: the loss counts some of the tokens, each by its weight."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palm_rlhf.model.modes import evaluating
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.cross_entropy import cross_entropy
from palm_rlhf.ops.logprobs import next_token_pairs, target_mask
from palm_rlhf.training.epoch_sampler import micro_batches
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.optimizer import adamw, warmup_cosine
from palm_rlhf.training.run.run import Run
from palm_rlhf.training.supervised_config import SupervisedConfig
from palm_rlhf.training.weighted_examples import (
    Example,
    OneInARow,
    Rows,
    RowSampler,
    check_examples,
    digest_of,
    lay_out,
)

CURVES = {"loss": "training loss (nats per token)", "learning_rate": "learning rate"}
SCOPE = "supervised"
# Logits held at once, whatever the context and the vocabulary.
LOGITS = 1 << 25


class RowsLoss(nn.Module):
    """The weighted cross-entropy of rows, in nats, summed and divided by `denominator`: `-> scalar`.

    Logits are computed where a target has a weight, some at a time, and once more in the backward: a long context
    takes no more memory for them than a short one.
    """

    def __init__(self, palm: PaLM, scope: str | None):
        super().__init__()
        self.palm, self.scope = palm, scope

    def forward(self, rows: Rows, denominator: float) -> Tensor:
        inputs, targets = next_token_pairs(rows.tokens)
        documents = None if rows.document_ids is None else next_token_pairs(rows.document_ids)[0]
        embeds = self.palm(inputs, document_ids=documents, return_only_embedding=True, finetune_scope=self.scope)
        counted = target_mask(loss_mask=rows.weights != 0, document_ids=rows.document_ids)
        weights = next_token_pairs(rows.weights)[1]
        parts = [x[counted].split(max(1, LOGITS // self.palm.num_tokens)) for x in (embeds, targets, weights)]
        losses = [
            self._part(*part, denominator)
            if len(parts[0]) == 1
            else checkpoint(self._part, *part, denominator, use_reentrant=False)
            for part in zip(*parts, strict=True)
        ]
        return torch.stack(losses).sum()

    def _part(self, embeds: Tensor, targets: Tensor, weights: Tensor, denominator: float) -> Tensor:
        z_loss = self.palm.config.z_loss if self.training else 0.0
        logits = self.palm.to_logits(embeds)
        return cross_entropy(logits, targets, weights=weights, z_loss=z_loss, denominator=denominator)


class SupervisedTrainer:
    """Fine-tunes a PaLM on examples, such as conversations, on one process or those of `accelerate launch`.

    Each row of a batch is one example, or several that do not see each other where a `sampler` packs them, as that of
    `palm_rlhf.data.packing` does. With `lora_r` adapters named "supervised" are trained: sample with
    `finetune_scope="supervised"`, or merge them. All that is saved goes to `output_dir`; `resume=True` goes on from the
    newest checkpoint there, if there is one. Seeds the random generators of Python, NumPy and PyTorch. The user's loop
    over `steps()` is the callback.
    """

    @beartype
    def __init__(
        self,
        palm: PaLM,
        *,
        train_data: Sequence[Example],
        valid_data: Sequence[Example] | None = None,
        sampler: RowSampler | None = None,
        config: SupervisedConfig = SupervisedConfig(),  # noqa: B008 (it is frozen)
        output_dir: str | Path | None = None,
        resume: bool = False,
    ):
        self.palm, self.config = palm, config
        self._check_palm()
        check_examples(train_data, "train_data", palm.num_tokens)
        if valid_data is not None:
            check_examples(valid_data, "valid_data", palm.num_tokens)
        self.examples, self.valid_data = train_data, valid_data
        self.weights = [example.total_weight for example in train_data]
        self.sampler = OneInARow(len(train_data), config.seed) if sampler is None else sampler
        if self.sampler.num_items != len(train_data):
            raise ValueError(f"the sampler deals {self.sampler.num_items} examples, train_data has {len(train_data)}")

        if config.gradient_checkpointing:
            palm.config = dataclasses.replace(palm.config, gradient_checkpointing=True)
        self.loss = RowsLoss(palm, SCOPE if config.lora_r > 0 else None)
        self.run = Run(self.loss, self._make_optimizer, config, output_dir=output_dir, resume=resume)
        self.accelerator = self.run.accelerator
        self.run.load_newest(self._read_models)
        panels = CURVES if valid_data is None else {**CURVES, "valid_loss": "validation loss (nats per token)"}
        self.run.open_log({**dataclasses.asdict(palm.config), **dataclasses.asdict(config)}, panels)

    def _check_palm(self) -> None:
        if not self.palm.config.causal:
            raise ValueError("got a PaLM with causal=False, which sees what it is to say; expected causal=True")
        if self.palm.finetune_modules:
            raise ValueError(
                f"got a PaLM with the LoRA scopes {sorted(self.palm.finetune_modules)}, expected none: merge them by "
                f"merge_finetune_params, or take them away by remove_finetune_params"
            )

    def _make_optimizer(self, loss: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        if c.lora_r > 0:  # not before here, where the run has seeded what is drawn for them
            self.palm.add_finetune_params(SCOPE, c.lora_r, alpha=c.lora_alpha)
            self.palm.token_emb.weight.requires_grad_(c.lora_embeddings)
        return adamw(loss, c.learning_rate, c.betas, c.eps, c.weight_decay)

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step, over all micro-batches and processes."""
        return self.config.batch_size * self.config.grad_accum * self.run.num_processes

    @property
    def epoch(self) -> float:
        """How often the examples have been seen."""
        return self.sampler.num_drawn / len(self.examples)

    @property
    def progress(self) -> float:
        """The part of the run that is done, from 0 to 1."""
        return min(1.0, self.epoch / self.config.num_epochs)

    def train(self) -> Result:
        """Runs what is left of the schedule with a progress bar on standard error; returns what `finish` returns."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """The metrics of one optimiser step after another until the schedule ends; evaluates and saves when due.

        `loss`, the weighted mean over the step's tokens in nats (with the z-loss); `epoch`; `filled`, the share of the
        rows that are not pads; `learning_rate`, `grad_norm` before clipping and `tokens_per_second`, pads not counted.
        `valid_loss` (without the z-loss) is there after evaluations. FloatingPointError where the loss or the gradient
        is not finite.
        """
        self.palm.train()
        return self.run.drive(
            self._optimizer_step,
            lambda: self.progress >= 1,
            self.save,
            num_steps=lambda: round(self.step / self.progress) if self.progress else None,  # packing decides
            show=lambda metrics: {"loss": metrics["loss"]},
            progress_bar=progress_bar,
        )

    def finish(self) -> Result:
        """Evaluates on the validation data, logs that, draws the curves and closes the trackers.

        Returns `valid_loss` (where there is validation data), `steps`, `seconds` with this evaluation included, and
        `stopped_early` where `max_seconds` ended the run before its last step.
        """
        return self.run.finish(self._validation)

    def _optimizer_step(self) -> Metrics:
        """One step on batch_size * grad_accum rows of every process, every loss divided by the weights of all."""
        config, run, started = self.config, self.run, time.perf_counter()
        factor = warmup_cosine(self.step, self.progress, config.warmup_steps, config.min_lr_ratio)
        rows = self.sampler.draw(self.rows_per_step)
        total_weight = sum(self.weights[index] for row in rows for index in row)

        def loss_of(batch: Sequence[Sequence[int]]) -> Tensor:
            laid_out = lay_out([[self.examples[index] for index in row] for row in batch])
            return run.model(laid_out.to(run.device), total_weight)

        batches = micro_batches(rows, config.batch_size, (run.rank, run.num_processes))
        loss, (norm,) = run.optimizer_step(batches, loss_of, rate_factor=factor)
        run.step += 1
        lengths = [sum(len(self.examples[index]) for index in row) for row in rows]
        metrics = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": loss,
            "filled": sum(lengths) / (max(lengths) * len(lengths)),
            "learning_rate": config.learning_rate * factor,
            "grad_norm": norm,
            "tokens_per_second": sum(lengths) / (time.perf_counter() - started),
        }
        if self.valid_data is not None and run.is_due(config.eval_every):
            metrics |= {**self._validation(), "log": True}
        return metrics

    @torch.no_grad()
    @beartype
    def evaluate(self, data: Sequence[Example] | None = None) -> float:
        """The weighted mean loss in nats per token, over the validation data or other `data`; no z-loss, no dropout."""
        if data is None and self.valid_data is None:
            raise ValueError("there is nothing to evaluate on: give the trainer valid_data, or evaluate(data)")
        if data is not None:
            check_examples(data, "data", self.palm.num_tokens)
        data = self.valid_data if data is None else data
        total_weight = sum(example.total_weight for example in data)
        total = torch.zeros((), device=self.run.device)
        by_length = sorted(data, key=len)  # so that few pads are read
        for batch in micro_batches(by_length, self.config.batch_size, (self.run.rank, self.run.num_processes)):
            with evaluating(self.loss), self.run.autocast():
                total += self.loss(lay_out([[example] for example in batch]).to(self.run.device), total_weight)
        return float(self.accelerator.reduce(total, "sum"))

    def _validation(self) -> Metrics:
        return {} if self.valid_data is None else {"valid_loss": self.evaluate()}

    def save(self) -> None:
        """Writes the checkpoint of this step, whole or not at all, and removes all but the newest `keep_checkpoints`.

        OSError where the disk is full; what was saved before stays.
        """
        self.run.save(
            lambda folder: self.palm.save_pretrained(folder / "model"),
            {"sampler": self.sampler.state_dict(), "data": digest_of(self.examples)},
        )

    def _read_models(self, folder: Path, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        if state["data"] != digest_of(self.examples):
            raise ValueError(f"train_data has changed since {folder}: resume with the same examples in the same order")
        self.palm.load(folder / "model")
