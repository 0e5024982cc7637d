"""The settings of every run; the command line's help is made of the texts below them."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, cast

from beartype import BeartypeConf, beartype

from palm_rlhf.training.run.optimizer import Precision


class Settings:
    """Base of the configs: methods that refuse a field, by its name, with a ValueError."""

    def expect(self, name: str, holds: bool, expected: str) -> None:
        """Raise ValueError that names a field and its expected value, unless the condition holds."""
        if not holds:
            raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)}, expected {expected}")

    def expect_positive(self, *names: str) -> None:
        """Raise ValueError for a field that is not above 0."""
        for name in names:
            self.expect(name, getattr(self, name) > 0, "a number above 0")

    def expect_positive_or_none(self, *names: str) -> None:
        """Raise ValueError for a field that is neither None nor above 0."""
        for name in names:
            value = getattr(self, name)
            self.expect(name, value is None or value > 0, "None or a number above 0")

    def expect_not_negative(self, *names: str) -> None:
        """Raise ValueError for a field below 0."""
        for name in names:
            self.expect(name, getattr(self, name) >= 0, "0 or more")

    def expect_share(self, *names: str) -> None:
        """Raise ValueError for a field that is not from 0 to 1."""
        for name in names:
            self.expect(name, 0 <= getattr(self, name) <= 1, "0 to 1")

    def expect_adamw(self) -> None:
        """Raise ValueError for a setting of AdamW, or of its learning rate's schedule, that is out of range."""
        self.expect_positive("learning_rate", "eps")
        self.expect_not_negative("warmup_steps", "weight_decay")
        self.expect_share("min_lr_ratio")
        self.expect("betas", all(0 <= beta < 1 for beta in vars(self)["betas"]), "two numbers from 0 to below 1")

    def expect_default(self, why: str, *names: str) -> None:
        """Raise ValueError for a field that is given although it has no effect; `why` says so."""
        for field in fields(cast(Any, self)):  # the classes that inherit from this one are dataclasses
            if field.name in names:
                self.expect(field.name, getattr(self, field.name) == field.default, f"{field.default}, {why}")


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class RunConfig(Settings):
    """The settings that all trainers have."""

    fixed: ClassVar[tuple[str, ...]] = ("seed",)  # a resumed run must keep the values of these fields

    seed: int = 0
    """Seed of the order of the data and of everything drawn at random."""

    grad_clip: float = 1.0
    """Largest norm of a step's gradient, to which longer ones are scaled down; 0: no clipping."""

    precision: Precision = "auto"
    """Arithmetic of the forward; auto is bf16 where the hardware has it. Weights stay in float32."""

    compile: Literal["auto"] | bool = "auto"
    """Compile the model's blocks in the first step, for faster ones after it. auto: on a GPU, for runs of minutes;
    not where log-probabilities are compared with earlier ones, since in bf16 compiled code rounds differently."""

    save_every: int = 250
    """Steps between checkpoints."""

    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones."""

    log_every: int = 10
    """Steps between lines in metrics.jsonl."""

    max_seconds: float | None = None
    """Stop after so many seconds of steps, with a checkpoint to resume from; None: stop at the last step."""

    trackers: tuple[str, ...] = ()
    """Experiment trackers that get the metrics too, by their names in accelerate: tensorboard, wandb, ..."""

    plot: bool | None = None
    """Draw curves.png at evaluations and the end; None: where matplotlib is installed (the extra palm-rlhf[plot])."""

    def __post_init__(self):
        self.expect_positive("save_every", "keep_checkpoints", "log_every")
        self.expect_not_negative("seed", "grad_clip")
        self.expect_positive_or_none("max_seconds")


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class FineTuningConfig(RunConfig):
    """The settings of trainers that improve a model; a new model has this one in its own config."""

    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs for the backward, and compute the rest again: less memory, a third more time."""
