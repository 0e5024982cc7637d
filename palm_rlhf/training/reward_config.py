"""The settings of a reward model's training; the command line's help is made of the texts below them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from beartype import BeartypeConf, beartype

from palm_rlhf.training.run.config import FineTuningConfig


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class RewardConfig(FineTuningConfig):
    """The settings of a reward model's training.

    The learning rate rises linearly over `warmup_steps`, times a cosine over the run's steps.
    """

    fixed: ClassVar[tuple[str, ...]] = (*FineTuningConfig.fixed, "loss", "centering", "max_seq_len")

    loss: Literal["auto", "ranking", "bradley_terry", "plackett_luce", "labels"] = "auto"
    """ranking: the mean over the pairs of a prompt, then over prompts (InstructGPT); bradley_terry: the mean over all
    pairs, with margins; plackett_luce: whole rankings; labels: ratings; auto: labels for ratings, else ranking."""

    centering: float = 0.0
    """Weight of the squared sum of a pair's scores, which holds the mean score at 0; for losses of pairs."""

    batch_size: int = 8
    """Rankings or ratings in one forward of one process; a step has batch_size * grad_accum * (number of processes)."""

    grad_accum: int = 8
    """Micro-batches of one process in an optimiser step: their gradients are added up."""

    num_epochs: int = 1
    """Passes over the prompts; more than one overfits soon. The last step is filled up from one more epoch."""

    max_seq_len: int = 1024
    """Tokens of a prompt and its response; longer ones lose the start of the prompt, then the end of the response."""

    learning_rate: float = 1e-5
    """Peak learning rate; InstructGPT's was 9e-6, adapters and small models take far more."""

    min_lr_ratio: float = 0.1
    """The learning rate at the end of the cosine, as a share of the peak."""

    warmup_steps: int = 20
    """Steps over which the learning rate rises linearly to the peak."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's first and second moments."""

    eps: float = 1e-8
    """AdamW's term against division by zero."""

    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""

    eval_every: int = 50
    """Steps between evaluations on the validation data."""

    eval_batch_size: int = 64
    """Responses in one forward of an evaluation."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_adamw()
        self.expect_positive("batch_size", "grad_accum", "num_epochs", "eval_every", "eval_batch_size")
        self.expect_not_negative("centering")
        pairs_alone = self.loss not in ("plackett_luce", "labels") or self.centering == 0
        self.expect("centering", pairs_alone, f"0 with the loss {self.loss}")
        self.expect("max_seq_len", self.max_seq_len >= 2, "at least 2, one of the prompt and one of the response")
