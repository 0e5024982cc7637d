"""The settings of sampling in online preference training; the command line's help is made of the texts below them."""

import math
from dataclasses import dataclass

from beartype import BeartypeConf, beartype

from palm_rlhf.policy.rollout import ResponseSampling
from palm_rlhf.training.sampling_config import SamplingConfig


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclass(frozen=True)
class RolloutConfig(SamplingConfig):
    """The settings of sampling and scoring responses."""

    num_samples: int = 2
    """Responses to each prompt; the best and the worst become a pair. 2 in arXiv:2402.04792."""

    max_new_tokens: int = 64
    """Longest response, in tokens; prompts lose their start where max_seq_len has no room for both."""

    eos_token: int | None = None
    """Ends a response, which keeps it; None: every response fills its room."""

    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a response that ended for lack of room."""

    reward_weights: dict[str, float] | None = None
    """Weights of named rewards in the score, 1 for rewards that are not listed; a reward of weight 0 is only logged."""

    reward_timeout: float | None = None
    """Seconds that the reward functions, called at the same time, may take for a step's responses; None: any time."""

    rollout_batch_size: int = 64
    """Responses that one process draws at once."""

    sample_every: int = 10
    """Steps between tables of responses in samples.jsonl."""

    samples_kept: int = 8
    """Responses in such a table."""

    def __post_init__(self):
        self.expect("num_samples", self.num_samples > 1, "at least 2, the best and the worst of which are compared")
        self.expect_positive("max_new_tokens", "rollout_batch_size", "sample_every", "samples_kept")
        self.expect_not_negative("missing_eos_penalty")
        weights = (self.reward_weights or {}).values()
        self.expect("reward_weights", all(map(math.isfinite, weights)), "finite numbers")
        self.check_sampling()
        self.expect_positive_or_none("reward_timeout")
        self.expect("eos_token", self.eos_token is None or self.eos_token >= 0, "None or the id of a token")

    def check_end(self) -> None:
        """Raise ValueError for a setting that needs an EOS token where none is given."""
        if self.eos_token is None:
            self.expect_default("where eos_token is None and no response is cut off", "missing_eos_penalty")

    @property
    def sampling(self) -> ResponseSampling:
        """The distribution that responses are drawn from."""
        return ResponseSampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            eos_token=self.eos_token,
        )
