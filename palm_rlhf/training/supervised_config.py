"""The settings of supervised fine-tuning; the command line's help is made of the texts below them."""

from dataclasses import dataclass
from typing import ClassVar

from beartype import BeartypeConf, beartype

from palm_rlhf.model.lora import ATTENTION, Targets, checked_targets
from palm_rlhf.training.run.config import FineTuningConfig


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class SupervisedConfig(FineTuningConfig):
    """The settings of fine-tuning on examples.

    The learning rate rises linearly over `warmup_steps`, times a cosine over the examples of the whole run.
    """

    fixed: ClassVar[tuple[str, ...]] = (*FineTuningConfig.fixed, "lora_r", "lora_alpha", "lora_targets",
                                             "lora_embeddings")  # fmt: skip

    batch_size: int = 8
    """Rows in one forward of one process; a step has batch_size * grad_accum * (number of processes)."""

    grad_accum: int = 1
    """Micro-batches of one process in an optimiser step: their gradients are added up."""

    num_epochs: int = 3
    """Passes over the examples; the run's last step is filled up from one more epoch."""

    learning_rate: float = 2e-5
    """Peak learning rate; adapters and small models take far more."""

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

    lora_r: int = 0
    """Rank of the adapters that are trained instead of the weights; 0 trains the weights."""

    lora_alpha: float | None = None
    """The output of adapters is multiplied by alpha / r; None: alpha is r."""

    lora_targets: Targets = ATTENTION
    """Matrices of each block that have adapters: q, k, v and out of the attention (q_proj, k_proj, v_proj and o_proj in
    PEFT), gate, value and ff_out of the feed-forward (gate_proj, up_proj and down_proj); all-linear is all of them."""

    lora_embeddings: bool = False
    """Train the token embeddings and the output layer beside the adapters, as tokens that are new to the model need."""

    eval_every: int = 50
    """Steps between evaluations on the validation data."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_adamw()
        self.expect_positive("batch_size", "grad_accum", "num_epochs", "eval_every")
        self.expect_not_negative("lora_r")
        checked_targets(self.lora_targets)
        if not self.lora_r:
            self.expect_default("without adapters (lora_r)", "lora_targets")
        self.expect("lora_embeddings", self.lora_r > 0 or not self.lora_embeddings, "False without adapters (lora_r)")
        self.expect_positive_or_none("lora_alpha")
