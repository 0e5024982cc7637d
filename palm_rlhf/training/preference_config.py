"""The settings of training on preferences; the command line's help is made of the texts below them."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from beartype import BeartypeConf, beartype

from palm_rlhf.model.lora import ATTENTION, Targets, checked_targets
from palm_rlhf.training.run.config import FineTuningConfig

# The losses that have a setting; with other losses it is refused.
LOSSES_WITH = {
    "beta": ("sigmoid", "ipo", "kto", "orpo"),
    "label_smoothing": ("sigmoid",),
    "nll_coef": ("sigmoid", "ipo", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "simpo_beta": ("simpo",),
    "simpo_gamma": ("simpo",),
}


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class PreferenceConfig(FineTuningConfig):
    """The settings of training on preferences.

    The learning rate rises linearly over `warmup_steps`, times a cosine over the run's steps.
    """

    # with the precision, since the reference's log-probabilities are in the checkpoint
    fixed: ClassVar[tuple[str, ...]] = (
        *FineTuningConfig.fixed, "loss", "beta", "label_smoothing", "nll_coef", "desirable_weight",
        "undesirable_weight", "simpo_beta", "simpo_gamma", "lora_r", "lora_alpha", "lora_targets", "precision"
    )  # fmt: skip

    loss: Literal["sigmoid", "ipo", "kto", "simpo", "orpo"] = "sigmoid"
    """sigmoid is DPO (arXiv:2305.18290). ipo (arXiv:2310.12036), on means over tokens, does not push without limit. kto
    (arXiv:2402.01306) learns from single responses, each labelled desirable or not. simpo (arXiv:2405.14734), on means
    over tokens, and orpo (arXiv:2403.07691), which fine-tunes on the chosen responses as well, have no reference."""

    beta: float = 0.1
    """Strength of the hold to the reference; for ipo, its tau; for orpo, its lambda, the weight of the odds ratio;
    not for simpo."""

    label_smoothing: float = 0.0
    """Share of pairs that are assumed to have the wrong label (conservative DPO); for sigmoid only."""

    nll_coef: float = 0.0
    """Weight of the chosen responses' negative log-likelihood, a mean over tokens, then pairs, beside the loss sigmoid,
    ipo or simpo: 1 in arXiv:2404.19733, 0.2 in Llama 3 (arXiv:2407.21783)."""

    desirable_weight: float = 1.0
    """Weight of kto's desirable responses; the rarer of the two classes should have the larger weight."""

    undesirable_weight: float = 1.0
    """Weight of kto's undesirable responses."""

    simpo_beta: float = 2.0
    """Factor of the mean log-probability in simpo's rewards; the paper has 2 to 2.5."""

    simpo_gamma: float = 1.0
    """Margin that simpo's reward of the chosen response should have; the paper has 0.3 to 1.6."""

    batch_size: int = 8
    """Pairs in one forward of one process; a step has batch_size * grad_accum * (number of processes). For kto, single
    responses; their KL to the reference is estimated over the whole step."""

    grad_accum: int = 8
    """Micro-batches of one process in an optimiser step: their gradients are added up."""

    num_epochs: int = 1
    """Passes over the pairs; the run's last step is filled up from one more epoch."""

    max_seq_len: int = 1024
    """Tokens of a prompt and its response; longer ones lose the start of the prompt, then the end of the response."""

    learning_rate: float = 1e-6
    """Peak learning rate; 1e-6 is the DPO paper's, adapters and small models take far more."""

    min_lr_ratio: float = 0.1
    """The learning rate at the end of the cosine, as a share of the peak."""

    warmup_steps: int = 20
    """Steps over which the learning rate rises linearly to the peak."""

    betas: tuple[float, float] = (0.9, 0.999)
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

    eval_every: int = 50
    """Steps between evaluations on the validation data."""

    def __post_init__(self):
        super().__post_init__()
        self.expect_adamw()
        self.expect_positive("beta", "batch_size", "grad_accum", "num_epochs", "eval_every")
        self.expect_positive("desirable_weight", "undesirable_weight", "simpo_beta")
        self.expect_not_negative("lora_r", "nll_coef", "simpo_gamma")
        self.expect("max_seq_len", self.max_seq_len >= 2, "at least 2, one of the prompt and one of the response")
        self.expect("label_smoothing", 0 <= self.label_smoothing < 0.5, "0 to below 0.5")
        inert = [name for name, losses in LOSSES_WITH.items() if self.loss not in losses]
        self.expect_default(f"with the loss {self.loss}, which it does not reach", *inert)
        checked_targets(self.lora_targets)
        if not self.lora_r:
            self.expect_default("without adapters (lora_r)", "lora_targets")
        self.expect_positive_or_none("lora_alpha")

    @property
    def is_paired(self) -> bool:
        """Whether the loss compares two responses to a prompt."""
        return self.loss != "kto"

    @property
    def has_reference(self) -> bool:
        """Whether the loss holds the policy to a reference."""
        return self.loss not in ("simpo", "orpo")

    @property
    def has_nll(self) -> bool:
        """Whether the negative log-likelihood of the chosen responses is a term of the loss."""
        return self.loss == "orpo" or self.nll_coef > 0
