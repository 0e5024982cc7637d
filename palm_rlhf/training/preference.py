"""The trainer on preferences between two responses: no reward model, no sampling."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from palm_rlhf.algorithms.preferences import dpo_loss
from palm_rlhf.model.generate import evaluating, switch_off_dropout
from palm_rlhf.model.palm import PaLM
from palm_rlhf.ops.logprobs import token_logprobs
from palm_rlhf.ops.logprobs_chunked import chunks_pay, linear_logprobs
from palm_rlhf.ops.masked import masked_sum
from palm_rlhf.policy.sequences import Sequences, join
from palm_rlhf.training.batches import EpochSampler, micro_batches
from palm_rlhf.training.metrics import Metrics, Result
from palm_rlhf.training.optimization import adamw, warmup_cosine
from palm_rlhf.training.preference_config import PreferenceConfig
from palm_rlhf.training.rankings import Ranking, checked, fingerprint
from palm_rlhf.training.run import Run

CURVES = {"loss": "loss", "accuracy": "accuracy", "reward_margin": "reward of the chosen minus the rejected"}
PAIR_METRICS = (
    "accuracy",
    "reward_margin",
    "chosen_rewards",
    "rejected_rewards",
    "chosen_logprobs",
    "rejected_logprobs",
)
SCOPE = "policy"


@beartype
@dataclass(frozen=True)
class Preference:
    """A prompt and two responses to it, 1-d tensors of token ids."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor

    @property
    def ranking(self) -> Ranking:
        """The same as a ranking of two."""
        return Ranking(self.prompt, (self.chosen, self.rejected))

    @property
    def num_tokens(self) -> int:
        """Tokens that the pair costs: the prompt is read with each of its responses."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


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
        if chunks_pay(embeds, weight):
            logprobs, _ = linear_logprobs(embeds, weight, sequences.actions, scale=self.palm.config.output_scale)
        else:
            logprobs = token_logprobs(self.palm.to_logits(embeds), sequences.actions)
        return masked_sum(logprobs, sequences.action_mask, dim=-1)


class PreferenceTrainer:
    """Trains a PaLM by DPO (Rafailov et al. 2023) or IPO (Azar et al. 2023), on one process or those of `accelerate`.

    The reference is `palm` as it is given, or another model. What it gives the responses is computed once, before the
    first step, and saved with the checkpoints: no second copy of the model is made. With `lora_r` adapters named
    "policy" are trained: sample with `finetune_scope="policy"`, or merge them. Dropout is switched off in `palm` for
    good. All that is saved goes to `output_dir`; `resume=True` goes on from the newest checkpoint there, if there is
    one, with the reference that it has. Seeds the random generators of Python, NumPy and PyTorch. The user's loop over
    `steps()` is the callback.
    """

    @beartype
    def __init__(
        self,
        palm: PaLM,
        *,
        train_data: Sequence[Preference],
        valid_data: Sequence[Preference] | None = None,
        reference: PaLM | None = None,
        config: PreferenceConfig = PreferenceConfig(),  # noqa: B008 (it is frozen)
        output_dir: str | Path | None = None,
        resume: bool = False,
    ):
        self.palm, self.config = palm, config
        self._check_models(reference)
        data = {"train": train_data} | ({} if valid_data is None else {"valid": valid_data})
        self.pairs = {name: self._checked(pairs, f"{name}_data") for name, pairs in data.items()}
        self.fingerprints = {name: fingerprint([p.ranking for p in pairs]) for name, pairs in self.pairs.items()}
        self.sampler = EpochSampler(len(train_data), config.seed)

        self.policy = ResponseLogprobs(switch_off_dropout(palm), SCOPE if config.lora_r > 0 else None)
        self.run = Run(self.policy, self._make_optimizer, config, output_dir=output_dir, resume=resume)
        self.accelerator = self.run.accelerator

        self.reference = None  # a model that can still be asked during training
        if reference is not None:
            self.reference = ResponseLogprobs(reference.to(self.run.device), None)
        elif config.lora_r > 0:
            self.reference = ResponseLogprobs(palm, None)
        self.ref_logprobs: dict[str, Tensor] = {}
        self.run.load_newest(self._read_models)
        if not self.ref_logprobs:
            start = self.policy if self.reference is None else self.reference
            self.ref_logprobs = {name: self._logprobs(start, pairs) for name, pairs in self.pairs.items()}
        panels = {
            key if name == "train" else f"valid_{key}": f"{name}: {CURVES[key]}" for name in data for key in CURVES
        }
        self.run.open_log({**dataclasses.asdict(palm.config), **dataclasses.asdict(config)}, panels)

    def _check_models(self, reference: PaLM | None) -> None:
        if self.palm.finetune_modules:
            raise ValueError(
                f"got a PaLM with the LoRA scopes {sorted(self.palm.finetune_modules)}, expected none: merge them by "
                f"merge_finetune_params, or take them away by remove_finetune_params"
            )
        if reference is self.palm:
            raise ValueError("the reference is the palm to be trained: leave it out, training starts from it anyway")
        for name, model in (("palm", self.palm), ("reference", reference)):
            if model is not None and not model.config.causal:
                raise ValueError(f"the {name} has causal=False and sees what it is to say, expected causal=True")
        if reference is not None and reference.num_tokens != self.palm.num_tokens:
            raise ValueError(
                f"the reference has num_tokens={reference.num_tokens}, expected {self.palm.num_tokens} as the palm has"
            )

    def _checked(self, pairs: Sequence[Preference], name: str) -> list[Preference]:
        rankings = [pair.ranking for pair in pairs]
        limits = {"num_tokens": self.palm.num_tokens, "max_seq_len": self.config.max_seq_len}
        return [Preference(ranking.prompt, *ranking.responses) for ranking in checked(rankings, name, **limits)]

    def _make_optimizer(self, policy: nn.Module) -> torch.optim.Optimizer:
        c = self.config
        if c.lora_r > 0:  # not before here, where the run has seeded what is drawn for them
            self.palm.add_finetune_params(SCOPE, c.lora_r, alpha=c.lora_alpha)
        return adamw(policy, c.learning_rate, c.betas, c.eps, c.weight_decay)

    @property
    def step(self) -> int:
        return self.run.step

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.config.num_epochs * self.sampler.num_items // self.pairs_per_step)

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimiser step, over all micro-batches and processes."""
        return self.config.batch_size * self.config.grad_accum * self.run.num_processes

    def train(self) -> Result:
        """Runs what is left of the schedule with a progress bar on standard error; returns what `finish` returns."""
        for _ in self.steps(progress_bar=True):
            pass
        return self.finish()

    @beartype
    def steps(self, progress_bar: bool = False) -> Iterator[Metrics]:
        """The metrics of one optimiser step after another until the schedule ends; evaluates and saves when due.

        Means over the step's pairs, before its update: `loss`; `accuracy`, the share whose chosen response has the
        higher reward; `chosen_rewards` and `rejected_rewards`, beta * (logprob - ref_logprob), for ipo of the means
        over tokens; `reward_margin`, their difference; `chosen_logprobs` and `rejected_logprobs`, in nats a response.
        Then `epoch`, `learning_rate`, `grad_norm` before clipping and `tokens_per_second`. After evaluations the
        means over the validation pairs are there too, as `valid_loss` and so on. FloatingPointError where the loss or
        the gradient is not finite.
        """
        self.palm.train()
        return self.run.drive(
            self._optimizer_step,
            lambda: self.step >= self.num_steps,
            self.save,
            num_steps=lambda: self.num_steps,
            show=lambda metrics: {key: metrics[key] for key in ("loss", "accuracy")},
            progress_bar=progress_bar,
        )

    def finish(self) -> Result:
        """Evaluates on the validation data, logs that, draws the curves and closes the trackers.

        Returns what `evaluate` does as `valid_loss` and so on, `steps`, `seconds` with this evaluation included, and
        `stopped_early` where `max_seconds` ended the run before its last step.
        """
        return self.run.finish(self._validation)

    def _optimizer_step(self) -> Metrics:
        """One step on batch_size * grad_accum pairs of every process, every loss divided by the pairs of all."""
        config, run, started = self.config, self.run, time.perf_counter()
        factor = warmup_cosine(self.step, self.step / self.num_steps, config.warmup_steps, config.min_lr_ratio)
        pairs, drawn = self.pairs["train"], self.sampler.draw(self.pairs_per_step)
        totals = torch.zeros(len(PAIR_METRICS), device=run.device)

        def loss_of(batch: Sequence[int]) -> Tensor:
            rows = [pairs[index] for index in batch]
            logprobs = run.model(self._block(rows)).unflatten(0, (2, -1))
            loss, metrics = self._objective(rows, logprobs, self.ref_logprobs["train"][:, batch], len(drawn))
            totals.add_(metrics)
            return loss

        batches = micro_batches(drawn, config.batch_size, (run.rank, run.num_processes))
        loss, (norm,) = run.optimizer_step(batches, loss_of, rate_factor=factor)
        run.step += 1
        num_tokens = sum(pairs[index].num_tokens for index in drawn)
        metrics = {
            "step": self.step,
            "epoch": self.sampler.num_drawn / self.sampler.num_items,
            "loss": loss,
            **dict(zip(PAIR_METRICS, self.accelerator.reduce(totals, "sum").tolist(), strict=True)),
            "learning_rate": config.learning_rate * factor,
            "grad_norm": norm,
            "tokens_per_second": num_tokens / (time.perf_counter() - started),
        }
        if "valid" in self.pairs and run.is_due(config.eval_every):
            metrics |= {**self._validation(), "log": True}
        return metrics

    def _block(self, pairs: Sequence[Preference]) -> Sequences:
        """The pairs as rows of one forward: first the chosen responses, then the rejected ones."""
        responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        return join([pair.prompt for pair in pairs] * 2, responses).to(self.run.device)

    def _objective(
        self, pairs: Sequence[Preference], logprobs: Tensor, ref_logprobs: Tensor, denominator: int
    ) -> tuple[Tensor, Tensor]:
        """The loss and the PAIR_METRICS, sums over the pairs divided by `denominator`; both log-probs: `2 b`."""
        ref_logprobs, taken = ref_logprobs.to(logprobs.device), logprobs
        if self.config.loss == "ipo":
            lengths = [[len(pair.chosen) for pair in pairs], [len(pair.rejected) for pair in pairs]]
            lengths = torch.tensor(lengths, device=logprobs.device)
            taken, ref_logprobs = logprobs / lengths, ref_logprobs / lengths
        loss, chosen, rejected = dpo_loss(
            *taken,
            *ref_logprobs,
            beta=self.config.beta,
            kind=self.config.loss,
            label_smoothing=self.config.label_smoothing,
            denominator=denominator,
        )
        metrics = torch.stack([(chosen > rejected).float(), chosen - rejected, chosen, rejected, *logprobs])
        return loss, metrics.detach().sum(dim=-1) / denominator

    @torch.no_grad()
    def _logprobs(self, model: ResponseLogprobs, pairs: Sequence[Preference]) -> Tensor:
        """What a model gives the chosen and the rejected responses, every process asking for its share: `2 p`."""
        result = torch.zeros(2, len(pairs), device=self.run.device)
        by_length = sorted(range(len(pairs)), key=lambda index: pairs[index].num_tokens)  # so that few pads are read
        for batch in micro_batches(by_length, self.config.batch_size, (self.run.rank, self.run.num_processes)):
            with evaluating(model), self.run.autocast():
                result[:, batch] = model(self._block([pairs[index] for index in batch])).unflatten(0, (2, -1))
        return self.accelerator.reduce(result, "sum").cpu()

    @beartype
    def evaluate(self, data: Sequence[Preference] | None = None) -> Metrics:
        """`loss`, `accuracy` and the other means that `steps` describes, over the validation data or other `data`.

        Other data needs a reference that is still there: one given to the trainer, or the base below the adapters.
        """
        if data is None and "valid" not in self.pairs:
            raise ValueError("there is nothing to evaluate on: give the trainer valid_data, or evaluate(data)")
        if data is not None and self.reference is None:
            raise ValueError(
                "the model that training started from has changed: give the trainer a reference, or this as valid_data"
            )
        if data is None:
            pairs, ref_logprobs = self.pairs["valid"], self.ref_logprobs["valid"]
        else:
            pairs = self._checked(data, "data")
            ref_logprobs = self._logprobs(self.reference, pairs)
        logprobs = self._logprobs(self.policy, pairs)
        loss, metrics = self._objective(pairs, logprobs, ref_logprobs, len(pairs))
        return {"loss": float(loss), **dict(zip(PAIR_METRICS, metrics.tolist(), strict=True))}

    def _validation(self) -> Metrics:
        return {f"valid_{key}": value for key, value in self.evaluate().items()} if "valid" in self.pairs else {}

    def save(self) -> None:
        """Writes the checkpoint of this step, whole or not at all, and removes all but the newest `keep_checkpoints`.

        OSError where the disk is full; what was saved before stays.
        """

        def write_models(folder: Path) -> None:
            self.palm.save_pretrained(folder / "model")
            save_file(self.ref_logprobs, folder / "reference.safetensors")

        self.run.save(write_models, {"sampler": self.sampler.state_dict(), "data": self.fingerprints})

    def _read_models(self, folder: Path, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state["sampler"])
        for name, digest in self.fingerprints.items():
            if state["data"].get(name) != digest:
                raise ValueError(
                    f"{name}_data has changed since {folder}, or is cut to another max_seq_len, but what the reference "
                    f"gives it was computed before the run: resume with the same pairs"
                )
        self.palm.load(folder / "model")
        self.ref_logprobs = load_file(folder / "reference.safetensors")
