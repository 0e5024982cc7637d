"""The settings of a run, and of language-model training; the command line's help is made of the texts below them."""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from beartype import BeartypeConf, beartype

from palm_rlhf.training.run.optimizer import Precision


class Settings:
    """What refuses a field of a config by its name."""

    def expect(self, name: str, holds: bool, expected: str) -> None:
        """ValueError that names a field and what it was expected to be, where that does not hold."""
        if not holds:
            raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)}, expected {expected}")

    def expect_positive(self, *names: str) -> None:
        """ValueError for a field that is not above 0."""
        for name in names:
            self.expect(name, getattr(self, name) > 0, "a number above 0")

    def expect_not_negative(self, *names: str) -> None:
        """ValueError for a field below 0."""
        for name in names:
            self.expect(name, getattr(self, name) >= 0, "0 or more")

    def expect_default(self, why: str, *names: str) -> None:
        """A setting that would reach nothing is refused, where it is not left as it is."""
        for field in fields(self):
            if field.name in names:
                self.expect(field.name, getattr(self, field.name) == field.default, f"{field.default}, {why}")


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class RunConfig(Settings):
    """What the runs of every trainer have in common."""

    fixed: ClassVar[tuple[str, ...]] = ("seed",)  # a resumed run must have these as it had; the others may change

    seed: int = 0
    """Seed of the order of the data and of all that is drawn at random."""

    grad_clip: float = 1.0
    """Largest norm of a step's gradient, longer ones are scaled down to it; 0 for no clipping."""

    precision: Precision = "auto"
    """Arithmetic of the forward; auto is bf16 where the hardware has it. Weights stay as they are, in float32."""

    save_every: int = 250
    """Steps between checkpoints."""

    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones."""

    log_every: int = 10
    """Steps between lines in metrics.jsonl."""

    max_seconds: float | None = None
    """Stop after so many seconds of steps, with a checkpoint from which resuming goes on; None: at the last step."""

    trackers: tuple[str, ...] = ()
    """Experiment trackers that also get the metrics, by their names in accelerate: tensorboard, wandb, ..."""

    plot: bool | None = None
    """Draw curves.png at evaluations and the end; None: where matplotlib is installed (the extra palm-rlhf[plot])."""

    def __post_init__(self):
        self.expect_positive("save_every", "keep_checkpoints", "log_every")
        self.expect_not_negative("seed", "grad_clip")
        self.expect("max_seconds", self.max_seconds is None or self.max_seconds > 0, "None or a number above 0")


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class LMConfig(RunConfig):
    """How a language model is trained.

    The learning rate rises linearly over `warmup_steps`, times a cosine over the run's steps.
    """

    fixed: ClassVar[tuple[str, ...]] = (*RunConfig.fixed, "optimizer", "seq_len")

    batch_size: int = 16
    """Sequences in one forward of one process; a step sees batch_size * grad_accum * (number of processes)."""

    seq_len: int = 256
    """Tokens predicted in one sequence."""

    grad_accum: int = 1
    """Forwards and backwards of one process whose gradients make one optimiser step."""

    num_steps: int = 1000
    """Optimiser steps of the whole run."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon, which takes over the blocks' matrices and reaches the same loss in fewer, slower steps."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    min_lr_ratio: float = 0.1
    """The learning rate at the end of the cosine, as a part of the peak."""

    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to the peak."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moments."""

    eps: float = 1e-8
    """AdamW's term against division by zero."""

    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices, with adamw the tied embedding among them; never of norms."""

    ema_decay: float = 0.0
    """Decay, per step, of a running average of the weights, which is evaluated and saved in their place; 0: none."""

    compile: bool = False
    """Compile the model with torch.compile: minutes at the start, faster steps after."""

    eval_every: int = 250
    """Steps between evaluations on the validation data."""

    eval_tokens: int = 200_000
    """Validation tokens of those evaluations, split over the sources; the evaluation at the end takes them all."""

    eval_context: int = 128
    """Tokens that each token has before it at least when it is predicted in evaluation (at a source's start, all)."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_positive("batch_size", "seq_len", "grad_accum", "num_steps", "learning_rate", "eps", "eval_every",
                              "eval_tokens")  # fmt: skip
        self.expect_not_negative("warmup_steps", "weight_decay", "eval_context")
        self.expect("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "0 to 1")
        self.expect("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
        self.expect("ema_decay", 0 <= self.ema_decay < 1, "0 to below 1")
        self.expect("eval_context", self.eval_context <= self.seq_len, f"at most seq_len, {self.seq_len}")
