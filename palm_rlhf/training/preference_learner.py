"""A policy beside its reference, and optimiser steps on preferences, for both preference trainers."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.algorithms.preferences import kto_baseline
from palm_rlhf.model.modes import evaluating, switch_off_dropout
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.logprobs import chunks_are_faster, linear_logprobs, token_logprobs
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.ops.pinned_copy import upload
from palm_rlhf.policy.model_checks import check_model
from palm_rlhf.policy.sequences import Sequences, batches_by_length
from palm_rlhf.training.epoch_sampler import micro_batches
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_data import Preferences, UnpairedPreference, as_rows, mismatched
from palm_rlhf.training.preference_objective import Counts, metric_names, objective
from palm_rlhf.training.run.log import Metrics
from palm_rlhf.training.run.optimizer import adamw, warmup_cosine
from palm_rlhf.training.run.run import Run

SCOPE = "policy"


class ResponseLogprobs(nn.Module):
    """The log-probability of each whole response under a PaLM, with one LoRA scope or none, in nats: `-> b`."""

    def __init__(self, palm: PaLM, scope: str | None):
        super().__init__()
        self.palm, self.scope = palm, scope

    def forward(self, sequences: Sequences) -> Tensor:
        embeds = self.palm(
            sequences.tokens,
            key_mask=sequences.key_mask,
            return_only_embedding=True,
            finetune_scope=self.scope,
        )
        embeds, weight = sequences.before_actions(embeds), self.palm.output_weight
        if chunks_are_faster(embeds, weight):
            logprobs, _ = linear_logprobs(embeds, weight, sequences.actions, scale=self.palm.config.output_scale)
        else:
            logprobs = token_logprobs(self.palm.to_logits(embeds, wide=True), sequences.actions)
        return masked_sum(logprobs, sequences.action_mask, dim=-1)


class PreferenceLearner:
    """The policy, the reference, the run and its optimiser steps, for a trainer that supplies the preferences.

    Args:
        palm: the policy, trained in place; with `config.lora_r` its adapters are.
        reference: the model that the policy is held to; None: the palm as it is given.
        config: the loss and all other settings.
        asks_reference: whether steps need log-probabilities of the reference. Then a palm as reference is copied,
            unless adapters leave it as the base below them. Otherwise the attribute `reference` is None for a palm
            that is its own reference, which training changes.
        output_dir: the folder of all that is saved.
        resume: go on from the newest checkpoint in that folder.
    """

    @beartype
    def __init__(
        self,
        palm: PaLM,
        reference: PaLM | None,
        config: PreferenceConfig,
        *,
        asks_reference: bool,
        output_dir: str | Path | None,
        resume: bool,
    ):
        self.palm, self.config = palm, config
        self._check_models(reference)
        is_copied = config.has_reference and asks_reference and (reference is not None or config.lora_r == 0)
        if is_copied:
            reference = switch_off_dropout(copy.deepcopy(reference or palm).requires_grad_(False))
        self.policy = ResponseLogprobs(switch_off_dropout(palm), SCOPE if config.lora_r > 0 else None)
        self.run = Run(config, output_dir=output_dir, resume=resume)
        palm.to(self.run.device)
        if config.lora_r > 0:  # not before the run has seeded the generator that adapters are drawn with
            palm.add_finetune_params(SCOPE, config.lora_r, alpha=config.lora_alpha, targets=config.lora_targets)
        self.run.prepare(self.policy, adamw(palm, config.learning_rate, config.betas, config.eps, config.weight_decay))
        self.reference: ResponseLogprobs | None = None
        if reference is not None:
            self.reference = ResponseLogprobs(reference.to(self.run.device), None)
        elif config.has_reference and config.lora_r > 0:
            self.reference = ResponseLogprobs(palm, None)
        self.saved_reference = reference if is_copied else None

    def _check_models(self, reference: PaLM | None) -> None:
        check_model("palm", self.palm, self.palm.num_tokens)
        if reference is self.palm:
            raise ValueError("the reference is the palm to be trained: leave it out, training starts from it anyway")
        if reference is not None and not self.config.has_reference:
            raise ValueError(f"got a reference with the loss {self.config.loss}, which has none: leave it out")
        if reference is not None:
            check_model("reference", reference, self.palm.num_tokens)

    @property
    def items_per_step(self) -> int:
        """Pairs, or single responses, of one optimiser step, over all micro-batches and processes."""
        return self.config.batch_size * self.config.grad_accum * self.run.num_processes

    @beartype
    def update(self, items: Preferences, ref_logprobs: Tensor | None, *, num_steps: int) -> Metrics:
        """Take one optimiser step on the items, which are the same in all processes; no step where there are none.

        The loss is the mean over the items. Returns means over them before the update, and metrics of the optimiser.

        Args:
            items: the items of all processes, in the same order in each.
            ref_logprobs: log-probabilities of the responses under the reference, `2 p`, or `1 p` of unpaired ones.
            num_steps: steps of the whole run, for the schedule of the learning rate.
        """
        config, run, readings = self.config, self.run, self.run.readings
        started = readings.mark()
        factor = warmup_cosine(run.step, run.step / num_steps, config.warmup_steps, config.min_lr_ratio)
        learning_rate = config.learning_rate * factor
        if not items:
            run.step += 1
            return {"step": run.step, "learning_rate": learning_rate}
        counts, z_ref = Counts.of(items), self._baseline(items)
        names = metric_names(config, counts)
        totals = torch.zeros(len(names), device=run.device)
        with run.optimizer_step(rate_factor=factor) as step:
            # with fewer items than processes, some have an empty batch, whose backward the others wait for
            batches = micro_batches(list(range(len(items))), config.batch_size, run.shard) or [[]]
            for batch in step.micro_batches(batches):
                rows = [items[index] for index in batch] or items[:1]
                with run.autocast():
                    logprobs = run.model(as_rows(rows).to(run.device)).unflatten(0, (-1, len(rows)))
                    if batch:
                        ref = None if ref_logprobs is None else upload(ref_logprobs[:, batch], run.device)
                        loss, metrics = objective(config, rows, logprobs, ref, counts, z_ref)
                        totals += metrics
                    else:
                        loss = logprobs.sum() * 0.0
                step.backward(loss)
        run.step += 1
        means = map(readings.number, run.accelerator.reduce(totals, "sum").unbind())
        return readings.metrics(
            {
                "step": run.step,
                "loss": step.loss,
                **dict(zip(names, means, strict=True)),
                **({} if z_ref is None else {"z_ref": readings.number(z_ref)}),
                "learning_rate": learning_rate,
                "grad_norm": step.norms[0],
                "tokens_per_second": readings.rate(sum(item.num_tokens for item in items), started),
            }
        )

    @beartype
    def evaluate(self, items: Preferences, ref_logprobs: Tensor | None) -> Metrics:
        """Return the loss and the metrics of a step over other items, which the processes share out."""
        counts, z_ref = Counts.of(items), self._baseline(items)
        logprobs = self.logprobs(self.policy, items)
        loss, metrics = objective(self.config, items, logprobs, ref_logprobs, counts, z_ref)
        names = metric_names(self.config, counts)
        known = {"loss": float(loss), **dict(zip(names, metrics.tolist(), strict=True))}
        return known if z_ref is None else {**known, "z_ref": float(z_ref)}

    def _baseline(self, items: Preferences) -> Tensor | None:
        """Return the KL to the reference that the loss kto needs, over all items of a step."""
        if self.config.is_paired:
            return None
        assert self.reference is not None  # where the loss is kto
        others = mismatched(cast(Sequence[UnpairedPreference], items))
        return kto_baseline(*(self.logprobs(model, others)[0] for model in (self.policy, self.reference)))

    @torch.no_grad()
    @beartype
    def logprobs(self, model: ResponseLogprobs, items: Preferences, *, as_in_steps: bool = False) -> Tensor:
        """Return log-probabilities of the responses, of which every process reads its share: `2 p` (or `1 p`).

        Items of similar length share a batch. With `as_in_steps` the batches are those of optimiser steps on the items
        in their order, for models that round by the batch.
        """
        size, shard = self.config.batch_size, self.run.shard
        if as_in_steps:
            steps = micro_batches(list(range(len(items))), self.items_per_step)
            batches = [batch for step in steps for batch in micro_batches(step, size, shard)]
        else:
            lengths = torch.tensor([item.num_tokens for item in items])
            batches = [batch.tolist() for batch in batches_by_length(lengths, size, shard)]
        result = torch.zeros(len(items[0].responses), len(items), device=self.run.device)
        for batch in batches:
            rows = as_rows([items[place] for place in batch]).to(self.run.device)
            with evaluating(model), self.run.autocast():
                result[:, batch] = model(rows).unflatten(0, (-1, len(batch)))
        return self.run.accelerator.reduce(result, "sum").cpu()

    @beartype
    def write_models(self, folder: Path) -> None:
        """Write the policy into a checkpoint, and the reference if it is a model of its own."""
        self.palm.save_pretrained(folder / "model")
        if self.saved_reference is not None:
            self.saved_reference.save_pretrained(folder / "reference")

    @beartype
    def read_models(self, folder: Path) -> None:
        """Read the models that `write_models` wrote, in place."""
        if (folder / "reference").is_dir() != (self.saved_reference is not None):
            kinds = "the base below the adapters", "a model of its own"
            here, there = kinds[::-1] if self.saved_reference is not None else kinds
            raise ValueError(
                f"this run's reference is {here}, that of {folder} is {there}: resume with the reference that it had"
            )
        self.palm.load(folder / "model")
        if self.saved_reference is not None:
            self.saved_reference.load(folder / "reference")
