"""A policy beside its reference, and optimiser steps on preferences, wherever those come from."""

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.algorithms.preferences import kto_baseline
from palm_rlhf.model.modes import evaluating, switch_off_dropout
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.logprobs import chunks_are_faster, linear_logprobs, token_logprobs
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.policy.actor_critic import check_model
from palm_rlhf.policy.sequences import Sequences
from palm_rlhf.training.epoch_sampler import micro_batches
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.preference_data import Preferences, UnpairedPreference, as_rows, mismatched
from palm_rlhf.training.preference_objective import Counts, metric_names, objective
from palm_rlhf.training.run.log import Metrics
from palm_rlhf.training.run.optimizer import adamw
from palm_rlhf.training.run.run import Run

SCOPE = "policy"


class ResponseLogprobs(nn.Module):
    """The log-probability that a PaLM, with one LoRA scope or none, gives each whole response, in nats: `-> b`."""

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
        embeds, weight = sequences.before_actions(embeds), self.palm.token_emb.weight
        if chunks_are_faster(embeds, weight):
            logprobs, _ = linear_logprobs(embeds, weight, sequences.actions, scale=self.palm.config.output_scale)
        else:
            logprobs = token_logprobs(self.palm.to_logits(embeds, wide=True), sequences.actions)
        return masked_sum(logprobs, sequences.action_mask, dim=-1)


class PreferenceLearner:
    """The policy, the reference, the run and its optimiser steps, for a trainer that brings the preferences.

    `palm` is trained in place, or with `lora_r` its adapters are. `reference` is None where nothing can be asked of one
    any more: with a loss that has none, or where it is the trained `palm` as it was. With `asks_reference` it is asked
    in every step, and so is the base below the adapters, or else a frozen copy.
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
        self.run = Run(self.policy, self._make_optimizer, config, output_dir=output_dir, resume=resume)
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

    def _make_optimizer(self, policy: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        if c.lora_r > 0:  # not before here, where the run has seeded what is drawn for them
            self.palm.add_finetune_params(SCOPE, c.lora_r, alpha=c.lora_alpha)
        return adamw(policy, c.learning_rate, c.betas, c.eps, c.weight_decay)

    @property
    def items_per_step(self) -> int:
        """Pairs, or single responses, of one optimiser step, over all micro-batches and processes."""
        return self.config.batch_size * self.config.grad_accum * self.run.num_processes

    @beartype
    def optimizer_step(self, items: Preferences, ref_logprobs: Tensor | None, rate_factor: float) -> Metrics:
        """One step on the items of all processes, which all have the same ones, every loss divided by their number.

        `ref_logprobs` are what the reference gives the responses, `2 p`, or `1 p` of unpaired ones. Returns means over
        the items before the update, and what the optimiser did.
        """
        config, run, started = self.config, self.run, time.perf_counter()
        counts, z_ref = Counts.of(items), self._baseline(items)
        names = metric_names(config, counts)
        totals = torch.zeros(len(names), device=run.device)

        def loss_of(batch: Sequence[int]) -> Tensor:
            if not batch:  # of fewer items than processes: this one adds nothing, but the others wait for it
                return run.model(as_rows(items[:1]).to(run.device)).sum() * 0.0
            rows = [items[index] for index in batch]
            logprobs = run.model(as_rows(rows).to(run.device)).unflatten(0, (-1, len(rows)))
            loss, metrics = objective(config, rows, logprobs, self._columns(ref_logprobs, batch), counts, z_ref)
            totals.add_(metrics)
            return loss

        batches = micro_batches(list(range(len(items))), config.batch_size, (run.rank, run.num_processes)) or [[]]
        loss, (norm,) = run.optimizer_step(batches, loss_of, rate_factor=rate_factor)
        run.step += 1
        return {
            "step": run.step,
            "loss": loss,
            **dict(zip(names, run.accelerator.reduce(totals, "sum").tolist(), strict=True)),
            **({} if z_ref is None else {"z_ref": float(z_ref)}),
            "learning_rate": config.learning_rate * rate_factor,
            "grad_norm": norm,
            "tokens_per_second": sum(item.num_tokens for item in items) / (time.perf_counter() - started),
        }

    @beartype
    def evaluate(self, items: Preferences, ref_logprobs: Tensor | None) -> Metrics:
        """The loss and the same means as of a step, over other items, which all processes share out."""
        counts, z_ref = Counts.of(items), self._baseline(items)
        logprobs = self.logprobs(self.policy, items)
        loss, metrics = objective(self.config, items, logprobs, ref_logprobs, counts, z_ref)
        names = metric_names(self.config, counts)
        known = {"loss": float(loss), **dict(zip(names, metrics.tolist(), strict=True))}
        return known if z_ref is None else {**known, "z_ref": float(z_ref)}

    def _columns(self, ref_logprobs: Tensor | None, batch: Sequence[int]) -> Tensor | None:
        return None if ref_logprobs is None else ref_logprobs[:, batch].to(self.run.device)

    def _baseline(self, items: Sequence[UnpairedPreference]) -> Tensor | None:
        """The KL to the reference that the loss kto needs, of all items of a step, however they are batched."""
        if self.config.is_paired:
            return None
        others = mismatched(items)
        return kto_baseline(*(self.logprobs(model, others)[0] for model in (self.policy, self.reference)))

    @torch.no_grad()
    @beartype
    def logprobs(self, model: ResponseLogprobs, items: Preferences, *, as_in_steps: bool = False) -> Tensor:
        """What a model gives the responses, every process asking for its share: `2 p`, or `1 p` of unpaired ones.

        Items of like length share a batch; `as_in_steps`, those that do in optimiser steps on the items in their order.
        """
        config, shard = self.config, (self.run.rank, self.run.num_processes)
        result = torch.zeros(len(items[0].responses), len(items), device=self.run.device)
        places = range(len(items))
        by_length = sorted(places, key=lambda place: items[place].num_tokens)  # so that few pads are read
        for step in micro_batches(places, self.items_per_step) if as_in_steps else [by_length]:
            for batch in micro_batches(step, config.batch_size, shard):
                rows = as_rows([items[place] for place in batch]).to(self.run.device)
                with evaluating(model), self.run.autocast():
                    result[:, batch] = model(rows).unflatten(0, (-1, len(batch)))
        return self.run.accelerator.reduce(result, "sum").cpu()

    @beartype
    def write_models(self, folder: Path) -> None:
        """Puts the policy into a checkpoint, and the reference where there is a copy of its own."""
        self.palm.save_pretrained(folder / "model")
        if self.saved_reference is not None:
            self.saved_reference.save_pretrained(folder / "reference")

    @beartype
    def read_models(self, folder: Path) -> None:
        """Puts back what `write_models` wrote, in place."""
        if (folder / "reference").is_dir() != (self.saved_reference is not None):
            kinds = "the base below the adapters", "a model of its own"
            here, there = kinds[::-1] if self.saved_reference is not None else kinds
            raise ValueError(f"this run's reference is {here}, that of {folder} is {there}: resume with what it had")
        self.palm.load(folder / "model")
        if self.saved_reference is not None:
            self.saved_reference.load(folder / "reference")
