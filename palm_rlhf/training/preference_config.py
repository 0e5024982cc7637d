"""The settings of training on preferences; the command line's help is made of the texts below them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from beartype import BeartypeConf, beartype

from palm_rlhf.training.config import RunConfig


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class PreferenceConfig(RunConfig):
    """How a policy is trained on preferences.

    The learning rate rises linearly over `warmup_steps`, times a cosine over the run's steps.
    """

    # precision is among them because what the reference gives the pairs is in the checkpoint
    fixed: ClassVar[tuple[str, ...]] = (
        *RunConfig.fixed, "loss", "beta", "label_smoothing", "lora_r", "lora_alpha", "precision"
    )  # fmt: skip

    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid is DPO (arXiv:2305.18290); ipo (arXiv:2310.12036), on means over tokens, does not push without limit."""

    beta: float = 0.1
    """How strongly the policy is held to the reference; for ipo, its tau."""

    label_smoothing: float = 0.0
    """The share of pairs taken to be labelled the wrong way round (conservative DPO); with sigmoid only."""

    batch_size: int = 8
    """Pairs in one forward of one process; a step sees batch_size * grad_accum * (number of processes)."""

    grad_accum: int = 8
    """Forwards and backwards of one process whose gradients make one optimiser step."""

    num_epochs: int = 1
    """How often each pair is seen; the run's last step is filled up with pairs of one more epoch."""

    max_seq_len: int = 1024
    """Tokens of a prompt and its response; what is longer loses the left of its prompt, then the response's right."""

    learning_rate: float = 1e-6
    """Peak learning rate; 1e-6 is the DPO paper's, adapters and small models take far more."""

    min_lr_ratio: float = 0.1
    """The learning rate at the end of the cosine, as a part of the peak."""

    warmup_steps: int = 20
    """Steps over which the learning rate rises linearly to the peak."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's first and second moments."""

    eps: float = 1e-8
    """AdamW's term against division by zero."""

    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""

    lora_r: int = 0
    """Rank of the adapters that are trained in place of the weights; 0 trains the weights."""

    lora_alpha: float | None = None
    """Adapters count alpha / r times; None is r."""

    eval_every: int = 50
    """Steps between evaluations on the validation data."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_positive("beta", "batch_size", "grad_accum", "num_epochs", "learning_rate", "eps", "eval_every")
        self.expect_not_negative("warmup_steps", "weight_decay", "lora_r")
        self.expect("max_seq_len", self.max_seq_len >= 2, "at least 2, one of the prompt and one of the response")
        self.expect("label_smoothing", 0 <= self.label_smoothing < 0.5, "0 to below 0.5")
        self.expect("label_smoothing", self.loss == "sigmoid" or self.label_smoothing == 0, "0 with the loss ipo")
        self.expect("lora_alpha", self.lora_alpha is None or self.lora_alpha > 0, "None or a number above 0")
        self.expect("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "0 to 1")
        self.expect("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers from 0 to below 1")
