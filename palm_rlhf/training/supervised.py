"""Supervised fine-tuning: a loss over weighted tokens of examples, such as the replies in conversations."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from beartype import beartype
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palm_rlhf.model.modes import evaluating
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.cross_entropy import cross_entropy
from palm_rlhf.ops.logprobs import next_token_pairs
from palm_rlhf.policy.sequences import batches_by_length
from palm_rlhf.training.epoch_sampler import micro_batches
from palm_rlhf.training.run.log import Metrics, Result
from palm_rlhf.training.run.loop import Loop
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
SHOWN = ("loss",)  # behind the progress bar
SCOPE = "supervised"
# Most logits in memory at once, for any context and vocabulary.
LOGITS = 1 << 25


class RowsLoss(nn.Module):
    """The weighted cross-entropy of rows, in nats, summed and divided by `denominator`: `-> scalar`.

    Logits are computed only where a target has a weight, in parts, and again in the backward: a long context needs no
    more memory for them than a short one.
    """

    def __init__(self, palm: PaLM, scope: str | None):
        super().__init__()
        self.palm, self.scope = palm, scope

    def forward(self, rows: Rows, denominator: float) -> Tensor:
        inputs, targets = next_token_pairs(rows.tokens)
        documents = None if rows.document_ids is None else next_token_pairs(rows.document_ids)[0]
        embeds = self.palm(inputs, document_ids=documents, return_only_embedding=True, finetune_scope=self.scope)
        weights = next_token_pairs(rows.weights)[1]
        chosen = [x.flatten(0, 1)[rows.counted] for x in (embeds, targets, weights)]
        columns = [x.split(max(1, LOGITS // self.palm.num_tokens)) for x in chosen]
        parts = list(zip(*columns, strict=True))
        if len(parts) == 1:
            return self._part(parts[0], denominator)
        losses = [checkpoint(self._part, part, denominator, use_reentrant=False) for part in parts]
        return torch.stack(losses).sum()

    def _part(self, part: tuple[Tensor, ...], denominator: float) -> Tensor:
        embeds, targets, weights = part
        z_loss = self.palm.config.z_loss if self.training else 0.0
        logits = self.palm.to_logits(embeds)
        return cross_entropy(logits, targets, weights=weights, z_loss=z_loss, denominator=denominator)


class SupervisedTrainer:
    """The trainer of a PaLM on examples, such as conversations, on one process or those of `accelerate launch`.

    With `config.lora_r` adapters "supervised" are trained: sample with `finetune_scope="supervised"`, or merge them.
    Seeds the random generators of Python, NumPy and PyTorch. Loop over `steps` to act between steps, or call `train`.

    Args:
        palm: the model, trained in place.
        train_data: examples to learn from.
        valid_data: examples for evaluations.
        sampler: puts examples into rows, such as the packing sampler of `palm_rlhf.data`; examples that share a row do
            not see each other. None: one example a row.
        config: all settings that are numbers.
        output_dir: the folder of all that is saved.
        resume: go on from the newest checkpoint in `output_dir`, if there is one.
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

        self.loss = RowsLoss(palm, SCOPE if config.lora_r > 0 else None)
        self.run = Run(config, output_dir=output_dir, resume=resume)
        self.accelerator = self.run.accelerator
        palm.to(self.run.device)
        if config.lora_r > 0:  # not before the run has seeded the generator that adapters are drawn with
            palm.add_finetune_params(SCOPE, config.lora_r, alpha=config.lora_alpha, targets=config.lora_targets)
            for embeddings in (palm.token_emb.weight, palm.output_weight):
                embeddings.requires_grad_(config.lora_embeddings)
        optimizer = adamw(palm, config.learning_rate, config.betas, config.eps, config.weight_decay)
        num_rows = config.num_epochs * len(train_data) // self.run.num_processes
        self.run.prepare(self.loss, optimizer, num_rows // config.batch_size)
        self._resume()
        panels = CURVES if valid_data is None else {**CURVES, "valid_loss": "validation loss (nats per token)"}
        self.run.open_log({**dataclasses.asdict(palm.config), **dataclasses.asdict(config)}, panels)

    def _check_palm(self) -> None:
        if not self.palm.config.causal:
            raise ValueError("got a PaLM with causal=False, which sees what it is to predict; expected causal=True")
        if self.palm.finetune_modules:
            raise ValueError(
                f"got a PaLM with the LoRA scopes {sorted(self.palm.finetune_modules)}, expected none: merge them by "
                f"merge_finetune_params, or take them away by remove_finetune_params"
            )

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step, over all micro-batches and processes."""
        return self.config.batch_size * self.config.grad_accum * self.run.num_processes

    @property
    def epoch(self) -> float:
        """Passes over the examples so far."""
        return self.sampler.num_drawn / len(self.examples)

    @property
    def progress(self) -> float:
        """The share of the run that is done, from 0 to 1."""
        return min(1.0, self.epoch / self.config.num_epochs)

    @property
    def _estimated_steps(self) -> int | None:
        """Steps of the whole run, which packing decides, by the steps so far; None before the first."""
        if self.progress in (0, 1):
            return self.step if self.progress else None
        return max(round(self.step / self.progress), self.step + 1)

    def train(self) -> Result:
        """Take the steps that are left, with a progress bar on standard error, and return the result of `finish`."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """Yield the metrics of one optimiser step after another until the schedule ends; evaluate and save when due.

        They are `loss`, the weighted mean over the step's tokens in nats (with the z-loss); `epoch`; `filled`, the
        share of the rows that is no padding; `learning_rate`, `grad_norm` before clipping and `tokens_per_second`
        without padding. Steps with an evaluation have `valid_loss` (without the z-loss). Raises FloatingPointError
        where the loss or the gradient is not finite.
        """
        self.palm.train()
        with Loop(self.run, self._estimated_steps, SHOWN, progress_bar) as loop:
            while loop.goes_on:
                metrics = self.update()
                evaluates = self.valid_data is not None and self.run.is_due(self.config.eval_every)
                if evaluates:
                    metrics["valid_loss"] = self.evaluate()
                loop.num_steps = self._estimated_steps
                if loop.finish_step(metrics, must_log=evaluates):
                    self.save()
                yield metrics

    def finish(self) -> Result:
        """Evaluate on the validation data, log the result, draw the curves and close the trackers.

        Returns `valid_loss` (where there is validation data), `steps`, `seconds` with this evaluation included, and
        `stopped_early` where `max_seconds` ended the run before its last step.
        """
        started = time.perf_counter()
        metrics = {} if self.valid_data is None else {"valid_loss": self.evaluate()}
        return self.run.finish(metrics, started=started)

    def update(self) -> Metrics:
        """Take one optimiser step on the next batch_size * grad_accum rows of every process.

        The loss is the weighted mean over the tokens of all of them.
        """
        config, run, readings = self.config, self.run, self.run.readings
        started = readings.mark()
        factor = warmup_cosine(self.step, self.progress, config.warmup_steps, config.min_lr_ratio)
        rows = self.sampler.draw(self.rows_per_step)
        total_weight = sum(self.weights[index] for row in rows for index in row)
        with run.optimizer_step(rate_factor=factor) as step:
            for batch in step.micro_batches(micro_batches(rows, config.batch_size, run.shard)):
                examples = lay_out([[self.examples[index] for index in row] for row in batch])
                with run.autocast():
                    loss = run.model(examples.to(run.device), total_weight)
                step.backward(loss)
        run.step += 1
        lengths = [sum(len(self.examples[index]) for index in row) for row in rows]
        return readings.metrics(
            {
                "step": self.step,
                "epoch": self.epoch,
                "loss": step.loss,
                "filled": sum(lengths) / (max(lengths) * len(lengths)),
                "learning_rate": config.learning_rate * factor,
                "grad_norm": step.norms[0],
                "tokens_per_second": readings.rate(sum(lengths), started),
            }
        )

    @torch.no_grad()
    @beartype
    def evaluate(self, data: Sequence[Example] | None = None) -> float:
        """Return the weighted mean loss over the validation data or other `data`, in nats per token; no z-loss."""
        if data is not None:
            check_examples(data, "data", self.palm.num_tokens)
        examples = self.valid_data if data is None else data
        if examples is None:
            raise ValueError("there is nothing to evaluate on: give the trainer valid_data, or evaluate(data)")
        total_weight = sum(example.total_weight for example in examples)
        total = torch.zeros((), device=self.run.device)
        lengths = torch.tensor([len(example) for example in examples])
        for batch in batches_by_length(lengths, self.config.batch_size, self.run.shard):
            rows = lay_out([[examples[index]] for index in batch.tolist()])
            with evaluating(self.loss), self.run.autocast():
                total += self.loss(rows.to(self.run.device), total_weight)
        return float(self.accelerator.reduce(total, "sum"))

    def save(self) -> None:
        """Write the checkpoint of this step, whole or not at all, and remove all but the newest `keep_checkpoints`.

        Raises OSError where the disk is full; the checkpoints before it stay.
        """
        state = {"sampler": self.sampler.state_dict(), "data": digest_of(self.examples)}
        with self.run.new_checkpoint(state) as folder:
            if folder is not None:
                self.palm.save_pretrained(folder / "model")

    def _resume(self) -> None:
        with self.run.newest_checkpoint() as saved:
            if saved is None:
                return
            self.sampler.load_state_dict(saved.state["sampler"])
            if saved.state["data"] != digest_of(self.examples):
                raise ValueError(
                    f"train_data has changed since {saved.folder}: resume with the same examples in the same order"
                )
            self.palm.load(saved.folder / "model")
