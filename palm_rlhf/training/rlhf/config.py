"""The settings of reinforcement learning; the command line's help is generated from the texts below the fields."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

from beartype import BeartypeConf, beartype
from torch import Tensor

from palm_rlhf.algorithms.advantages import AdvantageScale
from palm_rlhf.algorithms.ratios import RatioLevel
from palm_rlhf.model.lora import ATTENTION, Targets
from palm_rlhf.policy.rollout import ResponseSampling
from palm_rlhf.training.rlhf.config_checks import check_config
from palm_rlhf.training.rlhf.variants import Aggregation, Variant, variant_of
from palm_rlhf.training.run.config import FineTuningConfig
from palm_rlhf.training.run.optimizer import Precision
from palm_rlhf.training.sampling_config import SamplingConfig

T = TypeVar("T", int, Tensor)


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class PPOConfig(SamplingConfig, FineTuningConfig):
    """The settings of PPO (arXiv:1707.06347; for language arXiv:1909.08593 and arXiv:2203.02155), GRPO and RLOO.

    A step collects rollouts, scores them, and makes several optimiser steps on them. Defaults are those of
    lm-human-preferences (arXiv:1909.08593) where the text below a field names no other source.
    """

    fixed: ClassVar[tuple[str, ...]] = (*FineTuningConfig.fixed, "algorithm", "actor_lora_r", "critic_lora_r",
                                   "lora_targets", "shared_trunk", "share_base")  # fmt: skip

    algorithm: Literal["ppo", "grpo", "rloo"] = "ppo"
    """ppo has a critic; grpo (arXiv:2402.03300) and rloo (arXiv:2402.14740) compare the responses to one prompt."""

    num_steps: int = 100
    """Steps of the whole run."""

    rollouts_per_step: int = 64
    """Responses collected in a step, by all processes together."""

    num_samples: int = 1
    """Responses to one prompt; grpo and rloo need at least 2."""

    rollout_batch_size: int = 64
    """Responses that one process draws at once."""

    max_new_tokens: int | None = 64
    """Longest response, in tokens; an environment's replies count."""

    max_seq_len: int | None = None
    """Longest prompt and response together, in tokens; where it is given, max_new_tokens does not count."""

    temperature: float = 1.0
    """Divides the logits, in sampling and wherever log-probabilities are compared."""

    max_turns: int = 8
    """Most turns of the policy in a conversation with an environment; a longer one is cut off, as truncated."""

    max_turn_tokens: int | None = None
    """Longest turn in such a conversation, in tokens; None: the room that the response, replies included, has left."""

    eos_token: int | None = None
    """Ends a response, and is an action like any other; None: every response fills its room."""

    minibatch_size: int = 16
    """Responses behind one optimiser step, of all processes together."""

    micro_batch_size: int | None = None
    """Responses in one forward of one process, where that is fewer; the gradients are the same."""

    epochs: int = 4
    """Times that a step goes through its responses."""

    learning_rate: float = 1e-5
    """Learning rate of the policy."""

    critic_learning_rate: float | None = None
    """Learning rate of the critic; None: that of the policy."""

    warmup_steps: int = 0
    """Steps over which the learning rates rise linearly."""

    min_lr_ratio: float = 1.0
    """The learning rates at the end of a cosine over the run, as a share of their peaks; 1 keeps them."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's first and second moments."""

    eps: float = 1e-5
    """AdamW's term against division by zero."""

    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices."""

    clip_eps: float | None = None
    """Ratios of probabilities are clipped at 1 - clip_eps and 1 + clip_eps (arXiv:1707.06347, equation 7).
    None: 0.2, with gspo 0.0003, with cispo 1, which is no lower bound."""

    clip_eps_high: float | None = None
    """An upper bound of its own (clip-higher, arXiv:2503.14476, equation 10); None: clip_eps, with dapo 0.28, with gspo
    0.0004, with cispo 4."""

    ratio_level: RatioLevel | None = None
    """The ratio of probabilities that is clipped: each token's; the whole response's, as one action (sequence); or the
    geometric mean of a response's tokens (geometric). None: sequence for rloo, as in the paper and in TRL, geometric
    for gspo, else token."""

    loss_aggregation: Aggregation | None = None
    """The mean that is the loss: over tokens; over responses, of the means over their tokens (sequence); or over
    responses, of their sums divided by the longest response that there is room for (constant; with max_seq_len, after
    the shortest prompt). None: token for ppo, dapo and cispo, and for rloo where ratio_level is token; constant for
    dr_grpo; else sequence."""

    value_clip_eps: float | None = 0.2
    """Largest move of a value from its value at collection, beyond which it is clipped; None: no clipping."""

    value_coef: float = 0.1
    """Weight of the value loss."""

    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""

    gamma: float = 1.0
    """Discount of a reward for each action before it; tokens of an environment do not count."""

    gae_lambda: float = 0.95
    """Weight of long returns against the critic's values (arXiv:1506.02438, equation 16)."""

    whiten_advantages: bool = True
    """Normalise ppo's advantages to mean 0 and deviation 1 over all tokens of a step."""

    early_stop_kl: float | None = None
    """End a step's optimisation where the KL to the policy that sampled is larger, in nats per token."""

    kl_coef: float | None = None
    """Weight of the KL to the reference, its starting value where kl_target is given. None: 0.05 as in TRL's PPO, but 0
    for dr_grpo, dapo, gspo and cispo, which have no KL. With 0 there is no reference."""

    kl_target: float | None = None
    """The KL, in nats per response, that kl_coef is steered to; 6 in lm-human-preferences. None: kl_coef is fixed."""

    kl_horizon: int = 10_000
    """Responses over which kl_coef can grow or shrink by a fifth."""

    kl_penalty: Literal["reward", "loss"] | None = None
    """Whether that KL is part of each token's reward, or a term of the loss. None: loss for grpo, else reward."""

    kl_estimator: Literal["k2", "k3"] = "k3"
    """The estimate of the KL as a term of the loss. In the reward it is k1, whose gradient is right there."""

    grpo_variant: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"] = "grpo"
    """dr_grpo (arXiv:2503.20783) divides neither by deviations nor by lengths. dapo (arXiv:2503.14476) takes the mean
    over tokens, clips higher, and draws again where all responses to a prompt have the same score; its penalty of long
    responses depends on the task: give overlong_buffer. gspo (arXiv:2507.18071) clips one ratio for a whole response,
    the geometric mean of its tokens' ratios. cispo (arXiv:2506.13585) clips the weight of a token's log-probability, so
    that no token loses its gradient. A variant decides settings that are None; a given value goes before."""

    advantage_scale: AdvantageScale | None = None
    """The deviation that grpo's advantages are divided by: that of the prompt's responses (group), that of all scores
    of the step (batch, arXiv:2508.08221), or none. None: group, with dr_grpo none."""

    max_redraws: int | None = None
    """Times that a step replaces prompts whose responses all have the same score by the next prompts (dynamic sampling,
    arXiv:2503.14476, section 3.2); such groups that are left at the end do not count. None: 9 with dapo, else 0."""

    mask_truncated: bool = False
    """Leave responses that ended for lack of room out of the loss (overlong filtering, arXiv:2503.14476, section 3.4);
    their scores count in their group's mean."""

    importance_cap: float | None = None
    """Multiply each token's loss by the ratio of its recomputed probability to the one recorded in sampling, up to this
    cap (truncated importance sampling; 2 is usual). None: no correction."""

    reward_weights: dict[str, float] | None = None
    """Weights of named rewards in the score, 1 for rewards that are not listed; a reward of weight 0 is only logged."""

    reward_timeout: float | None = None
    """Seconds that the reward functions, called at the same time, may take for a step's responses; None: any time."""

    scale_scores: bool = False
    """Divide scores by the standard deviation of all scores of the run so far."""

    score_clip: float | None = None
    """Largest absolute value of a score, after scaling."""

    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a response that ended for lack of room."""

    overlong_buffer: int = 0
    """Tokens at the end of the room for a response over which a penalty rises from 0 to overlong_penalty (soft overlong
    punishment, arXiv:2503.14476, equation 13, where it is a fifth of the room); 0: no penalty."""

    overlong_penalty: float = 1.0
    """Subtracted from the score of a response that fills its room, where overlong_buffer is given."""

    actor_lora_r: int = 0
    """Rank of the policy's adapters, whose base is the reference; 0 trains the policy itself, beside a copy."""

    critic_lora_r: int = 0
    """Rank of the critic's adapters, unless it starts from a reward model; 0 trains all of it."""

    lora_targets: Targets = ATTENTION
    """Matrices of each block that have these adapters: q, k, v and out of the attention (q_proj, k_proj, v_proj and
    o_proj in PEFT), gate, value and ff_out of the feed-forward (gate_proj, up_proj and down_proj); all-linear is all of
    them. A critic that starts from a reward model has the targets of that one."""

    shared_trunk: bool = False
    """Read values from the policy's own embeddings, instead of a separate critic."""

    share_base: bool = False
    """Hold the weights once for policy, reference, critic and reward model, which differ by adapters and heads; the
    critic starts from the reward model's adapters, or with critic_lora_r from new ones."""

    eval_every: int = 10
    """Steps between evaluations on eval_prompts, if there are some; the last step always has one."""

    eval_samples: int = 1
    """Responses to each of eval_prompts in an evaluation, and responses of the reference to compare them with."""

    eval_temperature: float | None = None
    """Temperature of these responses, 0 for the likeliest tokens; None: the temperature of the training."""

    sample_every: int = 10
    """Steps between tables of responses in samples.jsonl."""

    samples_kept: int = 8
    """Responses in such a table."""

    precision: Precision = "float32"
    """Arithmetic of sampling and training. In bf16, or with weights in bfloat16, the log-probabilities of responses are
    computed again before the update, in the batches of its first epoch, so that ratios start at exactly 1."""

    save_every: int = 50
    """Steps between checkpoints."""

    log_every: int = 1
    """Steps between lines in metrics.jsonl."""

    def __post_init__(self):
        super().__post_init__()
        check_config(self)

    def of_episodes(self, num_episodes: int, max_timesteps: int) -> "PPOConfig":
        """Return settings for so many episodes of `max_timesteps` rollouts, in steps of at most `rollouts_per_step`."""
        if min(num_episodes, max_timesteps) < 1:
            raise ValueError(
                f"got num_episodes={num_episodes} and max_timesteps={max_timesteps}, expected at least 1 of each"
            )
        num_rollouts = num_episodes * max_timesteps
        per_step = min(self.rollouts_per_step, num_rollouts)
        return replace(self, rollouts_per_step=per_step, num_steps=num_rollouts // per_step)

    def response_room(self, prompt_length: T) -> int | T:
        """Return the longest response that there is room for after a prompt of so many tokens."""
        if self.max_seq_len is not None:
            return self.max_seq_len - prompt_length
        assert self.max_new_tokens is not None
        return self.max_new_tokens

    @property
    def sampling(self) -> ResponseSampling:
        """The distribution that responses are drawn from, and where they end."""
        return ResponseSampling(
            max_new_tokens=self.max_new_tokens if self.max_seq_len is None else None,
            max_seq_len=self.max_seq_len,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            eos_token=self.eos_token,
        )

    @property
    def initial_kl_coef(self) -> float:
        """The weight of the KL to the reference in the first step."""
        return self.variant.kl_coef

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL to the reference is a term of the loss."""
        return self.kl_penalty == "loss" or (self.kl_penalty is None and self.algorithm == "grpo")

    @property
    def variant(self) -> Variant:
        """The settings that the algorithm and its variant decide where the config gives none."""
        return variant_of(self)
