"""The settings of language-model training; the command line's help is made of the texts below them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from beartype import BeartypeConf, beartype

from palm_rlhf.training.run.config import RunConfig


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class LMConfig(RunConfig):
    """The settings of language-model training.

    The learning rate rises linearly over `warmup_steps`, times a cosine over the run's steps.
    """

    fixed: ClassVar[tuple[str, ...]] = (*RunConfig.fixed, "optimizer", "seq_len")

    batch_size: int = 16
    """Sequences in one forward of one process; a step has batch_size * grad_accum * (number of processes)."""

    seq_len: int = 256
    """Tokens predicted in one sequence."""

    grad_accum: int = 1
    """Micro-batches of one process in an optimiser step: their gradients are added up."""

    num_steps: int = 1000
    """Optimiser steps of the whole run."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the blocks' matrices, which reaches the same loss in fewer, slower steps."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    min_lr_ratio: float = 0.1
    """The learning rate at the end of the cosine, as a share of the peak."""

    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to the peak."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moments."""

    eps: float = 1e-8
    """AdamW's term against division by zero."""

    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices, with adamw of the tied embedding too; never of norms."""

    ema_decay: float = 0.0
    """Decay per step of a running average of the weights, evaluated and saved in their place; 0: no average."""

    eval_every: int = 250
    """Steps between evaluations on the validation data."""

    eval_tokens: int = 200_000
    """Validation tokens of such an evaluation, split over the sources; the evaluation at the end takes all."""

    eval_context: int = 128
    """Least tokens before a token that is predicted in an evaluation; at a source's start, all that there are."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_adamw()
        self.expect_positive("batch_size", "seq_len", "grad_accum", "num_steps", "eval_every", "eval_tokens")
        self.expect_not_negative("eval_context")
        self.expect("ema_decay", 0 <= self.ema_decay < 1, "0 to below 1")
        self.expect("eval_context", self.eval_context <= self.seq_len, f"at most seq_len, {self.seq_len}")
