"""The settings of learning from people; the command line's help is generated from the texts below the fields."""

from dataclasses import dataclass
from typing import Any, Literal

from beartype import BeartypeConf, beartype

from palm_rlhf.model.lora import ATTENTION, Targets
from palm_rlhf.policy.reward_model import Pooling
from palm_rlhf.policy.rollout import ResponseSampling
from palm_rlhf.training.reward_config import RewardConfig
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.run.config import Settings


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class LearningSettings(Settings):
    """The settings of a round: its answers, its preferences, its reward model, and PPO."""

    seed: int = 0
    """Seed of everything drawn at random; each round draws other numbers from it."""

    num_prompts: int = 64
    """Prompts that the model answers for people to compare, drawn from the known ones; 0 for none."""

    num_answers: int = 4
    """Answers to each of these prompts; those of equal text count once."""

    num_evaluations: int = 64
    """Held-out prompts that two models answer for the blind comparison."""

    compare_with: Literal["old", "first"] = "old"
    """The model that people compare the new one with: the one that the round began with, or the first of all rounds."""

    max_new_tokens: int = 128
    """Longest answer, in tokens."""

    temperature: float = 1.0
    """Temperature of all answers, those of PPO included."""

    top_p: float | None = None
    """Draw from the smallest set of tokens that holds this mass."""

    max_seq_len: int = 1024
    """Longest prompt and answer together, in tokens. Longer prompts are left out; preferences are cut."""

    held_out: float = 0.2
    """The share of prompts whose votes are never trained on; they measure the reward model and the models."""

    people_weight: float = 1.0
    """Weight, in the loss of the reward model, of a preference that people gave here."""

    imported_weight: float = 0.5
    """Weight of a preference of people from an imported file."""

    ai_weight: float = 0.25
    """Weight of a judgment by a model; for all three weights, 0 leaves the preferences out."""

    pooling: Pooling = "last"
    """Embedding that the score is computed from: the last token's, the mean over the answer, or over all tokens."""

    reward_epochs: int = 4
    """Passes of the reward model over the preferences."""

    reward_batch_size: int = 16
    """Rankings in an optimiser step of the reward model."""

    reward_learning_rate: float = 1e-5
    """Peak learning rate of the reward model; small models take far more, such as 1e-3."""

    num_steps: int = 40
    """Steps of PPO."""

    rollouts_per_step: int = 64
    """Answers that PPO collects in a step."""

    minibatch_size: int = 16
    """Answers behind one optimiser step of PPO."""

    epochs: int = 4
    """Times that a step of PPO goes through its answers."""

    learning_rate: float = 1e-5
    """Learning rate of the policy and its critic."""

    kl_coef: float = 0.05
    """Weight of the KL to the model that the round began with."""

    missing_eos_penalty: float = 0.0
    """Subtracted from the score of an answer that ended for lack of room."""

    actor_lora_r: int = 0
    """Rank of adapters that PPO trains in place of the policy's weights, and that are merged at the end."""

    lora_targets: Targets = ATTENTION
    """Matrices of each block that have these adapters: q, k, v, out, gate, value, ff_out; all-linear is all of them."""

    save_every: int = 10
    """Steps between checkpoints, of the reward model and of PPO."""

    plot: bool | None = None
    """Draw curves.png of both trainings; None: where matplotlib is installed (the extra palm-rlhf[plot])."""

    def __post_init__(self) -> None:
        self.expect_not_negative("num_prompts", "people_weight", "imported_weight", "ai_weight", "num_evaluations")
        self.expect("held_out", 0 <= self.held_out < 1, "at least 0 and below 1, so that some prompts train")
        self.expect("num_answers", self.num_answers > 1, "at least 2, which people compare")
        self.expect("max_seq_len", self.max_seq_len > self.max_new_tokens, "above max_new_tokens, for the prompt")
        self.ppo_config(1, 0).sampling  # noqa: B018 (each of the three checks the fields that it takes)
        self.reward_config(1)

    @property
    def weights(self) -> dict[str, float]:
        """The weight of a preference, by its origin."""
        return {"people": self.people_weight, "imported": self.imported_weight, "ai": self.ai_weight}

    def sampling(self, end_of_turn: int) -> ResponseSampling:
        """Return the distribution that answers are drawn from."""
        options: dict[str, Any] = {"temperature": self.temperature, "top_p": self.top_p}
        return ResponseSampling(max_new_tokens=self.max_new_tokens, eos_token=end_of_turn, **options)

    def reward_config(self, number: int) -> RewardConfig:
        """Return the settings of the reward model of a round; few votes make few steps, so the warm-up is short."""
        return RewardConfig(
            seed=self.seed + number,
            batch_size=self.reward_batch_size,
            grad_accum=1,
            num_epochs=self.reward_epochs,
            max_seq_len=self.max_seq_len,
            learning_rate=self.reward_learning_rate,
            warmup_steps=5,
            save_every=self.save_every,
            keep_checkpoints=1,
            log_every=1,
            plot=self.plot,
        )

    def ppo_config(self, number: int, end_of_turn: int) -> PPOConfig:
        """Return the settings of PPO in a round."""
        return PPOConfig(
            seed=self.seed + number,
            num_steps=self.num_steps,
            rollouts_per_step=self.rollouts_per_step,
            minibatch_size=self.minibatch_size,
            epochs=self.epochs,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            eos_token=end_of_turn,
            learning_rate=self.learning_rate,
            kl_coef=self.kl_coef,
            missing_eos_penalty=self.missing_eos_penalty,
            actor_lora_r=self.actor_lora_r,
            lora_targets=self.lora_targets,
            save_every=self.save_every,
            keep_checkpoints=1,
            log_every=1,
            plot=self.plot,
        )
