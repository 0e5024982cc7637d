"""The settings in which the algorithms of reinforcement learning differ, as their papers have them."""

from typing import TYPE_CHECKING, Literal, NamedTuple

from palm_rlhf.algorithms.advantages import AdvantageScale
from palm_rlhf.algorithms.ratios import RatioLevel

if TYPE_CHECKING:
    from palm_rlhf.training.rlhf.config import PPOConfig

Aggregation = Literal["token", "sequence", "constant"]


class Variant(NamedTuple):
    """The settings that an algorithm decides; the fields of PPOConfig with these names explain them."""

    ratio_level: RatioLevel = "token"
    loss_aggregation: Aggregation = "sequence"
    clip_eps: float = 0.2
    clip_eps_high: float | None = None  # None: clip_eps
    advantage_scale: AdvantageScale = "group"
    kl_coef: float = 0.05
    max_redraws: int = 0
    drops_equal_groups: bool = False  # from the losses, and from the counts that divide them


VARIANTS = {
    "ppo": Variant(loss_aggregation="token"),
    "rloo": Variant(ratio_level="sequence"),
    "grpo": Variant(),
    "dr_grpo": Variant(loss_aggregation="constant", advantage_scale="none", kl_coef=0.0),
    # at most 10 draws, as in its authors' recipe: max_num_gen_batches in run_dapo_qwen2.5_32b.sh of verl
    "dapo": Variant(
        loss_aggregation="token",
        clip_eps_high=0.28,
        kl_coef=0.0,
        max_redraws=9,
        drops_equal_groups=True,
    ),
    "gspo": Variant(ratio_level="geometric", clip_eps=3e-4, clip_eps_high=4e-4, kl_coef=0.0),
    # the paper names no upper bound; ScaleRL (arXiv:2510.13786) has 5
    "cispo": Variant(loss_aggregation="token", clip_eps=1.0, clip_eps_high=4.0, kl_coef=0.0),
}


def variant_of(config: "PPOConfig") -> Variant:
    """Return the settings of the algorithm and its variant; values that the config gives go before."""
    variant = VARIANTS[config.grpo_variant if config.algorithm == "grpo" else config.algorithm]
    if config.algorithm == "rloo" and config.ratio_level == "token":
        variant = variant._replace(loss_aggregation="token")
    given = {name: getattr(config, name) for name in Variant._fields if hasattr(config, name)}
    variant = variant._replace(**{name: value for name, value in given.items() if value is not None})
    if variant.clip_eps_high is None:
        variant = variant._replace(clip_eps_high=variant.clip_eps)
    return variant._replace(drops_equal_groups=variant.drops_equal_groups or variant.max_redraws > 0)
